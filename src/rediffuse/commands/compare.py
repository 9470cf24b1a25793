"""Compare evaluations, or refuse: numbers stand side by side only if the same ruler measured them.

The ruler is the instrument (SHA-256 of its weights, layer, shape, resizing), the reference images, the
settings of the metrics, the rounding of pixels, and N; see docs/evaluation.md.  A record is the content of
metrics/evaluation/{model}.json.  This module knows nothing of git, DVC or MLflow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from rediffuse.params import flatten
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS

Record = Mapping[str, Any]
ByRow = Mapping[str, Any]  # a value for each row, by its label

WITHIN = 2.0  # units of spread: other sampling seeds alone could have made a smaller difference

# Places in a record.  COMMON and all settings must agree; a missing value must not pass for an equal one.
COMMON = ["sampling.n", "sampling.rounding", "reference.sha256", "reference.split", "reference.n"]
NEEDED = ["model", "sampling.seeds", "settings.metric_seed", *COMMON]
RULER = ["sha256", "layer", "dimension", "shape", "resize"]  # of an instrument
SCALE = ["expected_bias", "floor"]  # of its Fréchet distance, at this N

# What is better; the metrics of the memorisation and the density, near 1 for real images, have no direction.
BETTER = {
    **dict.fromkeys(["fid", "fd", "fid_inf", "fd_inf", "kid", "ratio_to_real"], "lower"),
    **dict.fromkeys(["is", "precision", "recall", "coverage", "accuracy_score", "label_accuracy"], "higher"),
}
FOOTNOTES = f"""\
Units: the difference over the standard deviation between sample sets (root mean square of the two rows);
~ is less than {WITHIN:g} of them, within the spread.  A single set has no spread.
The spread is that of the sampling seeds alone; training again with another seed would add its own."""


@dataclass(frozen=True)
class Row:
    """An evaluation: its name, where it was found, its record, and flattened parameters (None: unknown)."""

    name: str
    origin: str
    record: Record
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Score:
    """The score of a row and, of a later row, its difference to the first.

    std: between sample sets (ddof = 1); None for a single set.  difference: None if the first has no score.
    units: the difference in units of spread; None if there is no spread.
    mark: better, worse, ~ (within the spread), or nothing without spread or direction.
    """

    mean: float
    std: float | None
    difference: float | None = None
    units: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the table: a metric, by an instrument or without, and the score of each row that has one."""

    instrument: str | None
    metric: str
    better: str
    scores: Mapping[str, Score | None]


@dataclass(frozen=True)
class Comparison:
    """What text, Markdown and JSON show: the rows by label, and one table, empty if nothing may be compared.

    same: sampling, reference images and settings common to all rows.  different: the others, and parameters
    that differ.  refusals: why scores may not be compared.  notes: what is left out.
    """

    rows: Mapping[str, Row]
    same: Mapping[str, Any]
    different: Mapping[str, ByRow]
    refusals: list[str]
    notes: list[str]
    table: list[Line] = field(default_factory=list)

    @property
    def title(self) -> str:
        return " and ".join(dict.fromkeys(row.record["model"] for row in self.rows.values()))


def compare(rows: Sequence[Row], instruments: Sequence[str] = ()) -> Comparison:
    """Judge whether the rows may be compared, and compare what may be, by all instruments or by these (ids).

    Raises UserError for fewer than two rows, a record that lacks what must agree, and an unknown instrument.
    """
    if len(rows) < 2:
        example = "name two or more, as in `rediffuse compare HEAD workspace`"
        raise UserError(f"a comparison needs at least two rows, got {len(rows)}: {example}")
    for row in rows:
        _check_record(row)
    labelled = {chr(ord("A") + i): row for i, row in enumerate(rows)}
    known = sorted({id for row in rows for id in row.record["instruments"]})
    if unknown := [id for id in instruments if id not in known]:
        have = ", ".join(known) or "none"
        raise UserError(f"--instrument {unknown[0]}: no row was measured with it; known here: {have}")

    found = _describe(labelled)
    if found.refusals:
        return found
    shared = [id for id in known if all(id in row.record["instruments"] for row in rows)]
    omitted = found.refusals if instruments or (known and not shared) else found.notes
    parts = {label: _parts(row.record) for label, row in labelled.items()}
    for part in dict.fromkeys(instruments or (part for each in parts.values() for part in each)):
        if lacking := [label for label, each in parts.items() if part not in each]:
            omitted.append(f"{part}: not measured in {', '.join(lacking)}")
        elif differing := _differing({label: each[part][0] for label, each in parts.items()}):
            found.refusals.extend(f"{part}: {name}: {_listed(values)}" for name, values in differing.items())
        else:
            scores = {label: each[part][1] for label, each in parts.items()}
            found.table.extend(_lines(part if part in known else None, scores))
    return found


