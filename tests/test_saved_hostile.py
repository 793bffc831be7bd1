"""Saved mixtures from strangers: whatever is in the files, one clear error, and no memory taken for it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save

from command_line import make_world, refused
from memlm.cache import Cache
from memlm.errors import ConfigError
from memlm.evidence import MOST_ENTRIES
from memlm.mixtures import CacheMixture, GateMixture, KnnMixture, TrimeMixture, load_mixture
from planted import network
from test_adapter import adapter
from test_learned import learned
from test_saved import LINEAR, MIXTURES, tensors_of

KNN = {"kind": "knn", "interpolation_weight": 0.3, "temperature": 2.0, "k": 9}
VALUES = [None, True, "x" * 5000, [], [[]], {}, -1, 0, 1, 1e30, -1e39, 10**18, 10**400, KNN, {"tensor": []}]
RAW = ["NaN", "-Infinity", "1e999", "1" * 5000, "[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500]


def places(value, path=()):
    """Yield the path of every part of some JSON."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(values, path, new):
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return json.dumps(values)


def load_or_refuse(path):
    """Return the mixture, or the one line that says why it is none."""
    message = ""
    try:
        return load_mixture(path)
    except ConfigError as error:
        message = str(error)
    assert 0 < len(message) < 600
    return None


@pytest.mark.parametrize("name", MIXTURES)
def test_any_value_in_any_place_is_a_setting_or_a_clear_error(name, tmp_path):
    path = tmp_path / "mixture.json"
    MIXTURES[name][0].save(path)
    saved = json.loads(path.read_text())
    texts = [replaced(saved, place, value) for place in places(saved) for value in VALUES]
    texts += [replaced(saved, place, "@").replace('"@"', raw) for place in places(saved) for raw in RAW]
    refusals = 0
    for text in texts:
        path.write_text(text)
        loaded = load_or_refuse(path)
        refusals += loaded is None
        if loaded is not None:
            json.dumps(loaded.to_dict(), allow_nan=False)
            assert len(loaded.describe()) < 1000
    assert len(texts) > refusals > len(texts) / 3


def nested(mixture, depth):
    """A gate over a gate over a gate …, as JSON."""
    values = mixture
    for _ in range(depth):
        values = {"kind": "gate", "members": [values], "network": {"tensors": "network."}}
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        '{"a":' * 900 + "1" + "}" * 900,
        nested(KNN, 20),
        nested(KNN, 300),
        json.dumps({**KNN, "k": json.loads("[" * 40 + "]" * 40)}),
    ],
)
def test_deep_nesting(tmp_path, text):
    (tmp_path / "mixture.json").write_text(text)
    assert load_or_refuse(tmp_path / "mixture.json") is None


@pytest.mark.parametrize("many", [MOST_ENTRIES + 1, 2**31, 10**18, 10**400], ids=["more", "2³¹", "10¹⁸", "10⁴⁰⁰"])
def test_more_entries_than_anyone_looks_at(many):
    makers = [
        lambda: Cache(many),
        lambda: CacheMixture(interpolation_weight=0.1, scale=1.0, length=many),
        lambda: KnnMixture(interpolation_weight=0.1, temperature=1.0, k=many),
        lambda: TrimeMixture(temperature=1.0, length=many),
        lambda: TrimeMixture(temperature=1.0, k=many),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="1 to 1,048,576") as caught:
            make()
        assert len(str(caught.value)) < 200
    assert len(Cache(MOST_ENTRIES)) == MOST_ENTRIES


def test_more_memories_than_fit():
    assert len(GateMixture(members=(LINEAR,) * 16, network=network(5, 17)).members) == 16
    with pytest.raises(ConfigError, match="a gate over 17 memories; expected 1 to 16"):
        GateMixture(members=(LINEAR,) * 17, network=network(5, 18))
    with pytest.raises(ConfigError, match="a gate over 0 memories; expected 1 to 16"):
        GateMixture(members=(), network=network(5, 1))


def put(path, content):
    """Put another file of tensors in the place of a saved mixture's, and let the JSON vouch for it."""
    tensors_of(path).write_bytes(content)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "tensors_sha256": hashlib.sha256(content).hexdigest()}))


def sized(width, layers, features):
    """A network of other sizes, sound in itself."""

    tensors = {"network.mean": torch.zeros(features), "network.scale": torch.ones(features)}
    sizes = [features, *[width] * (layers - 1), 1]
    for place in range(layers):
        tensors[f"network.layers.{place}.weight"] = torch.zeros(sizes[place + 1], sizes[place])
        tensors[f"network.layers.{place}.bias"] = torch.zeros(sizes[place + 1])
    return tensors


