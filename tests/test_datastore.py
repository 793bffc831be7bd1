"""Building and reading a datastore: what lies where, in which type, bound to what, and where it comes from."""

import datetime

import numpy as np
import pytest
import torch

from fake_encoder import FakeEncoder, Tokenized, random_documents
from memlm import Datastore, Document
from memlm.errors import (
    ConfigError,
    CorpusError,
    DatastoreMismatch,
    KeyOverflow,
    ModelError,
    ShapeError,
)


def build(source, path, encoder=None, **settings):
    return Datastore.build(encoder or FakeEncoder(), source, path, show_progress=False, **settings)


def all_keys(memory):
    return memory.keys.gather_keys(np.arange(len(memory)))


def test_an_entry_is_the_token_after_what_the_model_saw(lm, documents, memory):
    place = 0
    for document, stored in zip(documents, memory.documents(), strict=True):
        tokens = lm.tokenize(document)
        first, stop = stored["entries"]
        assert first == place  # nothing lies between documents
        assert memory.values[first:stop].tolist() == tokens.ids[1:].tolist()
        assert {name: stored[name] for name in ("id", "text", "metadata")} == {
            "id": document.id,
            "text": document.text,
            "metadata": document.metadata,
        }
        for number in range(len(tokens.ids) - 1):
            # the key: of a run of the model over this document alone, up to the token before
            rows, keys = next(lm.keys([tokens.ids[: number + 2]]))
            assert rows[-1] == number
            stored_key = memory.keys.gather_keys(np.array([first + number]))[0]
            torch.testing.assert_close(stored_key.float(), keys[-1], rtol=1e-3, atol=1e-3)
        place = stop
    assert place == len(memory) == memory.manifest.entries


def test_spans_give_the_text_back(lm, documents, memory):
    for document in documents:
        first, stop = memory.document_range(document.text)
        sources = [memory.provenance(entry, context=1000) for entry in range(first, stop)]
        assert [source.position for source in sources] == list(range(stop - first))
        for source in sources:
            assert (source.document, source.metadata) == (document.id, document.metadata)
            assert source.before + source.token + source.after == document.text
            assert document.text[source.start : source.stop] == source.token
        assert sources[-1].start == sources[-1].stop == len(document.text)  # the end-of-text token
        assert [source.stop for source in sources] == sorted(source.stop for source in sources)
        if document.text.isascii():
            assert "".join(source.token for source in sources) == document.text
        own = [lm.tokenizer.decode([value]) for value in memory.values[first : stop - 1]]
        assert all(source.token == text for source, text in zip(sources, own, strict=False) if "\ufffd" not in text)


def test_provenance_shows_as_much_context_as_asked_for(memory):
    source = memory.provenance(3, context=4)
    assert len(source.before) <= 4
    assert len(source.after) == 4
    for entry in (-1, len(memory)):
        with pytest.raises(ConfigError, match=f"entry is {entry}; expected 0 to {len(memory) - 1}"):
            memory.provenance(entry)


