"""Drawing in shards: image i is the same however many are drawn, and of every seed another."""

import pytest
import torch
from torch import Tensor

from rediffuse.runtime.shards import SHARD, draw, shard_generator


def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Images that hang on the index, the shard's random numbers, and how many stand beside them."""
    assert len(indices) == SHARD
    noise = torch.randint(256, (len(indices), 1, 4, 4), generator=generator)
    return ((noise + indices[:, None, None, None]) % 256).to(torch.uint8)


def drawn(n: int, seed: int = 1) -> Tensor:
    return draw(n, draw_shard, seed=seed, title="test")


@pytest.mark.parametrize("n", [1, 10, 64, 65, 128])
def test_image_i_is_the_same_whatever_is_drawn_beside_it(n):
    images = drawn(n)
    assert images.shape == (n, 1, 4, 4) and images.dtype == torch.uint8
    assert torch.equal(images, drawn(200)[:n])


def test_a_shard_can_be_drawn_alone_and_in_any_order():
    images = drawn(192)
    for shard in (2, 0, 1):
        indices = torch.arange(shard * SHARD, (shard + 1) * SHARD)
        assert torch.equal(draw_shard(indices, shard_generator(1, shard)), images[indices])


def test_the_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images = drawn(70)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(drawn(70), images)


def test_seeds_and_shards_have_noise_of_their_own():
    streams = [torch.rand(8, generator=shard_generator(seed, shard)) for seed in (0, 1, 2) for shard in (0, 1, 2)]
    assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)
    assert not torch.equal(drawn(10, seed=1), drawn(10, seed=2))
