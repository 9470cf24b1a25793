"""From features to records: the scores of several independent sets, and their place between a perfect and a useless generator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import SEED, class_distances, expected_bias, frechet_distance, inception_score, judge, spread
from rediffuse.evaluation.instruments import Instrument
from rediffuse.images.image_set import ImageSet
from rediffuse.images.sample_sets import Samples
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SHOWN = 10  # images that look most like copies, in the record
FEATURES, NEIGHBOURS = "features.safetensors", "test-neighbours.safetensors"  # of real images, in the folder of the stage reference
CEILING = "noise"  # the row of the reference that a position of 1 stands for; 0 is real training images

Record = dict[str, Any]
Labelled = ImageSet | Samples


@dataclass(frozen=True)
class View:
    """What one instrument sees: the real test images, and several sets of images to be judged."""

    instrument: Instrument
    real: Features
    sets: Sequence[Features]


def describe_settings(settings: Evaluate) -> Record:
    """The settings of the metrics: numbers taken with others cannot be compared."""
    return settings.model_dump() | {"metric_seed": SEED}


def describe_reference(manifest: Mapping[str, Any]) -> Record:
    """The real images that everything is compared with, from the manifest of the image set: which, how many, and their hash."""
    test = manifest["splits"]["test"]
    return {"set": manifest["set"], "split": "test", "n": test["count"], "sha256": test["sha256"]["images"]}


def describe_train(manifest: Mapping[str, Any]) -> Record:
    """The images that the models have learnt from, which the memorisation is measured against."""
    train = manifest["splits"]["train"]
    return {"n": train["count"], "sha256": train["sha256"]["images"]}


def describe_instrument(instrument: Instrument) -> Record:
    """What identifies the instrument."""
    return {name: instrument.record[name] for name in ("name", "layer", "dimension", "shape", "resize", "sha256", "accuracy")}


def real_sets(n: int, available: int, sets: int) -> list[NDArray[np.int64]]:
    """Indices of `sets` sets of n real images, drawn with a constant seed; they are disjoint where there are enough images.

    Raises UserError for more than are available: without real images at the same N there is no floor.
    """
    if n > available:
        raise UserError(
            f"sample.n ({n}) must not exceed the {available} published training images: the floor is a set of as many real ones;"
            " lower sample.n (params.yaml)"
        )
    random = np.random.RandomState(SEED)
    if n * sets <= available:
        order = random.permutation(available)
        return [order[i * n : (i + 1) * n] for i in range(sets)]
    return [random.permutation(available)[:n] for _ in range(sets)]


def score_sets(view: View, settings: Evaluate) -> Record:
    """{metric: spread over the sets}; Fréchet distances carry the name that belongs to the instrument (fd, or fid of Inception)."""
    return named(view.instrument, spread_of([judge(features, view.real, settings) for features in view.sets]))


def reference_rows(view: View, anchors: Mapping[str, Features], settings: Evaluate) -> Record:
    """What generators that everybody understands score against the real test images.

    train: the sets of the view, real training images, are the floor.  test: the inception score of the test images themselves, in
    sets of the same size.
    test_halves: one half of the test images against the other, a floor free of what the instrument learnt by heart; left out where a
    half is too small.  Then each of the anchors.
    """
    rows: Record = {"train": score_sets(view, settings)}
    real, n = view.real, min(len(view.sets[0]), len(view.real))
    if real.logits is not None:
        parts = [real.take(slice(start, start + n)) for start in range(0, len(real) - n + 1, n)]
        rows["test"] = {"is": spread([inception_score(part, settings.is_splits) for part in parts])}
    if len(real) >= 4 * real.dimension:
        halves = real.take(slice(0, None, 2)), real.take(slice(1, None, 2))
        rows["test_halves"] = named(view.instrument, {"fd": frechet_distance(*halves)}) | {"n": len(halves[0])}
    return rows | {name: named(view.instrument, judge(features, real, settings)) for name, features in anchors.items()}


def instrument_record(view: View) -> Record:
    """What stands in every record beside the scores."""
    bias = expected_bias(view.real, len(view.sets[0]))
    record: Record = {"instrument": describe_instrument(view.instrument), "expected_bias": bias}
    return record | ({} if view.real.logits is None else {"is_max": view.real.logits.shape[1]})


def position(distance: Record, rows: Record, name: str) -> Record:
    """Where Fréchet distances (a spread) lie between real training images (0) and uniform noise (1): their spread, and the two ends.

    rows: those of the reference; name: of the distance, fd or fid.
    """
    floor, ceiling = rows["train"][name]["mean"], rows[CEILING][name]
    places = [(value - floor) / (ceiling - floor) for value in distance["values"]]
    return {"position": spread(places), "floor": floor, "ceiling": ceiling}


def accuracy_scores(
    sets: Sequence[Labelled], test: ImageSet, settings: Evaluate, *, device: torch.device, autocast: AbstractContextManager[object]
) -> Record | None:
    """Spread of the classification accuracy score over the sets; None without sets or labels, or where it is not asked for."""
    if test.labels is None or not settings.accuracy_images or not sets:
        return None
    scores = []
    for part in sets:
        if part.labels is None:
            return None
        score = classification_accuracy_score(
            part.images,
            part.labels,
            test.images,
            test.labels,
            len(test.classes),
            seed=SEED,
            seen=settings.accuracy_images,
            device=device,
            autocast=autocast,
        )
        scores.append(score)
    return spread(scores)


def spread_of(scores: Sequence[Mapping[str, float]]) -> Record:
    """{name: spread} of several dictionaries with the same names."""
    return {name: spread([score[name] for score in scores]) for name in scores[0]}


def predicted_classes(views: Sequence[View]) -> tuple[Tensor, Tensor] | None:
    """The classes of the images of all sets and of the real ones, int64, in the eyes of the first instrument that knows the classes."""
    for view in views:
        if view.instrument.classes:
            return predicted(pooled(view.sets)), predicted(view.real)
    return None


def distances_by_class(views: Sequence[View], classes: Tensor, real_classes: Tensor, names: Sequence[str]) -> Record:
    """{instrument's id: {class: its distance, see `class_distances`}}, of the images of all sets together."""
    found = {}
    for view in views:
        of_class = class_distances(pooled(view.sets), classes, view.real, real_classes, names)
        found[view.instrument.id] = {name: named(view.instrument, values) for name, values in of_class.items()}
    return found


def pooled(sets: Sequence[Features]) -> Features:
    """Several sets as one."""
    logits = [features.logits for features in sets if features.logits is not None]
    return Features(torch.cat([features.values for features in sets]), torch.cat(logits) if logits else None)


def predicted(features: Features) -> Tensor:
    """The class that a classifying instrument sees in each image, int64 (N,)."""
    assert features.logits is not None
    return features.logits.argmax(1)


def headline(n: int, scores: Mapping[str, Mapping[str, Record]], copies: float, **more: Record | None) -> Record:
    """The handful of numbers for `dvc metrics show` and MLflow: means over the sets, and the spread of the distances.

    scores: {instrument's id: {metric: spread}}; the first instrument gives all metrics, the others their distance.  copies: as in
    `memorisation`.  more: spreads of what belongs to no instrument; None is left out.
    """
    result: Record = {"n": n}
    for place, (id, of_instrument) in enumerate(scores.items()):
        distance = "fid" if "fid" in of_instrument else "fd"
        chosen = [distance, "position", "kid", "is", "precision", "recall", "density", "coverage"] if not place else [distance]
        result[id] = {name: of_instrument[name]["mean"] for name in chosen if name in of_instrument}
        result[id][f"{distance}_std"] = of_instrument[distance]["std"]
    return result | {"copies": copies} | {name: value["mean"] for name, value in more.items() if value}


def together(*splits: ImageSet) -> ImageSet:
    """Splits put together again.  Instruments are made from all training images, so that holding some out makes no other ruler."""
    first = splits[0]
    labels = None if first.labels is None else np.concatenate([split.labels for split in splits if split.labels is not None])
    return ImageSet(np.concatenate([split.images for split in splits]), labels, first.classes)


def named(instrument: Instrument, scores: Record) -> Record:
    """The scores with Fréchet distances called as the instrument calls them."""
    names = {"fd": instrument.distance, "fd_inf": f"{instrument.distance}_inf"}
    return {names.get(name, name): value for name, value in scores.items()}


def load_record(path: Path) -> Record:
    """A record that a stage wrote.  Raises UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro {path.stem}`")
    record: Record = json.loads(path.read_text())
    return record


def class_table(record: Record) -> list[tuple[str, float, int]]:
    """(class, distance, images) by the first instrument, for `dvc plots`; nothing without it or without classes."""
    first: Record = next(iter(record["instruments"].values()), {})
    classes: Record = next((part for name, part in first.get("classes", {}).items() if name != "by"), {})
    return [(name, row[key], row["n"]) for name, row in classes.items() for key in ("fd", "fid") if key in row]
