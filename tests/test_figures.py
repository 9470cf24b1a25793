"""Pictures: every pixel where it should be, the same bytes each time."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rediffuse.figures.curves import read_curves, write_curves
from rediffuse.figures.grid import annotate, class_rows, grid, reconstructions, save_png, strip
from rediffuse.figures.latent import latent_map, principal_components, prior_lattice


def flat(*values: int, channels: int = 1, size: int = 1) -> np.ndarray:
    """Images (N, channels, size, size), each of one shade."""
    return np.array(values, np.uint8)[:, None, None, None].repeat(channels, 1).repeat(size, 2).repeat(size, 3)


def test_grid_puts_images_row_by_row_with_white_between_and_in_missing_cells() -> None:
    picture = grid(flat(1, 2, 3), columns=2, pad=1)
    w = 255
    assert picture[:, :, 0].tolist() == [[w, w, w, w, w], [w, 1, w, 2, w], [w, w, w, w, w], [w, 3, w, w, w], [w, w, w, w, w]]


def test_grid_enlarges_by_whole_pixels() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)
    assert grid(image, columns=1, pad=0, scale=2)[:, :, 0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_grid_of_colour_images_keeps_every_pixel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    picture = grid(images, columns=3, pad=2, scale=3)
    assert picture.shape == (2 * (12 + 2) + 2, 3 * (15 + 2) + 2, 3)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        for y in range(12):
            for x in range(15):
                assert (picture[2 + row * 14 + y, 2 + column * 17 + x] == image[:, y // 3, x // 3]).all()


@pytest.mark.parametrize("images", [np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2, 2), np.uint8)])
def test_grid_refuses_what_is_not_images(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        grid(images, columns=1)


def test_strip_runs_from_left_to_right() -> None:
    images = flat(*range(6)).reshape(2, 3, 1, 1, 1)
    assert strip(images, pad=0, scale=1)[:, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_class_rows_stand_in_the_order_of_the_classes() -> None:
    labels = np.array([2, 0, 2, 0, 0, 2])
    picture = class_rows(flat(20, 1, 21, 2, 3, 22), labels, classes=3, columns=2, pad=0, scale=1)
    assert picture[:, :, 0].tolist() == [[1, 2], [255, 255], [20, 21]]


def test_reconstructions_stand_below_their_originals() -> None:
    picture = reconstructions(flat(1, 2, 3, 4), flat(11, 12, 13, 14), columns=2, pad=0, scale=1)
    assert picture[:, :, 0].tolist() == [[1, 2], [11, 12], [3, 4], [13, 14]]


@pytest.mark.parametrize("channels", [1, 3])
def test_annotation_leaves_the_picture_untouched(channels: int) -> None:
    picture = strip(flat(*range(6), channels=channels, size=9).reshape(2, 3, channels, 9, 9))
    page = annotate(picture, rows=["T-shirt", "boot"], columns=["t=0", "t=1", "t=2"])
    high, wide, _ = picture.shape
    assert (page[:high, page.shape[1] - wide :] == picture).all()
    margin, below = page[:, : page.shape[1] - wide], page[high:]
    assert margin.min() < 100 and below.min() < 100  # there is writing
    assert (annotate(picture) == picture).all()


def test_png_has_the_same_bytes_each_time_and_nothing_but_pixels(tmp_path: Path) -> None:
    for picture in (grid(flat(1, 2, 3), 2), grid(flat(1, 2, channels=3), 2), np.eye(9, dtype=np.uint8)):
        save_png(picture, tmp_path / "new" / "a.png")
        save_png(picture, tmp_path / "b.png")
        assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with Image.open(tmp_path / "b.png") as image:
            assert (np.asarray(image) == picture.squeeze()).all()
            assert image.info == {}
    assert {path.name for path in tmp_path.iterdir()} == {"new", "b.png"}


@pytest.mark.parametrize("dimensions", [1, 2, 7])
def test_latent_map_is_the_same_each_time_and_shows_each_class(dimensions: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 300)
    means = (rng.normal(size=(300, dimensions)) + 4 * labels[:, None]).astype(np.float32)
    first, second = (latent_map(means, labels, ["a", "b", "c"]) for _ in range(2))
    assert first.shape == (900, 1100, 3) and first.dtype == np.uint8
    assert (first == second).all()
    for colour in ([31, 119, 180], [255, 127, 14], [44, 160, 44]):  # tab10
        assert (first == colour).all(axis=2).sum() > 20
    assert latent_map(means).shape == (900, 900, 3)


def test_latent_map_with_many_classes_gives_each_a_colour() -> None:
    means = np.random.default_rng(0).normal(size=(20, 2))
    picture = latent_map(means, np.arange(20), [str(index) for index in range(20)])
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3)}) > 20


def test_principal_components_find_the_plane_and_its_variance() -> None:
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    plane = rng.normal(size=(1000, 2)) * [3.0, 1.0]
    points, shares = principal_components(plane @ basis.T + 5)
    assert shares.sum() == pytest.approx(1)
    distances = np.linalg.norm(points[:, None] - points[None, :50], axis=2)
    np.testing.assert_allclose(distances, np.linalg.norm(plane[:, None] - plane[None, :50], axis=2), atol=1e-9)
    assert points[:, 0].std() > points[:, 1].std()
    np.testing.assert_allclose(points, principal_components(plane @ basis.T)[0], atol=1e-9)


def test_principal_components_of_a_collapsed_posterior_are_zero() -> None:
    points, shares = principal_components(np.ones((5, 3)))
    assert not points.any() and not shares.any()


def test_prior_lattice_holds_the_quantiles_with_z_2_upwards() -> None:
    lattice = prior_lattice(3).reshape(3, 3, 2)
    outer = 0.967421566101701  # the 5/6 quantile of the standard normal
    np.testing.assert_allclose(lattice[0, :, 0], [-outer, 0, outer], atol=1e-12)
    np.testing.assert_allclose(lattice[:, 0, 1], [outer, 0, -outer], atol=1e-12)


def test_curves_read_back_exactly(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [
        {"images": 100, "loss": 0.1 + 0.2},
        {"images": 200, "validation": 1e-300, "loss": 1 / 3},
        {"images": 300, "loss": 2},
    ]
    write_curves(tmp_path / "curves.csv", rows)
    assert read_curves(tmp_path / "curves.csv") == rows
    assert (tmp_path / "curves.csv").read_text() == (
        "images,loss,validation\n100,0.30000000000000004,\n200,0.3333333333333333,1e-300\n300,2.0,\n"
    )


def test_curves_without_rows_still_have_their_first_column(tmp_path: Path) -> None:
    write_curves(tmp_path / "curves.csv", [])
    assert (tmp_path / "curves.csv").read_text() == "images\n"
    with pytest.raises(ValueError, match="whole number"):
        write_curves(tmp_path / "curves.csv", [{"images": 0.5}])
