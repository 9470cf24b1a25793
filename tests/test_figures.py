"""Pictures: made for every kind of set, the same bytes each time, and showing what they should."""

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from tiny_checkout import CLASSES as NAMES
from tiny_checkout import SHAPE, make_checkout

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.figures.ddpm import draw_denoising, draw_noising
from rediffuse.figures.latent import latent_map, principal_components
from rediffuse.figures.neighbours import draw_neighbours
from rediffuse.figures.samples import ROWS, draw_samples
from rediffuse.figures.scores import MODEL, REAL, USELESS, class_chart, draw_scores, score_chart
from rediffuse.figures.vae import draw_vae
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, to_unit
from rediffuse.images.sample_sets import Samples
from rediffuse.params import Params
from rediffuse.runtime.shards import draw
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.space import Space, load_space
from rediffuse.vae.model import VAE

Picture = NDArray[np.uint8]
CPU = torch.device("cpu")


def random_images(n: int, shape: tuple[int, ...] = SHAPE) -> Picture:
    return np.random.RandomState(3).randint(0, 256, (n, *shape)).astype(np.uint8)


def read(path: Path) -> Picture:
    with Image.open(path) as picture:
        assert picture.info == {}  # nothing but pixels: no time, no software
        return np.atleast_3d(np.asarray(picture))


def places(picture: Picture, image: Picture, scale: int = 2) -> list[tuple[int, int]]:
    """Where the picture shows the image, from top to bottom."""
    patch = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
    windows = sliding_window_view(picture, patch.shape)[:, :, 0]
    candidates = np.argwhere((windows[:, :, 0, 0] == patch[0, 0]).all(axis=2))
    return [(y, x) for y, x in candidates.tolist() if (windows[y, x] == patch).all()]


def place(picture: Picture, image: Picture, scale: int = 2) -> tuple[int, int]:
    [found] = places(picture, image, scale)
    return found


# Images side by side


def test_samples_have_a_row_for_each_class(tmp_path: Path) -> None:
    images = random_images(200, (3, 4, 4))
    draw_samples(Samples(images), [], tmp_path)
    found = [place(read(tmp_path / "samples.png"), image) for image in images[:100]]
    assert found == sorted(found)
    draw_samples(Samples(images, np.arange(200) % 3), ["a", "b ", "c"], tmp_path)
    found = [place(read(tmp_path / "samples.png"), image) for image in images[:30]]
    assert [y for y, _ in found[:3]] == sorted({y for y, _ in found})
    assert all(found[i][0] == found[i % 3][0] for i in range(30))


def test_of_many_classes_the_first_are_shown(tmp_path: Path) -> None:
    images = random_images(2 * ROWS, (1, 4, 4))
    labels, names = np.arange(len(images)) % (ROWS + 1), [str(i) for i in range(ROWS + 1)]
    draw_samples(Samples(images, labels), names, tmp_path)
    picture = read(tmp_path / "samples.png")
    assert place(picture, images[ROWS - 1]) and not places(picture, images[ROWS])


@pytest.mark.parametrize("channels", [1, 3])
def test_neighbours_stand_below_their_image(channels: int, tmp_path: Path) -> None:
    samples, train, test = np.split(random_images(30, (channels, 28, 28)), 3)
    closest = [{"index": 2, "nearest": [4, 5], "ratio": 0.3}, {"index": 0, "nearest": [0, 1], "ratio": 0.5}]
    real = [{"index": 1, "nearest": [7, 8], "ratio": 0.9}]

    def drawn() -> Picture:
        record, reference = {"closest": closest}, {"closest": real}
        draw_neighbours(record, reference, samples, ImageSet(train), ImageSet(test), tmp_path)
        return read(tmp_path / "neighbours.png")

    picture = drawn()
    assert (drawn() == picture).all()
    generated = [(samples[2], train[4], train[5]), (samples[0], train[0], train[1])]
    columns = [*generated, (test[1], train[7], train[8])]
    found = [[place(picture, image, scale=3) for image in column] for column in columns]
    assert all(len({x for _, x in column}) == 1 and column == sorted(column) for column in found)
    assert found[0][0][1] < found[1][0][1] == found[2][0][1]  # both blocks end on the right
    assert found[1][2] < found[2][0]
    closest[0]["ratio"] = 0.31
    assert (drawn() != picture).any()


# The latent space


@pytest.mark.parametrize(("dimensions", "classes"), [(1, 3), (2, 20), (7, 3)])
def test_a_latent_map_shows_each_class(dimensions: int, classes: int) -> None:
    means, labels = np.random.default_rng(1).normal(size=(300, dimensions)), np.arange(300) % classes
    first, second = (latent_map(means, labels, list(map(str, range(classes)))) for _ in range(2))
    assert first.shape == (900, 1100, 3) and (first == second).all()
    colours, counts = np.unique(first.reshape(-1, 3), axis=0, return_counts=True)
    assert sum(np.ptp(colour) > 50 for colour in colours[counts > 10].astype(int)) >= classes
    no_legend = [latent_map(means), latent_map(means, labels, list(map(str, range(41))))]
    assert [picture.shape for picture in no_legend] == [(900, 900, 3)] * 2


