"""From features to records: the scores of several sets, and what the records of all stages share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.features import Features, concatenate
from rediffuse.evaluation.fidelity import (
    SEED,
    class_distances,
    distances,
    expected_bias,
    frechet_distance,
    judge,
    spread,
)
from rediffuse.evaluation.instruments import Instrument
from rediffuse.evaluation.shared import IMAGENET
from rediffuse.images.image_set import ImageSet
from rediffuse.images.sample_sets import Samples
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SHOWN = 10  # images that look most like copies, in the record
FEATURES = "features.safetensors"  # of the real images, in the folder of an instrument
NEIGHBOURS = "test-neighbours.safetensors"  # of the test images, in the folder of the stage reference
FLOOR = "real"  # the row of the reference that real images of the other split give
RATIO = "ratio_to_real"  # a distance as a multiple of FLOOR's: 1 is as good as real images

Record = dict[str, Any]
Classes = tuple[Tensor, Tensor]  # of the images of all sets, and of the real images; int64


@dataclass(frozen=True)
class RealImages:
    """The splits of a set."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @cached_property
    def learnt(self) -> ImageSet:
        """The published training images: train and validation together."""
        train, validation = self.train, self.validation
        if not len(validation):
            return train
        images, labels = np.concatenate([train.images, validation.images]), None
        if train.labels is not None and validation.labels is not None:
            labels = np.concatenate([train.labels, validation.labels])
        return ImageSet(images, labels, train.classes)

    def compared(self, split: str) -> ImageSet:
        """Return the images that generated ones are compared with (reference.split): test or all of train."""
        return self.test if split == "test" else self.learnt


@dataclass(frozen=True)
class View:
    """What one instrument sees in the real images, in several sets to be judged, and in others by name.

    main: whether all scores are measured, which the first instrument gives; the others give distances.
    """

    instrument: Instrument
    real: Features
    sets: Sequence[Features]
    others: Mapping[str, Features] = field(default_factory=dict)
    main: bool = True

    def named(self, scores: Record) -> Record:
        """Return the scores with the instrument's name for Fréchet distances: fd, or fid of Inception."""
        distance = self.instrument.distance
        names = {"fd": distance, "fd_inf": f"{distance}_inf"}
        return {names.get(name, name): value for name, value in scores.items()}

    def scores(self, settings: Evaluate) -> Record:
        """Return {metric: spread over the sets}."""
        every = [
            judge(features, self.real, settings) if self.main else distances(features, self.real)
            for features in self.sets
        ]
        return self.named(spread_of(every))

    def frechet(self, generated: Features) -> Record:
        """Return the Fréchet distance alone, of any images."""
        return self.named({"fd": frechet_distance(generated, self.real)})

    def record(self) -> Record:
        """Return what every record has beside the scores: the instrument, and the ends of its scales."""
        keys = ("name", "layer", "dimension", "shape", "resize", "sha256", "accuracy")
        instrument = {key: self.instrument.record[key] for key in keys}
        record = {"instrument": instrument, "expected_bias": expected_bias(self.real, len(self.sets[0]))}
        if not self.main or self.real.logits is None:
            return record
        return record | {"is_max": self.real.logits.shape[1]}

    def distances_by_class(self, classes: Classes, names: Sequence[str]) -> Record:
        """Return {class: its distance, see `class_distances`}, of the images of all sets together."""
        found = class_distances(concatenate(self.sets), classes[0], self.real, classes[1], names)
        return {name: self.named(values) for name, values in found.items()}


def describe_settings(settings: Evaluate) -> Record:
    """Return the settings of the metrics: numbers with other settings cannot be compared."""
    return settings.model_dump() | {"metric_seed": SEED}


def real_sets(n: int, available: int, sets: int) -> list[NDArray[np.int64]]:
    """Draw indices of several sets of n real images with a constant seed, disjoint if possible.

    Raises UserError for n > available: without real images at the same N there is no floor.
    """
    if n > available:
        raise UserError(
            f"sample.n ({n}) must not exceed the {available} published training images: the floor is a set of"
            " as many real ones; lower sample.n (params.yaml)"
        )
    random = np.random.RandomState(SEED)
    if n * sets <= available:
        order = random.permutation(available)
        return [order[i * n : (i + 1) * n] for i in range(sets)]
    return [random.permutation(available)[:n] for _ in range(sets)]


def accuracy_scores(
    sets: Sequence[ImageSet | Samples],
    test: ImageSet,
    settings: Evaluate,
    device: torch.device,
    autocast: AbstractContextManager[object],
) -> Record:
    """Return {"accuracy_score": spread over the sets}, or {} without labels or where it is not wanted."""
    if test.labels is None or not settings.accuracy_images:
        return {}
    real, classes = (test.images, test.labels), len(test.classes)
    how: Record = {"seed": SEED, "seen": settings.accuracy_images, "device": device, "autocast": autocast}
    scores = [
        classification_accuracy_score(part.images, part.labels, *real, classes, **how)
        for part in sets
        if part.labels is not None
    ]
    return {"accuracy_score": spread(scores)} if scores else {}


def spread_of(scores: Sequence[Mapping[str, float]]) -> Record:
    """Return {name: spread} of several dictionaries with the same names."""
    return {name: spread([score[name] for score in scores]) for name in scores[0]}


def predicted_classes(views: Sequence[View]) -> Classes | None:
    """Return the classes of the images as seen by the first instrument that knows the classes."""
    for view in views:
        if view.instrument.classes:
            generated, real = concatenate(view.sets).logits, view.real.logits
            assert generated is not None and real is not None
            return generated.argmax(1), real.argmax(1)
    return None


def headline(n: int, scores: Mapping[str, Record], copies: float, **more: Record | None) -> Record:
    """Return the numbers for `dvc metrics show` and MLflow: means over the sets, and spreads of distances.

    scores: {instrument's id: {metric: spread}}. The number to hold comes first: the ratio to real images, by
    the network trained on ImageNet if there is one, else by the first instrument. copies: as in
    `memorisation`. more: spreads that belong to no instrument; None is left out.
    """
    chosen = ["fid", "fd", RATIO, "kid", "is", "precision", "recall", "density", "coverage"]
    result: Record = {}
    for id, of_instrument in scores.items():
        distance = "fid" if "fid" in of_instrument else "fd"
        result[id] = {name: of_instrument[name]["mean"] for name in chosen if name in of_instrument}
        result[id][f"{distance}_std"] = of_instrument[distance]["std"]
    ratios = {id: part[RATIO] for id, part in result.items() if RATIO in part}
    sharpest = [ratio for id, ratio in ratios.items() if id.startswith(IMAGENET)] or list(ratios.values())
    first = {RATIO: sharpest[0]} if sharpest else {}
    rest = {name: value["mean"] for name, value in more.items() if value}
    return first | {"n": n} | result | {"copies": copies} | rest


def load_record(path: Path) -> Record:
    """Return a record that a stage wrote. Raises UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro {path.stem}`")
    record: Record = json.loads(path.read_text())
    return record


def class_table(record: Record) -> list[tuple[str, float, int]]:
    """Return (class, distance, images) by the first instrument, if it has any, for `dvc plots`."""
    first: Record = next(iter(record["instruments"].values()), {})
    classes: Record = next((part for name, part in first.get("classes", {}).items() if name != "by"), {})
    names = ("fd", "fid")
    return [(of, row[name], row["n"]) for of, row in classes.items() for name in names if name in row]
