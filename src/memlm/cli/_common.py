"""Options and output that several verbs share."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, ModelError
from ..text import count as count
from ..text import printable

if TYPE_CHECKING:
    from ..cache import Cache
    from ..datastore import Datastore
    from ..documents import Corpus
    from ..mixtures import Mixture as AnyMixture
    from ..models import BlackBox, LanguageModel

Model = Annotated[str, typer.Argument(help="'reference', a folder made by save_pretrained, or a name on the hub.")]
Memory = Annotated[Path, typer.Argument(help="Folder of the datastore.", metavar="DATASTORE")]
MemoryOrNone = Annotated[
    Path, typer.Argument(help="Folder of the datastore; 'none' where a cache is all the memory.", metavar="DATASTORE")
]
Text = Annotated[list[Path], typer.Argument(help="Files or folders of text: .txt, .md, .jsonl[.gz|.xz|.zst], ….")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA by default where there is one.")]
KeySite = Annotated[
    str | None, typer.Option(help="last_ffn_input, final_norm_output, or a module's dotted path[:output].")
]
Context = Annotated[int | None, typer.Option(help="Tokens of left context a window.")]
Stride = Annotated[int | None, typer.Option(help="Tokens scored a window.")]
MaxTokens = Annotated[int | None, typer.Option(help="Use so many tokens of the text; all by default.")]
Mixture = Annotated[
    Path | None,
    typer.Option(
        help="Settings saved by `memlm tune --save`: the file, or the folder if it has one file for this datastore; "
        "FOLDER/METHOD, such as mixtures/adapter, where `memlm compare --mixtures` saved several."
    ),
]
Weight = Annotated[float | None, typer.Option("--lambda", help="Interpolation weight λ, the memory's, in [0, 1].")]
Temperature = Annotated[float | None, typer.Option(help="Divides squared distances.")]
Endpoint = Annotated[
    str | None,
    typer.Option(
        help="Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1: the model is there, and MODEL "
        "makes the keys alone. OPENAI_API_KEY is sent."
    ),
]
EndpointModel = Annotated[str | None, typer.Option(help="Name of the model at --endpoint; same tokenizer as MODEL.")]
TopLogprobs = Annotated[int, typer.Option(min=1, help="Most likely tokens asked of --endpoint at every place.")]
K = Annotated[int | None, typer.Option("--k", help="Neighbors a token.")]


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notes off stderr; memlm shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_model(
    name: str, dtype: str, device: str | None, key_site: str | None, context: int | None, stride: int | None
) -> LanguageModel:
    """Load a model and tell where its keys are read, if that is not the usual place."""
    from ..models import load

    quiet_libraries()
    lm = load(name, dtype=dtype, device=device, key_site=key_site, context=context, stride=stride)
    if lm.site.note:
        note(lm.site.note)
    return lm


def note_left_out(corpus: Corpus) -> None:
    """Tell which documents had no text or were binary."""
    for name, reason in list(corpus.skipped.items())[:5]:
        note(f"left out {name}: {reason}")
    if len(corpus.skipped) > 5:
        note(f"left out {len(corpus.skipped) - 5} more documents without text or binary")


def state(memory: Datastore) -> dict[str, Any]:
    """Return what a datastore is after a change."""
    manifest = memory.manifest
    return {
        "path": str(memory.path),
        "version": manifest.version,
        "documents": manifest.documents,
        "entries": manifest.entries,
    }


def described_state(memory: Datastore) -> str:
    """Return the same for people."""
    manifest = memory.manifest
    entries, documents = count(manifest.entries, "entry", "entries"), count(manifest.documents, "document")
    return f"now {entries} of {documents}, version {manifest.version}"


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())


def open_memory(path: Path) -> Datastore | None:
    """Open a datastore; None for the word none, which no folder here may then have as its name."""
    from ..datastore import Datastore

    return None if str(path) == "none" else Datastore(path)


def load_for(memory: Datastore | None, name: str, dtype: str, device: str | None) -> LanguageModel:
    """Load the model of a datastore, with its key site and windows; refuse another one."""
    if memory is None:
        return load_model(name, dtype, device, None, None, None)
    encoder, windows = memory.manifest.encoder, memory.manifest.windows
    try:
        lm = load_model(name, dtype, device, encoder["key_site"]["name"], windows["context"], windows["stride"])
    except ModelError as error:
        built_with = f"{encoder['name']} ({encoder['architecture']})"
        raise ModelError(f"{error}. The datastore {memory.path} was built with {built_with}") from error
    memory.manifest.check_bound(lm.identity)
    return lm


def open_all(
    model: str,
    datastore: Path,
    mixture: Path | None,
    weight: float | None,
    temperature: float | None,
    k: int | None,
    dtype: str,
    device: str | None,
) -> tuple[LanguageModel, list[Datastore | Cache], AnyMixture]:
    """Open a datastore, load its model and take the settings: what is quick to check comes first.

    Returns:
        The model, the memories that the mixture is for (the datastore, a cache, or both), and the mixture.
    """
    from ..mixtures import KnnMixture

    memory = None
    if mixture is not None and not mixture.is_file():
        memory = open_memory(datastore)
        mixture = _find_mixture(mixture, memory)
    settings = load_mixture(mixture, weight, temperature, k)
    memory = memory or open_memory(datastore)
    if mixture is None and k is None and isinstance(settings, KnnMixture) and memory is not None:
        settings = dataclasses.replace(settings, k=min(settings.k, len(memory)))
    memories = memories_of(settings, memory)
    if mixture is not None and memory is not None and memory in memories:
        _tell_of_another(mixture, memory)
    return load_for(memory, model, dtype, device), memories, settings


def _tell_of_another(mixture: Path, memory: Datastore) -> None:
    """Say so where saved settings were fitted with other datastores; which may be what is wanted."""
    from ..mixtures import fitted_with

    recorded, given = fitted_with(mixture), memory.manifest.content_sha256
    if recorded and given not in recorded:
        others = ", ".join(item[:12] for item in recorded[:3])
        note(
            f"{mixture} was fitted with the datastore {others}, but {memory.path} is {given[:12]}; `memlm tune` fits "
            "settings to this one"
        )


def memories_of(mixture: AnyMixture, memory: Datastore | None) -> list[Datastore | Cache]:
    """Return what a mixture looks at: the datastore, and a cache where it has a place for one."""
    from ..cache import Cache
    from ..mixtures import CACHE

    memories: list[Datastore | Cache] = []
    for kind, k in zip(mixture.expects, mixture.ks, strict=True):
        if kind == CACHE:
            memories.append(Cache(k))
        elif memory is None:
            raise ConfigError("this mixture searches a datastore, none is given; name one in the place of none")
        elif memory in memories:
            raise ConfigError("this mixture is for several datastores, the command line takes one; use it from Python")
        else:
            check_k(k, memory)
            memories.append(memory)
    mixture.check_memories(memories)
    return memories


def mixture_name(memory: Datastore, method: str) -> str:
    """Return the name under which a fitted mixture is saved in a folder."""
    slug = method.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
    return f"{memory.manifest.content_sha256[:12]}-{slug}.json"


def _find_mixture(path: Path, memory: Datastore | None) -> Path:
    """Return the file that a folder with one mixture for a datastore means, or FOLDER/METHOD where there are several.

    What means no file is returned as it is.
    """
    if memory is None:
        raise ConfigError(f"{path} is no file, and which one of a folder only a datastore could tell; name a file")
    folder, method = (path, "") if path.is_dir() else (path.parent, path.name)
    named = folder / mixture_name(memory, method)
    if method and named.is_file():
        return named
    pattern = mixture_name(memory, "*")
    found = sorted(folder.glob(pattern))
    if method and not found:
        return path
    if not found:
        raise ConfigError(
            f"{folder} holds none for this datastore ({pattern}); `memlm tune … --save {folder}` adds one"
        )
    if method or len(found) > 1:
        methods = sorted(item.stem.partition("-")[2] for item in found)
        raise ConfigError(
            f"{folder} holds {len(found)} mixtures for this datastore: {', '.join(methods)}; name one of them, such as "
            f"--mixture {folder / methods[0]}"
        )
    return found[0]


def behind(endpoint: str | None, model: str | None, top: int, encoder: LanguageModel) -> LanguageModel | BlackBox:
    """Return the model at an endpoint, if one is given, with the model loaded as its encoder."""
    if (endpoint is None) != (model is None):
        raise ConfigError("--endpoint URL and --endpoint-model NAME come together; pass both, or neither")
    if endpoint is None or model is None:
        return encoder
    from ..models import BlackBox

    return BlackBox(endpoint, model, encoder, top=top)


def check_k(k: int, memory: Datastore) -> None:
    """Raise ConfigError where more neighbors are asked for than there are."""
    if k > len(memory):
        entries = count(len(memory), "entry", "entries")
        raise ConfigError(f"k is {k:,}, but {memory.path} has {entries}; expected at most so many")


def load_mixture(path: Path | None, weight: float | None, temperature: float | None, k: int | None) -> AnyMixture:
    """Take saved settings and put those given on the command line in their place."""
    from ..mixtures import KnnMixture
    from ..mixtures import load_mixture as load_saved

    given = {"interpolation_weight": weight, "temperature": temperature, "k": k}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if path is not None:
        loaded = load_saved(path)
        for name, value in changes.items():
            _check_change(loaded, name, value, path)
        return dataclasses.replace(loaded, **changes)
    if weight is None or temperature is None:
        raise ConfigError(
            "λ and temperature are not known; pass --mixture FILE (`memlm tune … --save FILE` makes one), or --lambda "
            "and --temperature"
        )
    return KnnMixture(**changes)


def _check_change(loaded: AnyMixture, name: str, value: float, path: Path) -> None:
    """Refuse an option that a saved mixture has no place for, or that was settled when its network was fitted."""
    option = {"interpolation_weight": "--lambda"}.get(name, f"--{name}")
    if name not in {field.name for field in dataclasses.fields(loaded)}:
        raise ConfigError(f"{option} is {value}, but {path} ({loaded.kind}) has no such setting; leave {option} out")
    fitted = getattr(loaded, name)
    # k only gives a learned weight more neighbors; an adapter's network looks at all that is settled here
    if hasattr(loaded, "network") and value != fitted and (name != "k" or loaded.kind == "adapter"):
        raise ConfigError(
            f"{option} is {value}, but the network of {path} ({loaded.kind}) was fitted with {fitted:.6g}; leave "
            f"{option} out, or fit again by `memlm tune`"
        )


def check_output(path: Path | None, *suffixes: str) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path} ends in {path.suffix!r}; expected {' or '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} cannot be written: it is no file; name another one")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that can be neither made nor written to before the work is done, not after."""
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{folder} cannot be written to: {place} is not a folder; name another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written to: {place} allows no new files; name another folder")


def check_text(name: str, text: str) -> None:
    """Refuse text that no tokenizer takes."""
    if not text.strip():
        raise ConfigError(f"the {name} is empty; give some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the {name} is not valid UTF-8; expected text") from error


def metric_name(metric: str) -> str:
    """Return a datastore's metric in words."""
    return {"squared_l2": "squared L2", "inner_product": "inner product"}[metric]


def describe_search(details: dict[str, Any]) -> str:
    """Return in a few words how a datastore is searched."""
    if "factory" not in details:
        return details["kind"]
    return f"{details['factory']}, recall@{details['recall_k']} {details['recall']:.3f}"


def emit(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout, for people or for programs."""
    if as_json:
        typer.echo(json.dumps(value, allow_nan=False))
    else:
        say(text)


def say(text: str, *, err: bool = False) -> None:
    """Print lines; on a terminal, long ones are wrapped at a space. What a datastore's maker wrote may be in them."""
    text = printable(text)
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        indented = [(line, line[: len(line) - len(line.lstrip())]) for line in text.split("\n")]
        text = "\n".join(
            textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            for line, indent in indented
        )
    typer.echo(text, err=err)


def note(text: str) -> None:
    """Say something on stderr."""
    say(f"memlm: {text}", err=True)
