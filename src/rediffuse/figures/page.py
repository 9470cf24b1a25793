"""The page of a run: its results, and its models to play with, in one file that needs no network."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex
from torch import Tensor

from rediffuse.figures.films import Film, Map, Painter, latent_plane, noising, walk
from rediffuse.figures.latent import class_colours
from rediffuse.figures.scores import ROWS, Spread
from rediffuse.figures.text import legible
from rediffuse.images.files import encode_image
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.files import replace_file
from rediffuse.runtime.kinds import KINDS
from rediffuse.vae.model import VAE

Record = Mapping[str, Any]

TEMPLATE = "page.html"
SEES = {  # what each ruler sees; docs/evaluation.md measures it
    "efficientnet-lite0": "textures and noise, as a network that was trained on photographs sees them",
    "fashion-mnist-cnn-v1": "what the thing is: features of a classifier of this set",
    "classifier": "what the thing is: features of a classifier that was trained on this set",
    "random-conv-v1": "edges, contrasts and colours: random filters, which know nothing",
    "inception-v3": "what published FIDs see: a network that was trained on photographs at 299 pixels",
}
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # of lines; of Okabe and Ito
WIDE, HIGH = 600, 220  # of a chart
LISTED = 50  # classes
TERMS = {"reconstruction": "reconstruction", "kl": "KL"}


def draw_page(
    report: Path,
    records: Mapping[str, Record],
    painter: Painter,
    vae: VAE,
    images: Tensor,
    test: ImageSet,
    *,
    seed: int,
    trained: int,
    curves: Path,
) -> None:
    """Write index.html into the folder of the other pictures, which it holds as well.

    records: of the evaluations, by model, and of the reference.  images: uint8 (N, C, H, W), shown with
    noise.  trained: number of training images.  curves: the folder of the curves of both trainings.
    """
    reference = records["reference"]
    evaluated: dict[str, Record] = {model: records[model] for model in KINDS}
    x_t, x_0, times = painter.denoising()
    schedule = painter.denoiser.schedule
    samplers, guidance = painter.samplers(), painter.guidance()
    plane, between = latent_plane(vae, test), walk(vae, test)
    sampling = records["ddpm"]["sampling"]
    usual = f"{sampling['sampler']}, {sampling['steps']} steps"
    about, source = reference["reference"], records["ddpm"]["reference"]
    write_page(
        report / "index.html",
        set=about["set"],
        split=about["split"],
        sha256=source["sha256"],
        trained=f"{trained:,}",
        n=f"{sampling['n']:,}",
        classes=legible(test.classes)[:LISTED],
        models=[_about(model, record, report / model) for model, record in evaluated.items()],
        rulers=rulers(evaluated, reference),
        denoising={
            "x_t": film(x_t),
            "x_0": film(x_0),
            "real": film(noising(schedule, painter.space, images, times, seed)),
            "start": len(times) * 3 // 5,
            "snr": log_snr_chart(schedule.log_snr.tolist(), times),
        },
        samplers=film(samplers),
        samplers_start=samplers.labels.index(usual) if usual in samplers.labels else 0,
        guidance=film(guidance) if guidance else None,
        map=latent_map(plane, legible(test.classes)) if plane else None,
        plane=vae.latent_dim > 2,
        walk=film(between) if between else None,
        charts=_charts(curves),
        sampling={name: value for name, value in sampling.items() if name != "rounding"},
    )


def _about(model: str, record: Record, folder: Path) -> dict[str, str]:
    """Return what the page shows of a model: its name, pictures, and shares of copies."""
    shares = {name: Spread.of(record["memorisation"][name]).mean for name in ("copies", "authentic")}
    pictures = {"samples": "samples", "by_class": "classes", "neighbours": "neighbours"}
    shown = {name: embed((folder / f"{file}.png").read_bytes()) for name, file in pictures.items()}
    return {"title": model.upper(), **{name: f"{share:.2%}" for name, share in shares.items()}, **shown}


def _charts(folder: Path) -> list[dict[str, Any]]:
    """Return the curves of both trainings, those that have any."""
    quarters = {i: f"quarter {i} of t" for i in range(1, 5)}
    wanted = [
        ("VAE: the two terms of the ELBO, training, nats", "train_vae/training.csv", TERMS),
        (
            "VAE: negative ELBO of held-out images, nats",
            "train_vae/validation.csv",
            {"validation_elbo": "ELBO"},
        ),
        (
            "DDPM: loss by quarter of t",
            "train_ddpm/training.csv",
            {f"loss_q{i}": q for i, q in quarters.items()},
        ),
        (
            "DDPM: squared error of eps by quarter of t, held-out images",
            "train_ddpm/validation.csv",
            {f"validation_eps_mse_q{i}": q for i, q in quarters.items()},
        ),
    ]
    found = [{"title": title, "chart": chart(folder / file, columns)} for title, file, columns in wanted]
    return [each for each in found if each["chart"]]


def write_page(path: Path, **parts: Any) -> None:
    """Write the page atomically.  parts: what the template shows.  The bytes depend only on them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(**parts)
    replace_file(path, page.encode())


