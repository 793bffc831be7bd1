"""Progress of long work, on stderr, with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]


class _RateColumn(ProgressColumn):
    """Speed of a task in its own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{speed:,.0f} {unit}/s" if speed else f"-- {unit}/s", style="progress.data.speed")


@contextmanager
def progress(description: str, total: int | None, unit: str = "tokens", *, show: bool = True) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; yield a function that advances it by a number of units.

    Where stderr is not a terminal, one line is printed at the end instead of a bar.
    """
    if not show:
        yield lambda amount: None
        return
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, unit=unit)
        yield lambda amount: bar.advance(task, amount)
