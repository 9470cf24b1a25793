"""A model's scores between what real images and useless generators get: the records of the evaluation in, pictures out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rediffuse.figures.render import plain, render
from rediffuse.images.files import save_png

Record = Mapping[str, Any]

# Of Okabe and Ito, told apart with any colour vision; the shapes and the names differ too.
MODEL, REAL, USELESS, GREY = "#0072B2", "#009E73", "#D55E00", "#999999"
SHAPES = {MODEL: "o", REAL: "D", USELESS: "s"}
ROWS = {  # of the reference, from the worst to the best
    "noise": ("uniform noise", USELESS),
    "pixel_marginals": ("pixel marginals", USELESS),
    "mean_image": ("mean image", USELESS),
    "train": ("real train", REAL),
    "test_halves": ("real test, half vs half", REAL),
}
BY = {"label": "by the class that was asked for", "predicted": "by the class that a classifier sees"}
SHARES = ("precision", "recall", "density", "coverage")
DECADES = 1e7  # of a log axis, at most
DOTS = 100  # an inch
MOST = 50  # classes that are shown one by one
NOTHING = "no distance was measured (reference.instruments is empty)"


@dataclass(frozen=True)
class Spread:
    """A number with the range of its independent repetitions."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Any) -> Spread:
        """From a record: a plain number, or {"mean", "min", "max", ...}."""
        if isinstance(value, Mapping):
            return cls(value["mean"], value["min"], value["max"])
        return cls(value, value, value)


def draw_scores(record: Record, reference: Record, folder: Path) -> None:
    """Write scores.png and classes.png."""
    save_png(score_chart(record, reference), folder / "scores.png")
    save_png(class_chart(record, reference), folder / "classes.png")


def score_chart(record: Record, reference: Record) -> NDArray[np.uint8]:
    """All scores of a model, as a picture (height, 1500, 3) with a band for each instrument.

    record, reference: as in metrics/evaluation/{model}.json and reference.json.  Left: the Fréchet distance on a log axis, between those of
    real images and of useless generators, with the bias that a perfect generator would show.  Then precision, recall, density and coverage
    with the values of real training images, and the inception score where there is one.  Error bars reach from the smallest to the largest
    of the independent sample sets.  Without instruments the picture says so.
    """
    model, names = record["model"], list(record["instruments"])
    if not names:
        return _sentence(f"{model}: {NOTHING}")
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says, the bytes are the same
        figure = Figure(figsize=(15, 0.9 + 3.4 * len(names)), dpi=DOTS, layout="constrained")
        figure.suptitle(_title(record), fontsize=13)
        for band, name in zip(figure.subfigures(len(names), 1, squeeze=False)[:, 0], names, strict=True):
            band.suptitle(f"{name}, {record['instruments'][name]['instrument']['dimension']} dimensions", fontsize=11, weight="bold")
            _band(band, model, record["instruments"][name], reference["instruments"].get(name, {"rows": {}}))
        return render(figure)


def class_chart(record: Record, reference: Record) -> NDArray[np.uint8]:
    """The Fréchet distance of each class, as a picture with a panel for each instrument: (height, 800 or more, 3).

    On a log axis a bar from zero cannot be drawn: bars begin at the distance that real training images of the class have, so that their
    length is the ratio to it.  Classes with too few images for a distance are named in grey.  Of more than MOST classes those with the
    largest distances are shown.  Without classes the picture says so.
    """
    parts = {name: part for name, part in record["instruments"].items() if part.get("classes")}
    every = list(dict.fromkeys(name for part in parts.values() for name in _by_class(part)))
    if not every:
        return _sentence(f"{record['model']}: {'the images have no classes' if record['instruments'] else NOTHING}")
    measured = {name for part in parts.values() for name in _measured(_by_class(part))}
    if len(every) > MOST and not measured:
        return _sentence(f"{record['model']}: too few images of each of the {len(every):,} classes for a distance")
    classes = every if len(every) <= MOST else _furthest(every, _measured(_by_class(next(iter(parts.values())))))
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(max(8, 2.5 + 5.5 * len(parts)), 1.8 + 0.32 * max(3, len(classes))), dpi=DOTS, layout="constrained")
        by = dict.fromkeys(part["classes"]["by"] for part in parts.values())
        shown = "" if classes == every else f"\nthe {len(classes)} furthest of {len(every):,} classes"
        figure.suptitle(f"{record['model']}: Fréchet distance {' or '.join(BY[how] for how in by)}{shown}", fontsize=13)
        axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axis, (name, part) in zip(axes, parts.items(), strict=True):
            floor = reference["instruments"].get(name, {}).get("classes", {}).get(part["classes"]["by"], {})
            _class_panel(axis, classes, _by_class(part), floor)
            axis.set(title=name, xlabel=f"{_distance(part)} (log axis)")
        for tick, name in zip(axes[0].get_yticklabels(), classes, strict=True):
            tick.set_color("black" if name in measured else GREY)
        marks = [_mark(MODEL, record["model"]), _mark(REAL, "real train")]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
        return render(figure)


