"""Distances against integer brute force; copies, near copies and unseen images told apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from rediffuse.evaluation import memorisation as module
from rediffuse.evaluation.memorisation import (
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


@pytest.mark.parametrize("k", [1, 2, 5])
def test_distances_and_indices_agree_with_integer_brute_force(k: int) -> None:
    check(noise(60), noise(70, seed=1), k)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32), (3, 32, 32), (1, 29, 37)])
def test_distances_are_exact_at_the_ends_of_the_range_and_beyond_1024_pixels(shape: tuple[int, ...]) -> None:
    # Black, white, both with one pixel changed by one level, and nearly black or white: sums far above 2^24 that differ by little.
    almost = np.repeat(np.zeros((1, *shape), np.uint8), 5, axis=0)
    almost.reshape(5, -1)[range(4), range(4)] = 1
    dark = noise(8, shape, seed=3, levels=20)
    train = np.concatenate([255 - almost, almost, dark, 255 - dark, noise(20, shape)])
    dark = noise(8, shape, seed=4, levels=20)
    check(np.concatenate([almost, 255 - almost, dark, 255 - dark, noise(5, shape, seed=2, levels=2) * 255]), train, k=len(train))


def test_distances_of_images_so_large_that_int32_would_overflow() -> None:
    shape = (3, 150, 150)
    train = np.concatenate([np.full((1, *shape), shade, np.uint8) for shade in (255, 0, 128, 1)])
    check(train[::-1], train, k=4)
    squared, _ = nearest(train[:1], train, k=4)
    assert squared[0, -1] == 67_500 * 255**2 > 2**31


def test_equally_near_training_images_come_in_the_order_of_their_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    train = noise(40, (1, 2, 2), levels=3)  # 81 possible images: many ties
    images = noise(50, (1, 2, 2), seed=1, levels=3)
    assert any(len(set(row)) < len(row) for row in brute_force(images, train).tolist())
    for columns in (1, 3, 40):
        monkeypatch.setattr(module, "COLUMNS", columns)
        check(images, train, k=7)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (64, 11), (1000, 1000)])
def test_block_sizes_change_nothing(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, train = clusters(50, seed=0), clusters(60, seed=1)
    whole = Neighbourhood.of(images, train)
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "COLUMNS", columns)
    parts = Neighbourhood.of(images, train)
    for name in ("squared", "index", "spacing"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_large_images_come_in_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BYTES", 5 * 64)
    check(noise(20), noise(30, seed=1))


def test_an_image_can_be_kept_from_being_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    train = noise(50, levels=30)
    train[31] = train[7]  # a true duplicate stays a neighbour at distance 0
    monkeypatch.setattr(module, "COLUMNS", 16)
    rows = np.array([7, 3, 31, 49, 0])
    distances = brute_force(train[rows], train)
    distances[range(5), rows] = 2**40
    squared, index = nearest(train[rows], train, k=1, itself=rows)
    np.testing.assert_array_equal(index[:, 0], distances.argmin(axis=1))
    np.testing.assert_array_equal(squared[:, 0], distances.min(axis=1))
    assert index[0, 0] == 31 and index[2, 0] == 7 and squared[0, 0] == 0


def test_memory_mapped_training_images_give_the_same(tmp_path: Path) -> None:
    images, train = clusters(30, seed=0), clusters(40, seed=1)
    np.save(tmp_path / "train.npy", train)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert memorisation(*(Neighbourhood.of(images, mapped),) * 2) == memorisation(*(Neighbourhood.of(images, train),) * 2)


def test_reduced_precision_of_torch_touches_nothing() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check(noise(30, (1, 28, 28)), noise(40, (1, 28, 28), seed=1))
    finally:
        torch.set_float32_matmul_precision(before)


def test_scores_agree_with_brute_force() -> None:
    train, test = clusters(300, seed=0), clusters(90, seed=1)
    generated = np.concatenate([clusters(80, seed=2), train[:5], (train[10:30] // 2 + train[11:31] // 2)])
    found = memorisation(Neighbourhood.of(generated, train), Neighbourhood.of(test, train))
    distances, among = brute_force(generated, train), brute_force(train, train)
    np.fill_diagonal(among, 2**40)
    one, two = np.sqrt(np.sort(distances, axis=1)[:, :2].T)
    assert found["duplicates"] == (one == 0).mean() == 5 / 105
    assert found["copies"] == (one / two < 1 / 3).mean()
    assert found["authentic"] == (one > np.sqrt(among.min(axis=1))[distances.argmin(axis=1)]).mean()
    of_test = np.sqrt(brute_force(test, train).min(axis=1))
    assert found["distance"] == pytest.approx(np.median(one) / 8, rel=1e-12)  # 64 pixels
    assert found["ratio_to_test"] == pytest.approx(np.median(one) / np.median(of_test), rel=1e-12)
    assert 0 < found["authentic"] < 1 and 5 / 105 <= found["copies"] < 1


def test_distance_is_in_grey_levels() -> None:
    train = np.stack([np.full(SHAPE, shade, np.uint8) for shade in (0, 100, 200)])
    neighbourhood = Neighbourhood.of(train[1:2] + np.uint8(7), train)
    assert neighbourhood.distance.tolist() == [7]
    assert neighbourhood.ratio.tolist() == [7 / 93]


def test_planted_copies_are_found() -> None:
    rng = np.random.default_rng(5)
    train, test = noise(400), noise(200, seed=1)
    copied = rng.permutation(400)[:60]
    exact, noised = train[copied[:20]], train[copied[20:]].astype(int) + rng.integers(-2, 3, (40, *SHAPE))
    generated = np.concatenate([noise(140, seed=2), exact, noised.clip(0, 255).astype(np.uint8)])
    neighbourhood = Neighbourhood.of(generated, train)
    found = memorisation(neighbourhood, Neighbourhood.of(test, train))
    assert found["duplicates"] == 20 / 200
    assert found["copies"] == 60 / 200
    assert found["mann_whitney_z"] < -3
    assert {each["index"] for each in closest(neighbourhood, 60)} == set(range(140, 200))
    assert [each["index"] for each in closest(neighbourhood, 20)] == list(range(140, 160))  # all at 0: in their order
    assert (neighbourhood.index[140:, 0] == copied).all()


def test_the_closest_name_their_neighbours_and_ratios() -> None:
    train = np.stack([np.full(SHAPE, shade, np.uint8) for shade in (0, 100, 220)])
    images = np.stack([np.full(SHAPE, shade, np.uint8) for shade in (40, 220, 90)])
    neighbourhood = Neighbourhood.of(images, train)
    assert closest(neighbourhood, 2) == [
        {"index": 1, "nearest": [2, 1], "ratio": 0.0},
        {"index": 2, "nearest": [1, 0], "ratio": pytest.approx(10 / 90)},
    ]
    assert [each["index"] for each in closest(neighbourhood, 10)] == [1, 2, 0]
    assert json.loads(json.dumps(closest(neighbourhood, 3))) == closest(neighbourhood, 3)  # as a record keeps it


def test_training_images_that_pose_as_generated_are_caught() -> None:
    train, test = clusters(500, seed=0), clusters(300, seed=1)
    found = memorisation(Neighbourhood.of(train[:300], train), Neighbourhood.of(test, train))
    assert (found["duplicates"], found["copies"], found["authentic"], found["distance"], found["ratio_to_test"]) == (1, 1, 0, 0, 0)
    assert found["mann_whitney_z"] < -20


def test_unseen_images_of_the_same_distribution_pass() -> None:
    train, test = clusters(1000, seed=0), clusters(500, seed=1)
    found = memorisation(Neighbourhood.of(clusters(500, seed=2), train), Neighbourhood.of(test, train))
    itself = memorisation(*(Neighbourhood.of(test, train),) * 2)
    assert found["duplicates"] == 0
    assert abs(found["mann_whitney_z"]) < 3 and abs(found["ratio_to_test"] - 1) < 0.1
    assert itself["mann_whitney_z"] == 0 and itself["ratio_to_test"] == 1
    assert abs(found["authentic"] - itself["authentic"]) < 0.1


def test_images_far_from_all_training_images_are_no_copies_and_have_a_positive_z() -> None:
    train, test = clusters(300, seed=0), clusters(200, seed=1)
    found = memorisation(Neighbourhood.of(noise(200, seed=3), train), Neighbourhood.of(test, train))
    assert found["duplicates"] == found["copies"] == 0 and found["authentic"] == 1
    assert found["ratio_to_test"] > 1 and found["mann_whitney_z"] > 10


def test_a_copy_of_an_image_that_the_training_set_holds_twice_is_a_copy() -> None:
    train = noise(50)
    train[20] = train[3]
    neighbourhood = Neighbourhood.of(np.stack([train[3], noise(1, seed=9)[0]]), train)
    assert neighbourhood.squared[0].tolist() == [0, 0] and neighbourhood.index[0].tolist() == [3, 20]
    assert neighbourhood.ratio[0] == 0
    test = Neighbourhood.of(noise(20, seed=4), train)
    found = memorisation(neighbourhood, test)
    assert (found["duplicates"], found["copies"], found["authentic"]) == (0.5, 0.5, 0.5)


def test_a_third_of_the_distance_is_not_yet_a_copy() -> None:
    train = np.array([[0, 0], [4, 0], [200, 200]], np.uint8).reshape(3, 1, 1, 2)
    test = Neighbourhood.of(train + np.uint8(20), train)
    at_a_third = Neighbourhood.of(np.array([1, 0], np.uint8).reshape(1, 1, 1, 2), train)  # 1 from the first, 3 from the second
    assert memorisation(at_a_third, test)["copies"] == 0
    train[1] = [5, 0]
    assert memorisation(Neighbourhood.of(np.array([1, 0], np.uint8).reshape(1, 1, 1, 2), train), test)["copies"] == 1


@pytest.mark.parametrize("levels", [3, 10**6])
def test_z_agrees_with_scipy_and_changes_sign_with_the_roles(levels: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, levels, 150), rng.integers(0, levels, 110) + max(1, levels // 8)
    expected = scipy.stats.mannwhitneyu(a, b, use_continuity=False, method="asymptotic", alternative="less").pvalue
    assert scipy.stats.norm.cdf(mann_whitney_z(a, b)) == pytest.approx(expected, rel=1e-9)
    assert mann_whitney_z(a, b) < 0 and mann_whitney_z(a, b) == pytest.approx(-mann_whitney_z(b, a), rel=1e-12)


def test_z_of_numbers_that_are_all_equal_is_zero() -> None:
    assert mann_whitney_z(np.full(9, 4), np.full(5, 4)) == 0


def test_a_set_measured_with_others_is_the_same_as_measured_alone() -> None:
    train, images = clusters(100, seed=0), clusters(60, seed=1)
    together, alone = Neighbourhood.of(images, train).take(slice(20, 40)), Neighbourhood.of(images[20:40], train)
    assert len(together) == 20
    assert memorisation(together, together) == memorisation(alone, alone)
    np.testing.assert_array_equal(together.spacing, alone.spacing)


def test_a_saved_neighbourhood_is_read_back_and_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    neighbourhood = Neighbourhood.of(clusters(30, seed=0), clusters(40, seed=1))
    for name in ("a", "b"):
        save_neighbourhood(tmp_path / name, neighbourhood)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = load_neighbourhood(tmp_path / "a")
    for field in ("squared", "index", "spacing"):
        np.testing.assert_array_equal(getattr(read, field), getattr(neighbourhood, field))
        assert getattr(read, field).dtype == np.int64
    assert (read.train, read.pixels) == (40, 64)


def test_a_missing_or_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "neighbours.safetensors"
    with pytest.raises(UserError, match=r"is missing: make it with `dvc repro reference`"):
        load_neighbourhood(path)
    save_neighbourhood(path, Neighbourhood.of(noise(3), noise(5)))
    whole = path.read_bytes()
    for content in (whole[:-9], b"", whole.replace(b"sizes", b"seizs"), whole.replace(b"spacing", b"spicing")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged .*`dvc repro -f reference`"):
            load_neighbourhood(path)


@pytest.mark.parametrize(
    ("images", "train", "message"),
    [
        (noise(3).astype(np.float32), noise(5), "the samples must be a uint8 .* got float32"),
        (noise(3), noise(5).astype(np.int64), "the training images must be a uint8 .* got int64"),
        (noise(3)[:, 0], noise(5), r"the samples must be .* got uint8 \[3, 8, 8\]"),
        (noise(0), noise(5), r"not empty, got uint8 \[0, 1, 8, 8\]"),
        (noise(3, (1, 8, 9)), noise(5), r"one shape .* got \[1, 8, 9\] and \[1, 8, 8\]"),
        (noise(3), noise(2), "at least 3 training images, got 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(images: np.ndarray, train: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Neighbourhood.of(images, train, title="samples")


@pytest.mark.parametrize(("k", "itself"), [(0, None), (6, None), (5, np.zeros(2, np.int64))])
def test_more_neighbours_than_there_are_is_a_mistake_of_the_caller(k: int, itself: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="k must be between"):
        nearest(noise(2), noise(5), k=k, itself=itself)


def test_neighbourhoods_of_different_training_images_are_refused() -> None:
    with pytest.raises(UserError, match="40 of 64 pixels and 41 of 64"):
        memorisation(Neighbourhood.of(noise(5), noise(40)), Neighbourhood.of(noise(5), noise(41)))


def test_a_test_set_that_repeats_the_training_set_is_refused() -> None:
    train = noise(40)
    with pytest.raises(UserError, match="test images are training images"):
        memorisation(Neighbourhood.of(noise(5, seed=1), train), Neighbourhood.of(train[:10], train))


def test_the_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    neighbourhood = Neighbourhood.of(noise(5), noise(40, seed=1))
    memorisation(neighbourhood, neighbourhood)
    assert before == np.random.get_state()[1].tolist()  # type: ignore[index]