def test_segments_change_nothing_but_the_files(tmp_path):
    documents = random_documents()
    one = build(documents, tmp_path / "one")
    many = build(documents, tmp_path / "many", segment_entries=1)
    some = build(documents, tmp_path / "some", segment_entries=250)
    assert [len(item.manifest.segments) for item in (one, many, some)] == [1, 6, 3]
    entries = np.random.default_rng(0).integers(0, len(one), 50)
    for other in (many, some):
        assert other.values.tolist() == one.values.tolist()
        assert other.keys.gather_keys(entries).equal(one.keys.gather_keys(entries))
        assert list(other.documents()) == list(one.documents())
        assert list(other.entry_ranges()) == list(one.entry_ranges())
        assert [other.provenance(int(entry)) for entry in entries] == [one.provenance(int(entry)) for entry in entries]
        assert other.document_range(documents[4].text) == one.document_range(documents[4].text)
        blocks = list(other.keys.key_blocks(70))
        assert [first for first, _ in blocks] == np.cumsum([0] + [len(block) for _, block in blocks])[:-1].tolist()
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), all_keys(one).float().numpy())
        queries = all_keys(one)[:20].float().numpy() + 0.1
        for mine, theirs in zip(one.search(queries, 9), other.search(queries, 9), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("key_dtype", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_keys_are_rounded_to_the_type_of_storage(tmp_path, key_dtype, dtype):
    document = random_documents(1)[0]
    memory = build([document], tmp_path / "memory", key_dtype=key_dtype)
    expected = torch.empty(len(memory), 8)
    for rows, keys in FakeEncoder().keys([FakeEncoder().tokenize(document).ids]):
        expected[rows] = keys
    assert all_keys(memory).equal(expected.to(dtype).float())
    assert Datastore(memory.path).manifest.keys == {"dtype": key_dtype, "width": 8}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_values_take_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    memory = build([Document("a", "x" + chr(vocab_size - 1))], tmp_path / "memory", FakeEncoder(vocab_size=vocab_size))
    assert memory.values.dtype == dtype
    assert memory.values.tolist() == [ord("x"), vocab_size - 1]
    assert memory.manifest.values == {"dtype": dtype}
    assert memory.lookup(np.zeros((1, 8), np.float32), 2)[1].dtype == torch.int64


def test_a_vocabulary_that_cannot_be_is_refused(tmp_path):
    for size in (0, (1 << 22) + 1, 10**40):
        with pytest.raises(ModelError, match=f"the vocabulary has {size} tokens; expected 1 to 4194304"):
            build([Document("a", "xyz")], tmp_path / "memory", FakeEncoder(vocab_size=size))
        assert not (tmp_path / "memory").exists()
    assert len(build([Document("a", "xyz")], tmp_path / "memory", FakeEncoder(vocab_size=1 << 22)))


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="'a' have ids from 0 to 233; expected 0 to 199"):
        build([Document("a", "é")], tmp_path / "memory", FakeEncoder(vocab_size=200))
    assert not (tmp_path / "memory").exists()


def with_nan(number, keys):
    keys[-1, -1] = torch.nan if number == 2 else 0.0
    return keys


@pytest.mark.parametrize(
    ("encoder", "key_dtype", "message"),
    [
        (FakeEncoder(change=with_nan), "float16", "keys that are NaN or infinite; check its weights"),
        (FakeEncoder(change=with_nan), "bfloat16", "keys that are NaN or infinite; check its weights"),
        (FakeEncoder(scale=1e6), "float16", r"keys up to .*e\+06 overflow float16; use key type bfloat16"),
        (FakeEncoder(change=lambda _, keys: keys + 3.4e38), "bfloat16", "overflow bfloat16; check the model's weights"),
    ],
)
def test_keys_that_cannot_be_stored_are_an_error(tmp_path, encoder, key_dtype, message):
    with pytest.raises(KeyOverflow, match=message):
        build(random_documents(), tmp_path / "memory", encoder, key_dtype=key_dtype)
    assert list(tmp_path.iterdir()) == []


def test_keys_too_large_for_float16_fit_bfloat16(tmp_path):
    memory = build(random_documents(), tmp_path / "memory", FakeEncoder(scale=1e6), key_dtype="bfloat16")
    assert all_keys(memory).float().abs().max() > 65504


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, keys: keys[:, :1], r"keys have shape \(10, 1\); expected \(10, 8\)"),
        (lambda _, keys: keys[:1], r"keys have shape \(1, 8\); expected \(10, 8\)"),
    ],
)
def test_an_encoder_that_gives_other_keys_than_it_says_is_refused(tmp_path, change, message):
    with pytest.raises(ShapeError, match=message):
        build(random_documents(), tmp_path / "memory", FakeEncoder(change=change))
    assert not (tmp_path / "memory").exists()