def _sentence(text: str) -> NDArray[np.uint8]:
    """A small picture of nothing but a sentence."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(8, 1.8 + 0.32 * 3), dpi=DOTS, layout="constrained")
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color=GREY)
        return render(figure)


def _furthest(classes: Sequence[str], distances: Mapping[str, Spread]) -> list[str]:
    """Of many classes, MOST: those with the largest distances (of the first instrument) first, those without any last."""
    return sorted(classes, key=lambda name: distances[name].mean if name in distances else -math.inf, reverse=True)[:MOST]


def _title(record: Record) -> str:
    sampling, real = record["sampling"], record["reference"]
    sets = len(sampling["seeds"])
    bars = f"bars: smallest to largest of {sets} independent sets" if sets > 1 else "a single set, so no bars"
    return f"{record['model']}: {sampling['n']:,} images against {real['n']:,} of {real['set']} ({real['split']}); {bars}"


def _band(figure: SubFigure, model: str, part: Record, reference: Record) -> None:
    """The panels of one instrument."""
    rows, has_score = reference["rows"], "is" in part["scores"]
    axes = figure.subplots(1, 3 if has_score else 2, width_ratios=[6, 4, 2] if has_score else [6, 6])
    _distance_panel(axes[0], model, part, rows)
    _shares_panel(axes[1], part["scores"], rows.get("train", {}))
    if has_score:
        _inception_panel(axes[2], part, rows)


def _distance_panel(axis: Axes, model: str, part: Record, rows: Record) -> None:
    name = _distance(part)
    lines = [(title, colour, Spread.of(rows[row][name])) for row, (title, colour) in ROWS.items() if name in rows.get(row, {})]
    if name in part.get("reconstructions", {}):
        lines.append((f"{model}, reconstructions", MODEL, Spread.of(part["reconstructions"][name])))
    lines.append((model, MODEL, Spread.of(part["scores"][name])))
    lines.sort(key=lambda line: line[2].mean, reverse=True)
    bias = Spread.of(part["expected_bias"])
    least = _log_axis(axis, [bias, *(line[2] for line in lines)])
    for place, (title, colour, value) in enumerate(lines):
        _point(axis, place, value, colour, least, big=title == model)
        _beside(axis, place, max(value.high, least), _number(value), colour)
    axis.axvline(max(bias.mean, least), color="black", linestyle=":", linewidth=1.2, zorder=1)
    axis.set_title(f"dotted: {_number(bias)}, to expect of a perfect generator at this number of images", fontsize=9, loc="left")
    for row, colour in (("train", REAL), ("noise", USELESS)):
        if name in rows.get(row, {}):
            end = axis.get_xlim()[row == "noise"]
            axis.axvspan(max(Spread.of(rows[row][name]).mean, least), end, color=colour, alpha=0.08, linewidth=0, zorder=0)
    _name_rows(axis, [line[0] for line in lines])
    axis.set_xlabel(f"Fréchet distance {name} to the real test images, log axis; smaller is better")


def _shares_panel(axis: Axes, scores: Record, real: Record) -> None:
    names = [name for name in SHARES if name in scores]
    for place, name in enumerate(names):
        if name in real:
            _reference(axis, place, Spread.of(real[name]))
        value = Spread.of(scores[name])
        _point(axis, place, value, MODEL, big=True)
        axis.annotate(_number(value), (1.02, place), xycoords=("axes fraction", "data"), va="center", color=MODEL, fontsize=9)
    _name_rows(axis, names)
    highest = max([1.0, *(Spread.of(values[name]).high for values in (scores, real) for name in names if name in values)])
    axis.set(xlim=(0, 1.05 * highest), xlabel="green line: real train")


def _inception_panel(axis: Axes, part: Record, rows: Record) -> None:
    value = Spread.of(part["scores"]["is"])
    real = next((row for row in ("test", "train") if "is" in rows.get(row, {})), None)
    if real:
        _reference(axis, 0, Spread.of(rows[real]["is"]))
    _point(axis, 0, value, MODEL, big=True)
    axis.set_title(_number(value), fontsize=9, color=MODEL)
    _name_rows(axis, [""])
    # The scale ends at what is possible, unless that is so far away that all would stick together on the left.
    most, highest = part["is_max"], max(value.high, *(Spread.of(row["is"]).high for row in rows.values() if "is" in row), 1)
    axis.set_xlim(1, most if most < 4 * highest else 1.5 * highest)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_xlabel(f"IS (1 to {most})\n" + (f"green line: real {real}" if real else ""))


def _class_panel(axis: Axes, classes: Sequence[str], model: Record, floor: Record) -> None:
    found, real = _measured(model), _measured(floor)
    least = _log_axis(axis, [*found.values(), *real.values()])
    for place, name in enumerate(classes):
        if name not in found:
            text = f"too few images ({model.get(name, {}).get('n', 0)})"
            axis.annotate(text, (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center", color=GREY, fontsize=9)
            continue
        ends = [max(found[name].mean, least)]
        if name in real:
            ends.append(max(real[name].mean, least))
            axis.barh(place, ends[0] - ends[1], left=ends[1], height=0.3, color=MODEL, alpha=0.35, zorder=1)
            _point(axis, place, real[name], REAL, least)
        _point(axis, place, found[name], MODEL, least, big=True)
        _beside(axis, place, max(ends), _number(found[name]), MODEL)
    axis.xaxis.set_visible(bool(found))
    _name_rows(axis, classes)


def _log_axis(axis: Axes, values: Sequence[Spread]) -> float:
    """Make x logarithmic with room for all values, and return its left end, where what lies below (0, rounding) is drawn."""
    positive = [end for value in values for end in (value.low, value.high) if end > 0] or [1.0]
    most = max(positive)
    least = max(min(positive) / 1.6, most / DECADES)  # rounding around 0 must not push all else to the right
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if most / least > 300 else (1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(least, most * (most / least) ** 0.18)  # numbers stand to the right of the points
    return least


def _point(axis: Axes, place: float, value: Spread, colour: str, least: float = -math.inf, *, big: bool = False) -> None:
    """A mark with its range; nothing is drawn left of `least`."""
    low, mean, high = (max(end, least) for end in (value.low, value.mean, value.high))
    bars = [[mean - low], [high - mean]] if high > low else None
    axis.errorbar(mean, place, xerr=bars, fmt=SHAPES[colour], color=colour, markersize=9 if big else 6, capsize=4, zorder=3, clip_on=False)


def _reference(axis: Axes, place: float, value: Spread) -> None:
    """A vertical line, shaded over its range."""
    axis.fill_betweenx([place - 0.35, place + 0.35], value.low, value.high, color=REAL, alpha=0.25, linewidth=0)
    axis.plot([value.mean] * 2, [place - 0.35, place + 0.35], color=REAL, linewidth=2, zorder=2)


def _beside(axis: Axes, place: float, x: float, text: str, colour: str) -> None:
    axis.annotate(text, (x, place), (9, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [plain(name) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _number(value: Spread) -> str:
    """Three significant digits; with its range where there is one."""
    return _digits(value.mean) + (f" ({_digits(value.low)} to {_digits(value.high)})" if value.high > value.low else "")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _mark(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=SHAPES[colour], linestyle="", label=label)


def _distance(part: Record) -> str:
    """What the instrument's Fréchet distance is called."""
    return "fid" if "fid" in part["scores"] else "fd"


def _by_class(part: Record) -> Record:
    """{class: {its distance, "n"}}, or only "n" where there are too few images; Inception's distances are called fid."""
    distances: Record = part["classes"]["fid" if "fid" in part["classes"] else "fd"]
    return distances


def _measured(classes: Record) -> dict[str, Spread]:
    """The distances of those classes that have one."""
    return {name: Spread.of(value[key]) for name, value in classes.items() for key in ("fd", "fid") if key in value}
