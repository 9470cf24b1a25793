"""A model's scores between those of real images and of useless generators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rediffuse.figures.render import default_style, plain, render
from rediffuse.figures.text import legible
from rediffuse.images.files import save_png

Record = Mapping[str, Any]

# From Okabe and Ito, distinct with any colour vision; the shapes and the names differ too.
MODEL, REAL, USELESS, GREY = "#0072B2", "#009E73", "#D55E00", "#999999"
SHAPES = {MODEL: "o", REAL: "D", USELESS: "s"}
ROWS = {  # of the reference, from the worst to the best
    "noise": ("uniform noise", USELESS),
    "pixel_marginals": ("pixel marginals", USELESS),
    "mean_image": ("mean image", USELESS),
    "real": ("real", REAL),
    "halves": ("real, half vs half", REAL),
}
BY = {"label": "by the class that was asked for", "predicted": "by the class that a classifier sees"}
SHARES = ("precision", "recall", "density", "coverage")
DECADES = 1e7  # of a log axis, at most
DOTS = 100  # per inch
MOST = 50  # classes shown, at most
NOTHING = "no distance was measured (reference.instruments is empty)"


class Spread(NamedTuple):
    """A number with the range of its independent repetitions."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Any) -> Spread:
        """Read a value of a record: a plain number, or {"mean", "min", "max", ...}."""
        if isinstance(value, Mapping):
            return cls(value["mean"], value["min"], value["max"])
        return cls(value, value, value)

    def __str__(self) -> str:
        text = _digits(self.mean)
        return text + f" ({_digits(self.low)} to {_digits(self.high)})" if self.high > self.low else text


def draw_scores(record: Record, reference: Record, folder: Path) -> None:
    """Write scores.png and classes.png."""
    save_png(score_chart(record, reference), folder / "scores.png")
    save_png(class_chart(record, reference), folder / "classes.png")


@default_style
def score_chart(record: Record, reference: Record) -> NDArray[np.uint8]:
    """Return all scores of a model as a picture (height, 1500, 3), with a band for each instrument.

    record, reference: as in metrics/evaluation/{model}.json and reference.json.  Left: the Fréchet distance
    on a log axis, between those of real images and of useless generators, with the bias that a perfect
    generator would show.  For the first instrument, precision, recall, density and coverage with the values
    of real images, and the inception score if there is one.  Error bars reach from the smallest to the
    largest of the independent sample sets.
    """
    model, parts = record["model"], record["instruments"]
    if not parts:
        return _sentence(f"{model}: {NOTHING}")
    figure = Figure(figsize=(15, 0.9 + 3.4 * len(parts)), dpi=DOTS, layout="constrained")
    figure.suptitle(_title(record), fontsize=13)
    bands = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for band, (name, part) in zip(bands, parts.items(), strict=True):
        dimension = part["instrument"]["dimension"]
        band.suptitle(f"{name}, {dimension} dimensions", fontsize=11, weight="bold")
        rows, scores = reference["instruments"].get(name, {}).get("rows", {}), part["scores"]
        widths = [6, *([4] if "precision" in scores else []), *([2] if "is" in scores else [])]
        axes = band.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _distance_panel(axes[0], model, part, rows)
        if "precision" in scores:
            _shares_panel(axes[1], scores, rows.get("real", {}))
        if "is" in scores:
            _inception_panel(axes[2], part, rows)
    return render(figure)


