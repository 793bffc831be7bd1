"""Options and output that several verbs share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..datastore import Datastore
    from ..mixtures import KnnMixture
    from ..models import LanguageModel

Model = Annotated[str, typer.Argument(help="'reference', a folder made by save_pretrained, or a name on the hub.")]
Memory = Annotated[Path, typer.Argument(help="Folder of the datastore.", metavar="DATASTORE")]
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
Mixture = Annotated[Path | None, typer.Option(help="Settings saved by `memlm tune --save`.")]
Weight = Annotated[float | None, typer.Option("--lambda", help="Interpolation weight λ, the memory's, in [0, 1].")]
Temperature = Annotated[float | None, typer.Option(help="Divides squared distances.")]
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


def load_for(memory: Datastore, name: str, dtype: str, device: str | None) -> LanguageModel:
    """Load a model with the key site and windows of a datastore."""
    encoder, windows = memory.manifest.encoder, memory.manifest.windows
    site = encoder["key_site"]
    site_name = site["name"]
    return load_model(name, dtype, device, site_name, windows["context"], windows["stride"])


def load_mixture(path: Path | None, weight: float | None, temperature: float | None, k: int | None) -> KnnMixture:
    """Take saved settings and put those given on the command line in their place."""
    import dataclasses

    from ..mixtures import KnnMixture

    given = {"interpolation_weight": weight, "temperature": temperature, "k": k}
    changes = {name: value for name, value in given.items() if value is not None}
    if path is not None:
        return dataclasses.replace(KnnMixture.load(path), **changes)
    if weight is None or temperature is None:
        raise ConfigError(
            "λ and temperature are not known; pass --mixture FILE (made by `memlm tune … --save FILE`), or --lambda and "
            "--temperature"
        )
    return KnnMixture(**changes)


def emit(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on stdout, for people or for programs."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    """Say something on stderr."""
    typer.echo(f"memlm: {text}", err=True)


def show_progress() -> bool:
    """Whether bars make sense: always on stderr, unless it was closed."""
    return sys.stderr is not None
