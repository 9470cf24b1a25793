"""Names in the row of what stages write below metrics/.

metrics/ddpm.json                        {"cnn-v1": {"fd": 3.1}}  ->  metric ddpm/cnn-v1/fd
metrics/train_vae.json                   {"elbo": -240.1}         ->  metric train_vae/elbo
metrics/evaluation/ddpm.json             full record              ->  artifact only
metrics/plots/train_ddpm/training.csv    images,loss              ->  curve  ddpm/loss, step = images seen
metrics/report/ddpm/denoising.png                                 ->  image  ddpm/denoising
metrics/report/index.html                                         ->  artifact report/index.html
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def legal(name: str) -> str:
    """Return a name that MLflow accepts: at most 250 letters, digits and "_./ -"; others become _."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def result_files(places: Iterable[Path]) -> list[Path]:
    """Return the files at these places in a fixed order, with folders opened."""
    opened = (sorted(place.rglob("*")) if place.is_dir() else [place] for place in places)
    return [file for files in opened for file in files if file.is_file()]


def is_record(path: Path) -> bool:
    """Return whether the file is the full record of an evaluation."""
    return path.suffix == ".json" and path.parent.name == "evaluation"


def read_metrics(path: Path) -> dict[str, float]:
    """Return the numbers in a JSON file, not text and booleans, named by the file's stem and nested keys."""

    def leaves(node: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                yield from leaves(value, f"{name}/{key}")
        elif isinstance(node, int | float) and not isinstance(node, bool):
            yield name, float(node)

    return dict(leaves(json.loads(path.read_text()), path.stem))


def read_curve_points(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (images seen, {curve: value}) for each line of a CSV file of curves; another file has none."""
    model = model_of(path)
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        for row in table if "images" in (table.fieldnames or ()) else ():
            images = int(row.pop("images"))
            yield images, {f"{model}/{column}": float(value) for column, value in row.items() if value}


def image_name(path: Path) -> str:
    """Return the name of a picture in the row."""
    return f"{model_of(path)}/{path.stem}"


def model_of(path: Path) -> str:
    """Return the model of a file below metrics/plots/train_ddpm or metrics/report/ddpm: ddpm."""
    if match := re.search(r"(?:^|/)metrics/(?:plots|report)/(?:[^/_]+_)?([^/]+)/", path.as_posix()):
        return match[1]
    raise ValueError(
        f"{path} is in no folder below metrics/plots or metrics/report: it has no name in the row"
    )
