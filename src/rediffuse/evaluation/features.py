"""What an instrument sees in a set of images, and how it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    values: float64 (N, d); logits: float64 (N, K), unnormalised log-probabilities of K classes, or None where
    the instrument is not a classifier.
    """

    values: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return self.values.shape[1]

    def take(self, index: Tensor | slice) -> Features:
        """Return the rows at these indices, in this order."""
        return Features(self.values[index], None if self.logits is None else self.logits[index])


def concatenate(sets: Sequence[Features]) -> Features:
    """Return several sets of one instrument as one."""
    logits = [features.logits for features in sets if features.logits is not None]
    return Features(torch.cat([features.values for features in sets]), torch.cat(logits) if logits else None)


def check_features(features: Features, title: str) -> None:
    """Raise UserError unless the features are finite float64 matrices with a row for each image."""
    for name, matrix in (("features", features.values), ("logits", features.logits)):
        if matrix is None:
            continue
        if matrix.dtype != torch.float64 or matrix.ndim != 2 or len(matrix) != len(features):
            found = f"{matrix.dtype} {list(matrix.shape)}"
            raise UserError(f"the {name} of the {title} must be float64 (N, d), got {found}")
        if broken := int((~torch.isfinite(matrix).all(dim=1)).sum()):
            found = f"{broken} of the {len(matrix)} {title}"
            raise UserError(f"the {name} of {found} are not finite: the images are broken, draw them again")


def save_features(path: Path, sets: Mapping[str, Features]) -> None:
    """Write several sets by name, atomically. The bytes depend only on the features."""
    tensors = {}
    for name, features in sets.items():
        tensors[f"{name}.values"] = features.values.clone()
        if features.logits is not None:
            tensors[f"{name}.logits"] = features.logits.clone()
    replace_file(path, safetensors.torch.save(tensors))


def load_features(path: Path) -> dict[str, Features]:
    """Return the sets by name. Raises UserError if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        names = sorted({name.rpartition(".")[0] for name in tensors})
        sets = {name: Features(tensors[f"{name}.values"], tensors.get(f"{name}.logits")) for name in names}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `dvc repro -f reference`") from None
    for name, features in sets.items():
        check_features(features, f"{name} images in {path}")
    return sets
