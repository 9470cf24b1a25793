"""Pictures: every pixel where it should be, the same bytes each time."""

import copy
import functools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkout import CLASSES as NAMES
from tiny_checkout import SHAPE, make_checkout

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.figures.ddpm import MOMENTS, TIMES, draw_denoising, draw_noising
from rediffuse.figures.grid import annotate, class_rows, grid, reconstructions, strip
from rediffuse.figures.latent import latent_map, principal_components
from rediffuse.figures.neighbours import CELL, GAP, Neighbours, draw_neighbours, pairs
from rediffuse.figures.samples import ROWS, draw_samples
from rediffuse.figures.scores import GREY, MODEL, REAL, USELESS, class_chart, draw_scores, score_chart
from rediffuse.figures.vae import draw_vae
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, to_unit
from rediffuse.images.sample_sets import Samples
from rediffuse.params import Params
from rediffuse.runtime.shards import draw
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.space import load_space
from rediffuse.training.curves import Curves, write_curve, write_curves
from rediffuse.vae.model import VAE
from stages.train_vae import make_vae


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
    for picture in (grid(flat(1, 2, 3), 2), grid(flat(1, 2, channels=3), 2), np.eye(9, dtype=np.uint8)[:, :, None]):
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


def test_curves_read_back_exactly(tmp_path: Path) -> None:
    training = [{"images": 100, "loss": 0.1 + 0.2}, {"images": 200, "validation": 1e-300, "loss": 1 / 3}, {"images": 300, "loss": 2}]
    write_curves(tmp_path / "plots", Curves(training, []))
    assert (tmp_path / "plots/training.csv").read_text() == (
        "images,loss,validation\n100,0.30000000000000004,\n200,0.3333333333333333,1e-300\n300,2.0,\n"
    )
    assert (tmp_path / "plots/validation.csv").read_text() == "images\n"  # without rows there is still the first column
    write_curve(tmp_path / "one.csv", training)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "plots/training.csv").read_bytes()


def neighbours(*shades: int, channels: int = 1, size: int = 28) -> Neighbours:
    """Each image of one shade, its nearest neighbour one shade lighter and the second nearest two."""
    images = flat(*shades, channels=channels, size=size)
    return Neighbours(images, images + np.uint8(1), images + np.uint8(2), np.linspace(0, 1, len(shades)))


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_show_each_image_above_its_nearest_and_second_nearest(channels: int) -> None:
    blocks = {"generated": neighbours(10, 20, 30, channels=channels), "real test": neighbours(110, 120, 130, channels=channels)}
    picture = pairs(blocks)
    assert picture.dtype == np.uint8 and picture.shape[2] == channels
    cell, lower = CELL + 2, (len(picture) - GAP) // 2 + GAP
    left = picture.shape[1] - (3 * cell + 2)
    for start, first in ((0, 10), (lower, 110)):
        for row in range(3):
            for column in range(3):
                y, x = start + 2 + row * cell, left + 2 + column * cell
                assert (picture[y : y + CELL, x : x + CELL] == first + 10 * column + row).all()
        below = picture[start + 3 * cell + 2 : start + len(picture) - lower]
        for column in range(3):  # the ratio
            assert below[:, left + column * cell : left + (column + 1) * cell].min() < 100
        assert below[:, :left].min() < 100 and picture[start : start + 3 * cell, :left].min() < 100  # the names
    assert (picture == pairs(blocks)).all()


def test_pairs_show_names_and_ratios() -> None:
    block = neighbours(10, 20, 30)
    picture = pairs({"generated": block})
    assert (picture != pairs({"regenerate": block})).any()
    other = Neighbours(block.images, block.nearest, block.second, block.ratio * 0.9)
    assert (picture != pairs({"generated": other})).any()


def test_columns_of_all_blocks_stand_below_each_other() -> None:
    picture = pairs({"a": neighbours(10, 20), "a block with a very long name": neighbours(10, 20)})
    last = picture[:, -CELL - 2 : -2, 0]
    assert ((last == 20).sum(axis=0) == 2 * CELL).all()


