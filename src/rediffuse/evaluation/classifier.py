"""The in-domain classifiers that serve as instruments: images in, features and class logits out.

An instrument is versioned: its weights are shipped, their SHA-256 is pinned in the record beside them and checked before
they are read.  Another training run is another ruler, so it gets another id; see docs/instrument.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.errors import UserError
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.samples import check_images

WEIGHTS = Path(__file__).parent / "weights"
INSTRUMENTS = ("fashion-mnist-cnn-v1",)
DIMENSION = 64  # of the penultimate layer
BATCH = 250  # images in one pass: a fixed number, so that the sums are added in the same order every time


class Classifier(nn.Module):
    """A small convolutional classifier of 28 x 28 grey images, 0.67 M parameters.

    The penultimate layer is linear: a ReLU behind it would give dead features and singular covariances.  The buffers
    `feature_mean` and `feature_std` (of the training images) put every feature on the scale of the real data, so that the
    unit of the distances does not hang on the accidents of one training run.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, classes: int = 10, dimension: int = DIMENSION) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 4, 14, 14): all pixels, at a quarter of the cost
            *_convolution(4, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),  # (B, 64, 7, 7)
            *_convolution(64, 128),
            *_convolution(128, 128),
        )
        self.penultimate = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(128 * 7 * 7, dimension))
        self.logits = nn.Sequential(nn.BatchNorm1d(dimension), nn.ReLU(), nn.Linear(dimension, classes))
        self.register_buffer("feature_mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones(dimension, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The raw penultimate features (B, d) and the logits (B, classes) of uint8 images (B, 1, 28, 28)."""
        features = self.penultimate(self.convolutions(images.float() / 127.5 - 1))
        return features, self.logits(features)

    def standardise(self, features: Tensor) -> Tensor:
        """Raw features in units of the training images: mean 0, standard deviation 1, float64."""
        return (features.double() - self.feature_mean) / self.feature_std


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


@dataclass(frozen=True)
class Instrument:
    """A trained classifier with its record (the JSON beside its weights)."""

    record: dict[str, Any]
    network: Classifier

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images it measures."""
        return tuple(self.record["shape"])

    @property
    def dimension(self) -> int:
        """d of the features."""
        return int(self.record["dimension"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.record["classes"])

    @torch.no_grad()
    def measure(self, images: np.ndarray, *, batch: int = BATCH, title: str = "features") -> Features:
        """The features of uint8 images (N, C, H, W), computed in float32 on the CPU, also where there is a GPU.

        One ruler, one arithmetic: the network is so small that 10,000 images take seconds.
        Raises UserError for another dtype or shape than the instrument's.
        """
        check_images(images, self.shape, title)
        values, logits = [], []
        for start in tqdm(range(0, len(images), batch), desc=title, unit="batch", leave=False):
            raw, scores = self.network(torch.from_numpy(np.array(images[start : start + batch])))
            values.append(self.network.standardise(raw))
            logits.append(scores.double())
        return Features(torch.cat(values), torch.cat(logits))


def load_record(id: str, folder: Path = WEIGHTS) -> dict[str, Any]:
    """The record of an instrument: id, layer, dimension, shape, classes, sha256, test_accuracy, trained_on, recipe.

    Raises UserError for an id that is not known, or a record that is missing.
    """
    if id not in INSTRUMENTS:
        raise UserError(f"reference.instrument must be one of {', '.join(INSTRUMENTS)}, got {id!r} (params.yaml)")
    path = folder / f"{id}.json"
    if not path.is_file():
        raise UserError(f"the record of the instrument {id} is missing ({path.name}): {_remedy(id)}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def load_instrument(id: str, folder: Path = WEIGHTS) -> Instrument:
    """The instrument of this id, ready to measure.

    Raises UserError for an id that is not known, and for weights that are missing or are not the ones of the record: their SHA-256 is
    compared before a byte of them is used.
    """
    record = load_record(id, folder)
    path = folder / f"{id}.safetensors"
    if not path.is_file():
        raise UserError(f"the weights of the instrument {id} are missing ({path.name}): {_remedy(id)}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise UserError(
            f"the weights of the instrument {id} are altered: {path.name} has the SHA-256 {found}, its record says {record['sha256']}."
            f" Numbers measured with it could be compared with nothing: {_remedy(id)}"
        )
    network = Classifier(len(record["classes"]), record["dimension"])
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of the instrument {id} do not fit its network: {error}; {_remedy(id)}") from None
    return Instrument(record, network.eval().requires_grad_(False))


def _remedy(id: str) -> str:
    files = f"src/rediffuse/evaluation/weights/{id}.*"
    return f"restore the file with `git checkout -- {files}`, or install rediffuse again"
