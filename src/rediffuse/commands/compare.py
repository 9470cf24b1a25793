"""May these numbers be compared, and how far apart are they?  Records of evaluations in, verdict and tables out.

The guard: numbers of two rows stand side by side only if they were measured with the same ruler.  That is the instrument (SHA-256
of its weights, layer, resizing), the reference images, the settings of the metrics, the rounding of pixels, and N.  All the rest
(model, sampler, steps, seeds) is what one wants to compare, and is named above the table.

Knows nothing of git, DVC or MLflow: a record is the content of metrics/evaluation/{model}.json, wherever it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

from rediffuse.runtime.errors import UserError

Record = Mapping[str, Any]

WITHIN = 2.0  # units of spread: a smaller difference is one that other sampling seeds could have made
SHORT = 12  # hexadecimal digits of a SHA-256 that are shown

# Metrics in the order of the table, and what is better.  A metric that is not named here comes last and has no direction.
BETTER = {
    "fid": "lower",
    "fd": "lower",
    "fid_inf": "lower",
    "fd_inf": "lower",
    "kid": "lower",
    "is": "higher",
    "precision": "higher",
    "recall": "higher",
    "density": "higher, to 1",  # real images have 1; above, generated ones crowd where real ones are dense
    "coverage": "higher",
    "position": "lower",  # 0 at the floor, 1 at the ceiling
    "accuracy_score": "higher",
    "label_accuracy": "higher",
}

# What must agree beside the settings, by its place in the record, and why the numbers hang on it.
COMMON = {
    "sampling.n": "a Fréchet distance falls with N",
    "sampling.rounding": "the same image has other pixels",
    "reference.sha256": "other real images",
    "reference.split": "other real images",
    "reference.n": "a Fréchet distance falls with N",
}
RULER = {
    "sha256": "other weights are another ruler",
    "layer": "another layer is another ruler",
    "dimension": "another layer is another ruler",
    "shape": "images of another size",
    "resize": "resizing is part of the ruler",
}
FACTS = {"expected_bias": "expected bias at this N", "floor": "floor", "ceiling": "ceiling"}  # of the Fréchet distance, in words
FOOTNOTES = (
    "Units: the difference over the standard deviation between sample sets (root mean square of the two rows);"
    f" ~ is less than {WITHIN:g} of them, within the spread.",
    "The spread is that of the sampling seeds alone; training again with another seed would add its own.",
)


@dataclass(frozen=True)
class Row:
    """One of the things compared: a short label, the name the user gave, where it was found, and the record."""

    label: str
    name: str
    origin: str
    record: Record


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation (ddof = 1) of a metric over `sets` sample sets; std is None for one set, which has no spread."""

    mean: float
    std: float | None
    sets: int


@dataclass(frozen=True)
class Difference:
    """Row `label` minus the first row.

    value: None where one of the two lacks the metric.  units: the difference in units of spread; None where there is none to
    count in, and `note` says why.  mark: better, worse, ~ (within the spread), or nothing where no direction is the better one.
    """

    label: str
    value: float | None
    units: float | None = None
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A metric in all rows (None: the row lacks it), and the differences of the later rows to the first."""

    metric: str
    better: str
    scores: tuple[Score | None, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Section:
    """What one instrument says: the lines of its table, or refusals, a sentence for each difference of the ruler.

    The section of what no instrument measures alone (memorisation, accuracies) has the id "" and may have both.
    facts: expected_bias, floor and ceiling of the Fréchet distance, for each row.  sha256: "" unless the rows agree in it.
    """

    id: str
    sha256: str
    refusals: tuple[str, ...]
    lines: tuple[Line, ...] = ()
    facts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The verdict on some rows.

    conditions: what is compared, as {title: text}.  refused: what forbids to compare the rows with any instrument; no section has
    lines then.  notes: what is not in all rows, and therefore left out.
    """

    rows: tuple[Row, ...]
    conditions: Mapping[str, str]
    refused: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The model, or the models, of the rows."""
        return " and ".join(dict.fromkeys(str(row.record["model"]) for row in self.rows))

    @property
    def comparable(self) -> bool:
        """Whether the numbers of at least one instrument may be compared, or, of rows without any, those that need none."""
        return any(section.lines and (section.id or len(self.sections) == 1) for section in self.sections)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Everything that is refused, a sentence for each difference."""
        return (*self.refused, *(sentence for section in self.sections for sentence in section.refusals))