CLOSEST = [{"index": 2, "nearest": [4, 5], "ratio": 0.3}, {"index": 0, "nearest": [0, 1], "ratio": 0.5}]  # as in a record


def test_neighbours_are_taken_by_their_indices() -> None:
    found = Neighbours.of(CLOSEST, flat(1, 2, 3), flat(*range(100, 110)))
    assert found.images.ravel().tolist() == [3, 1]
    assert found.nearest.ravel().tolist() == [104, 100] and found.second.ravel().tolist() == [105, 101]
    assert found.ratio.tolist() == [0.3, 0.5]


def test_the_picture_of_neighbours_has_samples_above_real_images(tmp_path: Path) -> None:
    samples, train, test = flat(1, 2, 3, size=28), flat(*range(100, 110), size=28), flat(201, 202, size=28)
    real = [{"index": 1, "nearest": [7, 8], "ratio": 0.9}]
    draw_neighbours({"closest": CLOSEST}, {"closest": real}, samples, ImageSet(train), ImageSet(test), tmp_path)
    expected = {"generated": Neighbours.of(CLOSEST, samples, train), "real, unseen": Neighbours.of(real, test, train)}
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert np.array_equal(np.asarray(picture), pairs(expected).squeeze(2))
        assert {3, 1, 104, 100, 105, 101, 202, 107, 108} <= set(np.unique(picture).tolist())


def test_the_picture_of_samples_has_a_row_for_each_class_where_they_have_labels(tmp_path: Path) -> None:
    def drawn(samples: Samples, names: list[str]) -> np.ndarray:
        draw_samples(samples, names, tmp_path)
        with Image.open(tmp_path / "samples.png") as picture:
            return np.asarray(picture)

    images = flat(*range(120), size=9)
    assert np.array_equal(drawn(Samples(images), []), grid(images[:100], 10, scale=2).squeeze(2))
    labels = np.arange(120) % 3
    rows = class_rows(images, labels, 3, 10)
    assert np.array_equal(drawn(Samples(images, labels), ["a", "b ", "c"]), annotate(rows, ["a", "b", "c"], []).squeeze(2))
    many = [str(index) for index in range(ROWS + 1)]
    rows = class_rows(images, labels, ROWS, 10)
    assert np.array_equal(drawn(Samples(images, labels), many), annotate(rows, many[:-1], ["the first 50 of 51 classes"]).squeeze(2))


def test_neighbours_must_be_as_many_as_images() -> None:
    one, two = flat(1), flat(1, 2)
    for parts in ((two, one, two, np.ones(2)), (two, two, two, np.ones(3)), (one[:0], one[:0], one[:0], np.ones(0))):
        with pytest.raises(ValueError, match="as many neighbours"):
            Neighbours(*parts)


# What the models make: cells of the pictures are compared with images made here.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[VAE, Denoiser, Params, Path]:
    root = tmp_path_factory.mktemp("models")
    params = make_checkout(root, vae__conditional=True)
    cpu = torch.device("cpu")
    return (*(load_model(kind, root / f"data/models/{kind.kind}", cpu) for kind in (VAE, Denoiser)), params, root)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)[:, :, None]


def random_images(n: int) -> np.ndarray:
    return np.random.RandomState(3).randint(0, 256, (n, *SHAPE)).astype(np.uint8)


