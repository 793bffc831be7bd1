"""The command line, verb by verb, on a tiny model: results on stdout, everything else on stderr, exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import memlm
from command_line import SETTINGS, TEXTS, make_world, run
from memlm import Datastore, KnnMixture
from memlm.cli._app import app
from memlm.cli._common import say
from memlm.evaluation import Explanation
from memlm.mixtures import load_mixture
from test_training import RECIPE
from tiny_models import tiny_model

VERBS = [
    "build",
    "add",
    "update",
    "remove",
    "merge",
    "compact",
    "compress",
    "prune",
    "history",
    "rollback",
    "verify",
    "audit",
    "export",
    "import",
    "push",
    "pull",
    "info",
    "overlap",
    "tune",
    "eval",
    "generate",
    "explain",
    "compare",
    "train",
    "demo",
    "doctor",
    "recipes",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def lm(world):
    return memlm.load(world.model)


def test_build_says_what_was_stored(world, tmp_path):
    result = run("build", world.model, world.texts / "train", "--output", tmp_path / "memory")
    memory = Datastore(tmp_path / "memory")
    assert result.code == 0
    assert f"{len(memory):,} entries of 3 documents" in result.out
    assert "keys from last_ffn_input, search: exact" in result.out
    assert re.fullmatch(r"reading keys: [\d,]+ tokens in [\d.]+ s, [\d,]+ tokens/s\n", result.err)


def test_build_options_reach_the_datastore(world, tmp_path):
    options = ["--key-dtype", "bfloat16", "--context", 16, "--stride", 8, "--key-site", "final_norm_output"]
    result = run("build", world.model, world.texts / "train", "-o", tmp_path / "m", "--index", "IVF4,SQ8", *options)
    manifest = Datastore(tmp_path / "m").manifest
    assert "IVF4,SQ8, recall@" in result.out
    assert "building index: " in result.err
    assert (manifest.keys["dtype"], manifest.windows) == ("bfloat16", {"context": 16, "stride": 8})
    assert manifest.encoder["key_site"]["name"] == "final_norm_output"
    shown = run("info", tmp_path / "m").out
    assert re.search(r"search +IVF4,SQ8, recall@\d+ [\d.]+, visits \d of 4 lists", shown)
    assert run("eval", world.model, tmp_path / "m", world.texts / "test", *SETTINGS).code == 0


def test_build_names_what_it_left_out(world, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(7):
        (texts / f"{number}.txt").write_text(" \n")
    (texts / "image.bin").write_bytes(b"\x00\x01")
    (texts / "text.txt").write_text(TEXTS["train/cats.txt"])
    result = run("build", world.model, texts, "-o", tmp_path / "memory")
    assert result.code == 0
    assert result.err.count("memlm: left out ") == 6
    assert "left out 0.txt: no text\n" in result.err
    assert "left out 3 more documents" in result.err
    assert "8 documents without text or binary left out" in run("info", tmp_path / "memory").out


def test_info_is_readable(world):
    result = run("info", world.memory)
    lines = result.out.splitlines()
    assert lines[0] == str(world.memory)
    assert all(len(line) <= 80 for line in lines[1:] if not line.startswith("  from"))
    assert f"entries    {len(Datastore(world.memory)):,} of 3 documents" in result.out
    assert "keys       last_ffn_input (model.layers.1.mlp, input), 32 × float16" in result.out
    assert (result.code, result.err) == (0, "")


def test_tune_eval_round(world, lm, tmp_path):
    saved = tmp_path / "mixture.json"
    tuned = run("tune", world.model, world.memory, world.texts / "valid", "--save", saved, "--max-k", 64)
    assert (tuned.code, tuned.out.count("\n")) == (0, 1)
    assert tuned.out.startswith("memory helps: perplexity ")
    assert tuned.err.endswith(f"settings written to {saved}\n")
    mixture = load_mixture(saved)
    assert mixture.k <= 64
    result = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved)
    expected = memlm.evaluate(lm, world.texts / "test", Datastore(world.memory), mixture, show_progress=False)
    alone, mixed = (f"{item.perplexity:,.2f}" for item in expected.results)
    assert re.search(rf"^lm +{alone} .*\nknn-lm +{mixed} ", result.out, re.MULTILINE)
    assert expected.results[1].perplexity < expected.results[0].perplexity
    changed = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, "--lambda", 0, "--json")
    before, after = json.loads(changed.out)["results"]
    assert before["perplexity"] == pytest.approx(after["perplexity"]), "λ given on the command line was not used"


def test_every_way_to_choose_the_weight_is_compared(world, tmp_path, quick_choice):
    files = [tmp_path / f"comparison.{suffix}" for suffix in ("json", "md", "html")]
    texts = ["--valid", world.texts / "valid", "--test", world.texts / "test"]
    options = [part for file in files for part in ("--save", file)]
    options += ["--mixtures", tmp_path / "mixtures", "--cache", 64]
    result = run("compare", world.model, world.memory, *texts, *options)
    assert result.code == 0, result.err
    rows = {line[:22].strip(): line for line in result.out.splitlines()}
    assert {"lm", "cache", "knn-lm", "buckets", "exponential", "learned", "adapter", "adapter + cache"} <= set(rows)
    data = json.loads(files[0].read_text())
    perplexity = {row["method"]: row["perplexity"] for row in data["rows"]}
    assert all(f"{value:,.2f}" in rows[name] for name, value in perplexity.items())
    table, page = files[1].read_text(), files[2].read_text()
    assert all(f"| {name} |" in table and f"<td>{name}</td>" in page for name in perplexity)
    assert "data:image/png;base64," in page
    # what was fitted is what was reported, and the other verbs take it
    memory = Datastore(world.memory)
    name = memory.manifest.content_sha256[:12]
    saved = tmp_path / "mixtures" / f"{name}-adapter.json"
    evaluated = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, "--json")
    assert json.loads(evaluated.out)["results"][1]["perplexity"] == pytest.approx(perplexity["adapter"], rel=1e-3)
    gate = tmp_path / "mixtures" / f"{name}-adapter-cache.json"
    evaluated = run("eval", world.model, world.memory, world.texts / "test", "--mixture", gate, "--json")
    assert json.loads(evaluated.out)["results"][1]["perplexity"] == pytest.approx(
        perplexity["adapter + cache"], rel=1e-3
    )
    for verb in ("generate", "explain"):
        for mixture in (saved, gate):
            assert run(verb, world.model, world.memory, "The cat", "--mixture", mixture).code == 0
    for method in ("adapter-cache", "adapter + cache"):
        by_name = ("--mixture", tmp_path / "mixtures" / method, "--json")
        named = run("eval", world.model, world.memory, world.texts / "test", *by_name)
        assert json.loads(named.out)["settings"] == json.loads(evaluated.out)["settings"]
    for place in (tmp_path / "mixtures", tmp_path / "mixtures" / "adaptor"):
        many = run("eval", world.model, world.memory, world.texts / "test", "--mixture", place)
        assert many.code == 2
        assert f"holds {len(perplexity) - 1} mixtures for this datastore: adapter, adapter-cache, buckets, " in many.err
        assert f"name one of them, such as --mixture {tmp_path / 'mixtures' / 'adapter'}" in many.err


def test_a_folder_holds_the_mixture_of_a_datastore(world, tmp_path):
    tuned = run("tune", world.model, world.memory, world.texts / "valid", "--save", tmp_path)
    assert tuned.code == 0, tuned.err
    (written,) = tmp_path.iterdir()
    assert written.name == f"{Datastore(world.memory).manifest.content_sha256[:12]}-knn.json"
    for place in (written, tmp_path):
        result = run("eval", world.model, world.memory, world.texts / "test", "--mixture", place, "--json")
        assert json.loads(result.out)["settings"]["mixture"]["kind"] == "knn"
    (tmp_path / "empty").mkdir()
    none = run("eval", world.model, world.memory, world.texts / "test", "--mixture", tmp_path / "empty")
    assert (none.code, "holds none for this datastore" in none.err) == (2, True)


def test_settings_of_another_datastore_are_told_of(world, tmp_path):
    """They may be used, as an adapter's are meant to be; both datastores are named."""
    saved, other = tmp_path / "mixture.json", tmp_path / "other"
    run("tune", world.model, world.memory, world.texts / "valid", "--save", saved, "--max-k", 8)
    run("build", world.model, world.texts / "test", "--output", other)
    first, second = (Datastore(path).manifest.content_sha256[:12] for path in (world.memory, other))
    said = f"memlm: {saved} was fitted with the datastore {first}, but {other} is {second}; `memlm tune` fits settings"
    for memory, told in ((world.memory, False), (other, True)):
        result = run("explain", world.model, memory, "the cat was here", "--mixture", saved)
        assert (result.code, said in result.err) == (0, told)
    values = json.loads(saved.read_text())
    for nothing in ([], None, "x", [{}], 7):  # of strangers, or saved without a record
        saved.write_text(json.dumps({**values, "fitted_with": nothing}))
        result = run("explain", world.model, other, "the cat was here", "--mixture", saved)
        assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("kind", ["buckets", "exponential", "logistic", "learned", "adapter", "auto"])
