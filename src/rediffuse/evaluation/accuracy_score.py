"""The classification accuracy score (Ravuri and Vinyals 2019, arXiv:1905.10887): learn from generated images, be examined on real ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from rediffuse.evaluation.train_classifier import Recipe, accuracy, train_classifier
from rediffuse.runtime.errors import UserError

CHANNELS = (32, 64)
IMAGES = 50_000  # seen in training, however many there are: ten times each of 5,000
BATCH = 128
RECIPE = Recipe(batch=BATCH, lr=5e-3, held_out=0)  # nothing is chosen on real images: the last weights are taken


def classification_accuracy_score(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.int64],
    classes: int,
    *,
    seed: int,
    seen: int = IMAGES,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
) -> float:
    """Share of real test images whose class is named rightly by a classifier that was trained on generated images alone, 0 .. 1.

    images: uint8 (N, C, H, W), with the labels they were asked for, int64 (N,), 0 .. classes - 1; likewise the test images.  A model
    that mixes up its classes, or lacks variety within them, teaches badly.  It is compared with the score of real training images at
    the same N.
    seen: images seen in training, with repetition; the same for all scores that are compared.  Training runs on `device` in the
    context `autocast`, which is entered again and again (CPU, float32 if None); the examination in float32 on the CPU.
    Raises UserError for sets that do not fit each other.
    """
    for title, pixels, asked in (("generated images", images, labels), ("test images", test_images, test_labels)):
        _check(pixels, asked, classes, test_images.shape[1:], title)
    recipe = replace(RECIPE, seed=seed, steps=max(1, seen // BATCH))
    network, _ = train_classifier(
        images, labels, classes, recipe, channels=CHANNELS, device=device, autocast=autocast, title="accuracy score"
    )
    return accuracy(network, torch.tensor(test_images), torch.tensor(test_labels))


def _check(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, shape: tuple[int, ...], title: str) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) < 2:
        wanted = ", ".join(str(size) for size in shape)
        raise UserError(
            f"the {title} must be at least two, uint8 [N, {wanted}], for the accuracy score, got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != (len(images),) or not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"the {title} need {len(images)} labels from 0 to {classes - 1} for the accuracy score, got {list(labels.shape)}")
