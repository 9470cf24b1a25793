"""The record of an instrument, which belongs to every number measured with it, and the weights that it pins."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

Record = dict[str, Any]

RECORD_FILE, WEIGHTS_FILE = "instrument.json", "weights.safetensors"  # in the folder of an instrument
REMEDY = "make it again with `dvc repro -f reference`, or fetch it with `dvc pull`"
LABEL_FREE = "random-conv-v1 or pixel-pca-v1"


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
        "classes": [],  # of the data; also empty where there are logits of other classes
        "logits": None,
        "accuracy": None,
        "trained_on": None,
    }
    return common | own


def load_weights(network: nn.Module, data: bytes, record: Record, remedy: str) -> None:
    """Load the weights in these bytes (of a safetensors file) into the network, and freeze it.

    Raises UserError, with the remedy, unless their SHA-256 is the one of the record.  It is compared before the bytes are used.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise UserError(
            f"the weights of the instrument {record['id']} are altered: their SHA-256 is {found}, its record says {record['sha256']}."
            f" Numbers measured with them could be compared with nothing: {remedy}"
        )
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of the instrument {record['id']} do not fit its network: {error}; {remedy}") from None
    network.eval().requires_grad_(False)
