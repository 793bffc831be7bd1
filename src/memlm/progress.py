"""Progress of long work, on stderr, with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Advance = Callable[[int], None]


class _AmountColumn(ProgressColumn):
    """Percentage done, or units done where nobody knows how many there are."""

    def render(self, task: Task) -> Text:
        done = f"{task.completed:,.0f}" if task.total is None else f"{task.percentage:3.0f} %"
        return Text(done, style="progress.percentage")


class _RateColumn(ProgressColumn):
    """Speed of a task in its own unit."""

    def render(self, task: Task) -> Text:
        speed = task.speed if not task.finished else None  # over the last half minute; at the end, over everything
        if speed is None and task.elapsed:
            speed = task.completed / task.elapsed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class _TimeColumn(ProgressColumn):
    """Time left, or time taken where that is not known."""

    def render(self, task: Task) -> Text:
        left = None if task.finished else task.time_remaining
        seconds = (task.elapsed or 0.0) if left is None else left
        return Text(f"{timedelta(seconds=int(seconds))}{' left' if left is not None else ''}", style="progress.elapsed")


@contextmanager
def progress(description: str, total: int | None, unit: str = "tokens", *, show: bool = True) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; yield a function that advances it by a number of units.

    Where stderr is not a terminal, one line is printed at the end instead of a bar.
    """
    if not show:
        yield lambda amount: None
        return
    console = Console(file=sys.stderr)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(24), _AmountColumn(), _RateColumn(), _TimeColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, unit=unit)
            yield lambda amount: bar.advance(task, amount)
        return
    done = 0

    def count(amount: int) -> None:
        nonlocal done
        done += amount

    started = time.perf_counter()
    yield count
    seconds = time.perf_counter() - started
    sys.stderr.write(f"{description}: {done:,} {unit} in {seconds:,.1f} s, {done / max(seconds, 1e-9):,.0f} {unit}/s\n")
