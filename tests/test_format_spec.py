"""docs/datastore-format.md to the letter: a reader in the standard library and NumPy; the page's tables are checked."""

import json
import re
import struct
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from memlm import Datastore

PAGE = (Path(__file__).parents[1] / "docs/datastore-format.md").read_text(encoding="utf-8")
TYPES = {"I8": "i1", "U8": "u1", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U16": "<u2", "U32": "<u4", "I64": "<i8"}


def read_manifest(folder):
    pointer = json.loads((folder / "current.json").read_bytes())
    content = json.loads((folder / f"manifest-{pointer['version']:06d}.json").read_bytes())
    others = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    assert content["sha256"] == sha256(text.encode("ascii")).hexdigest() == pointer["sha256"]
    assert (content["format"], content["format_version"]) == ("memlm-datastore", 4)
    assert content["version"] == pointer["version"]
    return content


def fields(value, path=""):
    """Name the fields of a manifest as the page does."""
    if isinstance(value, dict):
        in_files = path.endswith(".files")
        return set().union(*(fields(v, f"{path}.{'<file>' if in_files else k}".strip(".")) for k, v in value.items()))
    return {path}.union(*(fields(item, f"{path}[]") for item in (value if isinstance(value, list) else ())))


def read_tensors(data):
    (length,) = struct.unpack_from("<Q", data)
    tensors = {}
    for name, item in json.loads(data[8 : 8 + length]).items():
        assert re.search(rf"^\| `\w+\.safetensors` \| `{name}` \| [^|]*`{item['dtype']}`", PAGE, re.MULTILINE)
        content = data[slice(*(8 + length + offset for offset in item["data_offsets"]))]
        tensors[name] = np.frombuffer(content, TYPES[item["dtype"]]).reshape(item["shape"])
    return tensors


def key_at(lm, manifest, ids, i):
    """Run the model over the window of entry i and return what its key site shows there."""
    context, stride, seen = manifest["windows"]["context"], manifest["windows"]["stride"], []
    module = lm.model.get_submodule(manifest["encoder"]["key_site"]["path"])
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    lm.model(torch.tensor([ids[max(0, 1 + stride * (i // stride) - context) : i + 1]]))
    hook.remove()
    return seen[0].detach().numpy()


@pytest.mark.parametrize(("key_dtype", "index"), [("float16", "exact"), ("bfloat16", "IVF2,SQ8")])
def test_a_reader_written_from_the_page(key_dtype, index, tiny_lm, documents, tmp_path):
    lm, folder, gone = tiny_lm(context=6, stride=5), tmp_path / "memory", documents[1]
    stored = iter([document for document in documents if document != gone])
    Datastore.build(lm, documents, folder, key_dtype=key_dtype, index=index, segment_entries=80, show_progress=False)
    Datastore(folder).remove(gone.id)
    manifest = read_manifest(folder)
    table = set(re.findall(r"^\| `([^`]+)` \|", PAGE.split("## Manifest")[1].split("## Entries")[0], re.MULTILINE))
    assert fields(manifest) | {"index", "parent", "codec"} == {
        name for name in table if not name.startswith("codec.") and (index != "exact" or "index." not in name)
    }
    for part in manifest["segments"]:
        raw = {name: (folder / "segments" / part["name"] / name).read_bytes() for name in part["files"]}
        assert part["files"] == {n: {"bytes": len(b), "sha256": sha256(b).hexdigest()} for n, b in raw.items()}
        tensors = read_tensors(raw["entries.safetensors"]) | read_tensors(raw["keys.safetensors"])
        keys = tensors["keys"] if key_dtype == "float16" else (tensors["keys"].astype("<u4") << 16).view("<f4")
        deleted = {d for first, stop in part["details"]["deleted"]["documents"] for d in range(first, stop)}
        lengths = np.diff(tensors["entry_starts"])
        assert part["details"]["deleted"]["entries"] == sum(int(lengths[d]) for d in deleted)
        for d in sorted(set(range(part["details"]["documents"])) - deleted):
            document, (start, stop) = next(stored), tensors["entry_starts"][d : d + 2]
            assert tensors["ids"][d].tobytes() == sha256(document.id.encode()).digest()
            assert tensors["texts"][d].tobytes() == sha256(document.text.encode()).digest()
            line = json.loads(raw["documents.jsonl"][slice(*tensors["text_starts"][d : d + 2])])
            assert line.pop("sha256") == sha256(document.text.encode()).hexdigest()
            assert line == {"id": document.id, "metadata": document.metadata, "text": document.text}
            text = lm.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
            ids = [manifest["tokenizer"]["start"], *text["input_ids"], manifest["tokenizer"]["end"]]
            assert tensors["values"][start:stop].tolist() == ids[1:]
            assert tensors["spans"][start:stop].tolist() == [*map(list, text.offset_mapping), [len(document.text)] * 2]
            for i in {0, min(5, len(ids) - 2), len(ids) - 2}:
                np.testing.assert_allclose(keys[start + i], key_at(lm, manifest, ids, i), rtol=0.01, atol=0.01)
    assert next(stored, None) is None


def test_a_reader_of_pruned_documents_written_from_the_page(tiny_lm, documents, tmp_path):
    lm, folder = tiny_lm(context=6, stride=5), tmp_path / "memory"
    memory = Datastore.build(lm, documents, folder, segment_entries=80, show_progress=False)
    whole, merged = len(memory), memory.prune(20)
    memory.add(lm, [type(documents[0])("new", "the new one")])
    manifest, left = read_manifest(folder), 0
    for part in manifest["segments"]:
        raw = {name: (folder / "segments" / part["name"] / name).read_bytes() for name in part["files"]}
        tensors = read_tensors(raw["entries.safetensors"]) | read_tensors(raw["keys.safetensors"])
        assert ("positions" in tensors) == ("counts" in tensors)
        for d in range(part["details"]["documents"]):
            start, stop = tensors["entry_starts"][d : d + 2]
            line = json.loads(raw["documents.jsonl"][slice(*tensors["text_starts"][d : d + 2])])
            text = lm.tokenizer(line["text"], add_special_tokens=False, return_offsets_mapping=True)
            ids = [manifest["tokenizer"]["start"], *text["input_ids"], manifest["tokenizer"]["end"]]
            spans = [*map(list, text.offset_mapping), [len(line["text"])] * 2]
            ones = {"positions": np.arange(stop - start), "counts": np.ones(stop - start, int)}
            positions, counts = (tensors.get(name, ones[name])[start:stop].tolist() for name in ones)
            if line["id"] == "new":
                assert "counts" not in tensors
                continue
            assert positions == sorted(set(positions))
            assert (min(counts), sum(counts)) == (1, len(ids) - 1)
            assert tensors["values"][start:stop].tolist() == [ids[i + 1] for i in positions]
            assert tensors["spans"][start:stop].tolist() == [spans[i] for i in positions]
            for entry, i in list(enumerate(positions, int(start)))[::9]:
                np.testing.assert_allclose(tensors["keys"][entry], key_at(lm, manifest, ids, i), rtol=0.01, atol=0.01)
            left += stop - start
    assert left == whole - merged < whole - 10


@pytest.mark.parametrize(("key_dtype", "width"), [("int8", 20), ("float16", 32)])
def test_a_reader_of_compressed_keys_written_from_the_page(key_dtype, width, tiny_lm, documents, tmp_path):
    lm, folder = tiny_lm(context=6, stride=5), tmp_path / "memory"
    memory = Datastore.build(lm, documents, folder, segment_entries=80, show_progress=False)
    memory.compress(width, key_dtype)
    manifest = read_manifest(folder)
    table = set(re.findall(r"^\| `([^`]+)` \|", PAGE.split("## Manifest")[1].split("## Entries")[0], re.MULTILINE))
    assert fields(manifest) | {"index", "parent", "codec"} == {
        name for name in table if "index." not in name and "deleted.documents[" not in name and "parent." not in name
    }
    part, built = manifest["codec"], manifest["codec"]["details"]["keys"]
    raw = (folder / "codec" / part["name"] / "codec.safetensors").read_bytes()
    assert part["files"] == {"codec.safetensors": {"bytes": len(raw), "sha256": sha256(raw).hexdigest()}}
    codec, shapes = read_tensors(raw), {"V": built["width"], "W": manifest["keys"]["width"]}
    for name, tensor in codec.items():
        shape = re.search(rf"^\| `codec\.safetensors` \| `{name}` \| `F32` \| \(([VW, ]+)\)", PAGE, re.MULTILINE)[1]
        assert tensor.shape == tuple(shapes[letter] for letter in shape.split(", "))
    document = documents[0]
    text = lm.tokenizer(document.text, add_special_tokens=False)
    ids = [manifest["tokenizer"]["start"], *text["input_ids"], manifest["tokenizer"]["end"]]
    codes = read_tensors((folder / "segments" / manifest["segments"][0]["name"] / "keys.safetensors").read_bytes())
    for i in range(0, len(ids) - 1, 9):
        projected = (key_at(lm, manifest, ids, i) - codec["mean"]) @ codec["projection"]
        stored = codec["offset"] + codec["step"] * codes["keys"][i]
        np.testing.assert_allclose(
            stored, projected, rtol=0.01, atol=0.01 + codec["step"].max() / 2 * (key_dtype == "int8")
        )
