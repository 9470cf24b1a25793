"""Drawing many images so that image i does not depend on what else is drawn.

Random numbers belong to fixed shards of 64 images, and a network always sees one whole shard.  So the bits of
an image depend neither on the number of images nor on how the shards are shared among processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from rediffuse.runtime.device import seed_for
from rediffuse.runtime.processes import gather, is_main, my_share, world_size

SHARD = 64
SAMPLING = 4  # the stream of random numbers, beside those of training

# Takes the indices of the shard's images, int64 (64,), and its generator; returns uint8 (64, C, H, W).
DrawShard = Callable[[Tensor, torch.Generator], Tensor]


def shard_generator(seed: int, shard: int) -> torch.Generator:
    """Return the CPU generator of one shard."""
    return torch.Generator().manual_seed(seed_for(seed, SAMPLING, shard))


def asked_labels(indices: Tensor, classes: int, label: int | None) -> Tensor | None:
    """Return the labels of the images with these indices, int64; None without classes.

    label: of all images; None: 0, 1, 2, ... in turn.
    """
    if not classes:
        return None
    return indices % classes if label is None else torch.full_like(indices, label)


def in_shards(images: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Return work(images) on the CPU for any number of images (N, ...), computed on whole shards.

    The last shard is filled up with copies, so the result of an image does not depend on the size of the
    batch.
    """
    parts = []
    for part in torch.split(images, SHARD):
        filled = torch.cat([part, part[-1:].expand(SHARD - len(part), *part.shape[1:])])
        parts.append(work(filled)[: len(part)].cpu())
    return torch.cat(parts)


def draw(n: int, draw_shard: DrawShard, *, seed: int, title: str) -> Tensor:
    """Return the first n images, uint8 (n, C, H, W) on the CPU.

    All processes must call this.  They share the shards; the first gets the images, the others an empty (0,).
    """
    mine = []
    with tqdm(total=n, unit="img", desc=title, mininterval=1.0, disable=not is_main()) as bar:
        for shard in my_share(-(-n // SHARD)):
            indices = torch.arange(shard * SHARD, (shard + 1) * SHARD)
            mine.append(draw_shard(indices, shard_generator(seed, shard)).cpu())
            bar.update(min(SHARD * world_size(), n - shard * SHARD))
    shards = gather(mine)
    return torch.cat(shards)[:n] if shards else torch.empty(0, dtype=torch.uint8)