def label(index: int) -> str:
    """A, B, ..., Z, then R27, R28, ..."""
    return chr(ord("A") + index) if index < 26 else f"R{index + 1}"


def compare(rows: Sequence[Row], instruments: Sequence[str] = ()) -> Comparison:
    """Judge whether the rows may be compared, and compare what may be.

    Each instrument that all rows have gets a section; with `instruments` (ids) these only, and nothing else.
    Raises UserError for fewer than two rows, a record that lacks what the guard has to know, and an id that no row has.
    """
    if len(rows) < 2:
        raise UserError(
            f"a comparison needs at least two rows, got {len(rows)}: name two or more, as in `rediffuse compare HEAD workspace`"
        )
    for row in rows:
        _check_record(row)
    known = list(dict.fromkeys(id for row in rows for id in row.record["instruments"]))
    if unknown := [id for id in instruments if id not in known]:
        raise UserError(f"no row was measured with the instrument {', '.join(unknown)}; they were with {', '.join(known) or 'none'}")
    partly = {id: _partly(id, rows) for id in known if not all(id in row.record["instruments"] for row in rows)}
    refused, notes = _common_refusals(rows), () if instruments else tuple(partly.values())
    if known and len(partly) == len(known) and not instruments:
        refused, notes = (*refused, "no instrument has measured all rows", *notes), ()
    asked = list(dict.fromkeys(instruments)) or [id for id in known if id not in partly]
    sections = [Section(id, "", (partly[id],)) if id in partly else _instrument_section(id, rows, bool(refused)) for id in asked]
    if not instruments and not refused:
        sections += _other_section(rows)
    return Comparison(tuple(rows), _conditions(rows), refused, tuple(sections), notes)


# The guard


def _check_record(row: Row) -> None:
    """Raise UserError unless the record says all that the guard has to know: a missing hash must not pass for an equal one."""
    needed = ["model", "sampling.n", "sampling.seeds", "reference.sha256", "reference.split", "reference.n", "settings"]
    lacking = [path for path in needed if not _at(row.record, path)]
    # Instruments may be none, which was chosen; but the record must say so.
    lacking += [key for key, absent in (("settings", {}), ("instruments", None)) if not isinstance(row.record.get(key, absent), dict)]
    if "instruments" not in lacking:
        for id, measured in row.record["instruments"].items():
            lacking += [f"instruments.{id}.{path}" for path in ("instrument.sha256", "scores") if not _at(measured, path)]
    if lacking:
        which = f"the record of {row.record.get('model', 'a model')} in {row.name} ({row.origin})"
        raise UserError(f"{which} lacks {', '.join(lacking)}, without which it may be compared with nothing: make it anew with `dvc repro`")


def _common_refusals(rows: Sequence[Row]) -> tuple[str, ...]:
    """What forbids every comparison of the rows."""
    settings = dict.fromkeys((f"settings.{key}" for row in rows for key in row.record["settings"]), "the metric is another")
    return _refusals(rows, COMMON | settings, lambda row, path: _at(row.record, path))


def _refusals(rows: Sequence[Row], reasons: Mapping[str, str], get: Callable[[Row, str], Any], prefix: str = "") -> tuple[str, ...]:
    """A sentence for each path at which the rows differ.  `reasons` says why a path matters, `get` what a row has there."""
    sentences = []
    for path, why in reasons.items():
        values = [get(row, path) for row in rows]
        if _differ(values):
            shown = [_hash(value) for value in values] if path.endswith("sha256") else values
            name = {"sha256": "SHA-256", "reference.sha256": "reference: SHA-256"}.get(path, f"{path}:")
            sentences.append(f"{prefix}{name} {_by_row(rows, shown)}: {why}")
    return tuple(sentences)


def _partly(id: str, rows: Sequence[Row]) -> str:
    have = [row.label for row in rows if id in row.record["instruments"]]
    lack = [row.label for row in rows if id not in row.record["instruments"]]
    return f"instrument {id}: measured in {_and(have)}, not in {_and(lack)}"


# The scores


