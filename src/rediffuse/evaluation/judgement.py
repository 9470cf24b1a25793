"""The judgement of generated images: the record of a model, and its headline."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from rediffuse.evaluation.features import Features, load_features
from rediffuse.evaluation.fidelity import frechet_distance, spread
from rediffuse.evaluation.instruments import open_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, load_neighbourhood, memorisation
from rediffuse.evaluation.record import (
    FEATURES,
    NEIGHBOURS,
    SHOWN,
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
from rediffuse.images.image_set import ImageSet
from rediffuse.images.sample_sets import SampleSets
from rediffuse.params import Params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.processes import is_main


class Judgement:
    """Sample sets, the real images that they are compared with, and the record and folder of the stage `reference`.

    Raises UserError unless floor and samples were made with the same N: DVC sees to it, except for stages that are run alone.
    """

    def __init__(self, params: Params, samples: SampleSets, train: ImageSet, test: ImageSet, reference: Record, folder: Path) -> None:
        self.params, self.samples, self.train, self.test, self.reference, self.folder = params, samples, train, test, reference, folder
        if (samples.n, len(samples.sets)) != (reference["n"], reference["sets"]):
            found = f"{len(samples.sets)} sets of {samples.n} and {reference['sets']} of {reference['n']}"
            raise UserError(f"generated and real images must be judged in sets of the same size, got {found}: run `dvc repro`")

    def measure(self, model: str, device: torch.device, autocast: AbstractContextManager[object]) -> tuple[Record, Record] | None:
        """The record and its headline.  All processes measure, the first gets the records."""
        views = self._views(device)
        reconstructed = self._reconstructed(views)
        if not is_main():
            return None
        samples = self.samples
        record: Record = {
            "model": model,
            "sampling": samples.sampling,
            "reference": self.reference["reference"],
            "train": self.reference["train"],
            "settings": describe_settings(self.params.evaluate),
            "instruments": {view.instrument.id: self._instrument(view, reconstructed) for view in views},
        }
        self._add_classes(record, views)
        record |= self._memorisation()
        scored = samples.sets if views else []  # by nothing but instruments, where there are few images
        if learnt := accuracy_scores(scored, self.test, self.params.evaluate, device=device, autocast=autocast):
            record["accuracy_score"] = learnt
        if samples.labels is not None and (seen := predicted_classes(views)):
            right = (seen[0] == torch.from_numpy(samples.labels)).double().reshape(len(samples.sets), -1)
            record["label_accuracy"] = spread(right.mean(1).tolist())
        scores = {id: part["scores"] | {"position": part["position"]} for id, part in record["instruments"].items()}
        more = {name: record.get(name) for name in ("accuracy_score", "label_accuracy")}
        return record, headline(samples.n, scores, record["memorisation"]["copies"]["mean"], **more)

    def _views(self, device: torch.device) -> list[View]:
        """What each instrument sees in the samples, and has seen in the test images."""
        views = []
        for name in self.params.reference.instruments:
            instrument = open_instrument(self.folder / name, device=device)
            real = load_features(self.folder / name / FEATURES)["test"]
            seen = [instrument.measure(part.images, title=f"{name}, samples") for part in self.samples.sets]
            views.append(View(instrument, real, seen))
        return views

    def _reconstructed(self, views: list[View]) -> dict[str, Features]:
        """What each instrument, by its id, sees in the reconstructions, if there are any."""
        images = self.samples.reconstructions
        if images is None:
            return {}
        return {v.instrument.id: v.instrument.measure(images, title=f"{v.instrument.id}, reconstructions") for v in views}

    def _instrument(self, view: View, reconstructed: dict[str, Features]) -> Record:
        """Scores, their place between floor and ceiling, and those of a VAE's reconstructions."""
        distance = view.instrument.distance
        scores = score_sets(view, self.params.evaluate)
        record = instrument_record(view) | {"scores": scores}
        record |= position(scores[distance], self.reference["instruments"][view.instrument.id]["rows"], distance)
        if (seen := reconstructed.get(view.instrument.id)) is not None:
            record["reconstructions"] = {distance: frechet_distance(seen, view.real)}
        return record

    def _add_classes(self, record: Record, views: list[View]) -> None:
        """Distances by class: the class asked for, or else the one that a classifying instrument sees, in real images as well."""
        samples, test = self.samples, self.test
        if samples.labels is not None and test.labels is not None:
            by, pair = "label", (torch.from_numpy(samples.labels), torch.tensor(test.labels))
        elif seen := predicted_classes(views):
            by, pair = "predicted", seen
        else:
            return
        distance = {view.instrument.id: view.instrument.distance for view in views}
        for id, distances in distances_by_class(views, *pair, test.classes).items():
            record["instruments"][id]["classes"] = {"by": by, distance[id]: distances}

    def _memorisation(self) -> Record:
        """How near the samples lie to the training images, beside unseen real images."""
        unseen, n = load_neighbourhood(self.folder / NEIGHBOURS), self.samples.n
        every = Neighbourhood.of(self.samples.images, self.train.images, title="samples")
        parts = [every.take(slice(start, start + n)) for start in range(0, len(every), n)]
        return {"memorisation": spread_of([memorisation(part, unseen) for part in parts]), "closest": closest(every, SHOWN)}
