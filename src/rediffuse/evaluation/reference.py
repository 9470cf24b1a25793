"""What real images score: the instruments, the floor and the ceiling between which generated images are read."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise
from rediffuse.evaluation.features import save_features
from rediffuse.evaluation.fidelity import check_enough
from rediffuse.evaluation.instruments import check_available, make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, memorisation, save_neighbourhood
from rediffuse.evaluation.record import (
    CEILING,
    FEATURES,
    NEIGHBOURS,
    SHOWN,
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
    real_sets,
    reference_rows,
    together,
)
from rediffuse.images.image_set import ImageSet
from rediffuse.params import DIMENSIONS, Params
from rediffuse.runtime.processes import is_main


class Reference:
    """The real images, and what is measured of them.

    everything: all training images, of which instruments are made.  sets: as many sets of them as are drawn from a model, of the same size.
    Raises UserError, before any work, for an instrument that cannot be had or used for these images.
    """

    def __init__(self, params: Params, train: ImageSet, validation: ImageSet, test: ImageSet) -> None:
        self.params, self.train, self.test, self.everything, self.sets = params, train, test, train, list[ImageSet]()
        if not params.reference.instruments:  # nothing else compares sets of real images
            return
        self.everything = together(train, validation)
        for name in params.reference.instruments:
            check_available(name, self.everything)
            check_enough(len(test), DIMENSIONS[name], params.evaluate, "test images")
        chosen = real_sets(params.sample.n, len(self.everything), len(params.sample.seeds))
        self.sets = [self.everything.take(indices) for indices in chosen]

    def measure(
        self, folder: Path, manifest: dict[str, Any], device: torch.device, autocast: AbstractContextManager[object]
    ) -> tuple[Record, Record] | None:
        """The record and its headline; what evaluations need is kept in the folder.  All processes measure, the first gets the records."""
        views = self._views(folder, device, autocast)
        if not is_main():
            return None
        params = self.params
        record: Record = {
            "reference": describe_reference(manifest),
            "train": describe_train(manifest),
            "n": params.sample.n,
            "sets": len(params.sample.seeds),
            "settings": describe_settings(params.evaluate),
            "instruments": self._instruments(views),
        } | self._memorisation(folder)
        real = [view for view, _ in views]
        if learnt := accuracy_scores(self.sets if real else [], self.test, params.evaluate, device=device, autocast=autocast):
            record["accuracy_score"] = learnt
        scores = {id: part["rows"]["train"] for id, part in record["instruments"].items()}
        copies = record["memorisation"]["test"]["copies"]
        return record, headline(params.sample.n, scores, copies, accuracy_score=record.get("accuracy_score"))

    def _views(self, folder: Path, device: torch.device, autocast: AbstractContextManager[object]) -> list[tuple[View, dict[str, Any]]]:
        """What each instrument sees in the real images, and in those of generators that learnt nothing."""
        n, everything = self.params.sample.n, self.everything
        if not self.sets:
            return []
        pictures = {
            "mean_image": mean_image(everything.images, n),
            "pixel_marginals": pixel_marginals(everything.images, n),
            CEILING: uniform_noise(everything.shape, n),
        }
        views = []
        for name in self.params.reference.instruments:
            instrument = make_instrument(name, everything, folder / name, device=device, autocast=autocast)
            real = instrument.measure(self.test.images, title=f"{name}, test images")
            view = View(instrument, real, [instrument.measure(part.images, title=f"{name}, training images") for part in self.sets])
            anchors = {title: instrument.measure(images, title=f"{name}, {title}") for title, images in pictures.items()}
            views.append((view, anchors))
            if is_main():
                save_features(folder / name / FEATURES, {"test": real})
                if warning := instrument.record.get("warning"):
                    print(f"warning: {instrument.id}: {warning}", file=sys.stderr)
        return views

    def _instruments(self, views: list[tuple[View, dict[str, Any]]]) -> Record:
        """The record of each instrument, by its id."""
        records = {
            view.instrument.id: instrument_record(view) | {"rows": reference_rows(view, anchors, self.params.evaluate), "classes": {}}
            for view, anchors in views
        }
        real = [view for view, _ in views]
        classes = {"predicted": predicted_classes(real)} if real else {}
        if real and self.test.labels is not None:
            labels = np.concatenate([part.labels for part in self.sets if part.labels is not None])
            classes["label"] = torch.from_numpy(labels), torch.tensor(self.test.labels)
        for by, pair in classes.items():
            for id, distances in distances_by_class(real, *pair, self.test.classes).items() if pair else ():
                records[id]["classes"][by] = distances
        return records

    def _memorisation(self, folder: Path) -> Record:
        """How near unseen real images lie to the training images, and what becomes of training images that pose as generated."""
        unseen = Neighbourhood.of(self.test.images, self.train.images, title="test images")
        save_neighbourhood(folder / NEIGHBOURS, unseen)
        memoriser = Neighbourhood.of(self.train.images[: self.params.sample.n], self.train.images, title="training images")
        measured = {"test": memorisation(unseen, unseen), "train": memorisation(memoriser, unseen)}
        return {"memorisation": measured, "closest": closest(unseen, SHOWN)}