def test_principal_components_find_the_plane_and_its_variance() -> None:
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    plane = rng.normal(size=(1000, 2)) * [3.0, 1.0]
    points, shares = principal_components(plane @ basis.T + 5)
    assert shares.sum() == pytest.approx(1)
    distances, expected = (np.linalg.norm(p[:, None] - p[None, :50], axis=2) for p in (points, plane))
    np.testing.assert_allclose(distances, expected, atol=1e-9)
    assert points[:, 0].std() > points[:, 1].std()
    np.testing.assert_allclose(points, principal_components(plane @ basis.T)[0], atol=1e-9)
    collapsed, none = principal_components(np.ones((5, 3)))
    assert not collapsed.any() and not none.any()


# What the models make


Models = tuple[VAE, Denoiser, Space, Params]


@pytest.fixture(scope="module", params=[True, False], ids=["labels", "no labels"])
def models(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Models:
    root = tmp_path_factory.mktemp("models")
    params = make_checkout(root, vae__conditional=request.param, ddpm__conditional=request.param)
    folder = root / "data/models/ddpm"
    vae, denoiser = load_model(VAE, folder.with_name("vae"), CPU), load_model(Denoiser, folder, CPU)
    return vae, denoiser, load_space(folder, SHAPE, CPU), params


def test_noising_begins_with_the_images_and_ends_with_noise(models: Models, tmp_path: Path) -> None:
    _, denoiser, space, _ = models
    images = random_images(5)
    draw_noising(denoiser.schedule, space, torch.from_numpy(images), seed=1, folder=tmp_path)
    found = [place(read(tmp_path / "noising.png"), image) for image in images[:3]]
    assert found == sorted(found) and {x for _, x in found} == {2}


def test_denoising_ends_with_the_images_of_the_first_seed(models: Models, tmp_path: Path) -> None:
    _, denoiser, space, params = models
    sampling = {"n": 1000, "seeds": [3, 4], "rounding": "nearest"} | params.sample.ddpm.model_dump()
    with torch.inference_mode():
        draw_denoising(denoiser, space, sampling, params.precision, tmp_path)
        draw_shard = ddpm_shards(denoiser, params.sample.ddpm, params.precision, space=space)
        expected = draw(1000, draw_shard, seed=3, title="images").numpy()[:10]
    picture = read(tmp_path / "denoising.png")
    found = [places(picture, image)[-1] for image in expected]
    assert found == sorted(found) and {x for _, x in found} == {picture.shape[1] - 2 * SHAPE[2] - 2}


@pytest.mark.parametrize("n", [1, 7, 45])
def test_pictures_of_a_vae_show_what_it_makes_of_images(models: Models, tmp_path: Path, n: int) -> None:
    vae, *_ = models
    images, labels = random_images(n), np.arange(n) % 3 if vae.classes else None
    shown, columns = min(30, n - n % min(10, n)), min(10, n)
    with torch.inference_mode():
        draw_vae(vae, ImageSet(images, labels, NAMES if vae.classes else ()), tmp_path)
        given = None if labels is None else torch.from_numpy(labels[:shown])
        z = vae.encode(to_unit(torch.from_numpy(images[:shown])), given)[0]
        decoded = from_unit(vae.decode(z, given)).numpy()
    names = {"latent", "reconstructions", "interpolation"} | ({"analogies"} if vae.classes else set())
    assert {path.stem for path in tmp_path.iterdir()} == names
    picture = read(tmp_path / "reconstructions.png")
    for original, reconstruction in zip(images[:shown], decoded, strict=True):
        y, x = place(picture, original)
        assert (y + 2 * SHAPE[1] + 2, x) in places(picture, reconstruction)
    walk = read(tmp_path / "interpolation.png")
    assert all(2 in [x for _, x in places(walk, image)] for image in decoded[:columns])
    right = walk.shape[1] - 2 * SHAPE[2] - 2
    if n == 45 and not vae.classes:  # the walks go to the images of the second row
        assert all(right in [x for _, x in places(walk, image)] for image in decoded[10:20])
    if vae.classes:
        analogies = read(tmp_path / "analogies.png")
        assert all(place(analogies, image)[0] == 2 for image in images[:columns])
        assert all(places(analogies, image) for image in decoded[:columns])


# Scores


def several(*values: float) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


SHARES = {name: several(0.7, 0.72, 0.75) for name in ("precision", "recall", "density", "coverage")}
Pair = tuple[dict[str, Any], dict[str, Any]]


def records(distance: str = "fd", names: tuple[str, ...] = ("cnn",)) -> Pair:
    """The records of a model and of the reference, with these instruments."""
    classes = {"boot": {distance: 3.0, "n": 700}, "bag": {distance: 0.5, "n": 700}, "shirt": {"n": 12}}
    part = {
        "instrument": {"id": "cnn", "dimension": 64},
        "expected_bias": 0.05,
        "is_max": 10,
        "scores": {distance: several(1.5, 1.7, 2.2), "is": several(7.1, 7.2), **SHARES},
        "classes": {"by": "label", distance: classes},
    }
    rows = {
        "train": {distance: several(0.07, 0.08), "is": several(8.4, 8.5), **SHARES},
        "test": {"is": several(8.3)},
        "test_halves": {distance: 0.06, "n": 5000},
        **{row: {distance: 50.0} for row in ("mean_image", "pixel_marginals", "noise")},
    }
    floor = {"label": {name: {distance: 0.2, "n": 700} for name in ("boot", "bag")} | {"shirt": {"n": 9}}}
    record = {
        "model": "ddpm",
        "sampling": {"n": 5000, "seeds": [1, 2, 3]},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10_000},
        "instruments": {name: copy.deepcopy(part) for name in names},
    }
    return record, {"instruments": {name: copy.deepcopy({"rows": rows, "classes": floor}) for name in names}}


