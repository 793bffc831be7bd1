"""Mixtures on disk: each kind comes back as it was, and whatever is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlm.cache import Cache
from memlm.errors import ConfigError
from memlm.evidence import Evidence
from memlm.mixtures import (
    AdapterMixture,
    CacheMixture,
    GateMixture,
    KnnMixture,
    SharedCacheMixture,
    TrimeMixture,
    load_mixture,
)
from memlm.mixtures._saved import KINDS
from planted import belief, memory
from test_adapter import adapter
from test_by_distance import KINDS as CURVES
from test_gate import gate
from test_learned import learned
from test_spalm import WIDTH, drawn, spalm, steered

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
    "spalm": (spalm(), drawn(n=10)),
    "spalm, a gate a dimension": (spalm(WIDTH), drawn(n=10)),
    "steered": (steered(), drawn(n=10)),
}
NETWORKS = ("adapter", "learned", "gate", "nested gate", "steered")
TENSORS = (*NETWORKS, "spalm", "spalm, a gate a dimension")


def tensors_of(path):
    """Return the file of tensors that a saved mixture names."""
    return path.with_name(json.loads(path.read_text())["tensors_file"])


def said_by(path):
    """Return what a saved adapter makes of ten targets."""
    lm, asked = evidence()
    return load_mixture(path).log_probs(lm, asked)


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
    beside = {tensors_of(tmp_path / "mixture.json").name} if name in TENSORS else set()
    assert {item.name for item in tmp_path.iterdir()} == {"mixture.json"} | beside


@pytest.fixture(params=NETWORKS)
def saved(request, tmp_path):
    path = tmp_path / "mixture.json"
    MIXTURES[request.param][0].save(path)
    return path


def change(path, edit):
    """Edit the tensors of a saved mixture, and let the JSON vouch for them."""
    beside = tensors_of(path)
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
    beside = tensors_of(saved)
    content = bytearray(beside.read_bytes())
    beside.unlink()
    if damage == "a folder":
        beside.mkdir()
    elif damage == "one byte":
        content[-1] ^= 1
        beside.write_bytes(content)
    elif damage != "missing":
        beside.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ConfigError, match=r"mixture.json\.[0-9a-f]{12}\.safetensors (cannot be read|is damaged)"):
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


class Killed(BaseException):
    """No error that anything catches."""


def kill_after(monkeypatch, steps):
    """Let so many of the steps that change files be taken; from then on nothing reaches the disk, as after a kill."""
    taken = iter(range(steps))

    def limited(function):
        def step(*arguments, **settings):
            if next(taken, None) is None:
                raise Killed
            return function(*arguments, **settings)

        return step

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))


@pytest.mark.parametrize("new", ["adapter", "knn"])
def test_a_kill_at_any_step_leaves_the_old_mixture_or_the_new_one(tmp_path, monkeypatch, new):
    lm, asked = evidence()
    new = adapter(seed=1) if new == "adapter" else MIXTURES[new][0]
    told = {name: mixture.log_probs(lm, asked) for name, mixture in (("old", adapter(seed=0)), ("new", new))}
    left = []
    for steps in range(100):
        path = tmp_path / str(steps) / "mixture.json"
        path.parent.mkdir()
        adapter(seed=0).save(path)
        with monkeypatch.context() as patch, suppress(Killed):
            kill_after(patch, steps)
            new.save(path)
            break
        left.append(next(name for name, expected in told.items() if said_by(path).equal(expected)))
        new.save(path)
        assert said_by(path).equal(told["new"]), "it can be saved again"
    assert left == sorted(left, reverse=True), "the old one, then the new one"
    assert {"old", "new"} == set(left)
    assert len({item.name for item in path.parent.iterdir()}) == (2 if isinstance(new, AdapterMixture) else 1)


def test_names_that_differ_after_a_dot_do_not_meet(tmp_path):
    lm, asked = evidence()
    paths = {seed: tmp_path / name for seed, name in enumerate(["run.k64.json", "run.k128.json", "run.k64", "run"])}
    for seed, path in paths.items():
        adapter(seed=seed).save(path)
    for seed, path in paths.items():
        assert said_by(path).equal(adapter(seed=seed).log_probs(lm, asked))


def test_tensors_of_the_mixture_before_are_removed_and_no_others(tmp_path):
    path, other = tmp_path / "mixture.json", tmp_path / "mixture.json.json"
    adapter(seed=0).save(path)
    adapter(seed=0).save(other)
    first, others = tensors_of(path), tensors_of(other)
    adapter(seed=0).save(path)
    assert tensors_of(path) == first
    shutil.copy(path, tmp_path / "copy.json")
    MIXTURES["knn"][0].save(tmp_path / "copy.json")
    assert first.exists(), "the copy's JSON named them, but they are not its own"
    MIXTURES["knn"][0].save(path)
    assert not first.exists()
    assert others.exists()
    assert load_mixture(path) == MIXTURES["knn"][0]


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"tensors_file": 5}', '{"tensors_file": "../x"}'])
def test_what_stood_there_before_may_be_anything(tmp_path, content):
    lm, asked = evidence()
    path = tmp_path / "mixture.json"
    path.write_text(content)
    adapter().save(path)
    assert said_by(path).equal(adapter().log_probs(lm, asked))


def test_both_files_can_be_moved_and_the_json_renamed(tmp_path):
    adapter().save(tmp_path / "mixture.json")
    (tmp_path / "new").mkdir()
    shutil.move(tensors_of(tmp_path / "mixture.json"), tmp_path / "new")
    shutil.move(tmp_path / "mixture.json", tmp_path / "new" / "other.json")
    lm, asked = evidence()
    assert said_by(tmp_path / "new" / "other.json").equal(adapter().log_probs(lm, asked))


@pytest.mark.parametrize("name", ["../mixture.json.0123456789ab.safetensors", "/etc/passwd", "x.safetensors", "", 5])
def test_tensors_are_looked_for_in_the_same_folder_alone(saved, name):
    values = json.loads(saved.read_text())
    shutil.copy(tensors_of(saved), saved.parent.parent / "mixture.json.0123456789ab.safetensors")
    saved.write_text(json.dumps({**values, "tensors_file": name}))
    with pytest.raises(ConfigError, match="as its file of tensors; save the mixture again"):
        load_mixture(saved)


def test_a_name_that_tensors_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="another suffix"):
        adapter().save(tmp_path / "mixture.safetensors")
    assert not list(tmp_path.iterdir())


def test_gates_of_one_memory_are_gates():
    assert isinstance(NESTED.members[0], GateMixture)
