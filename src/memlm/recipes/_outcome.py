"""What came out of an experiment: as a table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically, write_json
from ._claims import Range, Verdict, t_interval
from ._experiment import Experiment, Measured


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An experiment's numbers and what they say of its claims.

    Attributes:
        experiment: What was run.
        size: Name of its size …
        sizes: … and the numbers behind it.
        facts: What preparing told.
        runs: Of each arm what was measured, seed after seed.
        verdicts: One a claim.
    """

    experiment: Experiment
    size: str
    sizes: Any
    facts: Mapping[str, Any]
    runs: Mapping[str, Sequence[Measured]]
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether all claims hold."""
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def seeds(self) -> int:
        """How often every arm was trained."""
        return min(len(runs) for runs in self.runs.values())

    def means(self, arm: str, row: str) -> np.ndarray:
        """Return the mean of every seed, shape (seeds,); empty where the arm has no such row."""
        runs = [run for run in self.runs[arm] if row in run.rows]
        return np.array([sum(run.rows[row].sums) / sum(run.counts) for run in runs])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the sums of single groups as plain values."""
        unit = self.experiment.unit
        table = []
        for row in self.experiment.rows:
            for arm in self.experiment.arms:
                means = self.means(arm, row)
                if len(means):
                    settings = [run.rows[row].settings for run in self.runs[arm]]
                    mean, by_seed = float(means.mean()), [unit.of(value) for value in means.tolist()]
                    shown = {"mean": mean, unit.name: unit.of(mean), "by_seed": by_seed}
                    table.append({"row": row, "arm": arm, **shown, "settings": settings})
        return {
            "experiment": self.experiment.name,
            "holds": self.holds,
            "claims": [verdict.to_dict() for verdict in self.verdicts],
            "table": table,
            "size": self.size,
            "sizes": asdict(self.sizes),
            "seeds": self.seeds,
            "targets": sum(self._first.counts),
            "facts": dict(self.facts),
            "runs": {arm: [dict(run.facts) for run in runs] for arm, runs in self.runs.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `result.json` and `result.md`."""
        write_json(folder / "result.json", self.to_dict())
        write_atomically(folder / "result.md", self.markdown())

    def markdown(self) -> str:
        """Return description, claims, table and settings."""
        experiment = self.experiment
        arms = list(experiment.arms)
        lines = [f"# {experiment.name}", "", experiment.description.strip(), ""]
        titles = "claim", "holds", "lower", "higher", "difference", "over seeds", f"over {self._first.groups}"
        lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for verdict in self.verdicts:
            cells = [verdict.claim.text, "yes" if verdict.holds else "**no**", *self._words(verdict)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"{self._caption()}.", "", f"| {experiment.unit.name} | " + " | ".join(arms) + " |"]
        lines += ["|---" + "|---:" * len(arms) + "|"]
        for row, cells in self._cells():
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines += ["", "What the arms are:", ""]
        lines += [f"- **{arm}**: {meaning}" for arm, meaning in experiment.arms.items()]
        lines += ["", "What was tuned, from seed 0:", ""]
        for arm, runs in self.runs.items():
            lines += [f"- {arm}, {name}: {row.settings}" for name, row in runs[0].rows.items() if row.settings]
        numbers = ", ".join(f"{name} {value}" for name, value in asdict(self.sizes).items())
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        lines += ["", f"Size “{self.size}”: {numbers}.", "", f"Text: {facts}."]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        arms = list(self.experiment.arms)
        cells = dict(self._cells())
        first = max(map(len, cells))
        widths = [max(len(arm), *(len(row[place]) for row in cells.values())) + 2 for place, arm in enumerate(arms)]

        def line(name: str, row: Sequence[str]) -> str:
            return name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))

        lines = [f"{self._caption()}.", "", line("", arms), *(line(name, row) for name, row in cells.items()), ""]
        for verdict in self.verdicts:
            lower, higher, difference, seeds, groups = self._words(verdict)
            lines.append(f"{'holds' if verdict.holds else 'DOES NOT HOLD'}: {verdict.claim.text}")
            lines.append(
                f"    {lower} against {higher}, {difference}; over seeds {seeds}; over {verdict.groups} {groups}"
            )
        return "\n".join(lines)

    @property
    def _first(self) -> Measured:
        return next(iter(self.runs.values()))[0]

    def _caption(self) -> str:
        spread = f"mean of {self.seeds} seeds ± half of its 95 % interval" if self.seeds > 1 else "one seed"
        return f"{self.experiment.unit.name.capitalize()} on {sum(self._first.counts):,} test tokens, {spread}"

    def _cells(self) -> list[tuple[str, list[str]]]:
        """Return the rows that any arm has, with a cell for every arm."""
        rows = []
        for row in self.experiment.rows:
            found = [self.means(arm, row) for arm in self.experiment.arms]
            if any(len(means) for means in found):
                rows.append((row, [self._cell(means) for means in found]))
        return rows

    def _cell(self, means: np.ndarray) -> str:
        if not len(means):
            return ""
        of, interval = self.experiment.unit.of, t_interval(means)
        shown = f"{of(float(means.mean())):.2f}"
        return shown if interval is None else f"{shown} ± {abs(of(interval.high) - of(interval.low)) / 2:.2f}"

    def _words(self, verdict: Verdict) -> tuple[str, ...]:
        """Return the two means, the change from the higher one to the lower one, and its intervals."""
        claim, unit = verdict.claim, self.experiment.unit

        def interval(found: Range | None) -> str:
            return "–" if found is None else f"{unit.change(-found.high)} to {unit.change(-found.low)}"

        means = (f"{unit.of(float(self.means(*place).mean())):.2f}" for place in (claim.lower, claim.higher))
        difference = unit.change(-verdict.difference) + (f" (claimed {unit.change(-claim.by)})" if claim.by else "")
        return *means, difference, interval(verdict.over_seeds), interval(verdict.over_groups)
