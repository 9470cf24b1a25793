"""The classification accuracy score (Ravuri and Vinyals 2019): learn from generated, test on real images."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rediffuse.evaluation.classifier import Recipe, accuracy, train_classifier

CHANNELS = (32, 64)
IMAGES = 50_000  # seen in training, for any number of images: each of 5,000 ten times
BATCH = 128
RECIPE = Recipe(batch=BATCH, lr=5e-3, held_out=0)  # keep the last weights: no real image chooses between them


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
    """Return the accuracy, 0 .. 1, on real test images of a classifier trained on generated images alone.

    images: uint8 (N, C, H, W); labels: the classes asked for, int64 (N,), 0 .. classes - 1; likewise for the
    test images. The score is low for a model that confuses its classes or lacks variety within them. Compare
    it with the score of real training images at the same N and `seen`, the number of images seen in training,
    with repetition. Training runs on `device` within `autocast`, which must be reusable (CPU, float32 if
    None); the test in float32 on the CPU.
    """
    recipe = replace(RECIPE, seed=seed, steps=max(1, seen // BATCH))
    how: dict[str, Any] = {"channels": CHANNELS, "device": device, "autocast": autocast}
    network, _ = train_classifier(images, labels, classes, recipe, title="accuracy score", **how)
    return accuracy(network, torch.tensor(test_images), torch.tensor(test_labels))