@pytest.mark.parametrize(
    ("width", "layers", "features", "sound"),
    [(64, 3, 7, True), (1024, 8, 7, True), (1025, 2, 7, False), (1, 9, 7, False), (1, 2, (1 << 16) + 1, False)],
)
def test_networks_of_absurd_size(tmp_path, width, layers, features, sound):
    learned().save(tmp_path / "mixture.json")
    kept = load_file(tensors_of(tmp_path / "mixture.json"))
    put(tmp_path / "mixture.json", save({"statistics.": kept["statistics."], **sized(width, layers, features)}))
    assert (load_or_refuse(tmp_path / "mixture.json") is not None) == sound


@pytest.mark.parametrize("name", ["mean", "scale", "layers.0.weight", "layers.1.bias"])
def test_numbers_whose_sums_are_none(tmp_path, name):
    """λ would be NaN: ∞ − ∞ of numbers that a float32 holds one by one."""
    learned().save(tmp_path / "mixture.json")
    tensors = load_file(tensors_of(tmp_path / "mixture.json"))
    for size, sound in ((1e29, True), (3e38, False)):
        tensors[f"network.{name}"] = torch.full_like(tensors[f"network.{name}"], size)
        put(tmp_path / "mixture.json", save(tensors))
        assert (load_or_refuse(tmp_path / "mixture.json") is not None) == sound


def safetensors(kind, shape, data):
    """A file whose only tensor is of any kind and shape."""
    header = json.dumps({"network.mean": {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("kind", ["F8_E4M3", "C64", "F4", "BOOL", "U64", "F64", "E9", "I8"])
@pytest.mark.parametrize("shape", [[4], [2**40, 0], [2**62, 2**62, 0], [0], [], [2**63]])
def test_tensors_of_any_kind_and_shape(tmp_path, kind, shape):
    adapter().save(tmp_path / "mixture.json")
    for size in (0, 1, 4, 8, 32):
        put(tmp_path / "mixture.json", safetensors(kind, shape, bytes(size)))
        assert load_or_refuse(tmp_path / "mixture.json") is None


@pytest.mark.parametrize("name", ["network.mean", "network.scale", "network.layers.0.bias", "statistics."])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.bfloat16, torch.uint64])
def test_a_tensor_of_another_type(tmp_path, name, dtype):
    learned().save(tmp_path / "mixture.json")

    tensors = load_file(tensors_of(tmp_path / "mixture.json"))
    tensors[name] = torch.ones_like(tensors[name]).to(dtype)
    put(tmp_path / "mixture.json", save(tensors))
    assert load_or_refuse(tmp_path / "mixture.json") is None


def test_a_header_that_is_longer_than_the_file(tmp_path):
    adapter().save(tmp_path / "mixture.json")
    put(tmp_path / "mixture.json", struct.pack("<Q", 2**63) + b"{}")
    assert load_or_refuse(tmp_path / "mixture.json") is None


@pytest.mark.parametrize("which", ["json", "tensors"])
@pytest.mark.parametrize("what", ["a terabyte", "a pipe", "a device"])
def test_files_without_an_end(tmp_path, which, what):
    adapter().save(tmp_path / "mixture.json")
    path = tmp_path / "mixture.json" if which == "json" else tensors_of(tmp_path / "mixture.json")
    if what == "a terabyte":
        os.truncate(path, 1 << 40)
    else:
        path.unlink()
        os.mkfifo(path) if what == "a pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"it is no file of up to [\d,]+ bytes"):
        load_mixture(tmp_path / "mixture.json")


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    cache = {"kind": "cache", "interpolation_weight": 0.1, "scale": 1.0, "forgetting": 0.0, "length": 10**18}
    texts = {
        "is nested over 32 levels deep": "[" * 500 + "]" * 500,
        "length is 1e+18; expected a whole number of neighbors, 1 to 1,048,576": json.dumps(cache),
        "NaN is no number of JSON": json.dumps({**KNN, "k": float("nan")}),
        "temperature is inf; expected a positive number": json.dumps(KNN).replace("2.0", "1e999"),
    }
    for words, text in texts.items():
        (tmp_path / "mixture.json").write_text(text)
        for verb in ("eval", "generate", "explain"):
            what = "test" if verb == "eval" else "The cat"
            assert words in refused(verb, world.model, world.memory, what, "--mixture", "mixture.json")
