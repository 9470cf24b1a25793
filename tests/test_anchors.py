"""The anchors are what they claim to be: the mean, the marginals and nothing else, noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rediffuse.evaluation import anchors
from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise


def correlated(n: int = 400, shape: tuple[int, int, int] = (3, 4, 5)) -> np.ndarray:
    """Images whose pixels rise and fall together, each around its own level."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 120, shape)
    return (levels + rng.integers(0, 100, (n, 1, 1, 1)) + rng.integers(0, 36, (n, *shape))).astype(np.uint8)


def test_mean_image_is_the_mean_rounded_to_the_nearest_level() -> None:
    train = np.array([[0, 1, 255, 3], [0, 2, 255, 3], [1, 2, 255, 3], [1, 2, 255, 4]], np.uint8).reshape(4, 1, 2, 2)
    assert mean_image(train, 3).reshape(3, 4).tolist() == [[1, 2, 255, 3]] * 3  # of 0.5, 1.75, 255, 3.25


def test_mean_image_agrees_with_exact_fractions() -> None:
    train = correlated()
    distance = mean_image(train, 2)[1].astype(np.int64) * len(train) - train.sum(axis=0, dtype=np.int64)
    assert (2 * np.abs(distance) <= len(train)).all()
    assert mean_image(train, 2).shape == (2, 3, 4, 5) and mean_image(train, 2).dtype == np.uint8


def test_marginals_have_the_histogram_of_each_pixel() -> None:
    rng = np.random.default_rng(1)
    values = np.array([0, 7, 255])
    shares = rng.dirichlet(np.ones(3), 6)  # another distribution in each pixel
    train = np.stack([rng.choice(values, 1000, p=share) for share in shares], axis=1).astype(np.uint8).reshape(1000, 1, 2, 3)
    drawn = pixel_marginals(train, 20_000).reshape(-1, 6)
    assert set(np.unique(drawn)) <= set(values.tolist())
    for pixel in range(6):
        for value in values:
            expected = (train.reshape(-1, 6)[:, pixel] == value).mean()
            assert abs((drawn[:, pixel] == value).mean() - expected) < 5 * np.sqrt(0.25 / 20_000)


def test_marginals_draw_a_constant_pixel_as_it_is_and_reach_every_value_of_another() -> None:
    train = np.zeros((256, 1, 1, 2), np.uint8)
    train[:, 0, 0, 0], train[:, 0, 0, 1] = 255, np.arange(256)
    drawn = pixel_marginals(train, 5000)[:, 0, 0]
    assert (drawn[:, 0] == 255).all() and set(drawn[:, 1].tolist()) == set(range(256))


def test_pixels_of_marginals_are_independent_where_those_of_the_images_are_not() -> None:
    train, n = correlated(), 5000
    of_train, of_drawn = (np.corrcoef(images.reshape(len(images), -1).T) for images in (train, pixel_marginals(train, n)))
    others = ~np.eye(len(of_train), dtype=bool)
    assert of_train[others].min() > 0.7
    assert np.abs(of_drawn[others]).max() < 5 / np.sqrt(n)


def test_noise_is_uniform_and_independent() -> None:
    noise = uniform_noise((1, 8, 8), 4000)
    assert noise.shape == (4000, 1, 8, 8) and noise.dtype == np.uint8
    expected = noise.size / 256
    assert (np.abs(np.bincount(noise.ravel(), minlength=256) - expected) < 5 * np.sqrt(expected)).all()
    correlation = np.corrcoef(noise.reshape(4000, -1).T)
    assert np.abs(correlation[~np.eye(64, dtype=bool)]).max() < 5 / np.sqrt(4000)


def test_anchors_are_the_same_each_time_and_leave_the_global_random_state_alone() -> None:
    train = correlated()
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    assert (pixel_marginals(train, 50) == pixel_marginals(train, 50)).all()
    assert (uniform_noise((1, 2, 2), 50) == uniform_noise((1, 2, 2), 50)).all()
    assert before == np.random.get_state()[1].tolist()  # type: ignore[index]
    np.random.seed(2)
    other = pixel_marginals(train, 50)
    np.random.seed(3)
    assert (other == pixel_marginals(train, 50)).all()


def test_memory_map_block_size_and_order_of_the_images_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = correlated()
    whole = mean_image(train, 3), pixel_marginals(train, 30)
    np.save(tmp_path / "train.npy", train[::-1])
    monkeypatch.setattr(anchors, "BYTES", 7 * train[0].size)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert (mean_image(mapped, 3) == whole[0]).all()
    assert (pixel_marginals(mapped, 30) == whole[1]).all()
