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
from itertools import pairwise
from typing import Any, TypeGuard

from rediffuse.params import flatten
from rediffuse.runtime.errors import UserError

Record = Mapping[str, Any]
ByRow = Mapping[str, Any]  # a value for each row, by its label
Nodes = Mapping[str, Mapping[str, Any]]  # the same of values by name

WITHIN = 2.0  # units of spread: other sampling seeds alone could have made a smaller difference

# Places in a record.  COMMON and all settings must agree; a missing value must not pass for an equal one.
COMMON = ["sampling.n", "sampling.rounding", "reference.sha256", "reference.split", "reference.n"]
NEEDED = ["model", "sampling.seeds", "settings.metric_seed", *COMMON]
RULER = ["sha256", "layer", "dimension", "shape", "resize"]  # of an instrument
SCALE = ["expected_bias", "floor", "ceiling"]  # of its Fréchet distance, at this N

# Metrics in the order of the table, and what is better.  Other metrics come last and have no direction.
BETTER = {
    **dict.fromkeys(["fid", "fd", "fid_inf", "fd_inf", "kid"], "lower"),
    **dict.fromkeys(["is", "precision", "recall"], "higher"),
    "density": "higher, to 1",  # of real images; above 1, generated images crowd where real ones are dense
    "coverage": "higher",
    "position": "lower",
    **dict.fromkeys(["accuracy_score", "label_accuracy"], "higher"),
}
# Parameters of one model alone; all others belong to both.  A DDPM of latents depends on `vae` too.
GROUPS = {"vae": ["vae.", "sample.vae."], "ddpm": ["ddpm.", "sample.ddpm."]}
FOOTNOTES = f"""\
Units: the difference over the standard deviation between sample sets (root mean square of the two rows);
~ is less than {WITHIN:g} of them, within the spread; - stands where there is no spread, as of a single set.
The spread is that of the sampling seeds alone; training again with another seed would add its own.
The position, 0 at the floor and 1 at the ceiling, is compared only if the rows agree in both."""


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
    mark: better, worse, ~ (within the spread), or nothing if no direction is better.
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
    known = list(dict.fromkeys(id for row in rows for id in row.record["instruments"]))
    if unknown := [id for id in instruments if id not in known]:
        have = ", ".join(known) or "none"
        raise UserError(f"--instrument {', '.join(unknown)}: no row was measured with it; known here: {have}")

    labelled = {chr(ord("A") + i) if i < 26 else f"R{i + 1}": row for i, row in enumerate(rows)}
    records = {label: row.record for label, row in labelled.items()}
    found = _describe(labelled)
    forbidden = bool(found.refusals)
    lacking = {id: [label for label in records if id not in records[label]["instruments"]] for id in known}
    for id in dict.fromkeys(instruments or known):
        if lacking[id]:
            sentences = found.refusals if instruments or all(lacking.values()) else found.notes
            sentences.append(f"instrument {id}: not measured in {', '.join(lacking[id])}")
        else:
            _compare_by_instrument(id, records, found)
    if not instruments:
        _compare_without_instrument(records, found)
    return replace(found, table=[]) if forbidden else found


# The guard


def _check_record(row: Row) -> None:
    lacking = [path for path in NEEDED if not _at(row.record, path)]
    instruments = row.record.get("instruments")  # which may be empty
    if not isinstance(instruments, dict):
        instruments, lacking = {}, [*lacking, "instruments"]
    for id, measured in instruments.items():
        needed = [path for path in ("instrument.sha256", "scores") if not _at(measured, path)]
        lacking += [f"instruments.{id}.{path}" for path in needed]
    if lacking:
        record = f"the record of {row.record.get('model', 'a model')} in {row.name} ({row.origin})"
        remedy = "make it again with `dvc repro`"
        raise UserError(f"{record} lacks {', '.join(lacking)}, so it cannot be compared: {remedy}")


def _describe(rows: Mapping[str, Row]) -> Comparison:
    """Return the comparison without scores.  Its refusals forbid to compare any."""
    keys = ["model", "sampling", "reference", "settings"]
    conditions = {label: flatten({key: row.record[key] for key in keys}) for label, row in rows.items()}
    different, parameters = _differing(conditions), _parameters(rows)
    same = {name: value for name, value in conditions["A"].items() if name not in different}
    refused = [name for name in different if name in COMMON or name.startswith("settings.")]
    refusals = [f"{name}: {_listed(different.pop(name))}" for name in refused]
    said = list(parameters.values())  # as sample.ddpm.steps says what sampling.steps would
    different = {name: values for name, values in different.items() if values not in said}
    notes = [f"the parameters of {label} cannot be read" for label, row in rows.items() if row.params is None]
    return Comparison(rows, same, different | parameters, refusals, notes)


