"""The sets of images that the stages draw, one for each seed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from rediffuse.images.sample_sets import Samples, save_samples
from rediffuse.params import Sample
from rediffuse.runtime.processes import is_main
from rediffuse.runtime.shards import DrawShard, draw


def draw_sets(draw_shard: DrawShard, sample: Sample, classes: int, folder: Path) -> None:
    """Draw and save the set of each seed, with labels 0, 1, 2, ... in turn where there are classes.

    All processes draw; the main one saves.
    """
    if sample.n < classes and is_main():
        print(
            f"warning: sample.n ({sample.n:,}) is less than the {classes:,} classes, so that only the first"
            f" {sample.n:,} are drawn, and judged against all: raise sample.n (params.yaml)",
            file=sys.stderr,
        )
    labels = np.arange(sample.n, dtype=np.int64) % classes if classes else None
    for seed in sample.seeds:
        images = draw(sample.n, draw_shard, seed=seed, title=f"sample {folder.name}, seed {seed}").numpy()
        if is_main():
            save_samples(folder / str(seed), Samples(images, labels))
