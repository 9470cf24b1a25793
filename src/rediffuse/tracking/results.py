"""How the files that stages write under metrics/ are called in a row.  The running stage and a cached one go through here,
so that a number has the same name wherever it comes from.

    metrics/ddpm.json                        {"cnn-v1": {"fd": 3.1}}    ->  metric ddpm/cnn-v1/fd
    metrics/train_vae.json                   {"elbo": -240.1}           ->  metric train_vae/elbo
    metrics/evaluation/ddpm.json             the full record behind metrics/ddpm.json: an artifact, no metrics
    metrics/plots/train_ddpm/training.csv    images,loss                ->  curve  ddpm/loss, step = images seen
    metrics/report/ddpm/denoising.png                                   ->  image  ddpm/denoising
    metrics/report/vae/walk/3000.png                                    ->  image  vae/walk, step 3000
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

PLACES = (("metrics", "plots"), ("metrics", "report"))


def legal(name: str) -> str:
    """A name as MLflow takes it for parameters, metrics, tags and images: other characters become _, 250 at most."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def result_files(places: Iterable[Path]) -> list[Path]:
    """The files at these places, folders opened, in a fixed order."""
    return [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]) if file.is_file()]


def is_record(path: Path) -> bool:
    """Whether the file is a full record of an evaluation."""
    return path.suffix == ".json" and path.parent.name == "evaluation"


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers in a JSON file of metrics, by the file's stem and the nested keys joined with "/".  Text and booleans are not
    metrics."""

    def leaves(node: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, f"{name}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from leaves(value, f"{name}/{index}")
        elif isinstance(node, int | float) and not isinstance(node, bool):
            yield name, float(node)

    return dict(leaves(json.loads(path.read_text()), path.stem))


def read_curve_points(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(images seen, {curve: value}) for each row of a CSV of curves; nothing for one of another kind, such as scores by class."""
    model = model_of(_place(path)[0])
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        for row in table if "images" in (table.fieldnames or ()) else ():
            images = int(row.pop("images"))
            yield images, {f"{model}/{column}": float(value) for column, value in row.items() if value}


def image_name(path: Path) -> tuple[str, int]:
    """(key, step) of a picture.  A picture whose name is a number is one step of a series named after its folder."""
    owner, *inner = _place(path)
    parts = [model_of(owner), *(part for part in inner[:-1] if part != "images")]
    if path.stem.isdecimal() and len(parts) > 1:
        return "/".join(parts), int(path.stem)
    return "/".join([*parts, path.stem]), 0


def model_of(owner: str) -> str:
    """The model in a stage's name: train_ddpm, sample_ddpm -> ddpm.  Pictures and curves of a model stand together in MLflow."""
    return owner.partition("_")[2] or owner


def _place(path: Path) -> tuple[str, ...]:
    """The parts of the path below metrics/plots or metrics/report: a stage or a model, then what is its own."""
    parts = path.parts
    start = max((i for i, pair in enumerate(pairwise(parts)) if pair in PLACES), default=len(parts)) + 2
    if len(parts) < start + 2:
        raise ValueError(f"{path} must lie in a folder below metrics/plots or metrics/report, from which its name in the row is made")
    return parts[start:]
