"""The instruments by name: each turns images into features, and belongs to every number measured with it.

Each kind is a module with three functions. check(name, images): raise UserError where it cannot be used.
make(context): return the record, and the network whose weights belong beside it, or None where they are kept
elsewhere. load(record, folder): return the frozen network.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.backends import cudnn
from tqdm import tqdm

from rediffuse.evaluation import efficientnet, inception, random_conv, shared, shipped, trained_classifier
from rediffuse.evaluation.features import Features, check_features, concatenate
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.images.image_set import ImageSet, check_images
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.runtime.processes import barrier, gather, is_main, my_share

BATCH = 250  # images in one pass: a fixed number, so that the sums are added in the same order every time
_KINDS = {
    **dict.fromkeys(shipped.SHIPPED, shipped),
    "classifier": trained_classifier,
    "random-conv-v1": random_conv,
    "inception-v3": inception,
    "efficientnet-lite0": efficientnet,
}
NAMES = tuple(_KINDS)  # what reference.instruments may list


@dataclass(frozen=True, eq=False)
class Instrument:
    """A frozen network that maps a batch of uint8 images to (features, logits or None), and its record.

    record (JSON): name, id, layer, dimension, sha256 (of the weights), shape (C, H, W), resize, classes (of
    the data; empty if it does not know them), logits (how many, or None), accuracy (or None), trained_on, and
    more that belongs to its kind.
    """

    record: Record
    network: nn.Module
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @property
    def name(self) -> str:
        """The name in reference.instruments."""
        return str(self.record["name"])

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        return str(self.record["sha256"])

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
        """The classes of the image set, if its logits stand for them; otherwise ()."""
        return tuple(self.record["classes"])

    @property
    def distance(self) -> str:
        """The name of a Fréchet distance between its features: `fid` for Inception-v3 alone."""
        return "fid" if self.name == "inception-v3" else "fd"

    def measure(self, images: NDArray[np.uint8], *, batch: int = BATCH, title: str = "features") -> Features:
        """Return the features of uint8 images (N, C, H, W), without autocast or TF32.

        All but the pretrained networks are so small that they run on the CPU also where there is a GPU. The
        processes share the batches and must all call this; the first gets the features, the others none.
        Raises UserError for another dtype or shape than the instrument's, and for features that are not
        finite.
        """
        check_images(images, self.shape, title)
        batch = min(batch, self.record.get("batch", BATCH))
        starts, mine = range(0, len(images), batch), []
        exact = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
        bar = tqdm(my_share(len(starts)), desc=title, unit="batch", leave=False, disable=not is_main())
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), cudnn.flags(**exact):
            for i in bar:
                block = torch.from_numpy(np.array(images[starts[i] : starts[i] + batch])).to(self.device)
                values, logits = self.network(block)
                logits = None if logits is None else logits.double().cpu()
                mine.append(Features(values.double().cpu(), logits))
        if not (parts := gather(mine)):
            return Features(torch.empty(0, self.dimension, dtype=torch.float64))
        features = concatenate(parts)
        check_features(features, title)
        return features


def make_instrument(
    name: str,
    train: ImageSet,
    folder: Path,
    *,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
) -> Instrument:
    """Make the instrument of this name for the images of a set, and write it to `folder`.

    train: all training images. A classifier is trained on them on `device` within `autocast`, which must be
    reusable; a pretrained network measures on `device` (CPU and float32 if None). Raises UserError as
    `check_available`. The first of several processes makes it; the others, which must call this too, open it.
    """
    check_available(name, train)
    if is_main():
        context = BuildContext(name, train, device or torch.device("cpu"), autocast or nullcontext())
        record, network = _KINDS[name].make(context)
        weights = folder / shared.WEIGHTS_FILE
        weights.unlink(missing_ok=True)
        if network is not None:
            tensors = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
            data = safetensors.torch.save(tensors)
            record["sha256"] = hashlib.sha256(data).hexdigest()
            replace_file(weights, data)
        write_json(folder / shared.RECORD_FILE, record)
    barrier()
    return open_instrument(folder, device=device)


def open_instrument(folder: Path, *, device: torch.device | None = None) -> Instrument:
    """Return the instrument that `make_instrument` wrote to the folder.

    A pretrained one measures on `device` (CPU if None).
    Raises UserError, with the remedy, for files that are missing or damaged, and for weights that are not
    those of the record.
    """
    path = folder / shared.RECORD_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {shared.REMEDY}")
    try:
        record: Record = json.loads(path.read_text())
        kind = _KINDS[record["name"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {shared.REMEDY}") from None
    on = device if device and kind in (inception, efficientnet) else torch.device("cpu")
    return Instrument(record, kind.load(record, folder).to(on), on)


def check_available(name: str, images: ImageSet) -> None:
    """Raise UserError unless the instrument of this name is available and fits this image set.

    Takes seconds, unless the weights of inception-v3 must be downloaded.
    """
    if name not in _KINDS:
        known = ", ".join(NAMES)
        raise UserError(f"reference.instruments must each be one of {known}, got {name!r} (params.yaml)")
    _KINDS[name].check(name, images)
