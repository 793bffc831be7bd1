"""TRIME on the command line: datastores by inner product, `tune --mixture trime`, and what its settings do."""

import json

import pytest

import memlm
from command_line import SETTINGS, make_world, refused, run
from memlm import Datastore, evaluate
from memlm.cache import Cache
from memlm.mixtures import CacheMixture, load_mixture


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("trime-cli"))


@pytest.fixture(scope="module")
def by_product(world):
    path = world.texts / "by-product"
    built = run("build", world.model, world.texts / "train", "-o", path, "--metric", "inner-product")
    assert built.code == 0, built.err
    return path


@pytest.fixture(scope="module")
def saved(world, by_product):
    """Settings for the datastore and a cache of 20 tokens."""
    path = world.texts / "trime.json"
    options = ["--mixture", "trime", "--cache", 20, "--max-k", 16, "--save", path]
    tuned = run("tune", world.model, by_product, world.texts / "valid", *options)
    assert tuned.code == 0, tuned.err
    assert tuned.out.startswith("memory helps: perplexity ")
    return path


def test_the_metric_is_shown(world, by_product):
    assert Datastore(by_product).metric == "inner_product"
    assert "metric     inner product\n" in run("info", by_product).out
    assert "metric     squared L2\n" in run("info", world.memory).out
    assert json.loads(run("info", by_product, "--json").out)["metric"] == "inner_product"
    assert "entries, searched by inner product; all files match" in run("doctor", by_product).out
    assert json.loads(run("doctor", by_product, "--json").out)["datastore"]["metric"] == "inner_product"
    wrong = ["build", world.model, world.texts / "train", "-o", world.texts / "other", "--metric", "cosine"]
    assert "metric is 'cosine'; expected squared_l2 or inner_product" in refused(*wrong)


def test_what_was_tuned_is_evaluated_explained_and_written_with(world, by_product, saved):
    mixture = load_mixture(saved)
    assert (mixture.kind, mixture.k, mixture.length) == ("trime", 16, 20)
    fitted_with = json.loads(saved.read_text())["fitted_with"]
    assert fitted_with == [Datastore(by_product).manifest.content_sha256]
    text = world.texts / "test"
    result = run("eval", world.model, by_product, text, "--mixture", saved, "--json")
    found = json.loads(result.out)
    memory = [Datastore(by_product), Cache(20)]
    expected = evaluate(memlm.load(world.model), text, memory, mixture, show_progress=False)
    assert found["results"][1]["perplexity"] == pytest.approx(expected.results[1].perplexity, rel=1e-4)
    assert found["results"][1]["perplexity"] < 0.8 * found["results"][0]["perplexity"]
    assert [item.get("cache") for item in found["settings"]["memories"]] == [None, 20]
    explained = run("explain", world.model, by_product, "The cat was in the cat.", "--mixture", saved, "--json")
    assert "one softmax, temperature" in json.loads(explained.out)["settings"]["mixture"]
    wrote = run("generate", world.model, by_product, "The cat", "--mixture", saved, "--max-new-tokens", 5)
    assert wrote.code == 0, wrote.err
    assert wrote.out.startswith("The cat")
    other = run("eval", world.model, by_product, text, "--mixture", saved, "--temperature", 50, "--json")
    assert json.loads(other.out)["settings"]["mixture"]["temperature"] == 50
    assert abs(json.loads(other.out)["results"][1]["perplexity"] - found["results"][1]["perplexity"]) > 0.5


@pytest.mark.parametrize("datastore", ["none", "a datastore by inner product without a cache"])
def test_a_cache_or_a_datastore_may_be_all_the_memory(world, by_product, datastore, tmp_path):
    path = tmp_path / "mixture.json"
    cache, place = (15, "none") if datastore == "none" else (0, by_product)
    options = ["--mixture", "trime", "--cache", cache, "--save", path]
    tuned = run("tune", world.model, place, world.texts / "valid", *options)
    assert tuned.code == 0, tuned.err
    mixture = load_mixture(path)
    assert (mixture.length, bool(mixture.k)) == (cache, datastore != "none")
    result = run("eval", world.model, place, world.texts / "test", "--mixture", path, "--json")
    assert len(json.loads(result.out)["settings"]["memories"]) == 1
    if datastore == "none":
        for verb, text in (("explain", "The cat was in the cat."), ("generate", "The cat")):
            assert run(verb, world.model, "none", text, "--mixture", path, "--json").code == 0


def test_other_caches_need_no_datastore_either(world, tmp_path):
    CacheMixture(interpolation_weight=0.2, scale=0.1, length=10).save(tmp_path / "cache.json")
    result = run("eval", world.model, "none", world.texts / "test", "--mixture", tmp_path / "cache.json", "--json")
    assert json.loads(result.out)["settings"]["memories"] == [{"cache": 10}]


def test_what_does_not_go_together_is_refused(world, by_product, saved, tmp_path):
    text, valid = world.texts / "test", world.texts / "valid"
    mismatch = refused("eval", world.model, world.memory, text, "--mixture", saved)
    assert "'trime' is for a datastore searched by inner product" in mismatch
    assert "but the memory given is a datastore searched by squared L2" in mismatch
    for verb, *rest in (
        ["eval", text, *SETTINGS],
        ["explain", "the cat", *SETTINGS],
        ["generate", "the cat", *SETTINGS],
        ["tune", valid],
        ["tune", valid, "--mixture", "adapter"],
    ):
        assert "searched by squared L2" in refused(verb, world.model, by_product, *rest)
    compared = refused("compare", world.model, by_product, "--valid", valid, "--test", text)
    assert "searched by squared L2" in compared
    trime = ["--mixture", "trime"]
    for message, command in {
        "--cache is 5, but knn looks at the datastore alone": ["tune", by_product, valid, "--cache", 5],
        "knn has nothing to look at": ["tune", "none", valid],
        "trime has nothing to look at": ["tune", "none", valid, *trime, "--cache", 0],
        "name a file": ["tune", "none", valid, *trime, "--save", tmp_path],
        "name one in the place of none": ["eval", "none", text, "--mixture", saved],
        "which one of a folder only a datastore could tell": ["eval", "none", text, "--mixture", tmp_path],
        "expected at most so many": ["eval", by_product, text, "--mixture", saved, "--k", 10**6],
    }.items():
        verb, *rest = command
        assert message in refused(verb, world.model, *rest), command
