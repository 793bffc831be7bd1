"""`memlm demo` on a tiny model, and the standard library as its text."""

import builtins
import json
import re
import sysconfig

import pytest

from command_line import run
from memlm import Datastore
from memlm.cli import _demo
from memlm.errors import CorpusError
from memlm.mixtures import load_mixture
from tiny_models import tiny_folder


@pytest.fixture
def small(monkeypatch):
    """Fewer characters: a tiny model has a token for almost every one."""
    monkeypatch.setattr(_demo, "_SIZES", {"train": 9_000, "valid": 2_000, "test": 3_000})
    monkeypatch.setattr(_demo, "_FILE", dict.fromkeys(_demo._SIZES, 2_000))
    monkeypatch.setattr(_demo, "_TUNED_TOKENS", 600)
    monkeypatch.setattr(_demo, "_NEW_TOKENS", 12)


def test_the_demo_from_text_to_report(small, tmp_path):
    output = tmp_path / "demo"
    result = run("demo", "--model", tiny_folder("llama", tmp_path / "tiny"), "--output", output)
    assert result.code == 0, result.err
    for words in (
        "Model: tiny, 0.0 M parameters.\n",
        "1. build",
        "2. tune",
        "3. evaluate",
        "4. generate",
        "5. explain",
    ):
        assert words in result.out
    assert sorted(path.name for path in output.iterdir()) == ["memory", "mixture.json", "report.html", "result.json"]
    rows = json.loads((output / "result.json").read_text())
    assert [row["method"] for row in rows] == ["lm", "knn-lm"]
    assert all(row["perplexity"] > 1 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[1]["perplexity"] < rows[0]["perplexity"]
    assert f"{rows[1]['perplexity']:,.2f}" in result.out
    assert len(Datastore(output / "memory")) > 4_000
    assert load_mixture(output / "mixture.json").k <= 1024
    page = (output / "report.html").read_text()
    assert f"{rows[0]['perplexity']:,.2f} → <b>{rows[1]['perplexity']:,.2f}</b>" in page
    assert page.count("<iframe") == 2
    assert not re.search(r"(?:src|href)=.(?!data:)[^>]*(?:https?:|//)|url\(|@import", page)


def test_the_demo_as_json_replaces_an_earlier_one_only(small, tmp_path):
    model = tiny_folder("gpt2", tmp_path / "tiny")
    command = ["demo", "--model", model, "--output", tmp_path / "demo", "--json"]
    (tmp_path / "demo" / "memory").mkdir(parents=True)
    (tmp_path / "demo" / "memory" / "old").touch()
    result = run(*command)
    assert list(json.loads(result.out)) == ["results", "tuning", "generated"]
    assert "3. evaluate" in result.err
    assert not (tmp_path / "demo" / "memory" / "old").exists()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    refused = run(*command)
    assert refused.code == 2
    assert "holds notes.txt, which no demo made" in refused.err
    assert (tmp_path / "demo" / "result.json").exists()


def test_splits_are_disjoint_deterministic_and_as_large_as_said():
    splits = _demo.standard_library()
    assert splits == _demo.standard_library()
    names = [document.id for documents in splits.values() for document in documents]
    assert len(set(names)) == len(names)
    for name, documents in splits.items():
        size = sum(len(document.text) for document in documents)
        assert _demo._SIZES[name] - _demo._SMALLEST < size <= _demo._SIZES[name]
        assert any(document.id.endswith(".py") for document in documents)
        assert all(document.text.strip() for document in documents)
    assert any(name.startswith("help(") for name in names)


def test_files_are_cut_at_the_end_of_a_line():
    """Every text is a file's beginning, and ends where a line does."""
    root = sysconfig.get_path("stdlib")
    cut = 0
    for documents in _demo.standard_library().values():
        for document in documents:
            if document.id.endswith(".py"):
                with open(f"{root}/{document.id}", encoding="utf-8", errors="replace") as file:
                    whole = file.read()
                assert whole.startswith(document.text), document.id
                assert document.text.endswith("\n"), document.id
                cut += len(document.text) < len(whole)
    assert cut >= 3  # at least the last file of every split
    assert _demo._beginning("one\ntwo\nthree", 9) == "one\ntwo\n"
    assert _demo._beginning("one\ntwo\n", 8) == "one\ntwo\n"


def stdlib(monkeypatch, folder):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))


def test_a_python_without_sources_is_told_so(monkeypatch, tmp_path):
    """Compiled only, in an archive, or with too few files for three splits."""
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "os.pyc").write_bytes(b"\0" * 9999)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "os.py").write_text("import sys\n" * 999)
    (tmp_path / "python311.zip").touch()
    for name in ("compiled", "python311.zip", "few", "nowhere"):
        stdlib(monkeypatch, tmp_path / name)
        with pytest.raises(CorpusError, match=r"too few sources .* expected \.py files, .* another Python"):
            _demo.standard_library()


def test_a_python_without_its_documentation_has_sources_enough(monkeypatch, tmp_path):
    folder = tmp_path / "lib"
    for number in range(60):
        path = folder / ("json" if number % 2 else "site-packages/other") / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {number}\n" + "import sys\n" * 999)
    stdlib(monkeypatch, folder)
    original = builtins.__import__

    def without_topics(name, *rest):
        if name.startswith("pydoc_data"):
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_topics)
    splits = _demo.standard_library()
    assert {document.id.split("/")[0] for documents in splits.values() for document in documents} == {"json"}