def test_an_encoder_that_forgets_entries_is_refused(tmp_path):
    encoder = FakeEncoder()
    every = encoder.keys
    encoder.keys = lambda sequences: list(every(sequences))[1:]
    with pytest.raises(ShapeError, match="10 of 101 entries got no key"):
        build(random_documents(1), tmp_path / "memory", encoder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"key_dtype": "float32"}, "key type is 'float32'; expected"), ({"segment_entries": 0}, "segment_entries is 0")],
)
def test_settings_that_cannot_work_are_refused_before_reading(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(iter(lambda: pytest.fail("was read"), 1), tmp_path / "memory", **settings)
    assert list(tmp_path.iterdir()) == []


class ShortEncoder(FakeEncoder):
    """Drops all but the first token of documents named "cut", as a tokenizer without a start token may."""

    def tokenize(self, document):
        document, ids, spans = super().tokenize(document)
        stop = 1 if document.id == "cut" else None
        return Tokenized(document, ids[:stop], spans[:stop])


def test_text_without_a_token_to_store_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="no token of list can be stored"):
        build([Document("cut", "text")], tmp_path / "memory", ShortEncoder())
    with pytest.raises(CorpusError, match="no text was found"):
        build([Document("a", " ")], tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


def test_a_document_of_one_token_has_no_entry_but_is_kept(tmp_path):
    texts = {"a": "one", "cut": "two", "c": "three"}
    memory = build([Document(name, text) for name, text in texts.items()], tmp_path / "memory", ShortEncoder())
    ranges = [(item["id"], item["entries"]) for item in memory.documents()]
    assert ranges == [("a", (0, 3)), ("cut", (3, 3)), ("c", (3, 8))]
    assert [memory.provenance(entry).document for entry in range(8)] == ["a"] * 3 + ["c"] * 5


def test_metadata_of_any_kind_is_stored(tmp_path):
    day = datetime.date(2024, 2, 29)
    memory = build(
        [Document("a", "text", {"day": day, "deep": {"n": [1, None]}, "half": "\ud800"})], tmp_path / "memory"
    )
    assert memory.provenance(0).metadata == {"day": "2024-02-29", "deep": {"n": [1, None]}, "half": "\ud800"}
    with pytest.raises(CorpusError, match="the metadata of 'a' cannot be stored as JSON"):
        build([Document("a", "text", {("a", "tuple"): 1})], tmp_path / "other")


def test_info_and_manifest_describe_what_is_there(memory, documents):
    info = Datastore(memory.path).info()
    assert (info["entries"], info["documents"], info["segments"]) == (len(memory), len(documents), 3)
    files = [path for path in (memory.path / "segments").rglob("*") if path.is_file()]
    assert info["bytes"] == sum(path.stat().st_size for path in files)
    assert info["corpus"] == {"source": "list", "skipped": 0, "complete": True}
    assert info["index"] == {"kind": "exact"}
    assert repr(memory).endswith(f"{len(memory)} entries, 5 documents)")


def test_documents_left_out_are_counted(tmp_path):
    memory = build([Document("a", "text"), Document("b", ""), Document("c", " ")], tmp_path / "memory")
    assert memory.manifest.corpus["skipped"] == 2


def test_another_encoder_tokenizer_or_key_site_is_refused_by_name(tiny_lm, lm, memory):
    memory.manifest.check_bound(lm.identity)
    memory.manifest.check_bound(tiny_lm().identity)  # the same model, made again
    cases = [
        (tiny_lm(seed=1), "built with tiny-llama-0 .*but the model given is tiny-llama-1 "),
        (tiny_lm("gpt2"), "built with tiny-llama-0 .*but the model given is tiny-gpt2-0 "),
        (
            tiny_lm(tokenizer="reversed"),
            "the tokenizer [0-9a-f]{12} of tiny-llama-0, but the one given is [0-9a-f]{12} of",
        ),
        (tiny_lm(key_site="final_norm_output"), r"keys from model.layers.1.mlp \(input\), but .* at model \(output\)"),
    ]
    for other, message in cases:
        with pytest.raises(DatastoreMismatch, match=message):
            memory.manifest.check_bound(other.identity)