def changed(path: str, value: Any) -> Pair:
    """The records with one value replaced, of the record, its instrument (cnn) or the reference's (real)."""
    record, reference = records()
    node: Any = {"record": record}
    node |= {"cnn": record["instruments"]["cnn"], "real": reference["instruments"]["cnn"]}
    *groups, leaf = path.split(".")
    for group in groups:
        node = node[group]
    assert leaf in node
    node[leaf] = value
    return record, reference


def count(picture: Picture, colour: str) -> int:
    """Pixels of exactly this colour."""
    return int((picture == list(bytes.fromhex(colour[1:]))).all(axis=2).sum())


OTHER = several(0.6, 0.8)
SCORES: list[tuple[str, Any]] = [
    *(("record.model", "vae"), ("record.sampling.n", 6000), ("record.reference.n", 9000)),
    *(("cnn.instrument.dimension", 65), ("cnn.expected_bias", 0.02), ("cnn.is_max", 12)),
    *((f"cnn.scores.{name}", OTHER) for name in ("fd", "is", *SHARES)),
    *(("cnn.scores.recall.min", 0.5), ("cnn.scores.fd.max", 9.0), ("real.rows.test.is", several(9.0))),
    *((f"real.rows.train.{name}", OTHER) for name in ("fd", *SHARES)),
    *((f"real.rows.{row}.fd", 30.0) for row in ("noise", "pixel_marginals", "mean_image", "test_halves")),
]
CLASSES: list[tuple[str, Any]] = [
    *(("record.model", "vae"), ("cnn.classes.by", "predicted"), ("cnn.classes.fd.boot.fd", 3.1)),
    *(("cnn.classes.fd.shirt.n", 13), ("cnn.classes.fd.shirt", {"fd": 1.0, "n": 700})),
    *(("cnn.classes.fd", {"heel": {"fd": 3.0, "n": 700}}), ("real.classes.label.bag.fd", 0.25)),
]


@pytest.mark.parametrize(("chart", "changes"), [(score_chart, SCORES), (class_chart, CLASSES)])
def test_charts_show_every_number_and_name(chart: Any, changes: list[tuple[str, Any]]) -> None:
    pairs = [records(), records("fid"), records(names=("other",)), *(changed(*each) for each in changes)]
    assert len({chart(*pair).tobytes() for pair in pairs}) == len(pairs)


def test_charts_are_the_same_each_time_whatever_matplotlib_is_told(tmp_path: Path) -> None:
    pair = records(names=("cnn", "random"))
    charts = {"scores": score_chart(*pair), "classes": class_chart(*pair)}
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "figure.dpi": 50}):
        draw_scores(*pair, tmp_path)
    assert all((read(tmp_path / f"{name}.png") == picture).all() for name, picture in charts.items())
    assert pair == records(names=("cnn", "random"))  # left as they were


def test_charts_have_a_part_for_each_instrument() -> None:
    scores, classes = (chart(*records(names=("cnn", "random"))) for chart in (score_chart, class_chart))
    for band in np.array_split(scores, 2):
        assert count(band, MODEL) > 200 and count(band, REAL) > 200 and count(band, USELESS) > 50
    for panel in (classes[:, :700], classes[:, 700:]):
        assert count(panel, MODEL) > 50 and count(panel, REAL) > 30


def test_scores_that_some_sets_have_are_drawn_if_they_are_there() -> None:
    record, reference = records()
    before, part = count(score_chart(record, reference), MODEL), record["instruments"]["cnn"]
    part["reconstructions"] = {"fd": 4.0}
    assert count(score_chart(record, reference), MODEL) > before
    del part["is_max"], part["scores"]["is"], part["classes"]
    bare = score_chart(record, {"instruments": {}})
    assert count(bare, MODEL) > 200 and count(bare, USELESS) == 0
    for chart in (class_chart(record, reference), score_chart(record | {"instruments": {}}, reference)):
        assert chart.shape == (276, 800, 3) and chart.min() < 200 and count(chart, MODEL) == 0  # a sentence


@pytest.mark.filterwarnings("error")
def test_distances_of_zero_and_below_are_drawn() -> None:
    assert count(score_chart(*changed("cnn.scores.fd", several(-1e-9, 0.0, 1e-10))), MODEL) > 200
    assert count(class_chart(*changed("cnn.classes.fd", {"boot": {"fd": 0.0, "n": 700}})), MODEL) > 50
