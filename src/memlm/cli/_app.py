"""The application: verbs, errors and exit codes.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a check found something wrong, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from ..text import printable
from . import (
    _add,
    _build,
    _compact,
    _compare,
    _compress,
    _demo,
    _doctor,
    _eval,
    _explain,
    _generate,
    _history,
    _hub,
    _info,
    _merge,
    _overlap,
    _parquet,
    _prune,
    _recipes,
    _remove,
    _train,
    _tune,
    _verify,
)

app = typer.Typer(
    name="memlm",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command("build")(_build.build)
app.command("add")(_add.add)
app.command("update")(_add.update)
app.command("remove")(_remove.remove)
app.command("merge")(_merge.merge)
app.command("compact")(_compact.compact)
app.command("compress")(_compress.compress)
app.command("prune")(_prune.prune)
app.command("export")(_parquet.export)
app.command("import")(_parquet.import_)
app.command("push")(_hub.push)
app.command("pull")(_hub.pull)
app.command("history")(_history.history)
app.command("rollback")(_history.rollback)
app.command("verify")(_verify.verify)
app.command("audit")(_verify.audit)
app.command("info")(_info.info)
app.command("overlap")(_overlap.overlap)
app.command("tune")(_tune.tune)
app.command("eval")(_eval.evaluate)
app.command("generate")(_generate.generate)
app.command("explain")(_explain.explain)
app.command("compare")(_compare.compare)
app.add_typer(_recipes.app, name="recipes")
app.add_typer(_train.app, name="train")
app.command("demo")(_demo.demo)
app.command("doctor")(_doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"memlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    version: bool = typer.Option(
        False, "--version", help="Show the version and leave.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Give a language model a memory outside its weights."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that memlm raises on purpose become one line and exit code 2."""
    from ..errors import MemlmError

    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # "?" for λ, say, on a terminal that lacks it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(arguments, prog_name="memlm")
    except (MemlmError, OSError) as error:
        if "--debug" in arguments:
            raise
        typer.secho(f"memlm: {_reason(error)}", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except SystemExit as leaving:  # Typer turns KeyboardInterrupt into this
        if leaving.code == 130:
            typer.secho("memlm: interrupted", fg=typer.colors.RED, err=True)
        raise


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning in one line; where in the source it arose is of no use to who runs a command."""
    typer.secho(f"memlm: {' '.join(printable(str(message)).split())}", fg=typer.colors.YELLOW, err=True)


def _reason(error: Exception) -> str:
    """Return an error's message in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(printable(str(error)).split())
