"""Drawing in shards: image i is the same for any number of images, and another for each seed."""

import pytest
import torch
from torch import Tensor

from rediffuse.runtime.shards import SHARD, draw, shard_generator


def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Images that depend on the index, the shard's random numbers, and the size of the shard."""
    assert len(indices) == SHARD
    noise = torch.randint(256, (len(indices), 1, 4, 4), generator=generator)
    return ((noise + indices[:, None, None, None]) % 256).to(torch.uint8)


def drawn(n: int, seed: int = 1) -> Tensor:
    return draw(n, draw_shard, seed=seed, title="test")


@pytest.mark.parametrize("n", [10, 64, 65])
def test_image_i_does_not_depend_on_the_number_of_images(n):
    images = drawn(n)
    assert images.shape == (n, 1, 4, 4) and images.dtype == torch.uint8
    assert torch.equal(images, drawn(200)[:n])


def test_seeds_and_shards_have_noise_of_their_own():
    generators = [shard_generator(seed, shard) for seed in range(3) for shard in range(3)]
    assert len({torch.rand(1, generator=generator).item() for generator in generators}) == 9
    assert not torch.equal(drawn(10, seed=1), drawn(10, seed=2))
