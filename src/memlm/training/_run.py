"""What runs share: a folder bound to its recipe, a log that is cut where a run goes on, and a rate that falls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import sync_directory, sync_file, write_atomically


def check_recipe(described: dict[str, Any], fixed: list[str], output: Path) -> None:
    """Refuse to continue a run with another recipe.

    Args:
        described: The recipe, of tables and values.
        fixed: What must be as it was: keys, or "table.key".
        output: Folder of the run, whose `recipe.json` has the recipe of before.

    Raises:
        ConfigError: Something is not as it was, or the folder holds something else than a run.
    """
    path = output / "recipe.json"
    if not path.exists():
        for other in output.iterdir() if output.exists() else ():
            if other.name.startswith(".recipe.json."):  # a run that was killed before it had written anything
                continue
            raise ConfigError(f"{output} holds {other.name}, which no run made; name a new folder")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in fixed:
        old, new = _value(before, key), _value(described, key)
        if old != new:
            raise ConfigError(f"{output} holds a run with {key} = {old}, not {new}; expected the same or a new folder")


def _value(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table


def file_names(paths: list[str]) -> list[str]:
    """Return a short name for each path, its own where that tells it from the others."""
    short = [Path(path).name.split(".")[0] for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def relative_rate(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Return the share of the peak learning rate at a step, counted from 0: up, flat, down to zero.

    Example:
        >>> [relative_rate(step, 4, 2, 0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    remaining = (steps - step) / max(1.0, decay_fraction * steps)
    return min(warm, remaining)


def cut_log(path: Path, step: int) -> None:
    """Drop the losses of steps after the checkpoint: they will be taken again. A line may be broken by a kill."""
    rows: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows[json.loads(line)["step"]] = line
        except json.JSONDecodeError:
            continue
    write_atomically(path, "".join(f"{rows[number]}\n" for number in sorted(rows) if number <= step))


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error."""
    staging = target.with_name(target.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, target: Path) -> None:
    """Rename a folder once its files are on disk; another one in its place is removed."""
    for file in staging.rglob("*"):
        if file.is_file():
            sync_file(file)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    sync_directory(target.parent)
