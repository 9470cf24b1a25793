"""Measure the real images: the instruments, what they see in the test images, and what a perfect and a useless generator would score.

Run by `dvc repro`; see dvc.yaml.  It runs before any training, so that whatever the evaluation needs and cannot have is said here.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise
from rediffuse.evaluation.features import save_features
from rediffuse.evaluation.fidelity import check_enough
from rediffuse.evaluation.instruments import check_available, make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, memorisation, save_neighbourhood
from rediffuse.evaluation.report import (
    CEILING,
    Record,
    View,
    accuracy_scores,
    describe_reference,
    describe_settings,
    describe_train,
    distances_by_class,
    headline,
    instrument_record,
    predicted_classes,
    published,
    real_sets,
    reference_rows,
)
from rediffuse.images.image_set import ImageSet, load_images, load_manifest
from rediffuse.params import DIMENSIONS, Params, load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.tracking.row import stage_run
from stages import run_stage

FOLDER = Path("data/reference")
METRICS, RECORD = Path("metrics/reference.json"), Path("metrics/evaluation/reference.json")


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    on, manifest = device(), load_manifest("data/prepared")
    train, validation, test = (load_images("data/prepared", split) for split in ("train", "validation", "test"))
    everything, sets = train, list[ImageSet]()
    if params.reference.instruments:  # nothing else compares sets of real images
        everything = published(train, validation)
        for name in params.reference.instruments:
            check_available(name, everything)
            check_enough(len(test), DIMENSIONS[name], params.evaluate, "test images")
        sets = [everything.take(indices) for indices in real_sets(params.sample.n, len(everything), len(params.sample.seeds))]

    with stage_run("reference", params) as run:
        instruments = measure(params, everything, sets, test) if sets else {}
        if not is_main():
            return
        record: Record = {
            "reference": describe_reference(manifest),
            "train": describe_train(manifest),
            "n": params.sample.n,
            "sets": len(params.sample.seeds),
            "settings": describe_settings(params.evaluate),
            "instruments": instruments,
            "memorisation": remember(train, test, params.sample.n),
        }
        context = autocast(on, params.precision)
        if learnt := accuracy_scores(sets, test, params.evaluate, device=on, autocast=context):
            record["accuracy_score"] = learnt
        write_json(RECORD, record)
        scores = {id: part["rows"]["train"] for id, part in record["instruments"].items()}
        copies = record["memorisation"]["test"]["copies"]
        write_json(METRICS, headline(params.sample.n, scores, copies, accuracy_score=record.get("accuracy_score")))
        run.log_results(METRICS, RECORD)


def measure(params: Params, everything: ImageSet, sets: list[ImageSet], test: ImageSet) -> Record:
    """The record of each instrument, by its id.  What it sees in the test images is kept beside it, for the evaluations.

    All processes measure, the first one makes the records.
    """
    n = params.sample.n
    pictures = {
        "mean_image": mean_image(everything.images, n),
        "pixel_marginals": pixel_marginals(everything.images, n),
        CEILING: uniform_noise(everything.shape, n),
    }
    views, records, on = [], {}, device()
    for name in params.reference.instruments:
        instrument = make_instrument(name, everything, FOLDER / name, device=on, autocast=autocast(on, params.precision))
        real = instrument.measure(test.images, title=f"{name}, test images")
        view = View(instrument, real, [instrument.measure(real.images, title=f"{name}, training images") for real in sets])
        anchors = {title: instrument.measure(images, title=f"{name}, {title}") for title, images in pictures.items()}
        if not is_main():
            continue
        if warning := instrument.record.get("warning"):
            print(f"warning: {instrument.id}: {warning}", file=sys.stderr)
        save_features(FOLDER / name / "features.safetensors", {"test": real})
        records[instrument.id] = instrument_record(view) | {"rows": reference_rows(view, anchors, params.evaluate), "classes": {}}
        views.append(view)
    if not is_main():
        return records
    classes = {"predicted": predicted_classes(views)}
    if test.labels is not None:
        labels = np.concatenate([real.labels for real in sets if real.labels is not None])
        classes["label"] = torch.from_numpy(labels), torch.tensor(test.labels)
    for by, pair in classes.items():
        for id, distances in distances_by_class(views, *pair, test.classes).items() if pair else ():
            records[id]["classes"][by] = distances
    return records


def remember(train: ImageSet, test: ImageSet, n: int) -> Record:
    """How near unseen real images lie to the training images, and what becomes of training images that pose as generated."""
    unseen = Neighbourhood.of(test.images, train.images, title="test images")
    save_neighbourhood(FOLDER / "test-neighbours.safetensors", unseen)
    memoriser = Neighbourhood.of(train.images[:n], train.images, title="training images")
    return {"test": memorisation(unseen, unseen), "train": memorisation(memoriser, unseen)}


if __name__ == "__main__":
    run_stage(main)
