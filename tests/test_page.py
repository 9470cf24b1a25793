"""The parts of the page: films, the map, rulers, curves.  Its controls are tested in test_pipeline.py."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rediffuse.diffusion.schedule import Schedule
from rediffuse.figures.films import SHOWN, SIDE, WALK, Film, latent_plane, noising, walk
from rediffuse.figures.page import HIGH, WIDE, chart, film, latent_map, log_snr_chart, rulers, write_page
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit
from rediffuse.sampling.space import Pixels
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import posterior_means

RECORDS = Path(__file__).parents[1] / "metrics/evaluation"


def sheet_of(shown: dict[str, Any]) -> NDArray[np.uint8]:
    png = base64.b64decode(shown["source"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(png)))


def grey(n: int, size: int = 8) -> NDArray[np.uint8]:
    return np.random.RandomState(0).randint(0, 256, (n, 1, size, size)).astype(np.uint8)


def make_vae(latent_dim: int, **more: Any) -> VAE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"latent_channels": 0, "channels": [8], "hidden": 16, "likelihood": "bernoulli"}
    return VAE((1, 8, 8), latent_dim=latent_dim, **sizes, **more).eval()


@pytest.mark.parametrize(("columns", "colour"), [(1, False), (3, False), (3, True)])
def test_the_frames_of_a_film_lie_in_rows(columns, colour):
    frames = grey(7).repeat(3, axis=1) if colour else grey(7)
    shown = film(Film(frames, [], columns))
    sheet = sheet_of(shown)
    assert shown["rows"] == -(-7 // columns) and sheet.shape[:2] == (8 * shown["rows"], 8 * columns)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        found = sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        np.testing.assert_array_equal(found if colour else found[..., None], frame.transpose(1, 2, 0))


def test_noise_covers_images_as_the_schedule_says():
    schedule, images = Schedule.make("cosine", 100), torch.tensor(grey(SHOWN + 2))
    found = noising(schedule, Pixels((1, 8, 8)), images, [100, 50, 0], seed=1)
    assert found.labels == ["t = 100 of 100", "t = 50 of 100", "t = 0 of 100"]
    np.testing.assert_array_equal(found.frames[-1, 0], np.hstack(images[:SHOWN, 0].numpy()))
    assert found.frames.shape == (3, 1, 8, 8 * SHOWN)


@torch.no_grad()
def test_the_map_decodes_the_place_at_which_its_dots_lie():
    """In two dimensions, where the plane is the latent space itself."""
    vae, test = make_vae(2), ImageSet(grey(60), np.arange(60) % 3, ("a", "b", "c"))
    found = latent_plane(vae, test)
    assert found is not None and found.film.frames.shape == (SIDE**2, 1, 8, 8)
    means = posterior_means(vae, torch.tensor(test.images), None)
    step = 1 / (SIDE - 1)
    nodes = np.round(found.points / step).astype(int)
    near = np.flatnonzero(
        (np.abs(found.points - nodes * step) < 0.1 * step).all(1) & (found.points.min(1) >= 0)
    )
    near = near[(found.points[near] <= 1).all(1)]
    assert len(near)
    decoded = from_unit(vae.decode(means)).numpy().astype(int)
    for i in near:
        column, row = nodes[i]
        assert np.abs(found.film.frames[row * SIDE + column].astype(int) - decoded[i]).max() <= 2


def test_the_map_of_one_dimension_is_none_and_many_classes_have_no_legend():
    assert latent_plane(make_vae(1), ImageSet(grey(9))) is None
    names = tuple(f"class {i}" for i in range(60))
    found = latent_plane(make_vae(3), ImageSet(grey(60), np.arange(60), names))
    assert found is not None
    shown = latent_map(found, names)
    assert shown["classes"] == [] and len({dot["colour"] for dot in shown["dots"]}) > 40


@torch.no_grad()
def test_a_walk_begins_and_ends_at_what_the_vae_makes_of_the_images():
    vae, images = make_vae(4), grey(6)
    found = walk(vae, ImageSet(images))
    assert found is not None and len(found.frames) == len(found.labels) == WALK
    decoded = from_unit(vae.decode(vae.encode(torch.tensor(images).float() / 255)[0])).numpy()
    np.testing.assert_array_equal(found.frames[0, 0], np.hstack(decoded[:3, 0]))
    np.testing.assert_array_equal(found.frames[-1, 0], np.hstack(decoded[3:, 0]))
    assert walk(vae, ImageSet(images[:1])) is None


def test_rulers_order_their_rows_between_the_best_and_the_worst():
    records = {
        name: json.loads((RECORDS / f"{name}.json").read_text()) for name in ("reference", "vae", "ddpm")
    }
    found = rulers({name: records[name] for name in ("vae", "ddpm")}, records["reference"])
    assert [ruler["name"] for ruler in found] == list(records["reference"]["instruments"])
    for ruler in found:
        labels, places = zip(*((row["label"], float(row["place"])) for row in ruler["rows"]), strict=True)
        assert labels[:3] == ("real", "DDPM", "VAE") and ruler["sees"]
        assert places[0] == 0 and places[-1] == 100 and list(places) == sorted(places)
    ratio = records["ddpm"]["instruments"]["efficientnet-lite0-112px"]["ratio_to_real"]["mean"]
    [ddpm] = [row for row in found[1]["rows"] if row["label"] == "DDPM"]
    assert ddpm["times"] == f"{ratio:.3g} times"
    assert rulers({}, {"instruments": {}}) == []


def test_curves_reach_from_the_highest_to_the_lowest_value(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("images,a,b\n100,1.0,\n200,0.1,0.01\n")
    shown = chart(path, {"a": "first", "b": "second", "c": "missing"})
    assert shown is not None
    assert [(line["name"], line["points"]) for line in shown["lines"]] == [
        ("first", f"{WIDE / 2:.1f},0.0 {WIDE:.1f},{HIGH / 2:.1f}"),
        ("second", f"{WIDE:.1f},{HIGH:.1f}"),
    ]
    path.write_text("images,a,b\n100,2.0,\n200,-2.0,\n")
    negative = chart(path, {"a": "first", "b": "without a value"})
    assert negative is not None and negative["axis"] == "linear" and shown["axis"] == "log"
    assert [line["points"] for line in negative["lines"]] == [f"{WIDE / 2:.1f},0.0 {WIDE:.1f},{HIGH:.1f}"]
    path.write_text("images,a\n100,1.0\n")
    assert chart(path, {"a": "first"}) is None
    path.write_text("images\n")
    assert chart(path, {"a": "first"}) is None


def test_the_curve_of_log_snr_has_a_mark_for_each_time():
    log_snr = Schedule.make("linear", 50).log_snr.tolist()
    shown = log_snr_chart(log_snr, [50, 1, 0])
    first, second, last = shown["marks"]
    assert (first["x"], first["y"]) == (f"{WIDE:.1f}", f"{HIGH:.1f}") and second["y"] == "0.0"
    assert last["value"] == "∞" and first["value"] == f"{log_snr[50]:.1f}"


def test_a_name_cannot_break_the_page(tmp_path):
    reel = film(Film(grey(2), ["<b>&\"'", "t"]))
    nothing = {"charts": [], "rulers": [], "models": [], "map": None, "walk": None, "plane": False}
    text = {"split": "test", "sha256": "0", "trained": "1", "n": "1", "sampling": {}, "classes": []}
    snr = log_snr_chart(Schedule.make("cosine", 5).log_snr.tolist(), [5, 0])
    denoising = {"x_t": reel, "x_0": reel, "real": reel, "start": 0, "snr": snr}
    films = {"denoising": denoising, "samplers": reel, "samplers_start": 0, "guidance": None}
    write_page(tmp_path / "page.html", set="<script>alert(1)</script>", **films, **nothing, **text)
    page = (tmp_path / "page.html").read_text()
    assert "alert" not in page.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "") and "<b>" not in page
