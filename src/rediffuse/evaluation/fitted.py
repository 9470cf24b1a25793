"""What the instruments made from the training images share: which images they need, their ids, their weights on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.evaluation.instrument_record import REMEDY, WEIGHTS_FILE, Record, load_weights
from rediffuse.images.image_set import ImageSet
from rediffuse.params import SIDES
from rediffuse.runtime.errors import UserError

DIMENSION = 64  # of the features
LEAST = 2 * DIMENSION  # training images that an instrument can be made from
BATCH = 250
CONSTANT = 1e-6  # a spread up to here is rounding


def check_training_images(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images have 1 or 3 channels and sides within SIDES, and are enough."""
    channels, *sides = images.shape
    low, high = SIDES
    if channels not in (1, 3) or not low <= min(sides) <= max(sides) <= high:
        raise UserError(
            f"reference.instruments names {name}, which measures images of 1 or 3 channels with sides from {low} to {high}, and the"
            f" images of data.set are {list(images.shape)}: take efficientnet-lite0 or inception-v3, or other images (params.yaml)"
        )
    if len(images) < LEAST:
        raise UserError(
            f"reference.instruments names {name}, which is made from at least {LEAST} training images, and data.set has {len(images)}:"
            " take more images, or measure no distances with reference.instruments: [] (params.yaml)"
        )


def content_hash(images: ImageSet, *, labelled: bool) -> tuple[str, NDArray[np.int64]]:
    """Return the SHA-256 of what the set holds, and an order of the images, (N,), that depends only on their content.

    Both come from a hash of each image, with its label if `labelled`.  The order of the images in the set makes no difference.
    """
    labels = images.labels if labelled and images.labels is not None else np.zeros(len(images), np.int64)
    pairs = zip(images.images, labels, strict=True)
    digests = [hashlib.sha256(image.tobytes() + int(label).to_bytes(8)).digest() for image, label in pairs]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    header = json.dumps({"shape": images.shape, "classes": images.classes if labelled else None})
    whole = hashlib.sha256(header.encode() + b"".join(digests[i] for i in order))
    return whole.hexdigest(), np.array(order, dtype=np.int64)


def make_id(name: str, content: str, recipe: Record) -> str:
    """Return the name with a hash of `content`, the SHA-256 of the images, and of the recipe."""
    return f"{name}-{hashlib.sha256(json.dumps([content, recipe], sort_keys=True).encode()).hexdigest()[:8]}"


def load_fitted(network: nn.Module, record: Record, folder: Path) -> nn.Module:
    """Load the weights in the folder into the network.  Raises UserError if they are missing or not those of the record."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {REMEDY}")
    load_weights(network, path.read_bytes(), record, REMEDY)
    return network


def batches(images: NDArray[np.uint8], order: NDArray[np.int64], title: str) -> Iterator[Tensor]:
    """Yield the images (N, C, H, W) in this order, in batches."""
    for start in tqdm(range(0, len(order), BATCH), desc=title, unit="batch", leave=False):
        yield torch.from_numpy(images[order[start : start + BATCH]])


def check_variety(spread: Tensor) -> None:
    """Raise UserError if the features of the training images do not vary."""
    if spread <= CONSTANT:
        raise UserError("the training images are all alike: no instrument can be made from them; choose another data.set")


def round_to(values: Tensor, step: float) -> Tensor:
    """Round the values to multiples of `step`."""
    return (values / step).round() * step
