"""The README's Python example, as it is written there."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

import memlm

README = Path(__file__).parent.parent / "README.md"
STATUTES = """
(a) In general. There is hereby established within the Department of {name} an office to be known as the Office of
{name}.
(b) Director. The head of the Office of {name} shall be the Director, who shall be appointed by the Secretary of {name}.
(c) Report. Not later than {days} days after the date of the enactment of this Act, the Director shall submit to
Congress a report on the activities of the Office of {name} under this section.
"""
NAMES = {"docs": ["Agriculture", "Commerce", "Energy"], "held-out": ["Labor"], "test": ["Transportation"]}


def test_the_example_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example, f"{README} has no Python example"
    if not files("memlm").joinpath("reference_lm", "config.json").is_file():
        pytest.fail(
            "src/memlm/reference_lm is missing: train it by `memlm train lm`, see memlm/training/reference.toml"
        )
    monkeypatch.chdir(tmp_path)
    for folder, names in NAMES.items():
        Path(folder).mkdir()
        for days, name in enumerate(names, 90):
            Path(folder, f"{name}.txt").write_text(STATUTES.format(name=name, days=days))
    variables = {}
    exec(compile(example[1], str(README), "exec"), variables)

    assert variables["mixture"].interpolation_weight > 0
    memory = memlm.Datastore(tmp_path / "memory")
    assert memory.manifest.documents == len(NAMES["docs"])
    table = capsys.readouterr().out
    lm, knn = (float(re.search(rf"^{name} +([\d,.]+)", table, re.M)[1].replace(",", "")) for name in ("lm", "knn-lm"))
    assert knn < 0.7 * lm, table
    assert (tmp_path / "why.html").read_text().startswith("<!doctype html>")
