"""Measure the real images: features of test and train, and what a perfect generator would score.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

import numpy as np
import torch

from rediffuse.data.images import ImageSet, load_images
from rediffuse.errors import UserError
from rediffuse.evaluation.classifier import Instrument, load_instrument
from rediffuse.evaluation.features import Features, save_features
from rediffuse.evaluation.fidelity import check_enough, fidelity, inception_score
from rediffuse.files import write_json
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run
from stages import run_stage


def main() -> None:
    params = load_params()
    instrument = load_instrument(params.reference.instrument)
    test, train = load_images("data/prepared", "test"), load_images("data/prepared", "train")
    n = min(len(test), len(train))  # the floor is two sets of real images of the same size
    check_fit(test, instrument)
    check_enough(n, instrument.dimension, params.evaluate, "real images")

    with stage_run("reference", params) as run:
        real = instrument.measure(test.images, title="test images")
        other = instrument.measure(train.images[:n], title="train images")
        floor = fidelity(other, real.take(slice(n)), params.evaluate)
        save_features(Path("data/reference/features.safetensors"), {"test": real, "train": other})
        write_json(Path("data/reference/instrument.json"), instrument.record)
        result = {
            "n": n,
            "accuracy": accuracy(real, test),
            "floor": {name: floor[name] for name in ("fd", "kid", "precision", "recall")},
            "is_real": inception_score(real, params.evaluate.is_splits),
            "is_max": len(instrument.classes),
        }
        write_json(Path("metrics/reference.json"), {instrument.id: result})
        run.log_metrics_file(Path("metrics/reference.json"))


def check_fit(test: ImageSet, instrument: Instrument) -> None:
    """Raise UserError, before any work, unless the instrument was made for this image set."""
    if test.shape != instrument.shape or test.classes != instrument.classes or test.labels is None:
        found = f"{list(test.shape)} with the classes {', '.join(test.classes) or 'none'}"
        raise UserError(
            f"reference.instrument is {instrument.id}, which measures images {list(instrument.shape)} with the classes"
            f" {', '.join(instrument.classes)}; data.set has {found}: choose the instrument that belongs to the set (params.yaml)"
        )


def accuracy(features: Features, images: ImageSet) -> float:
    """Share of the images whose class the instrument names."""
    return float((features.logits.argmax(1) == torch.from_numpy(np.array(images.labels))).double().mean())


if __name__ == "__main__":
    run_stage(main)