def _instrument_section(id: str, rows: Sequence[Row], refused: bool) -> Section:
    """The verdict on one instrument that all rows have; without lines if the rows are refused on other grounds."""
    measured = {row.label: row.record["instruments"][id] for row in rows}
    refusals = _refusals(rows, RULER, lambda row, path: measured[row.label]["instrument"].get(path), f"instrument {id}: ")
    if refused or refusals:
        return Section(id, "", refusals)
    facts = {key: tuple(_mean(each.get(key)) for each in measured.values()) for key in FACTS}
    # The floor is a mean over as many sets as the row has, so rows with more sets have positions on a scale of their own.
    one_scale = _agree(facts["floor"]) and _agree(facts["ceiling"])
    values = [each["scores"] | ({"position": each.get("position")} if one_scale else {}) for each in measured.values()]
    lines = _lines(rows, values)
    nothing = () if lines else (f"instrument {id}: no row has a finite score",)
    notes = () if one_scale else ("position is left out: it lies between floor and ceiling, which are not the same in all rows",)
    return Section(id, str(measured[rows[0].label]["instrument"]["sha256"]), nothing, lines, facts, notes)


def _other_section(rows: Sequence[Row]) -> list[Section]:
    """Memorisation, classification accuracy score, label accuracy.  Empty if no row has any of them."""
    tests = {row.label: dict(_leaves(row.record.get("memorisation"), "memorisation")) for row in rows}
    names = (name for test in tests.values() for name, value in test.items() if not isinstance(value, dict))
    tested = [row for row in rows if tests[row.label]]
    refusals = _refusals(tested, dict.fromkeys(names, "another test for copies"), lambda row, name: tests[row.label].get(name))
    refusals += _refusals(tested, {"train.sha256": "memorisation of other training images"}, lambda row, path: _at(row.record, path))
    values = [{name: value for name, value in tests[row.label].items() if isinstance(value, dict) and not refusals} for row in rows]
    accuracies = ["accuracy_score", "label_accuracy"]
    judged = [row for row in rows if row.record.get("label_accuracy")]
    if _differ(judges := [_judge_of_labels(row.record) for row in judged]):
        accuracies.remove("label_accuracy")
        refusals += (f"label_accuracy: judged by {_by_row(judged, judges)}: another judge",)
    lines = _lines(rows, [value | {key: row.record.get(key) for key in accuracies} for value, row in zip(values, rows, strict=True)])
    return [Section("", "", refusals, lines)] if lines or refusals else []


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Scores of the record, and settings of the test (numbers, text), by dotted name.  Lists, such as those of pairs, are neither."""
    if isinstance(node, dict) and "mean" not in node:
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}")
    elif node is not None and not isinstance(node, list):
        yield name, node


def _judge_of_labels(record: Record) -> str:
    """The classifier that read the classes of generated images: the first instrument that has an accuracy on the real ones."""
    instruments = ((id, each["instrument"]) for id, each in record["instruments"].items())
    return next((f"{id} {_hash(each['sha256'])}" for id, each in instruments if _is_number(each.get("accuracy"))), "none")


def _lines(rows: Sequence[Row], values: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    """A line for each metric that at least one row has."""
    names = dict.fromkeys(name for value in values for name in value)
    table = []
    for name in sorted(names, key=_place):
        first, *others = scores = tuple(_score(value.get(name)) for value in values)
        if any(scores):
            better = BETTER.get(name, "")
            differences = (difference(row.label, first, other, better) for row, other in zip(rows[1:], others, strict=True))
            table.append(Line(name, better, scores, tuple(differences)))
    return tuple(table)


def _place(metric: str) -> float:
    """Where a metric stands in the table: as in BETTER, memorisation before the accuracies, all others last."""
    order = list(BETTER)
    return order.index("position") + 0.5 if metric.startswith("memorisation") else order.index(metric) if metric in order else len(order)


def difference(label: str, first: Score | None, other: Score | None, better: str) -> Difference:
    """How far `other` is from `first`: (mean - mean) / sqrt((std² + std²) / 2), and which of them is better."""
    if first is None or other is None:
        return Difference(label, None)
    value = other.mean - first.mean
    if first.std is None or other.std is None:
        return Difference(label, value, note="one set")
    unit = math.sqrt((first.std**2 + other.std**2) / 2)
    if unit <= 1e-12 * max(abs(first.mean), abs(other.mean)):  # equal in all sets, up to the rounding of their mean
        return Difference(label, value, mark=_mark(first.mean, other.mean, better), note="spread is zero")
    units = value / unit
    return Difference(label, value, units, "~" if abs(units) < WITHIN else _mark(first.mean, other.mean, better))


def _mark(first: float, other: float, better: str) -> str:
    """What `other` is, by the means alone."""
    if better.endswith("to 1"):
        first, other = min(first, 1.0), min(other, 1.0)
    if not better or first == other:
        return ""
    return "better" if (other < first) == (better == "lower") else "worse"


def _score(node: Any) -> Score | None:
    """A spread, or a single number, of the record; None if it is missing or not finite."""
    if _is_number(node):
        return Score(float(node), None, 1)
    if not isinstance(node, dict) or not _is_number(node.get("mean")):
        return None
    sets, std = len(node.get("values", ())), node.get("std")
    return Score(float(node["mean"]), float(std) if sets > 1 and _is_number(std) else None, sets)


# What is compared, in words


def _conditions(rows: Sequence[Row]) -> dict[str, str]:
    """Sampling in which the rows agree and differ, reference images, settings of the metrics."""
    sampling = [{"model": row.record["model"], **row.record["sampling"], "sets": len(row.record["sampling"]["seeds"])} for row in rows]
    values = {key: [each.get(key) for each in sampling] for key in dict.fromkeys(key for each in sampling for key in each)}
    same = {key: value[0] for key, value in values.items() if not _differ(value)}
    return {
        "the same": _listed(same),
        "different": "; ".join(f"{key} {_by_row(rows, values[key])}" for key in values if key not in same) or "nothing of the sampling",
        "reference": _by_row(rows, [_reference(row.record["reference"]) for row in rows]),
        "metrics": _by_row(rows, [_listed(row.record["settings"]) for row in rows]),
    }


def _reference(reference: Mapping[str, Any]) -> str:
    return f"{reference.get('set', 'unnamed')}, {reference['split']}, n {reference['n']}, SHA-256 {_hash(reference['sha256'])}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _by_row(rows: Sequence[Row], values: Sequence[Any]) -> str:
    """ "20" if all rows have it, else "20 in A and C, 50 in B"."""
    if not _differ(values):
        return _text(values[0])
    different = [value for index, value in enumerate(values) if value not in values[:index]]
    labels = {
        index: [row.label for row, other in zip(rows, values, strict=True) if other == value] for index, value in enumerate(different)
    }
    return ", ".join(f"{_text(value)} in {_and(labels[index])}" for index, value in enumerate(different))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "none" if value is None else str(value)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _hash(sha256: Any) -> str:
    return "none" if sha256 is None else str(sha256)[:SHORT]


def _at(node: Any, path: str) -> Any:
    """What stands at the dotted path, or None."""
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _mean(node: Any) -> float | None:
    return score.mean if (score := _score(node)) else None


def _agree(values: Sequence[float | None]) -> bool:
    """Whether all are the same, up to the rounding of another machine."""
    numbers = [value for value in values if value is not None]
    return not numbers or (len(numbers) == len(values) and all(math.isclose(value, numbers[0], rel_tol=1e-6) for value in numbers))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# How it is shown


def to_text(comparison: Comparison) -> str:
    """Plain text: what is compared, then a table for each instrument, its columns aligned."""
    return _render(comparison, _aligned, heading="", subheading="", item="  ")


def to_markdown(comparison: Comparison) -> str:
    """The same as `to_text`, with tables of pipes."""
    return _render(comparison, _piped, heading="### ", subheading="#### ", item="- ")


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The same as plain values; a refused section has no metrics."""
    return {
        "models": [row.record["model"] for row in comparison.rows],
        "rows": [
            {"label": row.label, "name": row.name, "origin": row.origin, "sampling": row.record["sampling"]} for row in comparison.rows
        ],
        "reference": [row.record["reference"] for row in comparison.rows],
        "settings": [row.record["settings"] for row in comparison.rows],
        "comparable": comparison.comparable,
        "refusals": list(comparison.refusals),
        "notes": list(comparison.notes),
        "sections": [
            {
                "instrument": section.id or None,
                "sha256": section.sha256 or None,
                "refusals": list(section.refusals),
                **{key: list(section.facts.get(key, ())) for key in FACTS},
                "metrics": [asdict(line) for line in section.lines],
                "notes": list(section.notes),
            }
            for section in comparison.sections
        ],
    }


