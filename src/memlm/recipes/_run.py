"""Running an experiment: every arm from every seed, each kept as soon as it is measured and never run twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_json
from ..progress import progress
from ._claims import judge
from ._experiment import Experiment, Measured, Row, Task
from ._outcome import Outcome
from ._processes import in_processes

Say = Callable[[str], None]


def run_experiment(
    experiment: Experiment,
    output: str | Path,
    *,
    size: str = "full",
    seeds: int = 3,
    processes: int = 1,
    show_progress: bool = True,
    say: Say = lambda text: None,
) -> Outcome:
    """Run what is not there yet, and judge the claims by everything.

    Args:
        experiment: From `find_experiment`.
        output: Folder of the run. It keeps everything that is finished, and the trained models; a run that was stopped,
            or that is to have more seeds, continues.
        size: Name of one of the experiment's sizes.
        seeds: How often every arm is trained: from seed 0 on.
        processes: Arms that are trained at the same time, each in a process of one thread; 1 stays in this process.
            With more, a program that calls this must be guarded by `if __name__ == "__main__"`.
        show_progress: Show rate and time left on stderr.
        say: Called with a line whenever an arm is finished.

    Raises:
        ConfigError: There is no such size, a number is below 1, or the folder holds something else.
    """
    output = Path(output)
    if size not in experiment.sizes:
        raise ConfigError(f"size is {size!r}; expected one of {', '.join(experiment.sizes)}")
    for name, number in (("seeds", seeds), ("processes", processes)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; expected a whole number of at least 1")
    sizes = experiment.sizes[size]
    _claim_folder(experiment, sizes, output)
    facts = _prepare(experiment, sizes, output)
    wanted = [(arm, seed) for seed in range(seeds) for arm in experiment.arms]
    missing = [pair for pair in wanted if not _place(output, *pair).exists()]
    if missing:
        _run(experiment, sizes, output, missing, processes, show_progress, say)
    runs = {arm: [load_measured(_place(output, arm, seed)) for seed in range(seeds)] for arm in experiment.arms}
    outcome = Outcome(
        experiment=experiment,
        size=size,
        sizes=sizes,
        facts=facts,
        runs=runs,
        verdicts=tuple(judge(claim, runs) for claim in experiment.claims),
    )
    outcome.save(output)
    return outcome


def run_task(experiment: Experiment, task: Task) -> float:
    """Measure one arm, keep what was measured, and return the seconds that it took."""
    started = time.perf_counter()
    measured = experiment.measure(task)
    place = _place(task.folder, task.arm, task.seed)
    place.parent.mkdir(exist_ok=True)
    write_json(place, asdict(measured) | {"rows": {name: row._asdict() for name, row in measured.rows.items()}})
    return time.perf_counter() - started


def load_measured(path: Path) -> Measured:
    """Read what `run_task` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**values | {"rows": {name: Row(**row) for name, row in values["rows"].items()}})


def _place(output: Path, arm: str, seed: int) -> Path:
    return output / "measured" / f"{arm}-{seed}.json"


def _claim_folder(experiment: Experiment, sizes: Any, output: Path) -> None:
    """Refuse a folder with anything but an earlier run of the same experiment."""
    path, settings = output / "settings.json", {"experiment": experiment.name, "sizes": asdict(sizes)}
    if not output.exists() or not any(output.iterdir()):
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    if not path.exists():
        raise ConfigError(
            f"{output} holds {min(item.name for item in output.iterdir())}, which no recipe made; name a new folder"
        )
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["experiment"] != experiment.name:
        raise ConfigError(f"{output} holds a run of {before['experiment']}; name another folder for {experiment.name}")
    for name, value in settings["sizes"].items():
        if before["sizes"].get(name) != value:
            raise ConfigError(
                f"{output} holds a run with {name} = {before['sizes'].get(name)}, this one has {value}: another size, "
                "or another version of memlm; name a new folder"
            )


def _prepare(experiment: Experiment, sizes: Any, output: Path) -> dict[str, Any]:
    """Make what all arms share, once: it stays the same, whatever Python continues the run."""
    path = output / "prepared.json"
    if not path.exists():
        write_json(path, experiment.prepare(sizes, output))
    return json.loads(path.read_text(encoding="utf-8"))


def _run(
    experiment: Experiment,
    sizes: Any,
    output: Path,
    missing: list[tuple[str, int]],
    processes: int,
    show_progress: bool,
    say: Say,
) -> None:
    work = sum(experiment.work(sizes, arm) for arm, _ in missing)
    started, done, finished = time.perf_counter(), 0, 0

    with progress(experiment.name, work, show=show_progress) as advance:

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            advance(tokens)

        def tell(arm: str, seed: int, seconds: float) -> None:
            nonlocal finished
            finished += 1
            left = (time.perf_counter() - started) * (work / max(done, 1) - 1) if finished < len(missing) else 0.0
            say(
                f"{arm}, seed {seed}: {_clock(seconds)}; {finished} of {len(missing)} done"
                + (f", about {_clock(left)} left" if left > 0 else "")
            )

        if processes == 1:
            for arm, seed in missing:
                tell(arm, seed, run_task(experiment, Task(sizes, arm, seed, output, count)))
        else:
            in_processes(experiment, sizes, output, missing, processes, count, tell)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
