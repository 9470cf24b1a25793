"""fashion-mnist-cnn-v1: the classifier of Fashion-MNIST that is shipped with rediffuse.

A shipped instrument is versioned.  The record beside its weights pins their SHA-256, which is checked before they are read.  Another
training run is another ruler, so it gets another id; see docs/evaluation.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from rediffuse.evaluation.classifier import Classifier, build_classifier
from rediffuse.evaluation.instrument_record import LABEL_FREE, BuildContext, Record, load_weights
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("fashion-mnist-cnn-v1",)


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images have the shape and the classes of the instrument."""
    record, _ = load_shipped(name)
    if list(images.shape) != record["shape"] or list(images.classes) != record["classes"] or images.labels is None:
        found = f"{list(images.shape)} with {'the classes ' + ', '.join(images.classes) if images.classes else 'no classes'}"
        fitting = LABEL_FREE if images.labels is None else f"classifier, {LABEL_FREE}"
        raise UserError(
            f"reference.instruments names {name}, which measures images {record['shape']} with the classes"
            f" {', '.join(record['classes'])}, in this order; data.set has {found}: take {fitting} (params.yaml)"
        )


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the shipped record."""
    return load_shipped(context.name)[0], None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the shipped network.  Raises UserError unless its weights are those of the record in the folder."""
    shipped, network = load_shipped(record["name"])
    if shipped["sha256"] != record["sha256"]:
        raise UserError(
            f"{folder} was made with other weights of {record['id']} than are shipped now ({record['sha256']} and {shipped['sha256']}):"
            " run `dvc repro reference`"
        )
    return network


def load_shipped(id: str, folder: Path = WEIGHTS) -> tuple[Record, Classifier]:
    """Return the record and the network of a shipped instrument, ready to measure.

    Raises UserError for files that are missing, and for weights that are not those of the record.
    """
    paths = {suffix: folder / f"{id}.{suffix}" for suffix in ("json", "safetensors")}
    remedy = f"restore the files with `git checkout -- src/rediffuse/evaluation/weights/{id}.*`, or install rediffuse again"
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise UserError(f"the instrument {id} is not complete, {' and '.join(missing)} missing: {remedy}")
    record: Record = json.loads(paths["json"].read_text())
    network = build_classifier(record)
    load_weights(network, paths["safetensors"].read_bytes(), record, remedy)
    return record, network
