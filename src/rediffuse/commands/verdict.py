"""What became of each output, number and library when a row was rebuilt, and the verdict.

Knows nothing of git, DVC or MLflow: entries of dvc.lock, numbers and records in, lines of text out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rediffuse.commands.compare import WITHIN
from rediffuse.tracking.lock import Entries, hashes

STATUS = {"exact": 0, "exact-env-differs": 3, "diverged": 4}  # exit status; 1 is that of errors and refusals
SHORT = 8  # digits of a hash that are shown


@dataclass(frozen=True)
class Output:
    """An output of a stage and its hash, as recorded and as rebuilt; None where one of the two lacks it."""

    stage: str
    path: str
    recorded: str | None
    rebuilt: str | None

    @property
    def same(self) -> bool:
        return self.recorded is not None and self.recorded == self.rebuilt


@dataclass(frozen=True)
class Metric:
    """A number that differs, or that the row lacks (recorded: None).  spread: the recorded standard deviation, if there is one."""

    name: str
    recorded: float | None
    rebuilt: float
    spread: float | None

    def __str__(self) -> str:
        if self.recorded is None:
            return f"{self.name}: not in the row, rebuilt {self.rebuilt!r}"
        text = f"{self.name}: recorded {self.recorded!r}, rebuilt {self.rebuilt!r}, difference {self.rebuilt - self.recorded:+.3g}"
        if not self.spread:
            return f"{text}, no recorded spread to count in"
        units = (self.rebuilt - self.recorded) / self.spread
        return f"{text}, {units:+.2f} units of spread: {'within' if abs(units) < WITHIN else 'beyond'} the recorded spread"


def compare_outputs(stages: Sequence[str], recorded: Entries, rebuilt: Entries) -> list[Output]:
    """A line for each output of these stages, in their order."""
    lines = []
    for stage in stages:
        before, after = (hashes(lock.get(stage, {}).get("outs", ())) for lock in (recorded, rebuilt))
        lines += [Output(stage, path, before.get(path), after.get(path)) for path in dict.fromkeys([*before, *after])]
    return lines


def compare_metrics(recorded: Mapping[str, float], rebuilt: Mapping[str, float], records: Mapping[str, Any]) -> list[Metric]:
    """The rebuilt numbers that the row has otherwise or not at all.  records: {model: record}, for the spread."""
    return [
        Metric(name, recorded.get(name), value, spread_of(records, name)) for name, value in rebuilt.items() if recorded.get(name) != value
    ]


def spread_of(records: Mapping[str, Any], name: str) -> float | None:
    """The standard deviation between sample sets of a metric such as ddpm/fashion-mnist-cnn-v1/fd, if the record has it."""
    model, *keys = name.split("/")
    record, *rest = records.get(model, {}), *keys
    if len(keys) == 2:
        places = [("instruments", keys[0], "scores", keys[1]), ("instruments", *keys), ("instruments", keys[0], "rows", "train", keys[1])]
    else:
        places = [tuple(rest), ("memorisation", *rest)]
    for place in places:
        node: Any = record
        for key in place:
            node = node.get(key) if isinstance(node, Mapping) else None
        std = node.get("std") if isinstance(node, Mapping) else None
        if isinstance(std, int | float) and math.isfinite(std) and std > 0:
            return float(std)
    return None


def judge(outputs: Sequence[Output], metrics: Sequence[Metric], same_environment: bool | None) -> str:
    """exact, exact-env-differs or diverged.  A number that the row lacks cannot contradict it; one that it has otherwise does."""
    if not all(output.same for output in outputs) or any(metric.recorded is not None for metric in metrics):
        return "diverged"
    return "exact-env-differs" if same_environment is False else "exact"


def first_diverging(outputs: Sequence[Output]) -> str | None:
    """The first stage, in their order, with an output that is not the same."""
    return next((output.stage for output in outputs if not output.same), None)


def table(outputs: Sequence[Output]) -> list[str]:
    """One line for each output, under a head, in columns."""
    rows = [("stage", "output", "recorded", "rebuilt", "")]
    rows += [(o.stage, o.path, _short(o.recorded), _short(o.rebuilt), "same" if o.same else "DIFFERS") for o in outputs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _short(value: str | None) -> str:
    return value[:SHORT] if value else "missing"
