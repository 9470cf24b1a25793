"""Judge the images drawn from one model: `python -m stages.evaluate vae|ddpm`.  Run by `dvc repro`; see dvc.yaml."""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import torch

from rediffuse.evaluation.features import Features, load_features
from rediffuse.evaluation.fidelity import frechet_distance, spread
from rediffuse.evaluation.instruments import open_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, load_neighbourhood, memorisation
from rediffuse.evaluation.report import (
    Record,
    View,
    accuracy_scores,
    describe_settings,
    distances_by_class,
    headline,
    instrument_record,
    position,
    predicted_classes,
    score_sets,
    spread_of,
)
from rediffuse.figures.pairs import Neighbours, pairs
from rediffuse.figures.scores import class_chart, score_chart
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet, load_images
from rediffuse.images.sample_sets import SampleSets, load_sets
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.tracking.row import stage_run
from stages import run_stage

FOLDER = Path("data/reference")
PAIRS = 10  # nearest neighbours shown


@process_group()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vae", "ddpm"])
    model = parser.parse_args().model
    params = load_params()
    make_deterministic()
    reference = load_reference(Path("metrics/evaluation/reference.json"))
    train, test = load_images("data/prepared", "train"), load_images("data/prepared", "test")
    samples = load_sets(Path(f"data/samples/{model}"), test.shape, len(test.classes))
    check_same_size(samples, reference)
    metrics, full, plots = Path(f"metrics/{model}.json"), Path(f"metrics/evaluation/{model}.json"), Path(f"metrics/plots/evaluate_{model}")

    with stage_run(f"evaluate_{model}", params, complete=True) as run:
        views = look(samples, params)
        reconstructed = look_at_reconstructions(samples, views)
        if not is_main():  # all processes look, the first one judges
            return
        record: Record = {
            "model": model,
            "sampling": samples.sampling,
            "reference": reference["reference"],
            "train": reference["train"],
            "settings": describe_settings(params.evaluate),
            "instruments": {view.instrument.id: judge_view(view, reconstructed, reference, params) for view in views},
        }
        by_class(record, views, samples, test)
        record["memorisation"] = remember(samples, train, test, plots / "images")
        context = autocast(device(), params.precision)
        scored = samples.sets if views else []  # by nothing but instruments, where there are few images
        if learnt := accuracy_scores(scored, test, params.evaluate, device=device(), autocast=context):
            record["accuracy_score"] = learnt
        if samples.labels is not None and (seen := predicted_classes(views)):
            right = (seen[0] == torch.from_numpy(samples.labels)).double().reshape(len(samples.sets), -1)
            record["label_accuracy"] = spread(right.mean(1).tolist())
        write_json(full, record)
        scores = {id: part["scores"] | {"position": part["position"]} for id, part in record["instruments"].items()}
        more = {name: record.get(name) for name in ("accuracy_score", "label_accuracy")}
        write_json(metrics, headline(samples.n, scores, record["memorisation"]["copies"]["mean"], **more))
        save_png(score_chart(record, reference), plots / "images/scores.png")
        save_png(class_chart(record, reference), plots / "images/classes.png")
        write_classes(plots / "classes.csv", record)
        run.log_results(metrics, full, plots)


def load_reference(path: Path) -> Record:
    """The record that the stage reference wrote."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    record: Record = json.loads(path.read_text())
    return record


def check_same_size(samples: SampleSets, reference: Record) -> None:
    """Raise UserError unless floor and samples were made with the same N: DVC sees to it, except for stages run singly."""
    if (samples.n, len(samples.sets)) != (reference["n"], reference["sets"]):
        found = f"{len(samples.sets)} sets of {samples.n} and {reference['sets']} of {reference['n']}"
        raise UserError(f"generated and real images must be judged in sets of the same size, got {found}: run `dvc repro`")


def look(samples: SampleSets, params: Params) -> list[View]:
    """What each instrument sees in the samples, and has seen in the test images."""
    views = []
    for name in params.reference.instruments:
        instrument = open_instrument(FOLDER / name, device=device())
        real = load_features(FOLDER / name / "features.safetensors")["test"]
        views.append(View(instrument, real, [instrument.measure(part.images, title=f"{name}, samples") for part in samples.sets]))
    return views


def look_at_reconstructions(samples: SampleSets, views: list[View]) -> dict[str, Features]:
    """What each instrument, by its id, sees in the reconstructions, if there are any."""
    if samples.reconstructions is None:
        return {}
    instruments = [view.instrument for view in views]
    return {one.id: one.measure(samples.reconstructions, title=f"{one.id}, reconstructions") for one in instruments}


def judge_view(view: View, reconstructed: dict[str, Features], reference: Record, params: Params) -> Record:
    """The record of one instrument: scores, their place between floor and ceiling, and those of a VAE's reconstructions."""
    distance = view.instrument.distance
    scores = score_sets(view, params.evaluate)
    record = instrument_record(view) | {"scores": scores}
    record |= position(scores[distance], reference["instruments"][view.instrument.id]["rows"], distance)
    if (seen := reconstructed.get(view.instrument.id)) is not None:
        record["reconstructions"] = {distance: frechet_distance(seen, view.real)}
    return record


def by_class(record: Record, views: list[View], samples: SampleSets, test: ImageSet) -> None:
    """Add distances by class: the class asked for, or else the one that a classifying instrument sees, in real images as well."""
    if samples.labels is not None and test.labels is not None:
        by, pair = "label", (torch.from_numpy(samples.labels), torch.tensor(test.labels))
    elif seen := predicted_classes(views):
        by, pair = "predicted", seen
    else:
        return
    for id, distances in distances_by_class(views, *pair, test.classes).items():
        record["instruments"][id]["classes"] = {"by": by, "fd": distances}


def remember(samples: SampleSets, train: ImageSet, test: ImageSet, pictures: Path) -> Record:
    """How near the samples lie to the training images, beside unseen real images, with a picture of the nearest."""
    unseen = load_neighbourhood(FOLDER / "test-neighbours.safetensors")
    images, n = samples.images, samples.n  # joined anew at each look
    together = Neighbourhood.of(images, train.images, title="samples")
    parts = [together.take(slice(start, start + n)) for start in range(0, len(together), n)]
    blocks = {"generated": nearest_shown(images, together, train), "real, unseen": nearest_shown(test.images, unseen, train)}
    save_png(pairs(blocks), pictures / "neighbours.png")
    return spread_of([memorisation(part, unseen) for part in parts])


def nearest_shown(images: np.ndarray, neighbourhood: Neighbourhood, train: ImageSet) -> Neighbours:
    """Of the images, those that look most like copies, with the training images they look like."""
    rows = closest(neighbourhood, PAIRS)
    return Neighbours.of(images, train.images, neighbourhood.index, neighbourhood.ratio, rows)


def write_classes(path: Path, record: Record) -> None:
    """The distance by class of the first instrument, for `dvc plots`; without it or classes only the head of the table."""
    first: Record = next(iter(record["instruments"].values()), {})
    rows = first["classes"]["fd"] if "classes" in first else {}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("class", "fd", "n"), *((name, row["fd"], row["n"]) for name, row in rows.items() if "fd" in row)]
    )
    replace_file(path, text.getvalue().encode())


if __name__ == "__main__":
    run_stage(main)
