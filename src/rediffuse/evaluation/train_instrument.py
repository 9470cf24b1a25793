"""How `fashion-mnist-cnn-v1` was trained: `python -m rediffuse.evaluation.train_instrument FOLDER` writes weights and record to FOLDER.

No stage runs this.  The instrument's weights are shipped and never retrained silently; a run on another machine is another
ruler and needs another id.  The test images take no part in the training or in the choice of the epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.data.fashion_mnist import load_fashion_mnist
from rediffuse.data.images import ImageSet
from rediffuse.evaluation.classifier import BATCH, Classifier
from rediffuse.files import replace_file, write_json

RECIPE: dict[str, Any] = {
    "seed": 20_240_501,
    "held_out": 5_000,  # training images that choose the epoch
    "epochs": 7,
    "batch": 128,
    "lr": 3e-3,
    "weight_decay": 1e-2,
    "shift": 1,  # pixels, in each direction
}


def train(images: np.ndarray, labels: np.ndarray, recipe: dict[str, Any]) -> Classifier:
    """Train the classifier on uint8 images (N, 1, 28, 28); the epoch that is best on held-out training images is returned."""
    torch.manual_seed(recipe["seed"])
    torch.set_num_threads(1)  # fewer surprises: the sums do not hang on the machine's cores
    order = torch.randperm(len(images))
    x, y = torch.tensor(images), torch.tensor(labels)
    held, used = order[: recipe["held_out"]], order[recipe["held_out"] :]
    network = Classifier().to(memory_format=torch.channels_last)
    steps = recipe["epochs"] * (len(used) // recipe["batch"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.15)
    loss = nn.CrossEntropyLoss()

    best, chosen = -1.0, dict[str, Tensor]()
    with tqdm(total=steps, unit="step") as bar:
        for epoch in range(recipe["epochs"]):
            for index in _batches(used, recipe["batch"]):
                with torch.autocast("cpu", torch.bfloat16):
                    _, logits = network.train()(_shifted(x[index], recipe["shift"]))
                value = loss(logits.float(), y[index])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            reached = accuracy(network, x[held], y[held])
            bar.set_postfix(epoch=epoch + 1, held_out=f"{reached:.4f}")
            if reached > best:
                best, chosen = reached, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(chosen)
    _set_scale(network, x)
    return network.to(memory_format=torch.contiguous_format).eval()


def _batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """A new random order, in full batches."""
    mixed = index[torch.randperm(len(index))]
    for start in range(0, len(mixed) - size + 1, size):
        yield mixed[start : start + size]


def _shifted(images: Tensor, shift: int) -> Tensor:
    """Each image (B, 1, H, W) moved by up to `shift` pixels along both axes, black coming in."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift))
    rows = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(width)
    picked = torch.arange(n)[:, None, None]
    return padded[picked, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.inference_mode()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is the label's."""
    network.eval()
    classes = torch.cat([network(images[start : start + BATCH])[1].argmax(1) for start in range(0, len(images), BATCH)])
    return float((classes == labels).double().mean())


@torch.inference_mode()
def _set_scale(network: Classifier, images: Tensor) -> None:
    """Store mean and standard deviation of the raw features of the training images in the network."""
    network.eval()
    starts = tqdm(range(0, len(images), BATCH), desc="scale", unit="batch")
    features = torch.cat([network(images[start : start + BATCH])[0].double() for start in starts])
    network.feature_mean.copy_(features.mean(0))
    network.feature_std.copy_(features.std(0))


def save(network: Classifier, folder: Path, record: dict[str, Any]) -> None:
    """Write {id}.safetensors and, with its SHA-256 added, the record {id}.json."""
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    record = {**record, "sha256": hashlib.sha256(data).hexdigest()}
    replace_file(folder / f"{record['id']}.safetensors", data)
    write_json(folder / f"{record['id']}.json", record)


def make(train_set: ImageSet, test_set: ImageSet, folder: Path) -> dict[str, Any]:
    """Train, look once at the test set, write weights and record; the record is returned."""
    assert train_set.labels is not None and test_set.labels is not None
    network = train(train_set.images, train_set.labels, RECIPE)
    content = hashlib.sha256(train_set.images.tobytes() + train_set.labels.astype(np.uint8).tobytes())
    record = {
        "id": "fashion-mnist-cnn-v1",
        "layer": "penultimate",
        "dimension": len(network.feature_mean),
        "shape": list(test_set.shape),
        "classes": list(test_set.classes),
        "test_accuracy": accuracy(network, torch.tensor(test_set.images), torch.tensor(test_set.labels)),
        "trained_on": {"set": "fashion-mnist", "split": "train", "n": len(train_set), "sha256_images_labels": content.hexdigest()},
        "recipe": {**RECIPE, "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    save(network, folder, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where weights and record are written")
    splits = load_fashion_mnist()
    print(json.dumps(make(splits["train"], splits["test"], parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    main()