def test_a_weight_by_distance_is_tuned_and_taken_by_every_verb(world, lm, tmp_path, kind, quick_choice):
    saved = tmp_path / "mixture.json"
    tuned = run("tune", world.model, world.memory, world.texts / "valid", "--mixture", kind, "--save", saved, "--json")
    report = json.loads(tuned.out)
    mixture = load_mixture(saved)
    written = json.loads(saved.read_text())
    assert len(written.pop("fitted_with")) == 1
    for name in ("tensors_file", "tensors_sha256"):
        written.pop(name, None)
    assert (report["mixture"], mixture.kind) == (written, report["mixture"]["kind"])
    assert kind in (mixture.kind, "auto")
    result = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, "--json")
    alone, mixed = (item["perplexity"] for item in json.loads(result.out)["results"])
    assert mixed < alone
    explained = run("explain", world.model, world.memory, "the cat was here", "--mixture", saved)
    generated = run("generate", world.model, world.memory, "the cat", "--mixture", saved)
    assert (generated.code, explained.code) == (0, 0)
    refused = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, "--lambda", 0.5)
    assert (refused.code == 2) is (mixture.kind != "knn")


def test_default_k_of_a_small_datastore_is_all_of_it(world, tmp_path):
    (tmp_path / "short.txt").write_text("the cat was here")
    run("build", world.model, tmp_path / "short.txt", "-o", tmp_path / "memory")
    options = [world.texts / "test", "--lambda", "0.5", "--temperature", "10", "--json"]
    settings = json.loads(run("eval", world.model, tmp_path / "memory", *options).out)["settings"]
    assert settings["mixture"]["k"] == settings["memories"][0]["entries"] < 1024
    assert run("tune", world.model, tmp_path / "memory", world.texts / "valid").code == 0


