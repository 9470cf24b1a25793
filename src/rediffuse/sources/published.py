"""The published sets by name: as their authors divided them into `train` and `test`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rediffuse.images.image_set import ImageSet
from rediffuse.sources import fashion_mnist, torchvision_sets

Splits = dict[str, ImageSet]

SETS: dict[str, tuple[dict[str, Any], Callable[[], Splits]]] = {
    "fashion-mnist": (fashion_mnist.ABOUT, fashion_mnist.load_fashion_mnist),
    "mnist": (torchvision_sets.MNIST, torchvision_sets.load_mnist),
    "cifar10": (torchvision_sets.CIFAR10, torchvision_sets.load_cifar10),
}


def load_published(name: str) -> tuple[Splits, dict[str, Any]]:
    """`train` and `test`, and what the set is.  Raises UserError if it cannot be had, or is not what was published."""
    about, load = SETS[name]
    return load(), about