@default_style
def class_chart(record: Record, reference: Record) -> NDArray[np.uint8]:
    """Return the Fréchet distance of each class as a picture, with a panel for each instrument.

    A bar on a log axis cannot begin at zero.  Bars begin at the distance of real training images of the
    class, so that their length is the ratio to it.  Classes with too few images for a distance are named in
    grey.  Of more than MOST classes those with the largest distances are shown.  Without classes the picture
    says so.
    """
    model, instruments = record["model"], record["instruments"]
    classified = {name: part for name, part in instruments.items() if part.get("classes")}
    # In many dimensions no class has enough images.  Without any distance, show the first one's counts.
    parts = {name: part for name, part in classified.items() if _measured(_by_class(part))}
    parts = parts or dict(list(classified.items())[:1])
    every = list(dict.fromkeys(name for part in parts.values() for name in _by_class(part)))
    if not every:
        return _sentence(f"{model}: {'the images have no classes' if instruments else NOTHING}")
    distances = [_measured(_by_class(part)) for part in parts.values()]
    if len(every) > MOST and not any(distances):
        return _sentence(f"{model}: too few images of each of the {len(every):,} classes for a distance")
    shown = dict(zip(every, legible(every), strict=True))
    classes = every if len(every) <= MOST else _furthest(every, distances[0])
    size = max(8, 2.5 + 5.5 * len(parts)), 1.8 + 0.32 * max(3, len(classes))
    figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
    by = " or ".join(BY[how] for how in dict.fromkeys(part["classes"]["by"] for part in parts.values()))
    note = "" if classes == every else f"\nthe {len(classes)} furthest of {len(every):,} classes"
    figure.suptitle(f"{model}: Fréchet distance {by}{note}", fontsize=13)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        floor = reference["instruments"].get(name, {}).get("classes", {}).get(part["classes"]["by"], {})
        _class_panel(axis, classes, _by_class(part), floor)
        _name_rows(axis, [shown[each] for each in classes])
        axis.set(title=name, xlabel=f"{_distance(part)} (log axis)")
    for tick, name in zip(axes[0].get_yticklabels(), classes, strict=True):
        tick.set_color("black" if any(name in measured for measured in distances) else GREY)
    marks = [
        Line2D([], [], color=colour, marker=SHAPES[colour], linestyle="", label=label)
        for colour, label in ((MODEL, model), (REAL, "real"))
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return render(figure)


def _sentence(text: str) -> NDArray[np.uint8]:
    """Return a small picture with only a sentence."""
    figure = Figure(figsize=(8, 1.8 + 0.32 * 3), dpi=DOTS, layout="constrained")
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color=GREY)
    return render(figure)


def _furthest(classes: Sequence[str], distances: Mapping[str, Spread]) -> list[str]:
    """Return the MOST classes with the largest distances; classes without a distance come last."""

    def distance(name: str) -> float:
        return distances[name].mean if name in distances else -math.inf

    return sorted(classes, key=distance, reverse=True)[:MOST]


def _title(record: Record) -> str:
    sampling, real, sets = record["sampling"], record["reference"], len(record["sampling"]["seeds"])
    bars = f"bars: smallest to largest of {sets} independent sets" if sets > 1 else "a single set, so no bars"
    against = f"{real['n']:,} of {real['set']} ({real['split']})"
    return f"{record['model']}: {sampling['n']:,} images against {against}; {bars}"


def _distance_panel(axis: Axes, model: str, part: Record, rows: Record) -> None:
    name = _distance(part)
    real = {row: Spread.of(values[name]) for row, values in rows.items() if name in values}
    lines = [(title, colour, real[row]) for row, (title, colour) in ROWS.items() if row in real]
    if name in part.get("reconstructions", {}):
        lines.append((f"{model}, reconstructions", MODEL, Spread.of(part["reconstructions"][name])))
    lines.append((model, MODEL, Spread.of(part["scores"][name])))
    lines.sort(key=lambda line: line[2].mean, reverse=True)
    bias = Spread.of(part["expected_bias"])
    least = _log_axis(axis, [bias, *(value for _, _, value in lines)])
    for place, (title, colour, value) in enumerate(lines):
        _point(axis, place, value, colour, least, big=title == model)
        _write_beside(axis, place, max(value.high, least), str(value), colour)
    axis.axvline(max(bias.mean, least), color="black", linestyle=":", linewidth=1.2, zorder=1)
    title = f"dotted: {bias}, to expect of a perfect generator at this number of images"
    axis.set_title(title, fontsize=9, loc="left")
    for row, colour, end in (("real", REAL, 0), ("noise", USELESS, 1)):
        if row in real:
            ends = max(real[row].mean, least), axis.get_xlim()[end]
            axis.axvspan(*ends, color=colour, alpha=0.08, linewidth=0, zorder=0)
    _name_rows(axis, [title for title, _, _ in lines])
    axis.set_xlabel(f"Fréchet distance {name} to the real images, log axis; smaller is better")


def _shares_panel(axis: Axes, scores: Record, real: Record) -> None:
    names = [name for name in SHARES if name in scores]
    highest = [1.0]
    for place, name in enumerate(names):
        if name in real:
            _reference(axis, place, Spread.of(real[name]))
            highest.append(Spread.of(real[name]).high)
        value = Spread.of(scores[name])
        highest.append(value.high)
        _point(axis, place, value, MODEL, big=True)
        _write_at(axis, place, 1.02, str(value), MODEL)
    _name_rows(axis, names)
    axis.set(xlim=(0, 1.05 * max(highest)), xlabel="green line: real")


