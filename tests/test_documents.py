"""Reading documents: every format, what is left out and counted, and what is an error."""

import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest
import zstandard

from memlm import Corpus, Document
from memlm.documents import describe
from memlm.errors import CorpusError

ROWS = [
    {"id": "a", "text": "first\ntext", "year": 1999, "tags": ["x"]},
    {"text": "naïve 🙂"},
    {"id": 3, "text": "third"},
    {"id": None, "text": "fourth"},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
# Enough text that a compressed file is several blocks long
LONG = b"".join(json.dumps({"text": f"line {n} of {n * n}"}).encode() + b"\n" for n in range(20_000))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path, suffix):
    path = write(tmp_path / f"rows.jsonl{suffix}", COMPRESS[suffix](JSONL))
    assert list(Corpus(path)) == [
        Document("a", "first\ntext", {"year": 1999, "tags": ["x"]}),
        Document(f"{path.name}:2", "naïve 🙂", {}),
        Document("3", "third", {}),
        Document(f"{path.name}:4", "fourth", {}),
    ]


def test_blank_lines_byte_order_marks_and_line_ends_are_read_over(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert [(item.id, item.text) for item in Corpus(path)] == [("rows.jsonl:1", "one"), ("rows.jsonl:3", "two")]


def test_parts_compressed_one_after_another_are_all_read(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = write(tmp_path / f"rows.jsonl{suffix}", compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n'))
        assert [item.text for item in Corpus(path)] == ["one", "two"], suffix


@pytest.mark.parametrize("name", ["page.txt", "page.md", "page.py", "README"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbfTitle\r\n\r\nna\xc3\xafve\r\n")
    for source in (path, str(path), [path], Corpus(path)):
        assert list(Corpus(source)) == [Document(name, "Title\n\nnaïve\n")]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    write(tmp_path / "b.txt", b"B")
    write(tmp_path / "a" / "z.md", b"Z")
    write(tmp_path / "a" / "rows.jsonl", b'{"text": "row"}\n')
    write(tmp_path / ".git" / "config", b"hidden")
    write(tmp_path / "a" / ".cache", b"hidden")
    assert [item.id for item in Corpus(tmp_path)] == ["a/rows.jsonl:1", "a/z.md", "b.txt"]


def test_lists_hold_paths_documents_rows_and_corpora(tmp_path):
    path = write(tmp_path / "page.txt", b"page")
    mixed = [path, Document("d", "text"), {"text": "row"}, {"id": "r", "text": "row"}, Corpus([Document("e", "more")])]
    assert [item.id for item in Corpus(mixed)] == ["page.txt", "d", "2", "r", "e"]


def test_a_datasets_dataset_and_a_stream_of_one():
    columns = {"id": ["x", "y"], "text": ["one", "two"], "label": [0, 1]}
    dataset = datasets.Dataset.from_dict(columns)
    expected = [Document("x", "one", {"label": 0}), Document("y", "two", {"label": 1})]
    assert list(Corpus(dataset)) == list(Corpus(dataset.to_iterable_dataset())) == expected
    with pytest.raises(CorpusError, match="row 0: expected a string under 'text', got NoneType; rename the field"):
        list(Corpus(dataset.rename_column("text", "content")))
    with pytest.raises(CorpusError, match="one split of a dataset"):
        list(Corpus(datasets.DatasetDict({"train": dataset})))


def test_documents_without_text_are_counted_and_left_out():
    corpus = Corpus([Document("a", "text"), Document("b", ""), Document("c", " \n\t "), Document("d", "more")])
    for _ in range(2):  # reading twice counts once
        assert [item.id for item in corpus] == ["a", "d"]
        assert corpus.skipped == {"b": "no text", "c": "no text"}


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\0\0", b"caf\xe9", b"\xff\xfeT\0", b"text\0text"])
def test_a_binary_file_is_an_error_where_named_and_counted_in_a_folder(tmp_path, data):
    path = write(tmp_path / "folder" / "image.png", data)
    with pytest.raises(CorpusError, match=r"image\.png is not text .*; expected UTF-8 text or JSON lines"):
        list(Corpus(path))
    write(tmp_path / "folder" / "page.txt", b"page")
    corpus = Corpus(tmp_path / "folder")
    assert [item.id for item in corpus] == ["page.txt"]
    assert list(corpus.skipped) == ["image.png"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b'{"text": "ok"}\n{"text": \n', r"rows\.jsonl, line 2: not valid JSON"),
        (b'{"text": "ok"}\n["text"]\n', r"rows\.jsonl, line 2: expected a JSON object, got list"),
        (b'{"text": 7}\n', r"rows\.jsonl, line 1: expected a string under 'text', got int"),
        (b'{"body": "x"}\n', r"rows\.jsonl, line 1: expected a string under 'text', got NoneType"),
        (b'{"text": "ok"}\ncaf\xe9\n', r"rows\.jsonl could not be read after line \d"),
        (b'{"text": "ok", "n": ' + b"9" * 5000 + b"}\n", r"rows\.jsonl, line 1: not valid JSON \(Exceeds the limit"),
        (b"[" * 200_000 + b"\n", r"rows\.jsonl, line 1: not valid JSON"),
    ],
)
def test_bad_json_lines_name_the_line(tmp_path, rows, message):
    with pytest.raises(CorpusError, match=message):
        list(Corpus(write(tmp_path / "rows.jsonl", rows)))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("rows", [JSONL, LONG])
def test_a_compressed_file_that_ends_early_is_an_error(tmp_path, suffix, rows):
    whole = COMPRESS[suffix](rows)
    for size in (len(whole) - 1, len(whole) // 2, 20):
        write(tmp_path / "in" / f"rows.jsonl{suffix}", whole[:size])
        write(tmp_path / "in" / "sound.txt", b"sound")
        with pytest.raises(CorpusError, match=r"rows\.jsonl.* could not be read after line \d+"):
            list(Corpus(tmp_path / "in"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, suffix):
    whole = COMPRESS[suffix](LONG)
    for place in (0, 12, len(whole) // 2):
        data = bytearray(whole)
        data[place : place + 8] = bytes(8)
        with pytest.raises(CorpusError, match=r"rows\.jsonl"):
            list(Corpus(write(tmp_path / f"rows.jsonl{suffix}", data)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/place", "no/such/place does not exist; expected a file or a folder of text"),
        ("word " * 2000, "'word word .* is no path"),
        ([], "no text was found in list; expected at least one document"),
        ([Document("a", " ")], r"no text was found in list \(1 left out: no text or binary\)"),
        ({"text": "row"}, "a single mapping is not a corpus"),
        (7, "cannot read documents from a int; pass a path or an iterable"),
        ([7], "cannot read documents from a int"),
        ([Document("", "x")], "a document has the id ''; ids name documents: give it one, or leave the field out"),
        ([{"id": "", "text": "x"}], "a document has the id ''"),
        ([Document("a", "x"), Document("a", "y")], "two documents have the id 'a'; ids must be unique"),
    ],
)
def test_what_is_no_corpus(source, message):
    with pytest.raises(CorpusError, match=message):
        list(Corpus(source))


def test_an_empty_folder_has_no_text(tmp_path):
    with pytest.raises(CorpusError, match="no text was found in "):
        list(Corpus(tmp_path))


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = write(tmp_path / "rows.jsonl", rb'{"text": "a\ud83db \ud83d\ude42"}')
    assert [item.text for item in Corpus(path)] == ["a\ufffdb 🙂"]


def test_a_file_name_that_is_not_utf8_gives_an_id_that_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path / name, b"text")
    assert [item.id for item in Corpus(tmp_path)] == ["caf\ufffd.txt"]
    assert describe(tmp_path / name).endswith("caf\ufffd.txt")


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    assert [document.id for document in Corpus(["a", Path("b")])] == ["a/x.txt", "b/x.txt"]
    assert [document.id for document in Corpus([Path("a")])] == ["x.txt"]
