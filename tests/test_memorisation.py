"""Distances against integer brute force; copies, near copies and unseen images told apart; the anchors."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.stats

from rediffuse.evaluation import anchors
from rediffuse.evaluation import memorisation as module
from rediffuse.evaluation.anchors import mean_image, pixel_marginals, uniform_noise
from rediffuse.evaluation.memorisation import (
    ARRAYS,
    Neighbourhood,
    closest,
    load_neighbourhood,
    mann_whitney_z,
    memorisation,
    nearest,
    save_neighbourhood,
)
from rediffuse.runtime.errors import UserError

SHAPE = (1, 8, 8)


def noise(n: int, shape: tuple[int, ...] = SHAPE, *, seed: int = 0, levels: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (n, *shape), dtype=np.uint8)


def clusters(n: int, *, seed: int) -> np.ndarray:
    """Images of one distribution: ten shades with noise of various strength."""
    rng = np.random.default_rng(seed)
    shades, strength = rng.integers(40, 216, (n, 1, 1, 1)), rng.integers(5, 40, (n, 1, 1, 1))
    return (shades + rng.normal(size=(n, *SHAPE)) * strength).clip(0, 255).astype(np.uint8)


def flat(*shades: int) -> np.ndarray:
    """An image of each shade."""
    return np.stack([np.full(SHAPE, shade, np.uint8) for shade in shades])


def brute_force(images: np.ndarray, train: np.ndarray) -> np.ndarray:
    """(N, M) squared distances in int64, pixel by pixel."""
    x, y = (a.reshape(len(a), -1).astype(np.int64) for a in (images, train))
    return np.stack([((y - image) ** 2).sum(axis=1) for image in x])


def check(images: np.ndarray, train: np.ndarray, k: int = 2) -> None:
    distances = brute_force(images, train)
    order = distances.argsort(axis=1, kind="stable")[:, :k]  # of equals, the lower index first
    squared, index = nearest(images, train, k=k)
    assert squared.dtype == index.dtype == np.int64
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(squared, np.take_along_axis(distances, order, axis=1))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 29, 37)])
def test_distances_are_exact_at_the_ends_of_the_range_and_beyond_1024_pixels(shape):
    # Black, white, both with one pixel changed by one level, and nearly black or white; sums above 2^24.
    almost = np.repeat(np.zeros((1, *shape), np.uint8), 5, axis=0)
    almost.reshape(5, -1)[range(4), range(4)] = 1
    dark, other = (noise(8, shape, seed=seed, levels=20) for seed in (3, 4))
    train = np.concatenate([255 - almost, almost, dark, 255 - dark, noise(20, shape)])
    binary = noise(5, shape, seed=2, levels=2) * 255
    check(np.concatenate([almost, 255 - almost, other, 255 - other, binary]), train, k=len(train))


def test_distances_of_images_so_large_that_int32_would_overflow():
    train = np.concatenate([np.full((1, 3, 150, 150), shade, np.uint8) for shade in (255, 0, 128, 1)])
    check(train[::-1], train, k=4)
    assert nearest(train[:1], train, k=4)[0][0, -1] == 67_500 * 255**2 > 2**31


def test_equally_near_training_images_come_in_the_order_of_their_indices(monkeypatch):
    train, images = (noise(n, (1, 2, 2), seed=seed, levels=3) for n, seed in ((40, 0), (50, 1)))  # many ties
    for columns in (1, 3, 40):
        monkeypatch.setattr(module, "COLUMNS", columns)
        check(images, train, k=7)


@pytest.mark.parametrize(("rows", "columns", "pixels"), [(7, 3, 2**25), (1024, 2048, 5 * 64)])
def test_blocks_and_memory_maps_change_nothing(rows, columns, pixels, monkeypatch, tmp_path):
    images, train = clusters(50, seed=0), clusters(60, seed=1)
    np.save(tmp_path / "train.npy", train)
    whole = Neighbourhood.of(images, train)
    for name, value in (("ROWS", rows), ("COLUMNS", columns), ("BYTES", pixels)):
        monkeypatch.setattr(module, name, value)
    parts = Neighbourhood.of(images, np.load(tmp_path / "train.npy", mmap_mode="r"))
    alone = Neighbourhood.of(images[20:40], train)  # of sets measured together, one
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
        np.testing.assert_array_equal(getattr(whole.take(slice(20, 40)), name), getattr(alone, name))


def test_scores_agree_with_brute_force():
    train, test = clusters(300, seed=0), clusters(90, seed=1)
    generated = np.concatenate([clusters(80, seed=2), train[:5], (train[10:30] // 2 + train[11:31] // 2)])
    found = memorisation(Neighbourhood.of(generated, train), Neighbourhood.of(test, train))
    distances, among = brute_force(generated, train), brute_force(train, train)
    np.fill_diagonal(among, 2**40)
    one, two = np.sqrt(np.sort(distances, axis=1)[:, :2].T)
    of_test = np.sqrt(brute_force(test, train).min(axis=1))
    assert found["duplicates"] == (one == 0).mean() == 5 / 105
    assert found["copies"] == (one / two < 1 / 3).mean()
    assert found["authentic"] == (one > np.sqrt(among.min(axis=1))[distances.argmin(axis=1)]).mean()
    assert found["distance"] == pytest.approx(np.median(one) / 8, rel=1e-12)  # 64 pixels
    assert found["ratio_to_test"] == pytest.approx(np.median(one) / np.median(of_test), rel=1e-12)
    assert found["mann_whitney_z"] == mann_whitney_z((one**2).round(), (of_test**2).round()) < 0
    assert 0 < found["authentic"] < 1 and 5 / 105 <= found["copies"] < 1


def test_the_closest_name_their_neighbours_and_ratios():
    neighbourhood = Neighbourhood.of(flat(40, 220, 90), flat(0, 100, 220))
    found = closest(neighbourhood, 2)
    assert found[0] == {"index": 1, "nearest": [2, 1], "ratio": 0.0}
    assert found[1] == {"index": 2, "nearest": [1, 0], "ratio": pytest.approx(10 / 90)}
    assert neighbourhood.distance.tolist() == [40, 0, 10]


def test_a_third_of_the_distance_is_not_yet_a_copy_and_an_image_that_is_there_twice_is_one():
    image = np.array([1, 0], np.uint8).reshape(1, 1, 1, 2)
    for second, copies in (([4, 0], 0), ([5, 0], 1), ([1, 0], 1)):  # 3, 4 or 0 from the image
        first = [1, 0] if second == [1, 0] else [0, 0]
        train = np.array([first, second, [200, 200]], np.uint8).reshape(3, 1, 1, 2)
        test = Neighbourhood.of(train + np.uint8(20), train)
        assert memorisation(Neighbourhood.of(image, train), test)["copies"] == copies


@pytest.mark.parametrize("levels", [3, 10**6])
def test_z_agrees_with_scipy_and_changes_sign_with_the_roles(levels):
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, levels, 150), rng.integers(0, levels, 110) + max(1, levels // 8)
    test = partial(scipy.stats.mannwhitneyu, use_continuity=False, method="asymptotic", alternative="less")
    assert scipy.stats.norm.cdf(mann_whitney_z(a, b)) == pytest.approx(test(a, b).pvalue, rel=1e-9)
    assert mann_whitney_z(a, b) == pytest.approx(-mann_whitney_z(b, a), rel=1e-12)
    assert mann_whitney_z(np.full(9, 4), np.full(5, 4)) == 0


def test_a_neighbourhood_comes_back_from_disk_or_is_refused(tmp_path):
    path, neighbourhood = tmp_path / "a", Neighbourhood.of(clusters(30, seed=0), clusters(40, seed=1))
    with pytest.raises(UserError, match=r"is missing: make it with `dvc repro reference`"):
        load_neighbourhood(path)
    save_neighbourhood(path, neighbourhood)
    whole, read = path.read_bytes(), load_neighbourhood(path)
    save_neighbourhood(path, read)
    assert path.read_bytes() == whole and (read.train, read.pixels) == (40, 64)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(read, name), getattr(neighbourhood, name))
    for content in (whole[:-9], whole.replace(b"sizes", b"seizs")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged .*`dvc repro -f reference`"):
            load_neighbourhood(path)


def test_images_that_cannot_be_compared_are_refused():
    train, images = noise(40), noise(5, seed=1)
    with pytest.raises(UserError, match=r"one shape .* got \[1, 8, 9\] and \[1, 8, 8\]"):
        Neighbourhood.of(noise(3, (1, 8, 9)), train)
    with pytest.raises(UserError, match="at least 3 training images, got 2"):
        Neighbourhood.of(images, train[:2])
    with pytest.raises(UserError, match="40 of 64 pixels and 41 of 64"):
        memorisation(Neighbourhood.of(images, train), Neighbourhood.of(images, noise(41)))
    with pytest.raises(UserError, match="test images are training images"):
        memorisation(Neighbourhood.of(images, train), Neighbourhood.of(train[:10], train))


# The anchors


def correlated(n: int = 400, shape: tuple[int, int, int] = (3, 4, 5)) -> np.ndarray:
    """Images whose pixels rise and fall together, each around its own level."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 120, shape)
    return (levels + rng.integers(0, 100, (n, 1, 1, 1)) + rng.integers(0, 36, (n, *shape))).astype(np.uint8)


