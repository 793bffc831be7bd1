"""Any sequence of changes to a datastore agrees with a dictionary.

MEMLM_KILLS, as in test_faults, makes it 4,000 changes instead of 480.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fake_encoder import FakeEncoder
from memlm import Datastore, Document
from memlm.datastore import Manifest, verify
from memlm.errors import ConfigError, DatastoreError

NAMES = st.sampled_from([f"d{number}" for number in range(6)])
TEXTS = st.text("abc ", min_size=1, max_size=12).map(lambda text: "x" + text)
DOCUMENTS = st.dictionaries(NAMES, TEXTS, min_size=1, max_size=4)
QUIET = {"show_progress": False}


def as_documents(texts):
    return [Document(name, text) for name, text in texts.items()]


class Life(RuleBasedStateMachine):
    @initialize(texts=DOCUMENTS, entries=st.integers(5, 60))
    def build(self, texts, entries):
        self.folder = Path(tempfile.mkdtemp())
        self.entries = entries
        self.memory = Datastore.build(
            FakeEncoder(), as_documents(texts), self.folder / "memory", segment_entries=entries, **QUIET
        )
        self.held = dict(texts)
        self.kept = {self.memory.manifest.version: dict(texts)}

    def changed(self):
        self.kept[self.memory.manifest.version] = dict(self.held)

    @rule(texts=DOCUMENTS, replace=st.booleans())
    def add(self, texts, replace):
        clash = any(self.held.get(name, text) != text for name, text in texts.items())
        settings = {"replace": replace, "segment_entries": 10_000, **QUIET}
        if clash and not replace:
            with pytest.raises(DatastoreError, match="stored already, with other content"):
                self.memory.add(FakeEncoder(), as_documents(texts), **settings)
            return
        new = sum(self.held.get(name) != text for name, text in texts.items())
        replaced = sum(name in self.held and self.held[name] != text for name, text in texts.items())
        assert self.memory.add(FakeEncoder(), as_documents(texts), **settings) == (new, replaced)
        self.held |= texts
        self.changed()

    @rule(names=st.sets(NAMES, min_size=1, max_size=3))
    def remove(self, names):
        if names <= set(self.held):
            assert set(self.memory.remove(sorted(names))) == names
            self.held = {name: text for name, text in self.held.items() if name not in names}
            self.changed()
        else:
            with pytest.raises(ConfigError, match="nothing was removed"):
                self.memory.remove(sorted(names))

    @rule()
    def compact(self):
        self.memory.compact(segment_entries=self.entries, **QUIET)
        self.kept = {}
        self.changed()
        assert len(self.memory.history()) == 1

    @rule(width=st.integers(1, 8), key_dtype=st.sampled_from(["int8", "float16"]))
    def compress(self, width, key_dtype):
        if len(self.memory) <= width or self.memory.manifest.codec is not None:
            with pytest.raises((DatastoreError, ConfigError), match=r"compressed already|has no entries|more entries"):
                self.memory.compress(width, key_dtype)
            return
        self.memory.compress(width, key_dtype, segment_entries=self.entries)
        self.kept = {}
        self.changed()

    @rule(neighbors=st.integers(0, 8), seed=st.integers(0, 3))
    def prune(self, neighbors, seed):
        if self.memory.prune(neighbors, seed=seed, segment_entries=self.entries, **QUIET):
            self.kept = {}
            self.changed()

    @rule(data=st.data())
    def rollback(self, data):
        version = data.draw(st.sampled_from(sorted(self.kept)))
        self.memory.rollback(version)
        self.held = dict(self.kept[version])
        self.changed()

    @precondition(lambda self: self.held)
    @rule(factory=st.sampled_from(["exact", "Flat", "IVF1,SQfp16", "HNSW4"]))
    def build_index(self, factory):
        self.memory.build_index(factory)
        self.changed()

    @rule()
    def reopen(self):
        self.memory = Datastore(self.memory.path)

    @rule(texts=DOCUMENTS)
    def merge(self, texts):
        texts = {f"m{name}": text for name, text in texts.items()}
        path = self.folder / "other"
        Datastore.build(FakeEncoder(), as_documents(texts), path, **QUIET)
        self.memory.merge(path, replace=True, segment_entries=10_000, **QUIET)
        shutil.rmtree(path)
        self.held |= texts
        self.changed()

    @invariant()
    def agrees(self):
        if not hasattr(self, "memory"):
            return
        found = {item["id"]: item for item in self.memory.documents()}
        assert {name: item["text"] for name, item in found.items()} == self.held
        assert self.memory.manifest == Manifest.load(self.memory.path)
        counts = np.ones(self.memory.slots, int) if self.memory.counts is None else self.memory.counts
        for name, text in self.held.items():
            first, stop = found[name]["entries"]
            positions = self.memory.positions(first, stop)
            left = "".join(text[position] for position in positions)
            assert "".join(map(chr, self.memory.values[first:stop])) == left
            assert (len(set(positions)), counts[first:stop].sum()) == (len(positions), len(text))
            for letter in set(text):  # whatever was merged, each value counts as often as it stands in the text
                same = self.memory.values[first:stop] == ord(letter)
                assert counts[first:stop][same].sum() == text.count(letter)
            assert self.memory.provenance(first).document == name
        if len(self.memory):
            self.search()

    def search(self):
        """Every stored key finds itself, or its equal, and only what is held."""
        entries = np.concatenate([np.arange(*item["entries"]) for item in self.memory.documents()])
        queries, codec = self.memory.keys.gather_keys(entries).numpy(), self.memory.keys.codec
        if codec is not None:  # as the model would have to see them
            queries = queries @ codec.projection.numpy().T + codec.mean.numpy()
        found = self.memory.search(queries, min(3, len(self.memory)))
        assert np.isin(found.entries[found.present], entries).all()
        exact = self.memory.index.details.get("factory", "exact") != "HNSW4"
        if exact:
            assert found.present.all()
            np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-3)

    def teardown(self):
        if hasattr(self, "memory"):
            assert verify(self.memory.path) == []
            shutil.rmtree(self.folder)


MANY = "MEMLM_KILLS" in os.environ
LIVES = settings(
    max_examples=20 if MANY else 12,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(5 if MANY else 1))  # parts, for several processes
def test_a_life_agrees_with_a_dictionary(number):
    run_state_machine_as_test(seed(number)(Life), settings=LIVES)