def _parameters(rows: Mapping[str, Row]) -> dict[str, ByRow]:
    """Return the parameters that differ and can affect a model of the rows."""
    params = {label: row.params for label, row in rows.items() if row.params is not None}
    used = {prefix for row in rows.values() for prefix in GROUPS.get(row.record["model"], ())}
    if any(each.get("ddpm.space") == "latents" for each in params.values()):
        used.add("vae.")
    unused = tuple({prefix for prefixes in GROUPS.values() for prefix in prefixes} - used)
    return {name: values for name, values in _differing(params).items() if not name.startswith(unused)}


def _differing(nodes: Nodes) -> dict[str, ByRow]:
    """Return {name: value of each row} of what differs between rows; a missing value is None."""
    names = dict.fromkeys(name for node in nodes.values() for name in node)
    found: dict[str, ByRow] = {}
    for name in names:
        values = {label: node.get(name) for label, node in nodes.items()}
        if any(value != other for value, other in pairwise(values.values())):
            found[name] = values
    return found


def _at(node: Any, path: str) -> Any:
    """Return what the record has at the dotted path, or None."""
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


# The table


def _compare_by_instrument(id: str, records: Mapping[str, Record], found: Comparison) -> None:
    measured = {label: record["instruments"][id] for label, record in records.items()}
    rulers = {label: {key: each["instrument"].get(key) for key in RULER} for label, each in measured.items()}
    # The floor is a mean over the sets of a row, so rows with more sets have positions on another scale.
    one_scale = all(_close([each.get(end) for each in measured.values()]) for end in ("floor", "ceiling"))
    more = [*SCALE, "position"] if one_scale else SCALE
    scores = {}
    for label, each in measured.items():
        scores[label] = each["scores"] | {key: each.get(key) for key in more}
    _add_lines(found, f"instrument {id}", rulers, scores, id)


def _compare_without_instrument(records: Mapping[str, Record], found: Comparison) -> None:
    copies, images, judges = {}, {}, {}
    for label, record in records.items():
        memorisation = record.get("memorisation") or {}
        copies[label] = {f"memorisation.{key}": value for key, value in memorisation.items()}
        if memorisation:
            images[label] = {"train.sha256": _at(record, "train.sha256")}
        if record.get("label_accuracy"):
            judges[label] = {"judge": _judge(record)}
    _add_lines(found, "memorisation", images, copies)
    for key, rulers in (("accuracy_score", {}), ("label_accuracy", judges)):
        _add_lines(found, key, rulers, {label: {key: record.get(key)} for label, record in records.items()})


def _add_lines(found: Comparison, what: str, rulers: Nodes, scores: Nodes, id: str | None = None) -> None:
    """Add a line for each metric that at least one row has, or the refusals if rulers differ."""
    if differing := _differing(rulers):
        found.refusals.extend(f"{what}: {name}: {_listed(values)}" for name, values in differing.items())
        return
    names = dict.fromkeys(name for each in scores.values() for name in each)
    for name in sorted(names, key=[*BETTER, *names].index):
        better = BETTER.get(name, "")
        first, *others = row = {label: _score(each.get(name)) for label, each in scores.items()}
        row |= {label: difference(row[first], row[label], better) for label in others}
        if any(row.values()):
            found.table.append(Line(id, name, better, row))


def _judge(record: Record) -> str:
    """Return what read the labels of generated images: the first instrument with an accuracy on real ones."""
    for id, measured in record["instruments"].items():
        if measured["instrument"].get("accuracy") is not None:
            return f"{id} {measured['instrument']['sha256']}"
    return "none"


def difference(first: Score | None, other: Score | None, better: str) -> Score | None:
    """Return `other` with its difference to `first`; the unit is sqrt((std² + std²) / 2)."""
    if first is None or other is None:
        return other
    value, mark = other.mean - first.mean, _mark(first.mean, other.mean, better)
    if first.std is None or other.std is None:
        return replace(other, difference=value)
    unit = math.sqrt((first.std**2 + other.std**2) / 2)
    if unit <= 1e-12 * max(abs(first.mean), abs(other.mean)):  # equal sets, up to the rounding of their mean
        return replace(other, difference=value, mark=mark)
    units = value / unit
    return replace(other, difference=value, units=units, mark="~" if abs(units) < WITHIN else mark)