# The guard


def _check_record(row: Row) -> None:
    flat, instruments = flatten(row.record), row.record.get("instruments")
    needed = NEEDED + [f"instruments.{id}.instrument.sha256" for id in instruments or ()]
    lacking = [path for path in needed if flat.get(path) is None]
    if instruments is None:
        lacking.append("instruments")
    if lacking:
        remedy = "it cannot be compared: make it again with `dvc repro`"
        raise UserError(f"the record in {row.name} ({row.origin}) lacks {', '.join(lacking)}, so {remedy}")


def _describe(rows: Mapping[str, Row]) -> Comparison:
    """Return the comparison without scores.  Its refusals forbid to compare any."""
    keys = ["model", "sampling", "reference", "settings"]
    conditions = {label: flatten({key: row.record[key] for key in keys}) for label, row in rows.items()}
    different = _differing(conditions)
    same = {name: value for name, value in conditions["A"].items() if name not in different}
    refused = [name for name in different if name in COMMON or name.startswith("settings.")]
    refusals = [f"{name}: {_listed(different.pop(name))}" for name in refused]
    notes = [f"the parameters of {label} are not known" for label, row in rows.items() if row.params is None]
    return Comparison(rows, same, different | _parameters(rows), refusals, notes)


def _parameters(rows: Mapping[str, Row]) -> dict[str, ByRow]:
    """Return the parameters that differ, without those of a model that affects no row."""
    params = {label: row.params for label, row in rows.items() if row.params is not None}
    used = {row.record["model"] for row in rows.values()}
    if any(each.get("ddpm.space") == "latents" for each in params.values()):
        used.add("vae")
    others = [model for model in KINDS if model not in used]
    unused = tuple(f"{group}{model}." for group in ("", "sample.") for model in others)
    return {name: values for name, values in _differing(params).items() if not name.startswith(unused)}


def _differing(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, ByRow]:
    """Return {name: value of each row} of what differs between rows; a missing value is None."""
    found: dict[str, ByRow] = {}
    for name in dict.fromkeys(name for node in nodes.values() for name in node):
        values = {label: node.get(name) for label, node in nodes.items()}
        first, *others = values.values()
        if any(other != first for other in others):
            found[name] = values
    return found


# The table


