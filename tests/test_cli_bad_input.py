"""What a user may get wrong: one clear line on stderr, exit code 2, no traceback, and nothing left behind."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from command_line import SETTINGS, TEXTS, make_world, refused, run
from memlm.mixtures import CacheMixture, ExponentialMixture, KnnMixture, SharedCacheMixture
from test_adapter import adapter
from test_gate import gate
from test_saved import evidence
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a text to build from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXTS["train/cats.txt"])
    return tmp_path


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "dtype is 'int8'; expected one of float32, bfloat16, float16, auto"),
        (["--device", "cuda:99"], "device is 'cuda:99'; expected cpu, or cuda where there is one ("),
        (["--device", "gpu"], "device is 'gpu'; expected cpu"),
        (["--key-dtype", "int8"], "key type is 'int8'; expected one of float16, bfloat16"),
        (["--context", "120", "--stride", "20"], "context 120 + stride 20 is longer than the 128 positions of tiny"),
        (["--context", "129"], "context 129 leaves no room for a stride in 128 positions"),
        (["--context", "0"], "context 0 and stride 128: expected whole numbers of at least 1"),
        (["--stride", "0"], "context 32 and stride 0: expected whole numbers of at least 1"),
        (["--key-site", "model.layers.9"], "LlamaForCausalLM has no module 'model.layers.9' for a key site"),
        (["--key-site", "model.norm:middle"], "ends in 'middle'; expected ':input' or ':output'"),
        (["--index", "IVFx,Flat"], "FAISS does not take 'IVFx,Flat' for keys of width 32"),
        (["--index", "PQ5"], "FAISS does not take 'PQ5' for keys of width 32"),
    ],
)
def test_options_of_building(world, place, options, words):
    assert words in refused("build", world.model, "text.txt", "-o", "memory", *options, place=place)


def test_a_factory_that_needs_more_entries_leaves_exact_search(world, place):
    kept = str(place / "memory")
    line = refused("build", world.model, "text.txt", "-o", "memory", "--index", "IVF999,Flat", place=place, left=kept)
    assert "FAISS cannot build 'IVF999,Flat' over 115 keys of width 32" in line
    assert "All entries are stored; the same command with another --index ends it" in line
    assert run("eval", world.model, "memory", "text.txt", *SETTINGS).code == 0
    result = run("build", world.model, "text.txt", "-o", "memory", "--index", "IVF2,Flat")
    assert result.code == 0
    assert "memory holds an unfinished build of 1 documents; going on" in result.err
    assert run("build", world.model, "text.txt", "-o", "memory").code == 2


def broken_models(folder, model):
    shutil.copytree(model, folder / "truncated")
    os.truncate(folder / "truncated" / "model.safetensors", 5000)
    shutil.copytree(model, folder / "without tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "empty").mkdir()
    (folder / "garbled").mkdir()
    (folder / "garbled" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "there is no folder ./nowhere; expected one made by save_pretrained, or a name on the hub"),
        ("text.txt", "cannot load a causal language model from 'text.txt'"),
        ("empty", "empty holds no config.json; expected a folder made by save_pretrained"),
        ("truncated", "cannot load a causal language model from 'truncated'"),
        ("without tokenizer", "cannot load a causal language model from 'without tokenizer'"),
        ("garbled", "cannot load a causal language model from 'garbled'"),
    ],
)
def test_models_that_cannot_be_loaded(world, place, name, words):
    broken_models(place, world.model)
    assert words in refused("build", name, "text.txt", "-o", "memory", place=place)


@pytest.mark.parametrize("everywhere", [True, False])
def test_weights_that_are_nan(world, place, everywhere):
    model, (token,) = tiny_model("llama"), tiny_tokenizer()("z")["input_ids"]
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight if everywhere else model.model.embed_tokens.weight
        weight[3 if everywhere else token] = torch.nan
    model.save_pretrained("nan")
    tiny_tokenizer().save_pretrained("nan")
    (place / "text.txt").write_text("the cat was in the house. z. " * 9)
    line = refused("build", "nan", "text.txt", "-o", "memory", place=place)
    assert "NaN or infinite; check" in line
    assert "weights and its dtype" in line


def corpora(folder):
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    for number in range(3):
        (folder / "blank" / f"{number}.txt").write_text("\n \n")
    (folder / "binary.bin").write_bytes(b"\x7fELF\x00\x01" * 99)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "fields.jsonl").write_text('{"body": "one"}\n')
    (folder / "same.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n')
    whole = gzip.compress(b'{"text": "the cat was in the house"}\n' * 999)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.txt", "nowhere.txt does not exist; expected a file or a folder of text"),
        ("empty", "no text was found in empty; expected at least one document"),
        ("blank", "no text was found in blank (3 left out: no text or binary)"),
        ("binary.bin", "binary.bin is not text (it holds NUL bytes); expected UTF-8 text or JSON lines"),
        ("latin.txt", "latin.txt is not text (invalid UTF-8 at byte 3)"),
        ("broken.jsonl", "broken.jsonl, line 2: not valid JSON"),
        ("fields.jsonl", "fields.jsonl, line 1: expected a string under 'text'"),
        ("same.jsonl", "two documents have the id 'a'; ids must be unique"),
        ("cut.jsonl.gz", "cut.jsonl.gz could not be read after line"),
    ],
)
@pytest.mark.parametrize("verb", ["build", "eval"])
def test_corpora_that_cannot_be_read(world, place, verb, name, words):
    corpora(place)
    command = ["build", world.model, name, "-o", "memory"]
    if verb == "eval":
        command = ["eval", world.model, world.memory, name, *SETTINGS]
    assert words in refused(*command, place=place)


def test_places_that_are_taken(world, place):
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("mine")
    (place / "file").write_text("mine")
    for output, words in [
        (world.memory, "exists already; `memlm add` adds to it. Otherwise name a new folder, or remove it first"),
        ("notes", "notes exists already (it holds mine.txt)"),
        ("file", "file exists already, as a file; name a new folder"),
        ("file/memory", "file/memory cannot be made (Not a directory); name another place"),
    ]:
        assert words in refused("build", world.model, "text.txt", "-o", output, place=place)


def test_disk_full_while_building(world, place, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    line = refused("build", world.model, "text.txt", "-o", "memory", place=place)
    assert (
        "no space left for the datastore at memory (No space left on device); it is as before the last commit" in line
    )


def test_an_interrupted_build_leaves_nothing(world, place):
    (place / "text.txt").write_text(TEXTS["train/cats.txt"] * 20_000)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import memlm.__main__"
    command = [sys.executable, "-c", code, "build", world.model, "text.txt", "-o", "memory"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(place.glob("memory/segments/*/keys.safetensors")):  # keys are being computed
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "memlm: interrupted\n")
    assert not (place / "memory").exists()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "10"], "λ and temperature are not known; pass --mixture FILE"),
        (["--lambda", "0.5"], "λ and temperature are not known; pass --mixture FILE"),
        (["--lambda", "1.5", "--temperature", "10"], "interpolation weight λ is 1.5; expected a number from 0"),
        (["--lambda", "-0.1", "--temperature", "10"], "interpolation weight λ is -0.1"),
        (["--lambda", "nan", "--temperature", "10"], "interpolation weight λ is nan"),
        (["--lambda", "0.5", "--temperature", "0"], "temperature is 0.0; expected a positive number"),
        (["--lambda", "0.5", "--temperature", "-3"], "temperature is -3.0; expected a positive number"),
        (["--lambda", "0.5", "--temperature", "inf"], "temperature is inf; expected a positive number"),
        (["--lambda", "0.5", "--temperature", "10", "--k", "0"], "k is 0; expected a whole number of neighbors"),
        (["--lambda", "0.5", "--temperature", "10", "--k", "343"], "has 342 entries; expected at most so many"),
        (["--mixture", "nowhere.json"], "nowhere.json does not exist; `memlm tune … --save nowhere.json` makes one"),
        (["--mixture", "text.txt"], "text.txt cannot be read as JSON"),
        (["--mixture", "other.json"], "other.json is not a saved mixture"),
        (["--mixture", "bad.json"], "temperature is 0.0; expected a positive number"),
        (["--mixture", "."], ". holds none for this datastore"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "generate", "explain"])
def test_settings_of_the_mixture(world, place, verb, options, words):
    (place / "other.json").write_text('{"kind": "cache"}')
    (place / "bad.json").write_text('{"kind": "knn", "interpolation_weight": 0.5, "temperature": 0.0, "k": 8}')
    assert words in refused(verb, world.model, world.memory, "text.txt", *options, place=place)


LINEAR = CacheMixture(interpolation_weight=0.2, scale=0.1, length=8)
SAVED = {
    "knn": KnnMixture(interpolation_weight=0.3, temperature=5.0, k=8),
    "exponential": ExponentialMixture(temperature=5.0, k=8, scale=0.5, length=9.0),
    "cache": LINEAR,
    "shared-cache": SharedCacheMixture(bias=-3.0, scale=0.1, length=8),
    "adapter": adapter(),
    "gate": gate((adapter(), LINEAR), evidence(2)[1]),
}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("exponential", ["--lambda", "0.5"], "--lambda is 0.5, but mixture (exponential) has no such setting; leave"),
        ("cache", ["--temperature", "5"], "--temperature is 5.0, but mixture (cache) has no such setting"),
        ("cache", ["--k", "5"], "--k is 5, but mixture (cache) has no such setting"),
        ("shared-cache", ["--lambda", "0.5"], "--lambda is 0.5, but mixture (shared-cache) has no such setting"),
        ("shared-cache", ["--temperature", "5"], "--temperature is 5.0, but mixture (shared-cache) has no such"),
        ("gate", ["--lambda", "0.5"], "--lambda is 0.5, but mixture (gate) has no such setting"),
        ("gate", ["--k", "5"], "--k is 5, but mixture (gate) has no such setting"),
        (
            "adapter",
            ["--temperature", "5"],
            "--temperature is 5.0, but the network of mixture (adapter) was fitted with",
        ),
        ("adapter", ["--k", "5"], "--k is 5, but the network of mixture (adapter) was fitted with 9; leave --k out"),
        ("adapter", ["--lambda", "0.5"], "--lambda is 0.5, but the network of mixture (adapter) was fitted with"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "generate", "explain"])
def test_options_that_a_saved_mixture_does_not_take(world, place, verb, kind, options, words):
    SAVED[kind].save("mixture")
    assert words in refused(verb, world.model, world.memory, "text.txt", "--mixture", "mixture", *options, place=place)


@pytest.mark.parametrize(
    ("kind", "option", "value", "name"),
    [
        ("cache", "--lambda", 0.5, "interpolation_weight"),
        ("exponential", "--temperature", 7.0, "temperature"),
        ("exponential", "--k", 5, "k"),
        ("knn", "--lambda", 0.5, "interpolation_weight"),
        ("adapter", "--k", 9, "k"),
    ],
)
def test_options_that_a_saved_mixture_takes(world, place, kind, option, value, name):
    SAVED[kind].save("mixture")
    result = run("eval", world.model, world.memory, "text.txt", "--mixture", "mixture", option, value, "--json")
    assert json.loads(result.out)["settings"]["mixture"][name] == value


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["tune", "MODEL", "MEMORY", "text.txt", "--max-k", "343"], "k is 343, but"),
        (["tune", "MODEL", "MEMORY", "text.txt", "--mixture", "magic"], "is 'magic'; expected one of knn, buckets"),
        (["tune", "MODEL", "MEMORY", "text.txt", "--max-k", "0"], "k is 0; expected 1 to 342"),
        (["tune", "MODEL", "MEMORY", "text.txt", "--max-tokens", "0"], "max_tokens is 0; expected at least 1"),
        (
            ["tune", "MODEL", "MEMORY", "text.txt", "--save", "no/where.json"],
            "no/where.json cannot be written: there is no",
        ),
        (
            ["compare", "MODEL", "MEMORY", "--valid", "text.txt", "--test", "text.txt", "--mixtures", "text.txt"],
            "text.txt cannot be written to: text.txt is not a folder",
        ),
        (
            ["compare", "MODEL", "MEMORY", "--valid", "text.txt", "--test", "text.txt", "--save", "a.pdf"],
            "expected .json or",
        ),
        (["compare", "MODEL", "MEMORY", "--valid", "none.txt", "--test", "text.txt"], "none.txt does not exist"),
        (
            ["compare", "MODEL", "MEMORY", "--valid", "text.txt", "--test", "text.txt", "--max-k", "0"],
            "k is 0; expected",
        ),
        (
            ["compare", "MODEL", "MEMORY", "--valid", "text.txt", "--test", "text.txt", "--mixtures", "text.txt"],
            "text.txt cannot be written to: text.txt is not a folder; name another one",
        ),
        (
            ["compare", "MODEL", "MEMORY", "--valid", "text.txt", "--test", "text.txt", "--mixtures", "text.txt/a/b"],
            "text.txt/a/b cannot be written to: text.txt is not a folder",
        ),
        (["eval", "MODEL", "MEMORY", "text.txt", *SETTINGS, "--max-tokens", "-1"], "max_tokens is -1"),
        (["overlap", "MODEL", "MEMORY", "text.txt", "--n", "0"], "n is 0; expected n-grams of at least 1 token"),
        (["generate", "MODEL", "MEMORY", "", *SETTINGS], "the prompt is empty; give some text"),
        (["generate", "MODEL", "MEMORY", "a\udcff", *SETTINGS], "the prompt is not valid UTF-8"),
        (
            ["generate", "MODEL", "MEMORY", "x" * 120, *SETTINGS],
            "121 tokens of prompt and 60 new ones are more than the 128",
        ),
        (["generate", "MODEL", "MEMORY", "A", *SETTINGS, "--top-p", "0"], "top-p is 0.0; expected a share above 0"),
        (["explain", "MODEL", "MEMORY", " \n", *SETTINGS], "the text is empty; give some text"),
        (["explain", "MODEL", "MEMORY", "@nowhere", *SETTINGS], "nowhere does not exist; expected a file"),
        (["explain", "MODEL", "MEMORY", "@.", *SETTINGS], ". is a folder; expected a file after @"),
        (
            ["explain", "MODEL", "MEMORY", "A", *SETTINGS, "--html", "a.pdf"],
            "a.pdf ends in '.pdf'; expected .html or .htm",
        ),
        (["explain", "MODEL", "MEMORY", "A", *SETTINGS, "--html", "no/a.html"], "there is no folder no; make it first"),
        (["doctor", "--model", "MODEL"], "--model is compared with the keys of a datastore; name that, too"),
        (["train", "lm", "nowhere.toml", "run"], "nowhere.toml does not exist; expected a recipe in TOML"),
        (["train", "lm", "text.txt", "run"], "text.txt is not valid TOML"),
        (["train", "lm", "short.toml", "text.txt"], "text.txt: File exists"),
        (["train", "trime", "nowhere.toml", "run"], "nowhere.toml does not exist; expected a recipe in TOML"),
        (["train", "trime", "short.toml", "run"], "short.toml has no schedule; add it"),
        (["demo", "--model", "MODEL", "-o", "."], ". holds short.toml, which no demo made; name a new folder"),
        (["demo", "--model", "MODEL", "-o", "text.txt"], "text.txt: Not a directory"),
    ],
)
def test_other_settings(world, place, command, words):
    (place / "short.toml").write_text('train = ["text.txt"]\nvalid = ["text.txt"]')
    names = {"MODEL": world.model, "MEMORY": world.memory}
    assert words in refused(*(names.get(item, item) for item in command), place=place)


@pytest.mark.parametrize("options", [["--save", "kept/result.json"], ["--mixtures", "kept/new/mixtures"]])
def test_a_folder_that_takes_no_files_is_refused_before_anything_is_compared(world, place, monkeypatch, options):
    (place / "kept").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "kept")  # to root everything is open
    monkeypatch.setattr("memlm.evaluation.compare", pytest.fail)
    command = ["compare", world.model, world.memory, "--valid", "text.txt", "--test", "text.txt", *options]
    assert "kept allows no new files; name another folder" in refused(*command, place=place)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        ("kept/mixture.json", "kept allows no new files; name another folder"),
        ("kept", "kept allows no new files; name another folder"),
        ("pipe", "pipe cannot be written: it is no file; name another one"),
        ("mixture.safetensors", "mixture.safetensors would be the name of tensors; expected another suffix"),
        ("nowhere/mixture.json", "there is no folder nowhere; make it first"),
        ("text.txt/mixture.json", "there is no folder text.txt; make it first"),
    ],
)
def test_a_place_where_no_mixture_can_be_saved_is_refused_before_anything_is_tuned(
    world, place, monkeypatch, save, words
):
    (place / "kept").mkdir()
    os.mkfifo(place / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "kept" or not mode & os.W_OK)  # root may write
    monkeypatch.setattr("memlm.evaluation.tune_report", pytest.fail)
    assert words in refused("tune", world.model, world.memory, "text.txt", "--save", save, place=place)


def test_a_warning_is_one_line(world):
    """pytest makes an error of each, so it runs as users do."""
    stored = world.texts / "alone.txt"
    stored.write_text("The cat was in the house.")
    assert run("build", world.model, stored, "--output", world.texts / "alone").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = warnings.showwarning
        tuned = run("tune", world.model, world.texts / "alone", stored)
        assert warnings.showwarning is shown
    assert (tuned.code, tuned.out.startswith("memory does not help here: ")) == (0, True)
    (line,) = [line for line in tuned.err.splitlines() if not line.startswith("tuning: ")]
    assert line.startswith("memlm: no token of the text to fit to finds a neighbor, ")


def test_a_comparison_is_shown_before_it_is_written(world, place, monkeypatch):
    """A disk that is full, or a folder that is gone meanwhile, does not cost the result."""

    class Result:
        def to_dict(self):
            return {"rows": []}

        def save(self, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("memlm.evaluation.compare", lambda *_, **__: Result())
    command = ["compare", world.model, world.memory, "--valid", "text.txt", "--test", "text.txt", "--save", "a.json"]
    shown = run(*command, "--json")
    assert (shown.code, shown.out, shown.err) == (2, '{"rows": []}\n', "memlm: No space left on device\n")


@pytest.mark.parametrize(
    "command",
    [
        ["frobnicate"],
        ["info"],
        ["info", "a", "b"],
        ["eval", "m", "d", "t", "--k", "many"],
        ["eval", "m", "d", "t", "--unknown"],
        ["explain", "m", "d", "t", "--sources", "0"],
        ["generate", "m", "d", "t", "--max-new-tokens", "0"],
        ["generate", "m", "d", "t", "--seed", "-1"],
        ["generate", "m", "d", "t", "--seed", str(10**20)],
        ["doctor", "d", "--documents", "0"],
        ["build", "m", "t"],
    ],
)
def test_usage_errors(command):
    result = run(*command)
    assert (result.code, result.out) == (2, "")
    assert "Usage: memlm" in result.err
    assert "Traceback" not in result.err


def test_a_disk_that_fills_while_a_result_is_written(world, place, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    command = ["explain", world.model, world.memory, "The cat", *SETTINGS, "--html", "why.html"]
    assert refused(*command, place=place) == "memlm: No space left on device"
