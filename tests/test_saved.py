"""Mixtures on disk: each kind comes back as it was, and whatever is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlm.cache import Cache
from memlm.errors import ConfigError
from memlm.evidence import Evidence
from memlm.mixtures import CacheMixture, GateMixture, KnnMixture, SharedCacheMixture, TrimeMixture, load_mixture
from memlm.mixtures import _mixture as mixture_module
from memlm.mixtures._saved import KINDS
from planted import belief, memory
from test_adapter import adapter
from test_by_distance import KINDS as CURVES
from test_gate import gate
from test_learned import learned

K = 9


def evidence(memories=1):
    """Return (log p_LM, what datastores found, and a cache last) for ten targets."""
    generator = torch.Generator().manual_seed(0)
    lm = torch.randn(10, 11, generator=generator).log_softmax(dim=1)
    thinks = belief(lm)
    distances = 20 * torch.rand(10, K, generator=generator)
    found = memory(torch.randint(11, (10, K), generator=generator), distances.sort(dim=1).values)
    recalled = Cache(K).recall(thinks.keys, thinks.last)
    return lm, Evidence((*[found] * (memories - 1), recalled), thinks) if memories > 1 else Evidence((found,), thinks)


def with_cache():
    lm, both = evidence(2)
    return lm, both._replace(memories=both.memories[1:])


LINEAR = CacheMixture(interpolation_weight=0.3, scale=0.5, forgetting=0.1, length=K)
OVER_THREE = gate((adapter(seed=0), adapter(seed=1), LINEAR), evidence(3)[1])
NESTED = gate((gate((learned(threshold=0.4),), evidence()[1], seed=3), LINEAR), evidence(2)[1], seed=4)
MIXTURES = {
    **{kind: (mixture, evidence()) for kind, mixture in CURVES.items()},
    "knn": (KnnMixture(interpolation_weight=0.3, temperature=2.0, k=K), evidence()),
    "adapter": (adapter(), evidence()),
    "learned": (learned(threshold=0.4), evidence()),
    "cache": (LINEAR, with_cache()),
    "shared-cache": (SharedCacheMixture(bias=-1.0, scale=0.5, length=K), with_cache()),
    "trime": (TrimeMixture(temperature=0.8, forgetting=0.1, k=K, length=K, interpolation_weight=0.2), evidence(2)),
    "gate": (OVER_THREE, evidence(3)),
    "nested gate": (NESTED, evidence(2)),
}
NETWORKS = ("adapter", "learned", "gate", "nested gate")


def test_every_kind_is_tested():
    assert {mixture.kind for mixture, _ in MIXTURES.values()} == set(KINDS)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_was_saved_comes_back(name, tmp_path):
    mixture, (lm, asked) = MIXTURES[name]
    mixture.save(tmp_path / "mixture.json", ["abc"])
    loaded = load_mixture(tmp_path / "mixture.json")
    assert type(loaded) is type(mixture)
    assert loaded.log_probs(lm, asked).equal(mixture.log_probs(lm, asked))
    assert loaded.to_dict() == mixture.to_dict()
    assert loaded.describe() == mixture.describe()
    assert not mixture.log_probs(lm, asked).equal(lm)
    assert json.loads((tmp_path / "mixture.json").read_text())["fitted_with"] == ["abc"]
    expected = {"mixture.json", "mixture.safetensors"} if name in NETWORKS else {"mixture.json"}
    assert {item.name for item in tmp_path.iterdir()} == expected


@pytest.fixture(params=NETWORKS)
def saved(request, tmp_path):
    path = tmp_path / "mixture.json"
    MIXTURES[request.param][0].save(path)
    return path


def change(path, edit):
    """Edit the tensors of a saved mixture, and let the JSON vouch for them."""
    beside = path.with_suffix(".safetensors")
    tensors = load_file(beside)
    edit(tensors)
    save_file(tensors, beside)
    values = json.loads(path.read_text())
    values["tensors_sha256"] = hashlib.sha256(beside.read_bytes()).hexdigest()
    path.write_text(json.dumps(values))


def test_an_edit_that_changes_nothing_is_no_damage(saved):
    change(saved, lambda tensors: None)
    load_mixture(saved)


def replaced(edit):
    def every(tensors):
        for name in tensors:
            tensors[name] = edit(tensors[name].clone()).contiguous()

    return every


def first(edit):
    def one(tensors):
        name = min(tensors)
        tensors[name] = edit(tensors[name].clone()).contiguous()

    return one


@pytest.mark.parametrize(
    "edit",
    [
        first(lambda tensor: tensor.fill_(torch.nan)),
        first(lambda tensor: tensor.fill_(torch.inf)),
        first(lambda tensor: tensor[:-1]),
        first(lambda tensor: tensor[None]),
        first(lambda tensor: tensor.sum()),
        first(lambda tensor: tensor.double()),
        first(lambda tensor: tensor.half()),
        first(lambda tensor: tensor.long()),
        replaced(lambda tensor: tensor[:0]),
        lambda tensors: tensors.pop(min(tensors)),
        lambda tensors: tensors.pop(max(tensors)),
        lambda tensors: tensors.update(surplus=torch.zeros(1)),
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update({name: -part for name, part in tensors.items() if name.endswith("scale")}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, edit):
    change(saved, edit)
    with pytest.raises(ConfigError):
        load_mixture(saved)


def test_layers_that_are_too_many_are_refused(saved):
    def add(tensors):
        prefix = next(name for name in tensors if name.endswith("layers.1.weight")).removesuffix("1.weight")
        outputs = len(tensors[f"{prefix}1.bias"])
        tensors[f"{prefix}2.weight"] = torch.zeros(outputs + 1, outputs)
        tensors[f"{prefix}2.bias"] = torch.zeros(outputs + 1)

    change(saved, add)
    with pytest.raises(ConfigError):
        load_mixture(saved)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "one byte", "a folder"])
def test_a_damaged_file_of_tensors_is_refused(saved, damage):
    beside = saved.with_suffix(".safetensors")
    content = bytearray(beside.read_bytes())
    beside.unlink()
    if damage == "a folder":
        beside.mkdir()
    elif damage == "one byte":
        content[-1] ^= 1
        beside.write_bytes(content)
    elif damage != "missing":
        beside.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ConfigError, match=r"mixture.safetensors (cannot be read|is damaged)"):
        load_mixture(saved)


def test_json_that_is_cut_anywhere_is_refused(saved):
    content = saved.read_bytes()
    for size in range(0, len(content.rstrip()), 7):
        saved.write_bytes(content[:size])
        with pytest.raises(ConfigError):
            load_mixture(saved)


@pytest.mark.parametrize(
    "wrong", [None, -5, "x", [], {}, {"tensors": "elsewhere."}, {"tensor": "elsewhere"}, {"kind": "knn"}]
)
def test_json_with_a_value_of_another_type_is_refused(saved, wrong):
    values = json.loads(saved.read_text())
    for name in set(values) - {"fitted_with"}:
        if name == "familiarity" and wrong is None:
            continue  # a gate may go without
        saved.write_text(json.dumps({**values, name: wrong}))
        with pytest.raises(ConfigError):
            load_mixture(saved)


def test_a_kill_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    """The tensors are new, the JSON is old; both are sound, and their shapes agree."""
    path = tmp_path / "mixture.json"
    adapter(seed=0).save(path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mixture_module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        adapter(seed=1).save(path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="not saved together"):
        load_mixture(path)
    adapter(seed=1).save(path)
    lm, asked = evidence()
    assert load_mixture(path).log_probs(lm, asked).equal(adapter(seed=1).log_probs(lm, asked))


def test_tensors_left_from_another_mixture_do_no_harm(tmp_path):
    path = tmp_path / "mixture.json"
    adapter().save(path)
    MIXTURES["knn"][0].save(path)
    assert load_mixture(path) == MIXTURES["knn"][0]
    path.with_suffix(".safetensors").write_bytes(b"damaged")
    assert load_mixture(path) == MIXTURES["knn"][0]


def test_both_files_can_be_moved(tmp_path):
    adapter().save(tmp_path / "mixture.json")
    for suffix in (".json", ".safetensors"):
        shutil.move(tmp_path / f"mixture{suffix}", tmp_path / f"other{suffix}")
    lm, asked = evidence()
    assert load_mixture(tmp_path / "other.json").log_probs(lm, asked).equal(adapter().log_probs(lm, asked))


def test_the_place_of_the_tensors_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="another suffix"):
        adapter().save(tmp_path / "mixture.safetensors")
    assert not list(tmp_path.iterdir())


def test_gates_of_one_memory_are_gates():
    assert isinstance(NESTED.members[0], GateMixture)
