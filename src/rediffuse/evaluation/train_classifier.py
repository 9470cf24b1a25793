"""How in-domain classifiers are trained: one loop and one recipe for every image set.

The shipped weights are never retrained silently: no stage does it, and a run on another machine is another ruler that needs
another id.  How they were made:

    OMP_NUM_THREADS=1 python -c "
    from pathlib import Path
    from rediffuse.evaluation.train_classifier import make_shipped
    from rediffuse.sources.fashion_mnist import load_fashion_mnist
    make_shipped(**load_fashion_mnist(), folder=Path('FOLDER'))"
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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

from rediffuse.evaluation.classifier import CHANNELS, Classifier
from rediffuse.evaluation.shipped import SHIPPED
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json

BATCH = 250  # images in one pass without gradients


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    The number of steps is the same for small sets and large: seven epochs of 55,000 images in batches of 128, minutes on a CPU
    core.  A small set is seen more often, and the held-out images stop it from being learnt by heart; a set of millions is not
    seen whole, which costs accuracy but not hours.
    """

    seed: int = 20_240_501
    held_out: int = 5_000  # training images that choose the weights; at most a tenth.  With 0 the last weights are taken
    looks: int = 7  # how often the weights are compared on them, evenly over the training
    steps: int = 3_003
    batch: int = 128  # all images where there are fewer
    lr: float = 3e-3  # the peak of one cycle
    warmup: float = 0.15  # share of the steps
    weight_decay: float = 1e-2
    shift: float = 1 / 28  # of the longer side: how far images are moved at random, at least a pixel, along both axes


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    recipe: Recipe,
    *,
    channels: tuple[int, int] = CHANNELS,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
    title: str = "classifier",
) -> tuple[Classifier, float | None]:
    """A classifier of uint8 images (N, C, H, W) with labels 0 .. classes - 1, on the CPU, and its accuracy on the held-out images.

    Of `looks` states the one that is best on the held-out images is returned; without any, the last one and None.  The
    features are not standardised yet.  The images are taken in the order given, and torch's random state is left as it was.
    The steps run on `device` (CPU if None) in the context `autocast`, which is entered for each of them (float32 if None).
    """
    device, autocast = device or torch.device("cpu"), autocast or nullcontext()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(recipe.seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(recipe.seed)
        order = torch.randperm(len(images))
        x, y = torch.tensor(images).to(device), torch.tensor(labels).to(device)
        held, used = order.tensor_split([min(recipe.held_out, len(order) // 10)])
        network = Classifier(classes, shape=images.shape[1:], channels=channels).to(device).to(memory_format=torch.channels_last)
        accuracy = _train(network, (x, y), held, used, recipe, autocast, title)
    return network.to("cpu").eval(), accuracy


def _train(
    network: Classifier,
    data: tuple[Tensor, Tensor],
    held: Tensor,
    used: Tensor,
    recipe: Recipe,
    autocast: AbstractContextManager[object],
    title: str,
) -> float | None:
    """Train on the images `used`; leave in the network the state that is best on the images `held`, and return its accuracy there."""
    x, y = data
    shift = max(1, round(recipe.shift * max(x.shape[2:])))
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=recipe.warmup)
    loss, batches = nn.CrossEntropyLoss(), _batches(used, min(recipe.batch, len(used)))

    best, chosen = -1.0, dict[str, Tensor]()
    with tqdm(total=recipe.steps, desc=title, unit="step", leave=False) as bar:
        for step in range(1, recipe.steps + 1):
            index = next(batches).to(x.device)
            with autocast:
                _, logits = network.train()(_shifted(x[index], shift))
            value = loss(logits.float(), y[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if len(held) and step * recipe.looks // recipe.steps > (step - 1) * recipe.looks // recipe.steps:
                reached = accuracy(network, x[held.to(x.device)], y[held.to(x.device)])
                bar.set_postfix(held_out=f"{reached:.4f}")
                if reached > best:
                    best, chosen = reached, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if not chosen:
        return None
    network.load_state_dict(chosen)
    return best


def _batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """Full batches, for ever; each pass over the images in a new random order."""
    while True:
        mixed = index[torch.randperm(len(index))]
        for start in range(0, len(mixed) - size + 1, size):
            yield mixed[start : start + size]


def _shifted(images: Tensor, shift: int) -> Tensor:
    """Each image (B, C, H, W) moved by up to `shift` pixels along both axes, black coming in."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift)).movedim(1, -1)
    rows = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(width)
    rows, columns, picked = (index.to(images.device) for index in (rows, columns, torch.arange(n)))
    return padded[picked[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@torch.inference_mode()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is the label's."""
    network.eval()
    classes = torch.cat([network(images[start : start + BATCH])[1].argmax(1) for start in range(0, len(images), BATCH)])
    return float((classes == labels).double().mean())


@torch.inference_mode()
def set_scale(network: Classifier, images: NDArray[np.uint8]) -> None:
    """Store mean and standard deviation of the raw features of the training images in the network.  Raises UserError if all are alike."""
    network.eval()
    starts = tqdm(range(0, len(images), BATCH), desc="scale of the features", unit="batch", leave=False)
    features = torch.cat([network(torch.tensor(images[start : start + BATCH]))[0] for start in starts])
    mean, std = features.mean(0), features.std(0)
    if not (std > 0).all():
        raise UserError("the training images are all alike: no instrument can be made from them; choose another data.set")
    network.feature_mean.copy_(mean)
    network.feature_std.copy_(std)


def make_shipped(train: ImageSet, test: ImageSet, folder: Path) -> dict[str, Any]:
    """Train `fashion-mnist-cnn-v1`, look once at the test set, write weights and record; the record is returned."""
    assert train.labels is not None and test.labels is not None
    recipe = Recipe()
    network, _ = train_classifier(train.images, train.labels, len(train.classes), recipe, autocast=torch.autocast("cpu", torch.bfloat16))
    set_scale(network, train.images)
    network.to(memory_format=torch.contiguous_format)
    content = hashlib.sha256(train.images.tobytes() + train.labels.astype(np.uint8).tobytes())
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    record = {
        "name": SHIPPED[0],
        "id": SHIPPED[0],
        "layer": "penultimate",
        "dimension": len(network.feature_mean),
        "shape": list(test.shape),
        "resize": None,
        "classes": list(test.classes),
        "logits": len(test.classes),
        "accuracy": accuracy(network, torch.tensor(test.images), torch.tensor(test.labels)),
        "accuracy_on": "the test images",
        "trained_on": {"set": "fashion-mnist", "split": "train", "n": len(train), "sha256_images_labels": content.hexdigest()},
        "recipe": asdict(recipe) | {"arithmetic": "bfloat16", "torch": torch.__version__, "threads": torch.get_num_threads()},
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    replace_file(folder / f"{record['id']}.safetensors", weights)
    write_json(folder / f"{record['id']}.json", record)
    return record
