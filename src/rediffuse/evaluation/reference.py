"""What real images score: the instruments, and the floor and ceiling of their distances."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise
from rediffuse.evaluation.features import save_features
from rediffuse.evaluation.fidelity import check_enough, frechet_distance, inception_score, judge, spread
from rediffuse.evaluation.instruments import check_available, make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, memorisation, save_neighbourhood
from rediffuse.evaluation.record import (
    CEILING,
    FEATURES,
    NEIGHBOURS,
    SHOWN,
    Classes,
    Record,
    View,
    accuracy_scores,
    describe_settings,
    headline,
    predicted_classes,
    real_sets,
)
from rediffuse.images.image_set import ImageSet
from rediffuse.params import DIMENSIONS, Evaluate, Params
from rediffuse.runtime.processes import is_main


class Reference:
    """The real images, and what is measured of them.

    everything: all training images, from which instruments are made, so that they do not depend on
    data.validation. sets: sets of these, of the same size and number as the sets drawn from a model. Raises
    UserError, before any work, for an instrument that is not available or does not fit these images.
    """

    def __init__(self, params: Params, train: ImageSet, validation: ImageSet, test: ImageSet) -> None:
        self.params, self.train, self.test = params, train, test
        self.sets: list[ImageSet] = []
        if not params.reference.instruments:
            return
        self.everything = _together(train, validation)
        for name in params.reference.instruments:
            check_available(name, self.everything)
            check_enough(len(test), DIMENSIONS[name], params.evaluate, "test images")
        chosen = real_sets(params.sample.n, len(self.everything), len(params.sample.seeds))
        self.sets = [self.everything.take(indices) for indices in chosen]

    def measure(
        self, folder: Path, manifest: Record, device: torch.device, autocast: AbstractContextManager[object]
    ) -> tuple[Record, Record] | None:
        """Return the record and its headline, and keep in the folder what evaluations need.

        All processes measure, the first gets the records.
        """
        views = self._views(folder, device, autocast)
        if not is_main():
            return None
        params, (train, test) = self.params, (manifest["splits"][split] for split in ("train", "test"))
        real = {"split": "test", "n": test["count"], "sha256": test["sha256"]["images"]}
        record: Record = {
            "reference": {"set": manifest["set"], **real},
            "train": {"n": train["count"], "sha256": train["sha256"]["images"]},
            "n": params.sample.n,
            "sets": len(params.sample.seeds),
            "settings": describe_settings(params.evaluate),
            "instruments": self._instruments(views),
        }
        record |= self._memorisation(folder)
        record |= accuracy_scores(self.sets, self.test, params.evaluate, device, autocast)
        scores = {id: part["rows"]["train"] for id, part in record["instruments"].items()}
        copies = record["memorisation"]["test"]["copies"]
        return record, headline(params.sample.n, scores, copies, accuracy_score=record.get("accuracy_score"))

    def _views(
        self, folder: Path, device: torch.device, autocast: AbstractContextManager[object]
    ) -> list[View]:
        """Return what each instrument sees in the real images, and in those of the anchors."""
        if not self.sets:
            return []
        everything, n, views = self.everything, self.params.sample.n, []
        pictures = {
            "mean_image": mean_image(everything.images, n),
            "pixel_marginals": pixel_marginals(everything.images, n),
            CEILING: uniform_noise(everything.shape, n),
        }
        for name in self.params.reference.instruments:
            instrument = make_instrument(name, everything, folder / name, device=device, autocast=autocast)
            real = instrument.measure(self.test.images, title=f"{name}, test images")
            sets = [instrument.measure(part.images, title=f"{name}, training images") for part in self.sets]
            anchors = {
                title: instrument.measure(images, title=f"{name}, {title}")
                for title, images in pictures.items()
            }
            views.append(View(instrument, real, sets, anchors))
            if is_main():
                save_features(folder / name / FEATURES, {"test": real})
                if warning := instrument.record.get("warning"):
                    print(f"warning: {instrument.id}: {warning}", file=sys.stderr)
        return views

    def _instruments(self, views: list[View]) -> Record:
        """Return the record of each instrument, by its id."""
        pairs: dict[str, Classes | None] = {"predicted": predicted_classes(views)}
        labels = [part.labels for part in self.sets if part.labels is not None]
        if labels and self.test.labels is not None:
            pairs["label"] = torch.from_numpy(np.concatenate(labels)), torch.tensor(self.test.labels)
        records = {}
        for view in views:
            rows = reference_rows(view, self.params.evaluate)
            classes = {
                by: view.distances_by_class(pair, self.test.classes) for by, pair in pairs.items() if pair
            }
            records[view.instrument.id] = view.record() | {"rows": rows, "classes": classes}
        return records

    def _memorisation(self, folder: Path) -> Record:
        """Return how near unseen real images, and training images themselves, lie to the training images."""
        train, n = self.train.images, self.params.sample.n
        unseen = Neighbourhood.of(self.test.images, train, title="test images")
        save_neighbourhood(folder / NEIGHBOURS, unseen)
        memoriser = Neighbourhood.of(train[:n], train, title="training images")
        measured = {"test": memorisation(unseen, unseen), "train": memorisation(memoriser, unseen)}
        return {"memorisation": measured, "closest": closest(unseen, SHOWN)}


def reference_rows(view: View, settings: Evaluate) -> Record:
    """Return what sets of known quality score against the real test images.

    train: the sets of the view, real training images, are the floor. test: the inception score of the test
    images themselves, in sets of the same size. test_halves: one half of the test images against the other, a
    floor that does not depend on the training images of the instrument; absent where a half is too small.
    Then each of the anchors.
    """
    rows: Record = {"train": view.scores(settings)}
    real, n = view.real, min(len(view.sets[0]), len(view.real))
    if real.logits is not None:
        parts = [real.logits[start : start + n] for start in range(0, len(real) - n + 1, n)]
        rows["test"] = {"is": spread([inception_score(part, settings.is_splits) for part in parts])}
    if len(real) >= 4 * real.dimension:
        half, other = real.take(slice(0, None, 2)), real.take(slice(1, None, 2))
        rows["test_halves"] = view.named({"fd": frechet_distance(half, other)}) | {"n": len(half)}
    return rows | {of: view.named(judge(seen, real, settings)) for of, seen in view.others.items()}


def _together(train: ImageSet, validation: ImageSet) -> ImageSet:
    """Return both splits as one set."""
    images, labels = np.concatenate([train.images, validation.images]), None
    if train.labels is not None and validation.labels is not None:
        labels = np.concatenate([train.labels, validation.labels])
    return ImageSet(images, labels, train.classes)
