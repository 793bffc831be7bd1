"""Datastores on a hub: pushed in one commit, pulled whole or not at all, and every refusal in one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, get_token

from command_line import refused, run
from fake_encoder import FakeEncoder, random_documents
from hub_server import Repository, serving
from memlm import Datastore
from memlm.datastore import verify
from memlm.errors import ConfigError, HubError
from memlm.sharing import pull, push
from test_parquet import content

NAME = "someone/memory"
# The client's own use of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, which the client in this process talks to with a token that may write."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "memory"
    settings = {"index": "IVF2,Flat", "segment_entries": 300, "show_progress": False}
    Datastore.build(FakeEncoder(), random_documents(8), path, **settings)
    return path


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A working directory with a copy of a datastore of three versions, one segment more than the first."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "memory")
    return tmp_path


def names(path):
    return sorted(str(item.relative_to(path)) for item in Path(path).rglob("*") if item.is_file())


def test_a_datastore_goes_there_and_back(hub, place):
    memory = Datastore("memory")
    assert memory.manifest.version > 1
    done = push("memory", NAME, license="cc0-1.0")
    repository = hub.repositories[NAME]
    assert (done.url, done.commit) == (f"{hub.url}/datasets/{NAME}", repository.commits[-1][0])
    assert len(repository.commits) == 2  # that of the hub, and one
    held = [name for name in repository.commits[-1][1] if name != ".gitattributes"]
    manifest = f"manifest-{memory.manifest.version:06d}.json"
    parts = [name for name in names("memory") if "/" in name]
    assert sorted(held) == sorted(["README.md", "current.json", manifest, *parts])
    assert done.files == len(held) - 1

    again = pull(NAME, place / "again")
    assert content(again) == content(memory)
    assert again.manifest.content_sha256 == memory.manifest.content_sha256
    assert again.index.details == memory.index.details
    assert verify("again") == []
    assert names("again") == sorted(held)
    assert not [item for item in Path("again").rglob("*") if item.is_symlink()]
    assert not Path("cache").exists()
    assert again.add(FakeEncoder(), random_documents(9)) == (1, 0)
    assert verify("again") == []
    assert [item["version"] for item in again.history()] == [done.version, done.version + 1]


def test_the_card_says_that_it_contains_the_corpus(hub, place):
    push("memory", NAME, license="cc0-1.0")
    card = hub.repositories[NAME].commits[-1][1]["README.md"].decode()
    assert hub.cards == [card]  # the hub checks it before anything is committed
    assert card.startswith("---\nlicense: cc0-1.0\ntags:\n- memlm\n")
    assert "**A datastore contains its corpus.** Whoever gets it can read the documents" in card
    assert "| entries | 808 |" in card
    assert "| documents | 8 |" in card
    assert "| encoder | fake (Fake), fingerprint 000000000000 |" in card
    assert f"memlm pull {NAME} memory/" in card
    push("memory", "someone/other")
    card = hub.repositories["someone/other"].commits[-1][1]["README.md"].decode()
    assert card.startswith("---\ntags:")
    assert "| license of the documents | not stated |" in card


def test_another_version_takes_the_place_of_the_first(hub, place):
    first = push("memory", NAME)
    memory = Datastore("memory")
    before = content(memory)
    memory.remove(["d1"])
    memory.compact()
    push("memory", NAME)
    assert len(hub.repositories[NAME].commits) == 3
    assert content(pull(NAME, "second")) == content(memory)
    held = {name for name in hub.repositories[NAME].commits[-1][1] if name not in ("README.md", ".gitattributes")}
    assert held == set(names("second")) - {"README.md"}
    assert content(pull(NAME, "first", revision=first.commit)) == before
    assert push("memory", NAME).version == memory.manifest.version  # again, unchanged


def test_what_was_removed_is_not_pushed(hub, place):
    Datastore("memory").remove(["d1"])
    line = refused("push", "memory", NAME)
    assert "memory still has the text of 1 removed document on the disk, which would be shared, too" in line
    assert "`memlm compact memory` takes it off" in line
    assert hub.requests == []
    Datastore("memory").compact()
    push("memory", NAME)
    files = hub.repositories[NAME].commits[-1][1].values()
    stored = [data.encode() if isinstance(data, str) else data for data in files]
    texts = {item.id: item.text.encode() for item in random_documents(8)}
    found = {name for name, text in texts.items() if any(text in data for data in [*stored, *hub.objects.values()])}
    assert found == set(texts) - {"d1"}


def test_an_unfinished_build_and_damage_are_not_pushed(hub, place):
    def fail(number, keys):
        if number > 60:
            raise KeyboardInterrupt
        return keys

    settings = {"segment_entries": 300, "show_progress": False}
    with pytest.raises(KeyboardInterrupt):
        Datastore.build(FakeEncoder(change=fail), random_documents(8), "unfinished", **settings)
    assert "unfinished is unfinished; run the same build again" in refused("push", "unfinished", NAME)
    file = Path("memory/segments/000000/documents.jsonl")
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    assert "does not match its checksum" in refused("push", "memory", NAME)
    assert hub.requests == []


def test_a_private_repository_is_private_or_refused(hub, place, monkeypatch):
    push("memory", NAME, private=True)
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    commits = len(hub.repositories[NAME].commits)
    assert f"{NAME} is there, and public" in refused("push", "memory", NAME, "--private")
    assert len(hub.repositories[NAME].commits) == commits


@pytest.mark.parametrize(
    "file", ["current.json", "manifest-000005.json", "segments/000001/keys.safetensors", "index/000005/index.faiss"]
)
def test_a_damaged_download_leaves_nothing(hub, place, file):
    push("memory", NAME)
    assert file in hub.repositories[NAME].commits[-1][1]

    def damage(name, data):
        return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if name == file else data

    hub.damage = damage
    line = refused("pull", NAME, "again", place=place, left=str(place / "cache"))
    assert "what was downloaded is damaged: " in line
    assert "nothing was kept" in line
    hub.damage = lambda name, data: data
    assert content(pull(NAME, "again")) == content(Datastore("memory"))


def test_a_download_that_breaks_off_leaves_nothing(hub, place):
    push("memory", NAME)
    hub.damage = lambda name, data: data[:-1] if name.endswith("keys.safetensors") else data
    refused("pull", NAME, "again", place=place)
    hub.damage = lambda name, data: data
    hub.refusal = "documents.jsonl", 500
    assert "the hub answered 500" in refused("pull", NAME, "again", place=place)


def test_a_repository_may_hold_what_is_no_datastore(hub, place):
    push("memory", NAME)
    hub.repositories[NAME].commit({"notes.txt": b"x", ".writer.json": b"{}", "segments/../../evil.txt": b"x"}, ())
    pull(NAME, "again")
    assert names("again") == sorted([*names_of(hub), "README.md"])
    assert not Path("../evil.txt").exists()
    hub.repositories[NAME].commit({}, ["current.json"])
    assert f"{NAME} holds no datastore" in refused("pull", NAME, "other", place=place)


def asked_for(hub):
    """Names of files that were downloaded."""
    pattern = re.compile(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)")
    return {match[1] for _, path in hub.requests if (match := pattern.fullmatch(path))}


def test_nothing_is_downloaded_that_the_current_version_does_not_name(hub, place):
    push("memory", NAME)
    others = ["segments/000000/surprise.bin", "segments/evil/keys.safetensors", "index/000001/index.faiss"]
    others += ["codec/000001/codec.safetensors", "manifest-000001.json", "manifest-999999.json", ".current.json.1.tmp"]
    hub.repositories[NAME].commit(dict.fromkeys(others, b"x" * 5000) | {"README.md": b"x" * (1 << 20)}, ())
    hub.requests.clear()
    pull(NAME, "again")
    assert names("again") == sorted(set(names_of(hub)) - {*others, "README.md"})  # nor a card of such a size
    assert asked_for(hub) == set(names("again"))


def test_a_folder_that_was_put_there_by_hand_comes_without_its_earlier_versions(hub, place):
    memory = Datastore("memory")
    memory.remove(["d1"])
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit({name: Path("memory", name).read_bytes() for name in names("memory")}, ())
    again = pull(NAME, "again")
    assert content(again) == content(memory)
    assert [item["version"] for item in again.history()] == [memory.manifest.version]
    assert verify("again") == []
    assert len([name for name in names("again") if name.startswith("manifest-")]) == 1


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("segments/000000/keys.safetensors", b"", "keys.safetensors has 0 bytes; expected "),
        ("segments/000000/keys.safetensors", None, "keys.safetensors has no bytes; expected "),
        ("segments/000000/keys.safetensors", b"../../../../etc/passwd", "keys.safetensors has 22 bytes; expected "),
        ("manifest-000005.json", None, "manifest-000005.json is not a sound manifest (FileNotFoundError"),
        ("manifest-000005.json", b"{}\n", "manifest-000005.json is not a sound manifest (KeyError"),
        ("manifest-000005.json", bytes(1 << 26), "manifest-000005.json has 67108864 bytes, too many for a manifest"),
        ("current.json", bytes(1 << 26), "current.json has 67108864 bytes, too many for a manifest"),
        ("current.json", b'{"version": 7, "sha256": "0"}\n', "manifest-000007.json is not a sound manifest"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_rest_is_downloaded(hub, place, file, data, words):
    push("memory", NAME)
    hub.repositories[NAME].commit({} if data is None else {file: data}, [file] if data is None else ())
    hub.requests.clear()
    line = refused("pull", NAME, "again", place=place)
    assert "what was downloaded is damaged: " in line
    assert words in line
    assert place.name not in line  # of the hidden folder
    assert not [name for name in asked_for(hub) if "/" in name]


def test_a_newer_format_is_told_from_damage(hub, place):
    push("memory", NAME)
    held = {name: data for name, data in hub.repositories[NAME].commits[-1][1].items() if name.startswith("manifest-")}
    ((name, data),) = held.items()
    hub.repositories[NAME].commit({name: json.dumps(json.loads(data) | {"format_version": 99}).encode() + b"\n"}, ())
    assert refused("pull", NAME, "again", place=place).startswith(
        f"memlm: {NAME} has format version 99; this memlm reads up to 4: install a newer memlm"
    )


def names_of(hub):
    others = ("README.md", ".gitattributes", "notes.txt", ".writer.json", "segments/../../evil.txt")
    return [name for name in hub.repositories[NAME].commits[-1][1] if name not in others]


def test_every_refusal_is_one_line(hub, place, monkeypatch):
    push("memory", NAME, private=True)
    for command, words in (
        (["push", "memory", "memory"], "the repository is 'memory'; expected USER/NAME"),
        (["push", "memory", "a/b/c"], "the repository is 'a/b/c'; expected USER/NAME"),
        (["pull", "../x", "again"], "the repository is '../x'; expected USER/NAME"),
        (["push", "nowhere", NAME], "nowhere holds no datastore"),
        (["push", "memory", NAME, "--license", "My: own"], "the license is 'My: own'; expected an identifier"),
        (["pull", NAME, "memory"], "memory exists already; name a new one, or remove it first"),
        (["pull", "someone/nothing", "again"], "someone/nothing is no dataset repository that you may see (404)"),
        (["pull", NAME, "again", "--revision", "nothing"], f"{NAME} has no such revision"),
    ):
        assert words in refused(*command, place=place)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert f"{NAME} may not be changed or read with this token (403)" in refused("push", "memory", NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the hub knows no such user (401); log in" in refused("push", "memory", NAME)
    assert "the hub knows no such user (401); log in" in refused("pull", NAME, "again", place=place)
    monkeypatch.delenv("HF_TOKEN")
    assert f"{NAME} is no dataset repository that you may see (401)" in refused("pull", NAME, "again", place=place)
    assert get_token() is None
    hub.refusal = "/api/", 502
    assert f"the hub answered 502 for {NAME}" in refused("pull", NAME, "again", place=place)
    hub.refusal = "/api/", 200  # a page in the place of JSON
    assert "answered something else than expected" in refused("pull", NAME, "again", place=place)
    hub.refusal = None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        for command in (["pull", NAME, "again"], ["push", "memory", NAME]):
            assert "cannot be reached (ConnectError: " in refused(*command, place=place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached in offline mode; unset HF_HUB_OFFLINE" in refused("pull", NAME, "again", place=place)


def test_a_commit_of_somebody_else_in_between_is_refused(hub, place, monkeypatch):
    push("memory", NAME)
    from huggingface_hub import HfApi

    create_commit = HfApi.create_commit

    def late(self, *arguments, **settings):
        hub.repositories[NAME].commit({"other.txt": b"x"}, ())
        return create_commit(self, *arguments, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(HubError, match="the hub answered 412"):
        push("memory", NAME)


def test_python_refuses_what_the_command_line_refuses(hub, place):
    with pytest.raises(ConfigError, match="exists already"):
        pull(NAME, "memory")
    with pytest.raises(HubError, match="no dataset repository"):
        pull(NAME, "again")


def test_the_commands_with_the_client_s_own_settings(hub, place):
    """Endpoint and token come from the environment, as its client takes them; large files by their own route."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | settings | {"HF_HOME": str(place / "home")}

    def memlm(*command):
        command = [sys.executable, "-m", "memlm", *command, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    told, progress = memlm("push", "memory", NAME)
    assert told["commit"] == hub.repositories[NAME].commits[-1][0]
    assert progress.startswith("uploading: ")
    told, progress = memlm("pull", NAME, "again")
    assert (told["documents"], told["entries"]) == (8, 808)
    assert progress.startswith("downloading: ")
    assert content(Datastore("again")) == content(Datastore("memory"))
    assert hub.objects
    done = run("pull", NAME, "other")
    assert done.out.startswith(f"other: {NAME}, sound; now 808 entries of 8 documents, version ")


def test_compressed_keys_travel_with_their_codec(hub, place):
    memory = Datastore("memory")
    memory.compress(memory.width // 2)
    push("memory", NAME)
    assert any(name.startswith("codec/") for name in hub.repositories[NAME].commits[-1][1])
    again = pull(NAME, place / "again")
    assert content(again) == content(memory)
    assert verify(place / "again") == []
    queries = memory.keys.gather_keys(np.arange(5)).numpy()
    assert queries.shape[1] == again.keys.width < memory.width