def test_generate_streams_the_text_and_shows_its_sources(world, lm):
    options = ["--max-new-tokens", 8, *SETTINGS]
    result = run("generate", world.model, world.memory, "The cat was", *options)
    inputs = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer("The cat was")["input_ids"]]])
    mixture = KnnMixture(interpolation_weight=0.5, temperature=10.0, k=32)
    with memlm.attach(lm.model, Datastore(world.memory), mixture):
        output = lm.model.generate(inputs, max_new_tokens=8, do_sample=False)
    expected = lm.tokenizer.decode(output[0], skip_special_tokens=True)
    assert result.code == 0
    assert result.out.startswith(expected)
    assert "the model wrote from here" in result.out
    assert re.search(r"train|cats\.txt|birds\.txt", result.out)
    assert run("generate", world.model, world.memory, "The cat was", *options, "--no-sources").out.strip() == expected


def test_sampling_follows_the_seed(world):
    options = ["--max-new-tokens", 12, "--sample", "--no-sources", *SETTINGS]
    texts = [run("generate", world.model, world.memory, "A", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_explain_in_the_terminal_and_as_a_page(world, tmp_path):
    passage = tmp_path / "passage.txt"
    passage.write_text("The rain was on the roof of the house.")
    result = run("explain", world.model, world.memory, f"@{passage}", *SETTINGS, "--html", tmp_path / "why.html")
    assert result.code == 0
    assert result.out.startswith("passage.txt\n")
    assert "Where it came from" in result.out
    assert "cats.txt" in result.out
    page = (tmp_path / "why.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "cats.txt" in page
    assert f"page written to {tmp_path / 'why.html'}" in result.err


def test_explain_sources_are_counted(world):
    text = ["explain", world.model, world.memory, "The cat", *SETTINGS, "--json"]
    few, many = (json.loads(run(*text, "--sources", count).out) for count in (1, 8))
    explanation = Explanation.from_dict(many)
    assert "".join(token.text for token in explanation.tokens) == "The cat"
    assert explanation.title == "Explained text"
    assert max(len(token["sources"]) for token in few["tokens"]) <= 2  # the heaviest, and one that agrees
    assert max(len(token["sources"]) for token in many["tokens"]) >= 8


def test_overlap_knows_stored_text(world):
    result = run("overlap", world.model, world.memory, world.texts / "train" / "cats.txt", world.texts / "test")
    assert re.search(r"^ +100\.0 %  cats\.txt$", result.out, re.MULTILINE)
    assert "stored whole: 1 of the documents (cats.txt)" in result.out
    share = json.loads(run("overlap", world.model, world.memory, world.texts / "test", "--json").out)["share"]
    assert 0 < share < 0.9


def test_doctor_without_a_datastore(world):
    result = run("doctor")
    assert result.code == 0
    assert f"torch         {torch.__version__}" in result.out
    assert re.search(r"memory +[\d.]+ GiB", result.out)
    assert result.out.endswith("no problem found\n")


def test_doctor_recomputes_keys(world):
    result = run("doctor", world.memory, "--model", world.model)
    assert result.code == 0
    assert "all files match their checksums" in result.out
    report = json.loads(run("doctor", world.memory, "--model", world.model, "--json").out)
    assert report["problems"] == []
    assert report["keys"]["recomputed"] == len(Datastore(world.memory))
    assert report["keys"]["largest_relative_difference"] < 1e-2
    once = json.loads(run("doctor", world.memory, "--model", world.model, "--documents", 1, "--json").out)
    assert 0 < once["keys"]["recomputed"] < report["keys"]["recomputed"]


def test_train_lm_makes_a_model_that_can_be_used(world, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('"valid.txt"', '"valid"').replace("steps = 12", "steps = 2"))
    for split in ("train", "valid"):
        (tmp_path / split).symlink_to(world.texts / split)
    result = run("train", "lm", tmp_path / "recipe.toml", tmp_path / "run")
    assert result.code == 0
    assert re.search(r"run/model: [\d,]+ parameters, 128 tokens\n  valid: [\d.]+ bits a byte\n", result.out)
    assert "training: 128 tokens in" in result.err
    again = run("train", "lm", tmp_path / "recipe.toml", tmp_path / "run", "--json")
    assert json.loads(again.out)["steps"] == 2
    assert run("build", tmp_path / "run" / "model", world.texts / "train", "-o", tmp_path / "memory").code == 0


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("build", ["train", "-o", "OUTPUT"]),
        ("info", []),
        ("overlap", ["test"]),
        ("tune", ["valid", "--save", "OUTPUT"]),
        ("eval", ["test", *SETTINGS]),
        ("generate", ["The cat", "--max-new-tokens", "3", *SETTINGS]),
        ("explain", ["The cat", "--html", "OUTPUT.html", *SETTINGS]),
        ("compare", ["--valid", "valid", "--test", "test", "--save", "OUTPUT.html", "--cache", "64"]),
        ("doctor", []),
    ],
)
def test_json_is_one_object_and_nothing_else(world, tmp_path, verb, arguments, quick_choice):
    places = {"OUTPUT": tmp_path / "output", "OUTPUT.html": tmp_path / "page.html"}
    places |= {name: world.texts / name for name in ("train", "valid", "test")}
    opened = {"build": [world.model], "info": [world.memory], "doctor": [world.memory, "--model", world.model]}
    begin = opened.get(verb, [world.model, world.memory])
    result = run(verb, *begin, *(places.get(item, item) for item in arguments), "--json")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    assert isinstance(json.loads(result.out, parse_constant=pytest.fail), dict)
    assert "\x1b" not in result.err


def test_every_verb_is_tested_here():
    assert sorted(item.name for item in [*app.registered_commands, *app.registered_groups]) == sorted(VERBS)


def test_help_does_not_wait_for_torch():
    code = f"""
import sys
from memlm.cli import main
verbs = [*([verb] for verb in {VERBS}), ["train", "lm"], ["train", "trime"], ["recipes", "run"]]
for arguments in [[], ["--version"], *([*verb, "--help"] for verb in verbs)]:
    try:
        main(arguments)
    except SystemExit as leaving:
        assert leaving.code == (0 if arguments else 2), arguments
assert not {{"torch", "transformers", "faiss", "matplotlib"}} & set(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for words in ("Usage: memlm build", "--interpolation", "--lambda", "--max-new-tokens"):
        assert (words in shown.stdout) == (words != "--interpolation"), words
    assert f"memlm {memlm.__version__}" in shown.stdout


def test_installed_as_a_program_and_as_a_module(world):
    """On a terminal that lacks a letter a question mark is shown, not a traceback."""
    (script,) = entry_points(group="console_scripts", name="memlm")
    assert script.value == "memlm.cli:main"
    command = [sys.executable, "-m", "memlm", "info", world.memory]
    environment = os.environ | {"PYTHONIOENCODING": "iso8859-5"}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "32 ? float16" in shown.stdout


def test_long_lines_are_wrapped_at_a_space_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    text = f"method      number\nshort       1\n   {'many words ' * 9}end\n{'x' * 50}\n\n"
    shown = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        say(text)
        shown.append(stream.getvalue())
    lines = shown[0].split("\n")
    assert lines[:2] == text.split("\n")[:2], "a line that fits was changed"
    assert all(len(line) <= 40 and line.startswith("   ") for line in lines[2:5])
    assert " ".join(shown[0].split()) == " ".join(text.split())
    assert lines[5:] == ["x" * 50, "", "", ""]
    assert shown[1] == text + "\n"


def test_debug_shows_the_traceback(world):
    from memlm.cli import main
    from memlm.errors import DatastoreError

    with pytest.raises(DatastoreError):
        main(["--debug", "info", str(world.texts / "nowhere")])


def test_other_weights_are_refused_by_every_verb(world, tmp_path):
    torch.manual_seed(0)
    model = tiny_model("llama", seed=0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "changed")
    memlm.load(world.model).tokenizer.save_pretrained(tmp_path / "changed")
    other, memory = tmp_path / "changed", world.memory
    for command in (
        ["doctor", memory, "--model", other],
        ["eval", other, memory, world.texts / "test", *SETTINGS],
        ["tune", other, memory, world.texts / "valid"],
        ["generate", other, memory, "The cat", *SETTINGS],
        ["explain", other, memory, "The cat", *SETTINGS],
        ["overlap", other, memory, world.texts / "test"],
    ):
        result = run(*command)
        assert (result.code, result.out) == (2, ""), command
        assert "built with tiny (" in result.err
        assert "the model given is changed (" in result.err
