"""Everything that one sample set is judged by, part by part: 10,000 images of Fashion-MNIST, the instrument of the set, on the CPU.

    python benchmarks/whole_evaluation.py

Training images 50,000 to 60,000 pose as samples; the other 50,000 are what they may have been copied from.  The reference features of
the test images are measured once per data set by the stage `reference`, and stand apart.  Peak: what the process has held at most.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from rediffuse.data.fashion_mnist import load_fashion_mnist
from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.classifier import SHIPPED
from rediffuse.evaluation.fidelity import SEED, class_distances, judge
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, memorisation
from rediffuse.params import load_params
from rediffuse.training.hardware import autocast, device

spent: dict[str, float] = {}


@contextmanager
def part(name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    spent[name] = time.perf_counter() - begin


def main() -> None:
    settings, splits = load_params().evaluate, load_fashion_mnist()
    train, test = splits["train"], splits["test"]
    samples, train = train.take(np.arange(50_000, 60_000)), train.take(np.arange(50_000))
    with tempfile.TemporaryDirectory() as folder:
        instrument = make_instrument(SHIPPED[0], splits["train"], Path(folder))
    with part("(reference: features and neighbours of the test images)"):
        real, unseen = instrument.measure(test.images), Neighbourhood.of(test.images, train.images)
    whole = time.perf_counter()
    with part("features"):
        seen = instrument.measure(samples.images)
    with part("fd, fd_inf, kid, is, precision, recall, density, coverage"):
        judge(seen, real, settings)
    with part("distance by class"):
        class_distances(seen, torch.from_numpy(samples.labels), real, torch.from_numpy(test.labels), test.classes)
    with part("memorisation"):
        memorisation(Neighbourhood.of(samples.images, train.images), unseen)
    with part("accuracy score"):
        context = autocast(device(), "auto")
        classification_accuracy_score(
            samples.images, samples.labels, test.images, test.labels, len(test.classes), seed=SEED, device=device(), autocast=context
        )
    spent["all of one sample set"] = time.perf_counter() - whole
    for name, seconds in spent.items():
        print(f"{name:60s} {seconds:6.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak {peak:.0f} MiB, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