def embed(png: bytes) -> str:
    """Return a PNG as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def film(film: Film) -> dict[str, Any]:
    """Return what the template shows of a film."""
    n, c, h, w = film.frames.shape
    rows = -(-n // film.columns)
    frames = np.zeros((rows * film.columns, c, h, w), np.uint8)
    frames[:n] = film.frames
    sheet = frames.reshape(rows, film.columns, c, h, w).transpose(2, 0, 3, 1, 4).reshape(c, rows * h, -1)
    about = {"rows": rows, "columns": film.columns, "labels": film.labels, "width": w, "height": h}
    return about | {"source": embed(encode_image(sheet))}


def latent_map(found: Map, classes: Sequence[str]) -> dict[str, Any]:
    """Return what the template shows of the map: the film, and dots with their colours."""
    labels = np.zeros(len(found.points), np.int64) if found.labels is None else found.labels
    points = zip(found.points.tolist(), labels.tolist(), strict=True)
    colours = [to_hex(colour) for colour in class_colours(len(classes))(range(max(1, len(classes))))]
    dots = [
        {"x": f"{100 * x:.1f}", "y": f"{100 * y:.1f}", "colour": colours[label]}
        for (x, y), label in points
        if 0 <= x <= 1 and 0 <= y <= 1
    ]
    names = [{"name": name, "colour": colour} for name, colour in zip(classes, colours, strict=False)]
    return {"film": film(found.film), "dots": dots, "classes": names if len(names) <= LISTED else []}


def rulers(records: Mapping[str, Record], reference: Record) -> list[dict[str, Any]]:
    """Return by ruler what it sees, and its distances in order, each with its place on a log axis, in %.

    records: of the evaluations, by model.
    """
    found = []
    for name, part in reference["instruments"].items():
        rows = [
            (label, Spread.of(part["rows"][row]["fd"]), "real" if row == "real" else "useless")
            for row, (label, _) in ROWS.items()
            if row in part["rows"] and row != "halves" and "fd" in part["rows"][row]
        ]
        rows += [
            (model.upper(), Spread.of(record["instruments"][name]["scores"]["fd"]), "model")
            for model, record in records.items()
            if name in record["instruments"]
        ]
        rows.sort(key=lambda row: row[1].mean)
        positive = [row[1].mean for row in rows if row[1].mean > 0] or [1.0]
        low, high = math.log(min(positive)), math.log(max(positive))
        floor = next((spread.mean for _, spread, kind in rows if kind == "real"), None)
        shown = []
        for label, spread, kind in rows:
            place = (math.log(max(spread.mean, min(positive))) - low) / (high - low or 1)
            times = f"{_rounded(spread.mean / floor)} times" if floor and kind != "real" else ""
            shown.append(
                {
                    "label": label,
                    "kind": kind,
                    "place": f"{100 * place:.1f}",
                    "fd": str(spread),
                    "times": times,
                }
            )
        found.append({"name": name, "sees": SEES.get(part["instrument"]["name"], ""), "rows": shown})
    return found


def _rounded(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:,.0f}"


def chart(path: Path, columns: Mapping[str, str]) -> dict[str, Any] | None:
    """Return curves of a CSV with the column `images` as the points of lines; None without two rows.

    columns: names of the lines by column.  The axis is logarithmic if all values are positive.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = {
        name: [(float(row["images"]), float(row[column])) for row in rows if row.get(column)]
        for column, name in columns.items()
    }
    lines = {name: points for name, points in read.items() if points}
    if len(rows) < 2 or not lines:
        return None
    known = [y for points in lines.values() for _, y in points]
    log, end = min(known) > 0, float(rows[-1]["images"])
    scale: Callable[[float], float] = math.log if log else float
    low, high = scale(min(known)), scale(max(known))
    drawn = [
        {
            "name": name,
            "points": " ".join(
                f"{WIDE * x / end:.1f},{HIGH - HIGH * (scale(y) - low) / (high - low or 1):.1f}"
                for x, y in points
            ),
            "colour": colour,
            "last": f"{points[-1][1]:.4g}",
        }
        for (name, points), colour in zip(lines.items(), COLOURS, strict=False)
    ]
    about = {"low": f"{min(known):.3g}", "high": f"{max(known):.3g}", "images": f"{int(end):,}"}
    return {"lines": drawn, "width": WIDE, "height": HIGH, "axis": "log" if log else "linear"} | about


def log_snr_chart(log_snr: Sequence[float], times: Sequence[int]) -> dict[str, Any]:
    """Return the curve of log SNR over t = 1..T, and the place of each frame's time on it."""
    T, low, high = len(log_snr) - 1, min(log_snr[1:]), max(log_snr[1:])

    def place(t: int) -> tuple[str, str]:
        share = (log_snr[max(t, 1)] - low) / (high - low or 1)
        return f"{WIDE * t / T:.1f}", f"{HIGH - HIGH * share:.1f}"

    every = sorted({1, T, *(round(1 + i * (T - 1) / 100) for i in range(101))})
    marks = [
        {"x": x, "y": y, "value": f"{log_snr[t]:.1f}" if t else "∞"} for t in times for x, y in [place(t)]
    ]
    points = " ".join(",".join(place(t)) for t in every)
    return {
        "points": points,
        "marks": marks,
        "width": WIDE,
        "height": HIGH,
        "low": f"{low:.1f}",
        "high": f"{high:.1f}",
    }