def _parts(record: Record) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Score]]]:
    """Return what was measured, by each instrument and without one: what must agree, and the scores."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    judge = None
    for id, each in record["instruments"].items():
        ruler = {key: each["instrument"].get(key) for key in RULER}
        found[id] = ruler, each.get("scores", {}) | {key: each.get(key) for key in ("ratio_to_real", *SCALE)}
        if judge is None and each["instrument"].get("accuracy") is not None:
            judge = f"{id} {ruler['sha256']}"  # the first instrument with an accuracy reads the labels
    copies = {f"memorisation.{key}": node for key, node in (record.get("memorisation") or {}).items()}
    found["memorisation"] = {"train.sha256": record.get("train", {}).get("sha256")}, copies
    found["accuracy_score"] = {}, {"accuracy_score": record.get("accuracy_score")}
    found["label_accuracy"] = {"judge": judge}, {"label_accuracy": record.get("label_accuracy")}
    return {part: (ruler, scores) for part, (ruler, nodes) in found.items() if (scores := _scores(nodes))}


def _scores(nodes: Mapping[str, Any]) -> dict[str, Score]:
    """Return the spreads and single numbers of a record; what is missing is left out."""
    found = {}
    for name, node in nodes.items():
        node = node if isinstance(node, Mapping) else {"mean": node}
        mean, std = node.get("mean"), node.get("std")
        if mean is None:
            continue
        if len(node.get("values", ())) < 2:
            std = None
        elif std is not None and std <= 1e-12 * abs(mean):
            std = 0.0  # equal sets, up to the rounding of their mean
        found[name] = Score(mean, std)
    return found


def _lines(instrument: str | None, scores: Mapping[str, Mapping[str, Score]]) -> list[Line]:
    found = []
    for name in dict.fromkeys(name for each in scores.values() for name in each):
        row, better = {label: each.get(name) for label, each in scores.items()}, BETTER.get(name, "")
        first, *others = row
        row |= {label: difference(row[first], row[label], better) for label in others}
        found.append(Line(instrument, name, better, row))
    return found


def difference(first: Score | None, other: Score | None, better: str) -> Score | None:
    """Return `other` with its difference to `first`; the unit is sqrt((std² + std²) / 2)."""
    if first is None or other is None:
        return other
    value = other.mean - first.mean
    if first.std is None or other.std is None or not (first.std or other.std):
        return replace(other, difference=value)
    units = value / math.sqrt((first.std**2 + other.std**2) / 2)
    mark = ""
    if abs(units) < WITHIN:
        mark = "~"
    elif better:
        mark = "better" if (value < 0) == (better == "lower") else "worse"
    return replace(other, difference=value, units=units, mark=mark)


# How it is shown


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values."""
    plain = asdict(comparison)
    for label, row in comparison.rows.items():
        hashes = {id: each["instrument"]["sha256"] for id, each in row.record["instruments"].items()}
        known = {"name": row.name, "origin": row.origin, "model": row.record["model"]}
        plain["rows"][label] = known | {"instruments": hashes}
    return plain


def to_text(comparison: Comparison, *, markdown: bool = False) -> str:
    """Return what is compared, then a table for each instrument.  markdown: with its headings and lists."""
    heading, subheading, item = ("### ", "#### ", "- ") if markdown else ("", "", "  ")
    facts = [f"{label}: {row.name}, {row.origin}" for label, row in comparison.rows.items()]
    for _, same in groupby(comparison.same.items(), lambda fact: fact[0].partition(".")[0]):
        facts.append(f"same: {_listed(dict(same))}")
    facts += [f"{name}: {_listed(values)}" for name, values in comparison.different.items()]
    facts += [] if comparison.different else ["different: nothing"]
    facts += [f"refused: {sentence}" for sentence in comparison.refusals] + comparison.notes
    blocks = [heading + comparison.title, "\n".join(item + fact for fact in facts)]
    for id, lines in groupby(comparison.table, lambda line: line.instrument):
        title = f"instrument {id}" if id else "memorisation and classes"
        blocks += [subheading + title, _table(list(lines))]
    return "\n\n".join(blocks)


def _listed(values: Mapping[str, Any]) -> str:
    """Return the values by name, with six digits of a number and twelve of a SHA-256."""
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
    text = ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown.items())
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _table(lines: Sequence[Line]) -> str:
    """Return a Markdown table: the scores of all rows, and the differences of later rows to the first."""
    first, *others = lines[0].scores
    cells = [["metric", "better is", first, *others, *(f"{other} - {first} (units)" for other in others)]]
    for line in lines:
        scores = list(line.scores.values())
        cells.append([line.metric, line.better, *map(_with_spread, scores), *map(_change, scores[1:])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def _with_spread(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.4g}" + ("" if score.std is None else f" ± {score.std:.2g}")


def _change(score: Score | None) -> str:
    if score is None or score.difference is None:
        return "-"
    units = "" if score.units is None else f" ({score.units:+z.2f})"
    return f"{score.difference:+z.2g}{units} {score.mark}".rstrip()
