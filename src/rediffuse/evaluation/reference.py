"""What real images score: the instruments, and the floor and ceiling of their distances."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise
from rediffuse.evaluation.features import save_features
from rediffuse.evaluation.fidelity import check_enough, frechet_distance, inception_score, spread
from rediffuse.evaluation.instruments import check_available, make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, closest, memorisation, save_neighbourhood
from rediffuse.evaluation.record import (
    FEATURES,
    FLOOR,
    NEIGHBOURS,
    SHOWN,
    Classes,
    RealImages,
    Record,
    View,
    accuracy_scores,
    describe_settings,
    headline,
    predicted_classes,
    real_sets,
)
from rediffuse.evaluation.shared import content_hash
from rediffuse.images.image_set import ImageSet
from rediffuse.params import DIMENSIONS, Evaluate, Params
from rediffuse.runtime.processes import is_main


class Reference:
    """The real images, and what is measured of them.

    Instruments are made from all training images, so that they do not depend on data.validation. training:
    sets of these, of the same size and number as the sets drawn from a model. sets: those that give the
    floor, of the split that is not compared with; all test images if they are fewer than sample.n. Raises
    UserError, before any work, for an instrument that is not available or does not fit these images.
    """

    def __init__(self, params: Params, real: RealImages) -> None:
        self.params, self.real, self.split = params, real, params.reference.split
        self.sets: list[ImageSet] = []
        if not params.reference.instruments:
            return
        self.compared = real.compared(self.split)
        for name in params.reference.instruments:
            check_available(name, real.learnt)
            for part, title in ((real.test, "test images"), (self.compared, "real images")):
                check_enough(len(part), DIMENSIONS[name], params.evaluate, title)
        n, sets = params.sample.n, len(params.sample.seeds)
        chosen = real_sets(n, len(real.learnt), sets)
        self.training = [real.learnt.take(indices) for indices in chosen]
        if self.split == "test":
            self.sets = self.training
        elif n > len(real.test):
            self.sets = [real.test]
        else:
            self.sets = [real.test.take(indices) for indices in real_sets(n, len(real.test), sets)]

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
        compared = {"n": test["count"], "sha256": test["sha256"]["images"]}
        if self.split == "train":
            sha256, _ = content_hash(self.real.learnt, labelled=False)
            compared = {"n": len(self.real.learnt), "sha256": sha256}
        record: Record = {
            "reference": {"set": manifest["set"], "split": self.split, **compared},
            "train": {"n": train["count"], "sha256": train["sha256"]["images"]},
            "n": params.sample.n,
            "sets": len(params.sample.seeds),
            "settings": describe_settings(params.evaluate),
            "instruments": self._instruments(views),
        }
        record |= self._memorisation(folder)
        training = self.training if self.sets else []
        record |= accuracy_scores(training, self.real.test, params.evaluate, device, autocast)
        scores = {id: part["rows"][FLOOR] for id, part in record["instruments"].items()}
        copies = record["memorisation"]["test"]["copies"]
        return record, headline(params.sample.n, scores, copies, accuracy_score=record.get("accuracy_score"))

    def _views(
        self, folder: Path, device: torch.device, autocast: AbstractContextManager[object]
    ) -> list[View]:
        """Return what each instrument sees in the real images, and in those of the anchors."""
        if not self.sets:
            return []
        everything, n, views = self.real.learnt, self.params.sample.n, list[View]()
        pictures = {
            "mean_image": mean_image(everything.images),
            "pixel_marginals": pixel_marginals(everything.images, n),
            "noise": uniform_noise(everything.shape, n),
        }
        for name in self.params.reference.instruments:
            instrument = make_instrument(name, everything, folder / name, device=device, autocast=autocast)
            real = instrument.measure(self.compared.images, title=f"{name}, {self.split} images")
            sets = [instrument.measure(part.images, title=f"{name}, real images") for part in self.sets]
            anchors = {
                title: instrument.measure(images, title=f"{name}, {title}")
                for title, images in pictures.items()
            }
            if is_main():
                anchors["mean_image"] = anchors["mean_image"].take(torch.zeros(n, dtype=torch.int64))
            views.append(View(instrument, real, sets, anchors, main=not views))
            if is_main():
                save_features(folder / name / FEATURES, {"real": real})
                if warning := instrument.record.get("warning"):
                    print(f"warning: {instrument.id}: {warning}", file=sys.stderr)
        return views

    def _instruments(self, views: list[View]) -> Record:
        """Return the record of each instrument, by its id."""
        pairs: dict[str, Classes | None] = {"predicted": predicted_classes(views)}
        labels = [part.labels for part in self.sets if part.labels is not None]
        if labels and self.compared.labels is not None:
            pairs["label"] = torch.from_numpy(np.concatenate(labels)), torch.tensor(self.compared.labels)
        records = {}
        for view in views:
            rows = reference_rows(view, self.params.evaluate)
            classes = {
                by: view.distances_by_class(pair, self.compared.classes) for by, pair in pairs.items() if pair
            }
            records[view.instrument.id] = view.record() | {"rows": rows, "classes": classes}
        return records

    def _memorisation(self, folder: Path) -> Record:
        """Return how near unseen real images, and training images themselves, lie to the training images."""
        train, n = self.real.train.images, self.params.sample.n
        unseen = Neighbourhood.of(self.real.test.images, train, title="test images")
        save_neighbourhood(folder / NEIGHBOURS, unseen)
        memoriser = Neighbourhood.of(train[:n], train, title="training images")
        measured = {"test": memorisation(unseen, unseen), "train": memorisation(memoriser, unseen)}
        return {"memorisation": measured, "closest": closest(unseen, SHOWN)}


def reference_rows(view: View, settings: Evaluate) -> Record:
    """Return what sets of known quality score against the real images.

    real: the sets of the view, real images of the other split, are the floor. same: the inception score of
    the images compared with, in sets of the same size. halves: one half of them against the other, a floor
    that does not depend on the training images of the instrument; absent where a half is too small.
    Then the distance of each of the anchors.
    """
    rows: Record = {FLOOR: view.scores(settings) | {"n": len(view.sets[0])}}
    real, n = view.real, min(len(view.sets[0]), len(view.real))
    if view.main and real.logits is not None:
        parts = [real.logits[start : start + n] for start in range(0, len(real) - n + 1, n)]
        rows["same"] = {"is": spread([inception_score(part, settings.is_splits) for part in parts])}
    if len(real) >= 4 * real.dimension:
        half, other = real.take(slice(0, None, 2)), real.take(slice(1, None, 2))
        rows["halves"] = view.named({"fd": frechet_distance(half, other)}) | {"n": len(half)}
    return rows | {of: view.frechet(features) for of, features in view.others.items()}
