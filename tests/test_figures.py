"""Pictures: the same bytes each time, and showing what they should."""

import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFont
from tiny_checkout import CLASSES as NAMES
from tiny_checkout import SHAPE, make_checkout

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.figures.ddpm import draw_denoising
from rediffuse.figures.films import Painter
from rediffuse.figures.latent import principal_components
from rediffuse.figures.neighbours import draw_neighbours
from rediffuse.figures.samples import draw_samples
from rediffuse.figures.scores import class_chart, draw_scores, score_chart
from rediffuse.figures.text import legible
from rediffuse.figures.vae import draw_vae
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, to_unit
from rediffuse.images.sample_sets import Samples
from rediffuse.runtime.shards import draw
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.guidance import load_guide
from rediffuse.sampling.space import load_space
from rediffuse.vae.model import VAE

CPU = torch.device("cpu")


def random_images(n: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.RandomState(3).randint(0, 256, (n, *shape)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.info == {}  # nothing but pixels: no time, no software
        return np.atleast_3d(np.asarray(picture))


def places(picture: np.ndarray, image: np.ndarray, scale: int = 2) -> list[tuple[int, int]]:
    """Where the picture shows the image, from top to bottom."""
    patch = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
    windows = sliding_window_view(picture, patch.shape)[:, :, 0]
    candidates = np.argwhere((windows[:, :, 0, 0] == patch[0, 0]).all(axis=2))
    return [(y, x) for y, x in candidates.tolist() if (windows[y, x] == patch).all()]


def place(picture: np.ndarray, image: np.ndarray, scale: int = 2) -> tuple[int, int]:
    [found] = places(picture, image, scale)
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The root of a checkout with both models, and its parameters."""
    root = tmp_path_factory.mktemp("models")
    return root, make_checkout(root, vae__conditional=True, sample__ddpm__autoguidance_scale=1.5)


def test_samples_have_a_row_for_each_class(tmp_path):
    images = random_images(200, (3, 4, 4))
    draw_samples(Samples(images, np.arange(200) % 3), ["a", "b ", "c"], tmp_path)
    found = [place(read(tmp_path / "samples.png"), image) for image in images[:30]]
    assert [y for y, _ in found[:3]] == sorted({y for y, _ in found})
    assert all(found[i][0] == found[i % 3][0] for i in range(30))


def test_neighbours_stand_below_their_image_with_the_ratio_of_distances(tmp_path):
    samples, train, test = np.split(random_images(30, (1, 28, 28)), 3)
    closest = [{"index": 2, "nearest": [4, 5], "ratio": 0.3}, {"index": 0, "nearest": [0, 1], "ratio": 0.5}]
    record, reference = {"closest": closest}, {"closest": [{"index": 1, "nearest": [7, 8], "ratio": 0.9}]}
    drawn = []
    for ratio in (0.3, 0.3, 0.31):
        closest[0]["ratio"] = ratio
        draw_neighbours(record, reference, samples, ImageSet(train), ImageSet(test), tmp_path)
        drawn.append(read(tmp_path / "neighbours.png"))
    assert (drawn[0] == drawn[1]).all() and (drawn[1] != drawn[2]).any()
    generated = [(samples[2], train[4], train[5]), (samples[0], train[0], train[1])]
    for column in (*generated, (test[1], train[7], train[8])):
        found = [place(drawn[0], image, scale=3) for image in column]
        assert len({x for _, x in found}) == 1 and found == sorted(found)


def test_principal_components_find_the_plane_and_its_variance():
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    plane = rng.normal(size=(1000, 2)) * [3.0, 1.0]
    points, shares = principal_components(plane @ basis.T + 5)
    assert shares.sum() == pytest.approx(1)
    distances, expected = (np.linalg.norm(p[:, None] - p[None, :50], axis=2) for p in (points, plane))
    np.testing.assert_allclose(distances, expected, atol=1e-9)
    assert points[:, 0].std() > points[:, 1].std()
    collapsed, none = principal_components(np.ones((5, 3)))
    assert not collapsed.any() and not none.any()


def test_denoising_ends_with_the_images_of_the_first_seed(checkout, tmp_path):
    root, params = checkout
    denoiser = load_model(Denoiser, root / "data/models/ddpm", CPU)
    space = load_space(root / "data/models/ddpm", SHAPE, CPU)
    guide = load_guide(root / "data/models/ddpm", 1.5)
    sampling = {"n": 1000, "seeds": [3, 4], "rounding": "nearest"} | params.sample.ddpm.model_dump()
    with torch.inference_mode():
        draw_denoising(Painter(denoiser, guide, space, sampling, params.precision), tmp_path)
        draw_shard = ddpm_shards(denoiser, params.sample.ddpm, params.precision, space=space, guide=guide)
        expected = draw(1000, draw_shard, seed=3, title="images").numpy()[:10]
    picture = read(tmp_path / "denoising.png")
    found = [places(picture, image)[-1] for image in expected]
    assert found == sorted(found) and {x for _, x in found} == {picture.shape[1] - 2 * SHAPE[2] - 2}


@pytest.mark.parametrize("n", [1, 45])
def test_pictures_of_a_vae_show_what_it_makes_of_images(checkout, tmp_path, n):
    vae = load_model(VAE, checkout[0] / "data/models/vae", CPU)
    images, labels, shown = random_images(n), np.arange(n) % 3, min(30, n)
    with torch.inference_mode():
        draw_vae(vae, ImageSet(images, labels, NAMES), tmp_path)
        given = torch.from_numpy(labels[:shown])
        decoded = from_unit(
            vae.decode(vae.encode(to_unit(torch.from_numpy(images[:shown])), given)[0], given)
        )
    names = ("reconstructions", "analogies", "interpolation", "latent")
    picture, analogies, walk, _ = (read(tmp_path / f"{name}.png") for name in names)
    for original, reconstruction in zip(images[:shown], decoded.numpy(), strict=True):
        y, x = place(picture, original)
        assert (y + 2 * SHAPE[1] + 2, x) in places(picture, reconstruction)
    for original, reconstruction in zip(images[:10], decoded.numpy()[:10], strict=False):
        assert place(analogies, original)[0] == 2 and places(analogies, reconstruction)
        assert 2 in [x for _, x in places(walk, reconstruction)]


# Scores


def several(*values: float) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def shares() -> dict[str, Any]:
    return {name: several(0.7, 0.72, 0.75) for name in ("precision", "recall", "density", "coverage")}


def records(path: str = "record.model", value: Any = "ddpm", distance: str = "fd") -> tuple[Any, Any]:
    """The records of a model and of the reference, with one value replaced (cnn, real: of the instrument)."""
    cnn = {
        "instrument": {"id": "cnn", "dimension": 64},
        "expected_bias": 0.05,
        "is_max": 10,
        "scores": {distance: several(1.5, 1.7, 2.2), "is": several(7.1, 7.2), **shares()},
        "classes": {"by": "label", distance: {"boot": {distance: 3.0, "n": 700}, "shirt": {"n": 12}}},
    }
    rows = {
        "real": {distance: several(0.07, 0.08), "is": several(8.4, 8.5), **shares()},
        "same": {"is": several(8.3)},
        "halves": {distance: 0.06, "n": 5000},
        **{row: {distance: 50.0} for row in ("mean_image", "pixel_marginals", "noise")},
    }
    real = {"rows": rows, "classes": {"label": {"boot": {distance: 0.2, "n": 700}, "shirt": {"n": 9}}}}
    record = {
        "sampling": {"n": 5000, "seeds": [1, 2, 3]},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10_000},
        "instruments": {"cnn": cnn},
    }
    node: Any = {"record": record, "cnn": cnn, "real": real}
    *groups, leaf = path.split(".")
    for group in groups:
        node = node[group]
    node[leaf] = value
    return {"model": "ddpm"} | record, {"instruments": {"cnn": real}}


OTHER = several(0.6, 0.8)
SCORES = {
    "record.model": "vae",
    "record.sampling.n": 6000,
    "cnn.expected_bias": 0.02,
    "cnn.reconstructions": {"fd": 4.0},
    "cnn.scores.fd": OTHER,
    "cnn.scores.is": OTHER,
    "cnn.scores.recall.min": 0.5,
    "real.rows.noise.fd": 30.0,
    "real.rows.real.fd": OTHER,
}
CLASSES = {
    "record.model": "vae",
    "cnn.classes.by": "predicted",
    "cnn.classes.fd.boot.fd": 3.1,
    "cnn.classes.fd.shirt.n": 13,
    "real.classes.label.boot.fd": 0.25,
}


@pytest.mark.parametrize(("chart", "changes"), [(score_chart, SCORES), (class_chart, CLASSES)])
def test_charts_show_every_number_and_name(chart, changes):
    pairs = [records(), records(distance="fid"), *(records(*each) for each in changes.items())]
    assert len({chart(*pair).tobytes() for pair in pairs}) == len(pairs)


def test_charts_are_the_same_each_time_whatever_matplotlib_is_told(tmp_path):
    charts = {"scores": score_chart(*records()), "classes": class_chart(*records())}
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "figure.dpi": 50}):
        draw_scores(*records(), tmp_path)
    assert all((read(tmp_path / f"{name}.png") == picture).all() for name, picture in charts.items())


@pytest.mark.filterwarnings("error")
def test_charts_of_little_and_of_distances_around_zero_are_drawn():
    record, reference = records("cnn.scores", {"fd": several(-1e-9, 0.0, 1e-10)})
    for bare, real in (
        (record, reference),
        (record, {"instruments": {}}),
        (record | {"instruments": {}}, {}),
    ):
        for chart in (score_chart, class_chart):
            assert chart(bare, real).min() < 200


# Names of classes

UNCHANGED = ("Ankle boot", "T-shirt/top", "naïve", "γάτα", "кошка", "$\\foo$", "½ → 1º", "a" * 40, "")
READ = {name: name for name in UNCHANGED} | {
    "ねこ": "neko",
    "日本語 🦊": "RiBenYu :fox:",
    "كلب": "klb",
    "कुत्ता": "kutta",
    "ໝາ": "ma",
    "cafe\u0301": "café",
    " a\n b ": "a b",
    "x\x01y": "xy",
    "\x01": "U+0001",  # nothing else is left of it
    " ": "U+0020",
    "\u200d": "U+200D",
    "\u2800": "U+2800",
    "\udc80": "U+DC80",
    "𒀀 1": "U+12000 1",
    "l" * 200: "l" * 39 + "…",
}


def test_names_read_as_they_are_or_transliterated():
    assert dict(zip(READ, legible(list(READ)), strict=True)) == READ


def test_the_font_draws_every_character_of_every_name():
    font, glyphs = ImageFont.truetype(findfont("DejaVu Sans")), FT2Font(findfont("DejaVu Sans")).get_charmap()
    names = [*map(chr, range(0x20000)), *(f"a{chr(i)}b" for i in range(0x20000))]
    shown = legible(names)
    assert len(set(shown)) == len(names)  # different names stay different
    assert all(font.getmask(text).getbbox() for text in shown[::20])  # none is blank
    drawn = set("".join(shown))
    assert all(ord(character) in glyphs and character.isprintable() for character in drawn)
    scripts = {unicodedata.name(character).split()[0] for character in drawn}
    assert {"LATIN", "GREEK", "CYRILLIC"} <= scripts and not {"ARABIC", "HEBREW", "COMBINING"} & scripts


def test_names_that_read_alike_are_numbered():
    names = ["ねこ", "neko", "ネコ", "neko (2)", "ねこ", "l" * 41, "l" * 42]
    long = "l" * 39 + "…"
    assert legible(names) == ["neko (3)", "neko", "neko (4)", "neko (2)", "neko (3)", long, f"{long} (2)"]


@pytest.mark.filterwarnings("error")
def test_every_picture_shows_the_names_of_its_classes(checkout, tmp_path):
    models, params = checkout[0] / "data/models", checkout[1]
    vae, denoiser = load_model(VAE, models / "vae", CPU), load_model(Denoiser, models / "ddpm", CPU)
    space, guide = load_space(models / "ddpm", SHAPE, CPU), load_guide(models / "ddpm", 1.5)
    sampling = {"seeds": [3]} | params.sample.ddpm.model_dump()
    images, labels = random_images(30), np.arange(30) % 3

    def pictures(*names: str) -> list[bytes]:
        vae.class_names = denoiser.class_names = names
        with torch.inference_mode():
            draw_vae(vae, ImageSet(images, labels, names), tmp_path)
            draw_denoising(Painter(denoiser, guide, space, sampling, params.precision), tmp_path)
        draw_samples(Samples(images, labels), names, tmp_path)
        drawn = [read(tmp_path / f"{name}.png") for name in ("analogies", "latent", "denoising", "samples")]
        classes = {name: {"fd": 3.0, "n": 700} for name in names}
        return [each.tobytes() for each in (*drawn, class_chart(*records("cnn.classes.fd", classes)))]

    drawn = pictures("ねこ", "_кошка $x$ 🦊", "كلب")
    assert drawn == pictures("neko", "_кошка $x$ :fox:", "klb")
    other = pictures("ねこ", "_мышка $x$ 🦊", "كلب")  # as many boxes, if they were boxes
    assert all(one != another for one, another in zip(drawn, other, strict=True))
