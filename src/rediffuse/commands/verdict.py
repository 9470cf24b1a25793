"""Compare what was rebuilt with what the row records, and judge it.

Knows nothing of git, DVC or MLflow: entries of dvc.lock, numbers and records in, lines of text out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rediffuse.commands.compare import WITHIN
from rediffuse.tracking.lock import Entries, hashes

STATUS = {"exact": 0, "exact-env-differs": 3, "diverged": 4}  # exit status; 1 is an error or a refusal
SHORT = 8  # digits of a hash that are shown


class Output(NamedTuple):
    """An output of a stage and its hash, as recorded and as rebuilt; None where one of the two lacks it."""

    stage: str
    path: str
    recorded: str | None
    rebuilt: str | None

    @property
    def same(self) -> bool:
        return self.recorded is not None and self.recorded == self.rebuilt


class Metric(NamedTuple):
    """A number that differs from the row's, or that the row lacks (recorded: None).

    spread: recorded standard deviation between sample sets, if there is one.
    """

    name: str
    recorded: float | None
    rebuilt: float
    spread: float | None

    def __str__(self) -> str:
        if self.recorded is None:
            return f"{self.name}: not in the row, rebuilt {self.rebuilt!r}"
        difference = self.rebuilt - self.recorded
        text = f"{self.name}: recorded {self.recorded!r}, rebuilt {self.rebuilt!r}, {difference:+.3g}"
        if not self.spread:
            return f"{text}, no spread is recorded"
        units = difference / self.spread
        within = "within" if abs(units) < WITHIN else "beyond"
        return f"{text} or {units:+.2f} units of spread, {within} the recorded spread"


def compare_outputs(recorded: Entries, rebuilt: Entries) -> list[Output]:
    """Return every output of the rebuilt stages, in the order in which they ran."""
    found = list[Output]()
    for stage, entry in rebuilt.items():
        before, after = hashes(recorded.get(stage, {}).get("outs", ())), hashes(entry.get("outs", ()))
        paths = dict.fromkeys([*before, *after])
        found += [Output(stage, path, before.get(path), after.get(path)) for path in paths]
    return found


def compare_metrics(
    recorded: Mapping[str, float], rebuilt: Mapping[str, float], records: Mapping[str, Any]
) -> list[Metric]:
    """Return the rebuilt numbers that differ from the row's.  records: {model: record}, for their spread."""
    return [
        Metric(name, recorded.get(name), value, spread_of(records, name))
        for name, value in rebuilt.items()
        if recorded.get(name) != value
    ]


def spread_of(records: Mapping[str, Any], name: str) -> float | None:
    """Return the standard deviation of a metric such as ddpm/fashion-mnist-cnn-v1/fd, if recorded."""
    model, *keys = name.split("/")
    instrument, rest = ["instruments", *keys[:1]], keys[1:]
    places = [[*instrument, "scores", *rest], [*instrument, *rest], [*instrument, "rows", "real", *rest]]
    for place in [*places, keys, ["memorisation", *keys]]:
        node = records.get(model)
        for key in [*place, "std"]:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, int | float) and math.isfinite(node) and node > 0:
            return float(node)
    return None


def judge(outputs: Sequence[Output], metrics: Sequence[Metric], same_environment: bool) -> str:
    """Return exact, exact-env-differs or diverged.  A number that the row lacks contradicts nothing."""
    if not all(output.same for output in outputs) or any(metric.recorded is not None for metric in metrics):
        return "diverged"
    return "exact" if same_environment else "exact-env-differs"


def table(outputs: Sequence[Output]) -> str:
    """Return a line for each output, under a head, in columns."""
    rows: list[tuple[str, ...]] = [("stage", "output", "recorded", "rebuilt", "")]
    for output in outputs:
        hashes = [(value or "missing")[:SHORT] for value in (output.recorded, output.rebuilt)]
        rows.append((output.stage, output.path, *hashes, "same" if output.same else "DIFFERS"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
