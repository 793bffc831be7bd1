"""Experiments of no work, for the code that runs them; a module of its own, because processes have to find it."""

import dataclasses
import os
import time
from dataclasses import dataclass

from memlm.errors import ConfigError
from memlm.recipes import Claim, Experiment, Measured, Place, Row, Unit


@dataclass(frozen=True)
class Sizes:
    groups: int = 3
    shift: float = 0.0


def show(mean):
    return 10 * mean


def change(difference):
    return f"{difference:+.2f} points"


def prepare(sizes, folder):
    with (folder / "log").open("a") as log:
        log.write("prepared\n")
    return {"text": "made up"}


def work(sizes, arm):
    return 10 * sizes.groups


def measure(task):
    """Arm "high" is 1 above arm "low" in every group, give or take the seed."""
    with (task.folder / "log").open("a") as log:
        log.write(f"{task.arm} {task.seed}\n")
    mean = {"low": 1.0, "high": 2.0}[task.arm] + 0.01 * task.seed * (task.arm == "high") + task.size.shift
    counts = [1 + group for group in range(task.size.groups)]
    for _ in counts:
        task.advance(10)
    rows = {"row": Row([mean * count for count in counts], f"seed {task.seed}")}
    if task.arm == "high":
        rows["other row"] = Row([0.0 for _ in counts])
    return Measured(counts=counts, groups="pages", rows=rows, facts={"arm": task.arm})


def refuse(task):
    raise ConfigError(f"no {task.arm}")


def vanish(task):
    os._exit(3)


def interrupt(task):
    """Finish one arm, then be interrupted."""
    if task.arm == "high":
        raise KeyboardInterrupt
    return measure(task)


def wait(task):
    """Finish one arm, then take for ever."""
    if task.arm == "high":
        (task.folder / f"waiting-{os.getpid()}").touch()
        time.sleep(3600)
    return measure(task)


LOW, HIGH = Place("low", "row"), Place("high", "row")
TOY = Experiment(
    name="toy",
    summary="Nothing at all",
    description="Two numbers are compared.",
    arms={"low": "the lower one", "high": "the higher one"},
    rows=("row", "other row", "row that nobody has"),
    claims=(Claim(text="low is lower", lower=LOW, higher=HIGH, by=0.5),),
    unit=Unit("points", show, change),
    sizes={"full": Sizes(), "one": Sizes(groups=1), "shifted": Sizes(shift=1.0)},
    prepare=prepare,
    work=work,
    measure=measure,
)


def toy(**changes):
    return dataclasses.replace(TOY, **changes)