def test_noising_begins_with_the_images_and_ends_with_noise(models: Any, tmp_path: Path) -> None:
    _, denoiser, _, root = models
    images = random_images(5)
    space = load_space(root / "data/models/ddpm", denoiser.shape, torch.device("cpu"))
    draw_noising(denoiser.schedule, space, torch.from_numpy(images), seed=1, folder=tmp_path)
    picture = read(tmp_path / "noising.png")
    shown = strip(np.stack([images[:3]] * TIMES, axis=1))
    assert picture.shape[1] == shown.shape[1]
    first, last = np.s_[: len(shown), : shown.shape[1] // TIMES], np.s_[: len(shown), -(shown.shape[1] // TIMES) :]
    assert (picture[first] == shown[first]).all() and (picture[last] != shown[last]).mean() > 0.5


def test_denoising_ends_with_the_images_of_the_first_seed(models: Any, tmp_path: Path) -> None:
    _, denoiser, params, root = models
    space = load_space(root / "data/models/ddpm", denoiser.shape, torch.device("cpu"))
    sampling = {"n": 1000, "seeds": [3, 4], "rounding": "nearest"} | params.sample.ddpm.model_dump()
    with torch.inference_mode():
        draw_denoising(denoiser, space, sampling, params.precision, tmp_path)
        draw_shard = ddpm_shards(denoiser, params.sample.ddpm, params.precision, space=space)
        expected = draw(1000, draw_shard, seed=3, title="images").numpy()[:10]
    picture, columns = read(tmp_path / "denoising.png"), min(params.sample.ddpm.steps, MOMENTS) + 1
    shown = strip(np.stack([expected] * columns, axis=1))
    last = np.s_[: len(shown), -(shown.shape[1] // columns) :]
    assert (picture[last] == shown[last]).all()
    assert picture.shape[1] > shown.shape[1]  # the names of the classes


def test_pictures_of_a_vae_show_what_it_makes_of_the_first_images(models: Any, tmp_path: Path) -> None:
    vae, *_ = models
    images, labels = random_images(45), np.arange(45) % 3
    with torch.inference_mode():
        draw_vae(vae, ImageSet(images, labels, NAMES), tmp_path / "labelled")
        first, given = torch.from_numpy(images[:30]), torch.from_numpy(labels[:30])
        decoded = from_unit(vae.decode(vae.encode(to_unit(first), given)[0], given)).numpy()
    assert {path.stem for path in (tmp_path / "labelled").iterdir()} == {"latent", "reconstructions", "interpolation", "analogies"}
    shown = reconstructions(images[:30], decoded, 10)
    assert (read(tmp_path / "labelled/reconstructions.png")[:, -shown.shape[1] :] == shown).all()
    walk = read(tmp_path / "labelled/interpolation.png")
    begin = grid(decoded[:10].repeat(10, axis=0), 10, scale=2)  # each walk begins at a reconstruction
    assert (walk[:, : 2 + 2 * SHAPE[2]] == begin[:, : 2 + 2 * SHAPE[2]]).all()
    analogies = read(tmp_path / "labelled/analogies.png")
    assert (analogies[: 2 + 2 * SHAPE[1], -(10 * (2 + 2 * SHAPE[2]) + 2) :] == strip(images[None, :10])[:-2]).all()


def test_a_vae_without_labels_or_with_few_images_is_drawn_too(models: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = make_vae(models[2].vae.model_copy(update={"conditional": False}), SHAPE).eval()
    for n in (1, 7, 45):
        with torch.inference_mode():
            draw_vae(vae, ImageSet(random_images(n)), tmp_path / str(n))
        assert {path.stem for path in (tmp_path / str(n)).iterdir()} == {"latent", "reconstructions", "interpolation"}


def several(*values: float) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "min": min(values), "max": max(values), "values": list(values)}


SHARES = {name: several(0.7, 0.72, 0.75) for name in ("precision", "recall", "density", "coverage")}
CLASSES = {"boot": {"fd": 3.0, "n": 700}, "bag": {"fd": 0.5, "n": 700}, "shirt": {"n": 12}}


def called(distance: str, classes: dict[str, Any]) -> dict[str, Any]:
    """The same distances by another name."""
    return {name: {distance if key == "fd" else key: value for key, value in row.items()} for name, row in classes.items()}


def records(distance: str = "fd", names: tuple[str, ...] = ("cnn", "random")) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of a model and of the reference, with these instruments."""
    part = {
        "instrument": {"id": "cnn", "dimension": 64},
        "expected_bias": 0.05,
        "is_max": 10,
        "scores": {distance: several(1.5, 1.7, 2.2), "is": several(7.1, 7.2), **SHARES},
        "classes": {"by": "label", distance: called(distance, CLASSES)},
    }
    rows = {
        "train": {distance: several(0.07, 0.08), "is": several(8.4, 8.5), **SHARES},
        "test": {"is": several(8.3)},
        "test_halves": {distance: 0.06, "n": 5000},
        "mean_image": {distance: 50.0},
        "pixel_marginals": {distance: 60.0},
        "noise": {distance: 200.0},
    }
    classes = {"label": called(distance, {"boot": {"fd": 0.2, "n": 700}, "bag": {"fd": 0.2, "n": 700}, "shirt": {"n": 9}})}
    record = {
        "model": "ddpm",
        "sampling": {"n": 5000, "seeds": [1, 2, 3]},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10_000},
        "instruments": {name: copy.deepcopy(part) for name in names},
    }
    return record, {"instruments": {name: copy.deepcopy({"rows": rows, "classes": classes}) for name in names}}


def count(picture: np.ndarray, colour: str) -> int:
    """Pixels of exactly this colour."""
    return int((picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum())


@pytest.mark.parametrize("chart", [score_chart, class_chart])
def test_charts_are_the_same_each_time_whatever_matplotlib_is_told(chart: Any) -> None:
    record, reference = records()
    first = chart(record, reference)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "text.color": "blue", "figure.dpi": 50}):
        assert (first == chart(*records())).all()
    assert first.dtype == np.uint8 and first.shape[2] == 3
    assert (record, reference) == records()  # left as they were


def test_score_chart_has_a_band_for_each_instrument() -> None:
    one, two = score_chart(*records(names=("cnn",))), score_chart(*records(names=("cnn", "random")))
    assert one.shape == (430, 1500, 3) and two.shape == (770, 1500, 3)
    for picture in (one, two[: len(two) // 2], two[len(two) // 2 :]):
        assert count(picture, MODEL) > 200 and count(picture, REAL) > 200 and count(picture, USELESS) > 50


def changed(path: tuple[str, ...], value: Any, *, of_reference: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of one instrument with a single value replaced."""
    pair = records(names=("cnn",))
    node = pair[of_reference]
    for key in path[:-1]:
        node = node[key]
    assert path[-1] in node
    node[path[-1]] = value
    return pair


@functools.cache
def unchanged(chart: Any) -> np.ndarray:
    return chart(*records(names=("cnn",)))


IN_MODEL, IN_ROWS = ("instruments", "cnn"), ("instruments", "cnn", "rows")


@pytest.mark.parametrize(
    "pair",
    [
        changed(("model",), "vae"),
        changed(("sampling", "n"), 6000),
        changed(("reference", "n"), 9000),
        changed((*IN_MODEL, "expected_bias"), 0.02),
        changed((*IN_MODEL, "is_max"), 12),
        changed((*IN_MODEL, "instrument", "dimension"), 65),
        *(changed((*IN_MODEL, "scores", name), several(0.6, 0.8)) for name in ("fd", "is", *SHARES)),
        changed((*IN_MODEL, "scores", "recall", "min"), 0.5),
        changed((*IN_MODEL, "scores", "fd", "max"), 9.0),
        *(changed((*IN_ROWS, "train", name), several(0.9), of_reference=True) for name in ("fd", *SHARES)),
        *(changed((*IN_ROWS, row, "fd"), 30.0, of_reference=True) for row in ("noise", "pixel_marginals", "mean_image", "test_halves")),
        changed((*IN_ROWS, "test", "is"), several(9.0), of_reference=True),
        records(names=("other",)),
        records("fid", names=("cnn",)),
    ],
)
def test_score_chart_shows_every_number_and_name(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert (score_chart(*pair) != unchanged(score_chart)).any()


def test_score_chart_shows_reconstructions_where_there_are_some() -> None:
    record, reference = records(names=("cnn",))
    before = score_chart(record, reference)
    record["instruments"]["cnn"]["reconstructions"] = {"fd": 4.0}
    assert count(score_chart(record, reference), MODEL) > count(before, MODEL)


def test_score_chart_does_without_inception_score_classes_and_reference_rows() -> None:
    record, reference = records(names=("cnn",))
    for name in ("is_max", "classes"):
        del record["instruments"]["cnn"][name]
    del record["instruments"]["cnn"]["scores"]["is"]
    assert count(score_chart(record, reference), MODEL) > 200
    bare = score_chart(record, {"instruments": {}})
    assert count(bare, MODEL) > 200 and count(bare, USELESS) == 0


@pytest.mark.filterwarnings("error")
def test_distances_of_zero_and_below_are_drawn_at_the_left_end() -> None:
    record, reference = records(names=("cnn",))
    record["instruments"]["cnn"]["scores"]["fd"] = several(-1e-9, 0.0, 1e-10)
    record["instruments"]["cnn"]["classes"]["fd"] = {"boot": {"fd": 0.0, "n": 700}}
    assert count(score_chart(record, reference), MODEL) > 200
    assert count(class_chart(record, reference), MODEL) > 50


def test_class_chart_has_a_panel_for_each_instrument_and_a_row_for_each_class() -> None:
    record, reference = records()
    picture = class_chart(record, reference)
    assert picture.shape == (276, 1350, 3)
    for panel in (picture[:, :700], picture[:, 700:]):
        assert count(panel, MODEL) > 50 and count(panel, REAL) > 30
    record["instruments"]["cnn"]["classes"]["fd"] = {**CLASSES, **{f"class {i}": {"fd": 1.0 + i, "n": 700} for i in range(7)}}
    assert class_chart(record, reference).shape == (500, 1350, 3)


def test_classes_with_too_few_images_are_grey() -> None:
    record, reference = records(names=("cnn",))
    few = class_chart(record, reference)
    record["instruments"]["cnn"]["classes"]["fd"] = {**CLASSES, "shirt": {"fd": 1.0, "n": 700}}
    enough = class_chart(record, reference)
    names = slice(0, 45)  # the third of the three names on the left
    assert (few[:, names] != enough[:, names]).any(axis=(1, 2)).sum() > 5
    assert few[150:190, names].min() > enough[150:190, names].min() + 100 and (few[:150, names] == enough[:150, names]).all()
    assert count(few, GREY) > count(enough, GREY)


@pytest.mark.parametrize(
    "pair",
    [
        changed(("model",), "vae"),
        changed((*IN_MODEL, "classes", "by"), "predicted"),
        changed((*IN_MODEL, "classes", "fd", "boot"), {"fd": 3.1, "n": 700}),
        changed((*IN_MODEL, "classes", "fd", "shirt"), {"n": 13}),
        changed((*IN_MODEL, "classes", "fd"), {("heel" if name == "boot" else name): value for name, value in CLASSES.items()}),
        changed(("instruments", "cnn", "classes", "label", "bag"), {"fd": 0.25, "n": 700}, of_reference=True),
        records(names=("other",)),
        records("fid", names=("cnn",)),
    ],
)
def test_class_chart_shows_every_number_and_name(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert (class_chart(*pair) != unchanged(class_chart)).any()


def test_class_chart_without_classes_says_so() -> None:
    record, reference = records(names=("cnn",))
    del record["instruments"]["cnn"]["classes"]
    picture = class_chart(record, reference)
    assert picture.shape[1] == 800 and picture.min() < 200 and count(picture, MODEL) == 0


def test_scores_and_classes_are_written(tmp_path: Path) -> None:
    draw_scores(*records(), tmp_path)
    for name, chart in (("scores", score_chart), ("classes", class_chart)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.array_equal(np.asarray(picture), chart(*records()))