def to_refusal(comparison: Comparison) -> str:
    """What is refused and why: the rows in one line, then a line for each difference."""
    rows = ", ".join(f"{row.label} = {row.name} ({row.origin})" for row in comparison.rows)
    return "\n".join(f"  {line}" for line in (f"{comparison.title}: {rows}", *(f"  {sentence}" for sentence in comparison.refusals)))


def _render(comparison: Comparison, table: Callable[[list[list[str]]], list[str]], *, heading: str, subheading: str, item: str) -> str:
    """Blocks of lines with empty ones between."""
    width = max(len(row.name) for row in comparison.rows)
    listed = [f"{item}{row.label}  {row.name:{width}}  {row.origin}" for row in comparison.rows]
    conditions = [f"{item}{title}: {text}" for title, text in comparison.conditions.items()]
    blocks = [[f"{heading}{comparison.title}"], listed, conditions, [f"{item}refused: {sentence}" for sentence in comparison.refused]]
    for section in comparison.sections if not comparison.refused else ():
        name = f"instrument {section.id}" if section.id else "memorisation and classes"
        name += f", SHA-256 {_hash(section.sha256)}" if section.sha256 else ""
        facts = [
            f"{title} {_by_row(comparison.rows, _shown(section.facts[key]))}" for key, title in FACTS.items() if section.facts.get(key)
        ]
        above = [f"{item}Fréchet distance: {', '.join(facts)}"] if facts else []
        above += [f"{item}refused: {sentence}" for sentence in section.refusals]
        blocks += [[f"{subheading}{name}"], above, table(_cells(comparison.rows, section)) if section.lines else []]
        blocks.append([f"{item}{note}" for note in (*section.notes, *_spread_notes(section))])
    blocks.append([f"{item}{note}" for note in comparison.notes])
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def _shown(values: Sequence[float | None]) -> list[str | None]:
    return [value if value is None else f"{value:.4g}" for value in values]


