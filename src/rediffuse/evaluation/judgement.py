"""The judgement of generated images: the record of a model, and its headline."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from rediffuse.evaluation.features import load_features
from rediffuse.evaluation.fidelity import spread
from rediffuse.evaluation.instruments import open_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, load_neighbourhood, memorisation
from rediffuse.evaluation.record import (
    FEATURES,
    FLOOR,
    NEIGHBOURS,
    RATIO,
    SHOWN,
    RealImages,
    Record,
    View,
    accuracy_scores,
    describe_settings,
    headline,
    predicted_classes,
    spread_of,
)
from rediffuse.images.sample_sets import SampleSets
from rediffuse.params import Params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.processes import is_main


@dataclass(frozen=True)
class Judgement:
    """Sample sets, the real images to compare them with, and the record and folder of the stage `reference`.

    Raises UserError unless reference and samples were made with the same N: DVC ensures it, except for stages
    run alone.
    """

    params: Params
    samples: SampleSets
    real: RealImages
    reference: Record
    folder: Path

    def __post_init__(self) -> None:
        if self.samples.n != self.reference["n"]:
            found = f"{self.samples.n} and {self.reference['n']}"
            raise UserError(
                f"generated and real images must be in sets of the same size, got {found}: run `dvc repro`"
            )

    def measure(
        self, model: str, device: torch.device, autocast: AbstractContextManager[object]
    ) -> tuple[Record, Record] | None:
        """Return the record and its headline. All processes measure, the first gets the records."""
        names = self.params.reference.instruments
        views = [self._view(name, device, main=name == names[0]) for name in names]
        if not is_main():
            return None
        samples, settings = self.samples, self.params.evaluate
        record: Record = {
            "model": model,
            "sampling": samples.sampling,
            "reference": self.reference["reference"],
            "train": self.reference["train"],
            "settings": describe_settings(settings),
            "instruments": {view.instrument.id: self._instrument(view) for view in views},
        }
        seen, real = predicted_classes(views), self.real.compared(self.params.reference.split)
        by, classes = "predicted", seen
        if samples.labels is not None and real.labels is not None:
            by, classes = "label", (torch.from_numpy(samples.labels), torch.tensor(real.labels))
        if classes:
            for view in views:
                found = view.distances_by_class(classes, real.classes)
                part = record["instruments"][view.instrument.id]
                part["classes"] = {"by": by, view.instrument.distance: found}
        record |= self._memorisation()
        # Without instruments the set is too small for this score too.
        record |= accuracy_scores(samples.sets if views else [], self.real.test, settings, device, autocast)
        if samples.labels is not None and seen:
            right = (seen[0] == torch.from_numpy(samples.labels)).double().reshape(len(samples.sets), -1)
            record["label_accuracy"] = spread(right.mean(1).tolist())
        scores = {
            id: part["scores"] | ({RATIO: part[RATIO]} if RATIO in part else {})
            for id, part in record["instruments"].items()
        }
        more = {name: record.get(name) for name in ("accuracy_score", "label_accuracy")}
        return record, headline(samples.n, scores, record["memorisation"]["copies"]["mean"], **more)

    def _view(self, name: str, device: torch.device, *, main: bool) -> View:
        """Return what the instrument sees in the samples, the reconstructions and the real images."""
        instrument = open_instrument(self.folder / name, device=device)
        real = load_features(self.folder / name / FEATURES)["real"]
        sets = [instrument.measure(part.images, title=f"{name}, samples") for part in self.samples.sets]
        others = {}
        if (images := self.samples.reconstructions) is not None:
            others["reconstructions"] = instrument.measure(images, title=f"{name}, reconstructions")
        return View(instrument, real, sets, others, main)

    def _instrument(self, view: View) -> Record:
        """Return the scores, their ratio to those of real images, and those of a VAE's reconstructions."""
        distance, scores = view.instrument.distance, view.scores(self.params.evaluate)
        rows = self.reference["instruments"][view.instrument.id]["rows"]
        record = view.record() | {"scores": scores}
        if self.samples.n == rows[FLOOR]["n"]:
            floor = rows[FLOOR][distance]["mean"]
            record |= {RATIO: spread([value / floor for value in scores[distance]["values"]]), "floor": floor}
        return record | {title: view.frechet(features) for title, features in view.others.items()}

    def _memorisation(self) -> Record:
        """Return how near the samples lie to the training images, compared with unseen real images."""
        unseen, n = load_neighbourhood(self.folder / NEIGHBOURS), self.samples.n
        every = Neighbourhood.of(self.samples.images, self.real.train.images, title="samples")
        parts = [every.take(slice(start, start + n)) for start in range(0, len(every), n)]
        measured = spread_of([memorisation(part, unseen) for part in parts])
        return {"memorisation": measured, "closest": closest(every, SHOWN)}
