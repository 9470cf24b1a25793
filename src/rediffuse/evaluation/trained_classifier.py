"""classifier: a classifier trained on the training images of the set, for sets with labels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rediffuse.evaluation import shared
from rediffuse.evaluation.classifier import ARCHITECTURE, Recipe, build_classifier, train_classifier
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

CLASSES = 10_000  # at most


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and have labels of at least two classes."""
    shared.check_training_images(name, images)
    found = 0 if images.labels is None else len(np.unique(images.labels))
    if not 2 <= found <= len(images.classes) <= CLASSES:
        labels = "has no labels" if images.labels is None else f"has {found} of {len(images.classes)} classes"
        raise UserError(
            f"reference.instruments names {name}, which learns to tell 2 to {CLASSES} classes apart, and"
            f" data.set {labels}: take {shared.LABEL_FREE}, which needs no labels (params.yaml)"
        )


def make(context: BuildContext) -> tuple[Record, nn.Module]:
    """Train the classifier and standardise its features."""
    train, recipe = context.images, Recipe()
    assert train.labels is not None
    content, order = shared.content_hash(train, labelled=True)
    id = shared.make_id(context.name, content, asdict(recipe) | {"architecture": ARCHITECTURE})
    images, labels, classes = train.images[order], train.labels[order], train.classes
    how: Record = {"device": context.device, "autocast": context.autocast, "title": f"training {id}"}
    network, accuracy = train_classifier(images, labels, len(classes), recipe, **how)
    assert accuracy is not None
    mean, std = shared.feature_scale(network, train.images, order)
    network.feature_mean.copy_(mean)
    network.feature_std.copy_(std)
    settings = {
        "architecture": ARCHITECTURE,
        "arithmetic": _arithmetic(context),
        "device": context.device.type,
        "torch": torch.__version__,
    }
    record = shared.new_record(
        context,
        id=id,
        layer="penultimate",
        dimension=shared.DIMENSION,
        classes=list(classes),
        logits=len(classes),
        accuracy=accuracy,
        accuracy_on="held-out training images",
        warning=_warning(accuracy, labels),
        trained_on={"n": len(train), "sha256": content},
        recipe=asdict(recipe) | settings,
    )
    return record, network


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network that `make` trained."""
    return shared.load_weights(build_classifier(record), folder / shared.WEIGHTS_FILE, record)


def _arithmetic(context: BuildContext) -> str:
    """Return the precision that autocast gives, in words."""
    kind = context.device.type
    with context.autocast:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return str(dtype).removeprefix("torch.")


def _warning(accuracy: float, labels: NDArray[np.int64]) -> str | None:
    """Return a warning for a classifier that learnt little.

    Little is below twice the accuracy of naming the most frequent class, and below halfway from that accuracy
    to 1.
    """
    chance = float(np.bincount(labels).max() / len(labels))
    if accuracy >= min(2 * chance, (1 + chance) / 2):
        return None
    return (
        f"it names {accuracy:.1%} of the held-out images rightly, and the most frequent class alone would"
        f" give {chance:.1%}: its distances say little; look at those of {shared.LABEL_FREE}"
    )