def _inception_panel(axis: Axes, part: Record, rows: Record) -> None:
    value = Spread.of(part["scores"]["is"])
    real = {row: Spread.of(values["is"]) for row, values in rows.items() if "is" in values}
    shown = next((row for row in ("same", "real") if row in real), None)
    if shown:
        _reference(axis, 0, real[shown])
    _point(axis, 0, value, MODEL, big=True)
    axis.set_title(str(value), fontsize=9, color=MODEL)
    _name_rows(axis, [""])
    # The axis ends at the highest possible score, unless that would push all points to the left.
    most, highest = part["is_max"], max(value.high, *(spread.high for spread in real.values()), 1)
    axis.set_xlim(1, most if most < 4 * highest else 1.5 * highest)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_xlabel(f"IS (1 to {most})\n" + ("green line: real" if shown else ""))


def _class_panel(axis: Axes, classes: Sequence[str], model: Record, floor: Record) -> None:
    found, real = _measured(model), _measured(floor)
    least = _log_axis(axis, [*found.values(), *real.values()])
    for place, name in enumerate(classes):
        if name not in found:
            n = model.get(name, {}).get("n", 0)
            _write_at(axis, place, 0.5, f"too few images ({n})", GREY, ha="center")
            continue
        ends = [max(values[name].mean, least) for values in (found, real) if name in values]
        if name in real:
            axis.barh(place, ends[0] - ends[1], left=ends[1], height=0.3, color=MODEL, alpha=0.35, zorder=1)
            _point(axis, place, real[name], REAL, least)
        _point(axis, place, found[name], MODEL, least, big=True)
        _write_beside(axis, place, max(ends), str(found[name]), MODEL)
    axis.xaxis.set_visible(bool(found))


def _log_axis(axis: Axes, values: Sequence[Spread]) -> float:
    """Make x logarithmic with room for all values.  Return its left end, where smaller values are drawn."""
    positive = [end for value in values for end in (value.low, value.high) if end > 0] or [1.0]
    most = max(positive)
    least = max(min(positive) / 1.6, most / DECADES)  # rounding around 0 must not push all else to the right
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if most / least > 300 else (1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(least, most * (most / least) ** 0.18)  # numbers stand to the right of the points
    return least


def _point(
    axis: Axes, place: float, value: Spread, colour: str, least: float = -math.inf, *, big: bool = False
) -> None:
    """Draw a mark with its range, nothing of it left of `least`."""
    mean, low, high = (max(end, least) for end in value)
    bars = [[mean - low], [high - mean]] if high > low else None
    style: Any = {"fmt": SHAPES[colour], "color": colour, "markersize": 9 if big else 6, "capsize": 4}
    axis.errorbar(mean, place, xerr=bars, zorder=3, clip_on=False, **style)


def _reference(axis: Axes, place: float, value: Spread) -> None:
    """Draw a vertical line, shaded over its range."""
    ends = [place - 0.35, place + 0.35]
    axis.fill_betweenx(ends, value.low, value.high, color=REAL, alpha=0.25, linewidth=0)
    axis.plot([value.mean] * 2, ends, color=REAL, linewidth=2, zorder=2)


def _write_beside(axis: Axes, place: float, x: float, text: str, colour: str) -> None:
    axis.annotate(text, (x, place), (9, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def _write_at(axis: Axes, place: float, share: float, text: str, colour: str, ha: Any = "left") -> None:
    """Write a text in a row, this share of the axis from its left end."""
    at: Any = ("axes fraction", "data")
    axis.annotate(text, (share, place), xycoords=at, ha=ha, va="center", color=colour, fontsize=9)


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [plain(name) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _digits(value: float) -> str:
    """Return three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _distance(part: Record) -> str:
    """Return the name of the instrument's Fréchet distance: fid is Inception's."""
    return "fid" if "fid" in part["scores"] else "fd"


def _by_class(part: Record) -> Record:
    """Return {class: {its distance, "n"}}, with only "n" for a class that has too few images."""
    distances: Record = part["classes"]["fid" if "fid" in part["classes"] else "fd"]
    return distances


def _measured(classes: Record) -> dict[str, Spread]:
    """Return the distances of those classes that have one."""
    return {name: Spread.of(row[key]) for name, row in classes.items() for key in ("fd", "fid") if key in row}
