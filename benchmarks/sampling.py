"""Images drawn in a second at equal evaluations of networks of equal FLOPs (random weights: speed does not hang on them).

Ours, in a size of the peers' FLOPs and as params.yaml has it, through `ddpm_shards`, as the stage sample_ddpm does; diffusers with
DDIMScheduler; denoising-diffusion-pytorch with its `ddim_sample`.  All without guidance, in batches of the size in training;
a shard of ours has always 64 images.
"""

from __future__ import annotations

import functools
import statistics
from typing import cast

from benchmarks import ours, peers
from benchmarks.report import RATIO, Cell, Settings, Table
from benchmarks.training import DEFAULT, OURS, OURS_FLOAT32, our_batch, our_flops
from benchmarks.workers import Factory, Workers, ratio, spread

EVALUATIONS, IMAGES, MANY = 20, 128, 10_000


def measure(settings: Settings) -> list[Table]:
    images, evaluations = (64, 2) if settings.quick else (IMAGES, EVALUATIONS)
    recipes = peers.recipes(our_flops(large=True), our_batch(), steps=1)
    contenders: dict[str, Factory] = {
        OURS: functools.partial(ours.sampling_turn, images, evaluations, large=True),
        DEFAULT: functools.partial(ours.sampling_turn, images, evaluations),
        OURS_FLOAT32: functools.partial(ours.sampling_turn, images, evaluations, "float32", large=True),
        **{name: functools.partial(peers.sampling_turn, recipe, images, evaluations) for name, recipe in recipes.items()},
    }
    with Workers(contenders) as workers:
        workers.turns(1)  # first use of each kernel
        rates = cast("dict[str, list[float]]", workers.turns(settings.turns))
        peaks = workers.peaks()
    rows: list[list[Cell]] = [
        [
            name,
            statistics.median(rates[name]),
            f"{spread(rates[name]):.0%}",
            MANY / statistics.median(rates[name]),
            peaks[name],
            ratio(rates[OURS], rates[name]),
        ]
        for name in contenders
    ]
    note = f"Median of {settings.turns} turns of {images} images each; spread: (max - min) / median.  Ratio: images/s of ours to these."
    columns = ["contender", "images/s", "spread", f"seconds for {MANY:,}", "peak MiB", RATIO]
    return [Table(f"Sampling with {evaluations} evaluations of the network", columns, rows, note)]
