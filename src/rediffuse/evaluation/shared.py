"""What the kinds of instruments share: their records, the checks of the images, and pinned weights."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.images.image_set import ImageSet
from rediffuse.params import SIDES
from rediffuse.runtime.errors import UserError

Record = dict[str, Any]

RECORD_FILE, WEIGHTS_FILE = "instrument.json", "weights.safetensors"  # in the folder of an instrument
REMEDY = "make it again with `dvc repro -f reference`, or fetch it with `dvc pull`"
IMAGENET = ("inception-v3", "efficientnet-lite0")  # trained on photographs; their ids begin so
LABEL_FREE = "random-conv-v1"
OTHERS = "take another instrument: classifier or random-conv-v1 (reference.instruments in params.yaml)"
DIMENSION = 64  # of the features of the instruments made from the training images
LEAST = 2 * DIMENSION  # training images that they can be made from
BATCH = 250
PRETRAINED_BATCH = 16  # what fits a processor's cache is measured faster, and takes less memory
CONSTANT = 1e-6  # a standard deviation up to here is rounding


@dataclass(frozen=True)
class BuildContext:
    """What an instrument is made from, and where."""

    name: str
    images: ImageSet
    device: torch.device
    autocast: AbstractContextManager[object]


def new_record(context: BuildContext, *, layer: str, dimension: int, **own: Any) -> Record:
    """Return a record: the fields that every instrument has, and its own."""
    common: Record = {
        "name": context.name,
        "id": context.name,
        "layer": layer,
        "dimension": dimension,
        "sha256": None,  # of weights that are kept with the record: known when they are written
        "shape": list(context.images.shape),
        "resize": None,
        "classes": [],  # of the data; empty also where there are logits of other classes
        "logits": None,
        "accuracy": None,
        "trained_on": None,
    }
    return common | own


def imagenet_record(context: BuildContext, weights: str, **own: Any) -> Record:
    """Return the record of a network trained on ImageNet; `weights` names their file."""
    own |= {"batch": PRETRAINED_BATCH, "device": context.device.type}
    return new_record(context, trained_on={"set": "ImageNet", "weights": weights}, **own)


def check_channels(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images have 1 or 3 channels."""
    if images.shape[0] not in (1, 3):
        raise UserError(
            f"reference.instruments names {name}, which measures images of 1 or 3 channels, and the images of"
            f" data.set are {list(images.shape)}: use other images (params.yaml)"
        )


def check_training_images(name: str, images: ImageSet) -> None:
    """Raise UserError unless there are enough images, of 1 or 3 channels, with sides within SIDES."""
    check_channels(name, images)
    low, high = SIDES
    if not all(low <= side <= high for side in images.shape[1:]):
        raise UserError(
            f"reference.instruments names {name}, which measures images with sides from {low} to {high}, and"
            f" those of data.set are {list(images.shape)}: take efficientnet-lite0 or inception-v3, or other"
            " images (params.yaml)"
        )
    if len(images) < LEAST:
        raise UserError(
            f"reference.instruments names {name}, which needs at least {LEAST} training images, and data.set"
            f" has {len(images)}: take more images, or measure no distances with reference.instruments: []"
            " (params.yaml)"
        )


def content_hash(images: ImageSet, *, labelled: bool) -> tuple[str, NDArray[np.int64]]:
    """Return the SHA-256 of the content of a set, and an order of the images, (N,), by their content.

    Both come from a hash of each image, with its label if `labelled`, not from the order in the set.
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


@torch.no_grad()
def feature_scale(
    network: nn.Module, images: NDArray[np.uint8], order: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (d,) of the features of images (N, C, H, W), taken in this order.

    Raises UserError if the features do not vary.
    """
    starts = tqdm(range(0, len(order), BATCH), desc="scale of the features", unit="batch", leave=False)
    features = torch.cat([network(torch.from_numpy(images[order[i : i + BATCH]]))[0] for i in starts])
    mean, std = features.mean(0), features.std(0)
    if std.max() <= CONSTANT:
        raise UserError("the training images are all alike: no instrument fits them; choose another data.set")
    return mean, std


def verify(data: bytes, expected: str, title: str, remedy: str) -> bytes:
    """Return the bytes. Raises UserError for another SHA-256 than expected: a pickle can run any program."""
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        wanted = f"its SHA-256 must be\n  {expected}, found\n  {found}"
        raise UserError(f"{title} is not the original file: {wanted}\n{remedy}")
    return data


def check_pinned(record: Record, sha256: str, folder: Path) -> None:
    """Raise UserError if the record in the folder names other weights than those pinned now."""
    if record["sha256"] != sha256:
        name = record["id"]
        raise UserError(f"{folder} was made with other weights of {name} than now: run `dvc repro reference`")


def load_weights(network: nn.Module, path: Path, record: Record, remedy: str = REMEDY) -> nn.Module:
    """Load the weights in a safetensors file into the network, and freeze it.

    Raises UserError, with the remedy, if the file is missing, or has not the SHA-256 of the record.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != record["sha256"]:
        raise UserError(
            f"the weights of the instrument {record['id']} are altered: their SHA-256 is {found}, its record"
            f" says {record['sha256']}. Numbers measured with them cannot be compared with others: {remedy}"
        )
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of {record['id']} do not fit its network: {error}; {remedy}") from None
    return network.eval().requires_grad_(False)