def _mark(first: float, other: float, better: str) -> str:
    if better.endswith("to 1"):
        first, other = min(first, 1.0), min(other, 1.0)
    if not better or first == other:
        return ""
    return "better" if (other < first) == (better == "lower") else "worse"


def _score(node: Any) -> Score | None:
    """Return a spread or a single number of the record; None if it is missing or not finite."""
    if not isinstance(node, dict):
        node = {"mean": node}
    mean, std, sets = node.get("mean"), node.get("std"), len(node.get("values", ()))
    return Score(mean, std if sets > 1 and _is_number(std) else None) if _is_number(mean) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _close(values: Sequence[Any]) -> bool:
    """Return whether all are the same number, up to the rounding of another machine."""
    return all(_is_number(each) and math.isclose(each, values[0], rel_tol=1e-6) for each in values)


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
    """Return plain text, or Markdown: what is compared, then a table for each instrument."""
    heading, subheading, item = ("### ", "#### ", "- ") if markdown else ("", "", "  ")
    width = max(len(row.name) for row in comparison.rows.values())
    rows = [f"{label}  {row.name:{width}}  {row.origin}" for label, row in comparison.rows.items()]
    refused = [f"refused: {sentence}" for sentence in comparison.refusals]
    blocks = [[heading + comparison.title]]
    blocks += [[item + line for line in lines] for lines in (rows, _conditions(comparison), refused)]
    for id in dict.fromkeys(line.instrument for line in comparison.table):
        title = "memorisation and classes"
        if id:
            sha256 = comparison.rows["A"].record["instruments"][id]["instrument"]["sha256"]
            title = f"instrument {id}, SHA-256 {_text(sha256)}"
        cells = _cells([line for line in comparison.table if line.instrument == id])
        blocks += [[subheading + title], _piped(cells) if markdown else _aligned(cells)]
    blocks.append([item + note for note in comparison.notes])
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def to_refusal(comparison: Comparison) -> str:
    """Return the rows in one line, and a line for each reason why they may not be compared."""
    rows = ", ".join(f"{label} = {row.name} ({row.origin})" for label, row in comparison.rows.items())
    return "\n    ".join([f"  {comparison.title}: {rows}", *comparison.refusals])


def _conditions(comparison: Comparison) -> list[str]:
    """Return what is the same, a line for each group, and what differs, a line for each parameter."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in comparison.same.items():
        group, _, key = name.rpartition(".")
        groups.setdefault(group, {})[key] = value
    groups.pop("", None)  # the model, which is the title
    same = [f"{group}: {_listed(values)}" for group, values in groups.items()]
    different = [f"{name}: {_listed(values)}" for name, values in comparison.different.items()]
    return [*same, *(different or ["different: nothing"])]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    """Return six digits of a number, twelve of a SHA-256."""
    text = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _cells(lines: Sequence[Line]) -> list[list[str]]:
    """Return the head, then for each metric the scores of all rows and the differences of later ones."""
    first, *others = lines[0].scores
    head = [title for other in others for title in (f"{other} - {first}", "units", "")]
    cells = [["metric", "better is", first, *others, *head]]
    for line in lines:
        scores = list(line.scores.values())
        digits = _decimals([score for score in scores if score])
        row = [line.metric, line.better, *(_with_spread(score, digits) for score in scores)]
        for score in scores[1:]:
            score = score or Score(0, None)
            row += [_signed(score.difference, digits), _signed(score.units, 2), score.mark]
        cells.append(row)
    return cells


def _decimals(scores: Sequence[Score]) -> int:
    """Return how many show two digits of the smallest spread, or without spread four of the largest mean."""
    spreads = [score.std for score in scores if score.std and score.std > 1e-12 * abs(score.mean)]
    smallest = min(spreads, default=max(abs(score.mean) for score in scores) / 100)
    exponent = int(f"{smallest:.1e}".partition("e")[2])  # of the rounded number: 0.0999 is 0.10
    return min(max(1 - exponent, 0), 9) if smallest else 0


def _with_spread(score: Score | None, digits: int) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.{digits}f}" + ("" if score.std is None else f" ± {score.std:.{digits}f}")


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+z.{digits}f}"


def _is_text(head: str) -> bool:
    return head in ("metric", "better is", "")


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    columns = []
    for column in zip(*cells, strict=True):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if _is_text(column[0]) else cell.rjust(width) for cell in column])
    return ["  " + "  ".join(row) for row in zip(*columns, strict=True)]


def _piped(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *lines = (f"| {' | '.join(row)} |" for row in cells)
    rule = "|".join(":--" if _is_text(title) else "--:" for title in cells[0])
    return [head, f"|{rule}|", *lines]