def _cells(rows: Sequence[Row], section: Section) -> list[list[str]]:
    """The table of a section, its head first: metric, what is better, each row's score, and for each later row its difference."""
    first, *others = (row.label for row in rows)
    head = ["metric", "better is", first, *others]
    table = [head + [title for other in others for title in (f"{other} - {first}", "units", "")]]
    for line in section.lines:
        digits = _decimals([score for score in line.scores if score])
        cells = [line.metric, line.better, *(_score_text(score, digits) for score in line.scores)]
        for each in line.differences:
            cells += [_signed(each.value, digits), _signed(each.units, 2), each.mark]
        table.append(cells)
    return table


def _spread_notes(section: Section) -> list[str]:
    """Why some differences stand without units."""
    found = dict[str, dict[str, None]]()
    for line in section.lines:
        for each in line.differences:
            if each.note:
                found.setdefault(each.note, {})[line.metric] = None
    reasons = {
        "one set": "a row has fewer than two sample sets, so there is no spread to count in",
        "spread is zero": "the spread of both rows is zero, so the difference has no units",
    }
    return [f"{', '.join(metrics)}: {reasons[note]}" for note, metrics in found.items()]


def _decimals(scores: Sequence[Score]) -> int:
    """As many as show two digits of the smallest spread; four digits of the largest mean where there is no spread."""
    spreads = [score.std for score in scores if score.std and score.std > 1e-12 * abs(score.mean)]
    means = [abs(score.mean) for score in scores if score.mean]
    if spreads:
        return min(max(1 - int(f"{min(spreads):.1e}".partition("e")[2]), 0), 9)  # the exponent after rounding: 0.0999... is 0.10
    return min(max(3 - math.floor(math.log10(max(means))), 0), 9) if means else 0


def _score_text(score: Score | None, digits: int) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.{digits}f}" if score.std is None else f"{score.mean:.{digits}f} ± {score.std:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def _aligned(table: list[list[str]]) -> list[str]:
    """Columns of text to the left, of numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    left = [title in ("metric", "better is", "") for title in table[0]]
    return [
        "  " + "  ".join(f"{cell:{'<' if to_left else '>'}{width}}" for cell, to_left, width in zip(row, left, widths, strict=True))
        for row in table
    ]


def _piped(table: list[list[str]]) -> list[str]:
    head, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    left = [title in ("metric", "better is", "") for title in table[0]]
    return [head, "|" + "|".join(":--" if to_left else "--:" for to_left in left) + "|", *rows]
