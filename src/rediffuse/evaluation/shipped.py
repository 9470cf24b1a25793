"""fashion-mnist-cnn-v1: the classifier of Fashion-MNIST that is shipped with rediffuse.

A shipped instrument is versioned: the record beside its weights pins their SHA-256. No stage trains it again;
docs/evaluation.md says how it was made.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from rediffuse.evaluation import shared
from rediffuse.evaluation.classifier import Classifier, build_classifier
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("fashion-mnist-cnn-v1",)


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images have the shape and the classes of the instrument."""
    record, _ = load_shipped(name)
    fits = (list(images.shape), list(images.classes)) == (record["shape"], record["classes"])
    if not fits or images.labels is None:
        classes = f"the classes {', '.join(images.classes)}" if images.classes else "no classes"
        fitting = shared.LABEL_FREE if images.labels is None else f"classifier or {shared.LABEL_FREE}"
        raise UserError(
            f"reference.instruments names {name}, which measures images {record['shape']} with the classes"
            f" {', '.join(record['classes'])}, in this order; data.set has {list(images.shape)} with"
            f" {classes}: take {fitting} (params.yaml)"
        )


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the shipped record."""
    return load_shipped(context.name)[0], None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the shipped network. Raises UserError unless its weights are those of the record in the folder."""
    shipped, network = load_shipped(record["name"])
    shared.check_pinned(record, shipped["sha256"], folder)
    return network


def load_shipped(id: str, folder: Path = WEIGHTS) -> tuple[Record, Classifier]:
    """Return the record and the network of a shipped instrument, ready to measure.

    Raises UserError for files that are missing, and for weights that are not those of the record.
    """
    checkout = f"git checkout -- src/rediffuse/evaluation/weights/{id}.*"
    path, remedy = folder / f"{id}.json", f"restore it with `{checkout}`, or install rediffuse again"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    record: Record = json.loads(path.read_text())
    network = build_classifier(record)
    shared.load_weights(network, path.with_suffix(".safetensors"), record, remedy)
    return record, network
