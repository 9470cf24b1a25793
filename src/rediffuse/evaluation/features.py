"""What an instrument sees in a set of images, and how it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file


@dataclass(frozen=True, eq=False)
class Features:
    """The features of N images.

    values: float64 (N, d); logits: float64 (N, K), unnormalised log-probabilities of K classes, or None where the instrument
    is not a classifier.
    """

    values: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return self.values.shape[1]

    def take(self, index: Tensor | slice) -> Features:
        """The rows at these indices, in this order."""
        return Features(self.values[index], None if self.logits is None else self.logits[index])


def check_features(features: Features, title: str) -> None:
    """Raise UserError unless the features are finite float64 matrices with a row for each image."""
    for name, matrix in (("features", features.values), ("logits", features.logits)):
        if matrix is None:
            continue
        if matrix.dtype != torch.float64 or matrix.ndim != 2 or len(matrix) != len(features):
            found = f"{matrix.dtype} {list(matrix.shape)}"
            raise UserError(f"the {name} of the {title} must be a float64 matrix with a row for each image, got {found}")
        if broken := int((~torch.isfinite(matrix).all(dim=1)).sum()):
            raise UserError(f"the {name} of {broken} of the {len(matrix)} {title} are not finite: the images are broken, draw them again")


def save_features(path: Path, sets: Mapping[str, Features]) -> None:
    """Write several sets by name; the file is there as a whole or not at all, and hangs on nothing but the features."""
    parts = {f"{name}.{part}": getattr(features, part) for name, features in sets.items() for part in ("values", "logits")}
    replace_file(path, safetensors.torch.save({name: tensor.clone() for name, tensor in parts.items() if tensor is not None}))


def load_features(path: Path) -> dict[str, Features]:
    """The sets by name.  Raises UserError if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        names = {name.rpartition(".")[0] for name in tensors}
        sets = {name: Features(tensors[f"{name}.values"], tensors.get(f"{name}.logits")) for name in sorted(names)}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `dvc repro -f reference`") from None
    for name, features in sets.items():
        check_features(features, f"{name} images in {path}")
    return sets
