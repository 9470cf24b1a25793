"""The instruments by name: what turns images into features, and belongs to every number that is measured with it.

A shipped or pretrained instrument is the same everywhere; the others are made from the training images by `make_instrument`, once, and
carry a hash of their content and recipe in the id.  The order of the images, and how they were split, makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.evaluation import efficientnet, fitted, inception, pixel_pca, random_conv, shipped, trained_classifier
from rediffuse.evaluation.features import Features, check_features
from rediffuse.evaluation.instrument_record import RECORD_FILE, REMEDY, WEIGHTS_FILE, BuildContext, Record
from rediffuse.images.image_set import ImageSet, check_images
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.runtime.processes import barrier, gather, is_main, my_share

BATCH = 250  # images in one pass: a fixed number, so that the sums are added in the same order every time


@dataclass(frozen=True)
class InstrumentKind:
    """The functions that check, make and load one kind of instrument.

    check: raises UserError where it cannot be used.  make: returns the record, and the network whose weights are to be kept with it, or
    None where they are kept elsewhere.  load: returns the frozen network of a record.  large: whether it is worth a GPU.
    """

    check: Callable[[str, ImageSet], None]
    make: Callable[[BuildContext], tuple[Record, nn.Module | None]]
    load: Callable[[Record, Path], nn.Module]
    large: bool = False


_KINDS = {
    **dict.fromkeys(shipped.SHIPPED, InstrumentKind(shipped.check, shipped.make, shipped.load)),
    "classifier": InstrumentKind(trained_classifier.check, trained_classifier.make, trained_classifier.load),
    "random-conv-v1": InstrumentKind(fitted.check_training_images, random_conv.make, random_conv.load),
    "pixel-pca-v1": InstrumentKind(fitted.check_training_images, pixel_pca.make, pixel_pca.load),
    "inception-v3": InstrumentKind(inception.check, inception.make, inception.load, large=True),
    "efficientnet-lite0": InstrumentKind(efficientnet.check, efficientnet.make, efficientnet.load, large=True),
}
NAMES = tuple(_KINDS)  # what reference.instruments may list


@dataclass(frozen=True, eq=False)
class Instrument:
    """A frozen network that takes a batch of uint8 images and gives (features, logits or None), with its record.

    record (JSON): name, id, layer, dimension, sha256 (of the weights), shape (C, H, W), resize, classes (of the data; empty if it does not
    know them), logits (how many, or None), accuracy (or None), trained_on, and more that belongs to its kind.
    """

    record: Record
    network: nn.Module
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @property
    def name(self) -> str:
        """As reference.instruments calls it."""
        return str(self.record["name"])

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def sha256(self) -> str:
        """Of the weights."""
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
        """The classes of the image set that its logits stand for; () if there are none, also where there are logits of other classes."""
        return tuple(self.record["classes"])

    @property
    def distance(self) -> str:
        """What a Fréchet distance between its features is called: `fid` belongs to Inception-v3 alone."""
        return "fid" if self.name == "inception-v3" else "fd"

    def measure(self, images: NDArray[np.uint8], *, batch: int = BATCH, title: str = "features") -> Features:
        """The features of uint8 images (N, C, H, W), without autocast and in full float32 (float64 in the label-free ones).

        One ruler, one arithmetic: all but the pretrained networks are so small that they run on the CPU also where there is a GPU.
        The batches are dealt to the processes, all of which must call this; the first gets the features, the others none.
        Raises UserError for another dtype or shape than the instrument's, and for features that are not finite.
        """
        check_images(images, self.shape, title)
        batch = min(batch, self.record.get("batch", BATCH))
        starts, mine = range(0, len(images), batch), list[tuple[Tensor, Tensor | None]]()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), _full_precision():
            for i in tqdm(my_share(len(starts)), desc=title, unit="batch", leave=False, disable=not is_main()):
                found, scores = self.network(torch.from_numpy(np.array(images[starts[i] : starts[i] + batch])).to(self.device))
                mine.append((found.double().cpu(), None if scores is None else scores.double().cpu()))
        if not (parts := gather(mine)):
            return Features(torch.empty(0, self.dimension, dtype=torch.float64))
        logits = [scores for _, scores in parts if scores is not None]
        features = Features(torch.cat([found for found, _ in parts]), torch.cat(logits) if logits else None)
        check_features(features, title)
        return features


def _full_precision() -> AbstractContextManager[None]:
    """No TF32, no algorithm chosen by a race."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    return context


def make_instrument(
    name: str,
    train: ImageSet,
    folder: Path,
    *,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
) -> Instrument:
    """The instrument of this name for the images of a set; written to `folder`, where `open_instrument` finds it again.

    train: all training images.  A classifier is trained on them on `device`, in the context `autocast`, which must be one that can be
    entered again and again; a pretrained network measures on `device` (CPU and float32 if None).  Raises UserError as `check_available`.
    Of several processes the first makes it, and the others, which must call this too, open it.
    """
    check_available(name, train)
    if is_main():
        _write_instrument(BuildContext(name, train, device or torch.device("cpu"), autocast or nullcontext()), folder)
    barrier()
    return open_instrument(folder, device=device)


def _write_instrument(context: BuildContext, folder: Path) -> None:
    record, network = _KINDS[context.name].make(context)
    weights = folder / WEIGHTS_FILE
    weights.unlink(missing_ok=True)
    if network is not None:
        data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in network.state_dict().items()})
        record["sha256"] = hashlib.sha256(data).hexdigest()
        replace_file(weights, data)
    write_json(folder / RECORD_FILE, record)


def open_instrument(folder: Path, *, device: torch.device | None = None) -> Instrument:
    """The instrument that `make_instrument` left in the folder; a pretrained one measures on `device` (CPU if None).

    Raises UserError, with the remedy, for files that are missing or damaged, and for weights that are not those of the record.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {REMEDY}")
    try:
        record: Record = json.loads(path.read_text())
        kind = _KINDS[record["name"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {REMEDY}") from None
    on = device if device and kind.large else torch.device("cpu")
    return Instrument(record, kind.load(record, folder).to(on), on)


def check_available(name: str, images: ImageSet) -> None:
    """Raise UserError, before minutes of work, unless the instrument of this name can be had, and be used for this image set.

    Takes seconds; but the weights of inception-v3 are downloaded here, where they are not on the disk.
    """
    if name not in _KINDS:
        raise UserError(f"reference.instruments must each be one of {', '.join(NAMES)}, got {name!r} (params.yaml)")
    _KINDS[name].check(name, images)