def correlations(images: np.ndarray) -> np.ndarray:
    """Those between different pixels."""
    found = np.corrcoef(images.reshape(len(images), -1).T)
    return found[~np.eye(len(found), dtype=bool)]


def test_the_mean_image_is_rounded_to_the_nearest_level():
    train = np.array([[0, 1, 255, 3], [0, 2, 255, 3], [1, 2, 255, 3], [1, 2, 255, 4]], np.uint8)
    found = mean_image(train.reshape(4, 1, 2, 2))
    assert found.ravel().tolist() == [1, 2, 255, 3]  # of 0.5, 1.75, 255, 3.25
    assert found.shape == (1, 1, 2, 2) and found.dtype == np.uint8


def test_marginals_have_the_histogram_of_each_pixel_and_nothing_else():
    train, n = correlated(), 20_000
    drawn = pixel_marginals(train, n)
    assert drawn.shape == (n, 3, 4, 5) and correlations(train).min() > 0.7
    assert np.abs(correlations(drawn)).max() < 5 / np.sqrt(n)
    for of_train, of_drawn in zip(train.reshape(400, -1).T, drawn.reshape(n, -1).T, strict=True):
        shares, found = (np.bincount(values, minlength=256) / len(values) for values in (of_train, of_drawn))
        assert (found[shares == 0] == 0).all()
        assert (np.abs(found - shares) <= 6 * np.sqrt(shares / n)).all()


def test_order_blocks_and_random_state_change_no_anchor(monkeypatch):
    train, written = correlated(), []
    for seed, images in enumerate((train, train[::-1])):
        np.random.seed(seed)
        written.append([mean_image(images), pixel_marginals(images, 30), uniform_noise((1, 2, 2), 50)])
        monkeypatch.setattr(anchors, "BYTES", 7 * train[0].size)
    assert all((one == other).all() for one, other in zip(*written, strict=True))
