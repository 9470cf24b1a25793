"""classifier: a classifier trained on the training images of the set, for sets with labels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rediffuse.evaluation.classifier import ARCHITECTURE, DIMENSION, build_classifier
from rediffuse.evaluation.fitted import check_training_images, content_hash, load_fitted, make_id
from rediffuse.evaluation.instrument_record import LABEL_FREE, BuildContext, Record, new_record
from rediffuse.evaluation.train_classifier import Recipe, set_scale, train_classifier
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

CLASSES = 10_000  # at most


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and have labels of at least two classes."""
    check_training_images(name, images)
    found = 0 if images.labels is None else len(np.unique(images.labels))
    if not 2 <= found <= len(images.classes) <= CLASSES:
        labels = "has no labels" if images.labels is None else f"has {found} of {len(images.classes)} classes"
        raise UserError(
            f"reference.instruments names {name}, which learns to tell 2 to {CLASSES} classes apart, and data.set {labels}:"
            f" take {LABEL_FREE}, which need no labels (params.yaml)"
        )


def make(context: BuildContext) -> tuple[Record, nn.Module]:
    """Train the classifier and standardise its features."""
    train, recipe = context.images, Recipe()
    assert train.labels is not None
    content, order = content_hash(train, labelled=True)
    id = make_id(context.name, content, asdict(recipe) | {"architecture": ARCHITECTURE})
    images, labels, classes = train.images[order], train.labels[order], train.classes
    network, accuracy = train_classifier(
        images, labels, len(classes), recipe, device=context.device, autocast=context.autocast, title=f"training {id}"
    )
    assert accuracy is not None
    set_scale(network, images)
    return new_record(
        context,
        id=id,
        layer="penultimate",
        dimension=DIMENSION,
        classes=list(classes),
        logits=len(classes),
        accuracy=accuracy,
        accuracy_on="held-out training images",
        warning=_warning(accuracy, labels),
        trained_on={"n": len(train), "sha256": content},
        recipe=asdict(recipe)
        | {"architecture": ARCHITECTURE, "arithmetic": _arithmetic(context), "device": context.device.type, "torch": torch.__version__},
    ), network


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network that `make` trained."""
    return load_fitted(build_classifier(record), record, folder)


def _arithmetic(context: BuildContext) -> str:
    """Return the precision that autocast gives, in words."""
    with context.autocast:
        enabled = torch.is_autocast_enabled(context.device.type)
        return str(torch.get_autocast_dtype(context.device.type) if enabled else torch.float32).removeprefix("torch.")


def _warning(accuracy: float, labels: NDArray[np.int64]) -> str | None:
    """Return a warning for a classifier that learnt little.

    Little is below twice the accuracy of naming the most frequent class, and below halfway from that accuracy to 1.
    """
    chance = float(np.bincount(labels).max() / len(labels))
    if accuracy >= min(2 * chance, (1 + chance) / 2):
        return None
    return (
        f"it names {accuracy:.1%} of the held-out images rightly, and the most frequent class alone would give {chance:.1%}:"
        f" its distances say little; look at those of {LABEL_FREE}"
    )
