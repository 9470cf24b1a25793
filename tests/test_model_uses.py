"""A model in hand: what reconstruct, interpolate, inpaint and nll do, in Python and as commands, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from tiny_checkout import SHAPE, T, make_checkout

import rediffuse
from rediffuse.cli import main
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.images.pixels import from_unit, to_signed, to_unit
from rediffuse.inference.likelihood import variational_bound
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.guidance import guided
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import bits_per_dim, elbo


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkout(tmp_path / "checkout", precision="float32")
    monkeypatch.chdir(tmp_path / "checkout")
    return tmp_path / "checkout"


def some(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, (n, *SHAPE)).astype(np.uint8)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_what_a_model_does_in_python(model: str) -> None:
    loaded = rediffuse.load(model)
    images = some(70)
    assert loaded.generate(3, seed=2).shape == (3, *SHAPE)
    assert loaded.reconstruct(images).shape == images.shape
    assert loaded.interpolate(images[0], 5, 4).shape == (4, *SHAPE)
    assert loaded.nll(images[:2]).shape == (2,)


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_an_image_comes_out_the_same_whatever_else_is_asked_for(model: str) -> None:
    loaded, images = rediffuse.load(model), some(70)
    np.testing.assert_array_equal(loaded.reconstruct(images)[:3], loaded.reconstruct(images[:3]))
    np.testing.assert_array_equal(loaded.nll(images[:5])[:2], loaded.nll(images[:2]))


def test_a_vae_reconstructs_by_its_means() -> None:
    vae, images = load_model(VAE, Path("data/models/vae"), torch.device("cpu")), some(3)
    with torch.inference_mode():
        expected = from_unit(vae.decode(vae.encode(to_unit(torch.from_numpy(images)))[0]))
    assert np.abs(rediffuse.load("vae").reconstruct(images).astype(int) - expected.numpy()).max() <= 1  # other batch, other rounding


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_a_walk_begins_and_ends_where_it_should(model: str) -> None:
    loaded, images = rediffuse.load(model), some(2)
    walk = loaded.interpolate(images[0], images[1], 5)
    ends = loaded.reconstruct(images)
    assert np.abs(walk[[0, 4]].astype(int) - ends).max() <= 1
    assert not np.array_equal(walk[1], walk[2])


def test_a_seed_stands_for_its_first_image() -> None:
    settings = {"sampler": "ddim", "steps": T, "spacing": "even"}
    loaded = rediffuse.load("ddpm", **settings)
    plain = loaded.interpolate(3, 4, 2, label=1, steps=T)
    for image, seed in zip(plain, (3, 4), strict=True):
        assert np.abs(image.astype(int) - loaded.generate(1, seed=seed, label=1)[0]).max() <= 1


def test_bits_are_those_of_the_bounds() -> None:
    images = some(2)
    whole = np.concatenate([images, np.repeat(images[-1:], 62, 0)])
    vae = load_model(VAE, Path("data/models/vae"), torch.device("cpu"))
    denoiser = load_model(Denoiser, Path("data/models/ddpm"), torch.device("cpu"))
    with torch.inference_mode():
        eps = torch.randn(64, vae.latent_dim, generator=shard_generator(7, 0))
        nats = elbo(vae, to_unit(torch.from_numpy(whole)), eps).total[:2]
        bound = variational_bound(guided(denoiser), denoiser.schedule, to_signed(torch.from_numpy(whole)), None, shard_generator(7, 0))
    assert rediffuse.load("vae").nll(images, seed=7).tolist() == pytest.approx([bits_per_dim(vae, each) for each in nats.tolist()])
    assert rediffuse.load("ddpm").nll(images, seed=7).tolist() == pytest.approx(bound.total[:2].tolist())


def test_inpainting_keeps_what_is_dark_in_the_mask() -> None:
    image, mask = some(1)[0], np.zeros(SHAPE[1:], bool)
    mask[:, :3] = True
    filled = rediffuse.load("ddpm").inpaint(image, mask, 3, seed=2, steps=4, rounds=2)
    assert (filled[:, :, :, 3:] == image[:, :, 3:]).all()
    assert len({one.tobytes() for one in filled}) == 3
    np.testing.assert_array_equal(rediffuse.load("ddpm").inpaint(image, mask, 1, seed=2, steps=4, rounds=2)[0], filled[0])


def test_settings_take_the_place_of_those_it_comes_with() -> None:
    np.testing.assert_array_equal(rediffuse.load("ddpm", steps=5).generate(2), rediffuse.load("ddpm", steps=5).generate(2))
    assert not np.array_equal(rediffuse.load("ddpm", steps=5).generate(2), rediffuse.load("ddpm", steps=2).generate(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rediffuse.load("ddpm", typo=1), "typo"),
        (lambda: rediffuse.load("vae", steps=3), "belongs to the ddpm"),
        (lambda: rediffuse.load("ddpm").reconstruct(some(2)[:, :, :4]), r"must be uint8 \(n, 1, 8, 8\)"),
        (lambda: rediffuse.load("ddpm").reconstruct(some(2).astype(float)), "got float64"),  # type: ignore[arg-type]
        (lambda: rediffuse.load("ddpm").interpolate(1, 2, 1), "at least 2, got 1"),
        (lambda: rediffuse.load("ddpm").interpolate(1, 2, steps=T + 1), f"from 1 to T, the {T} steps"),
        (lambda: rediffuse.load("ddpm").interpolate(-1, 2), "seed must be an integer from 0"),
        (lambda: rediffuse.load("vae").generate(2, label="Bag"), "without labels"),
        (lambda: rediffuse.load("ddpm").inpaint(some(1)[0], np.zeros((8, 8), bool)), "is true .* somewhere"),
        (lambda: rediffuse.load("ddpm").inpaint(some(1)[0], np.ones((4, 4), bool)), "8 x 8 pixels"),
        (lambda: rediffuse.load("ddpm").inpaint(some(1)[0], np.ones((8, 8), bool), rounds=0), "rounds must be at least 1"),
        (lambda: rediffuse.load("vae").inpaint(some(1)[0], np.ones((8, 8), bool)), "take a DDPM"),
        (lambda: rediffuse.load("ddpm").nll(some(1), evaluations=0), "evaluations must be at least 1"),
        (lambda: rediffuse.load("ddpm").nll(some(1), evaluations=T), f"between 1 and T - 1 \\({T - 1}\\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


# The commands


def files(n: int, side: int = 8) -> list[str]:
    for i in range(n):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (side, side)).astype(np.uint8)).save(f"{i}.png")
    return [f"{i}.png" for i in range(n)]


@pytest.mark.parametrize("n", [1, 3, 10, 13])
def test_reconstruct_shows_images_above_what_comes_back(n: int) -> None:
    run("reconstruct", "out.png", *files(n), "--model", "vae")
    run("reconstruct", "out.npz", *files(n), "--model", "vae")
    assert Image.open("out.png").size[1] > Image.open("out.png").size[0] / max(n, 2) / 2
    with np.load("out.npz") as arrays:
        assert arrays["images"].shape == (n, *SHAPE)


def test_interpolate_takes_images_and_seeds() -> None:
    a, b = files(2, side=20)
    for ends in ((a, b), (a, "4"), ("3", "4")):
        run("interpolate", "out.npz", *ends, "-n", "5", "--steps", "3", "--label", "bag")
        with np.load("out.npz") as arrays:
            assert arrays["images"].shape == (5, *SHAPE)


def test_inpaint_reads_a_mask() -> None:
    [image] = files(1)
    Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, 0).astype(np.uint8)).save("mask.png")
    run("inpaint", "out.npz", image, "mask.png", "-n", "2", "--steps", "3", "--rounds", "2")
    with np.load("out.npz") as arrays:
        assert (arrays["images"][:, 0, :, :4] == np.asarray(Image.open(image))[:, :4]).all()


def test_nll_prints_a_line_for_each_image_and_their_mean() -> None:
    names = files(2)
    lines = run("nll", *names, "--evaluations", "3").splitlines()
    assert len(lines) == 3 and lines[2].endswith("mean, bits per dimension")
    found = json.loads(run("nll", *names, "--evaluations", "3", "--json"))
    assert list(found["images"]) == names
    assert found["mean"] == pytest.approx(sum(found["images"].values()) / 2)
    assert [float(line.split()[0]) for line in lines] == pytest.approx([*found["images"].values(), found["mean"]], abs=6e-4)


def test_files_that_are_no_images_are_all_named() -> None:
    Path("a.png").write_text("no image")
    result = CliRunner().invoke(main, ["nll", *files(1), "a.png", "missing.png"])
    assert result.exit_code == 1 and "a.png" in result.output and "missing.png" in result.output and "0.png" not in result.output


@pytest.mark.parametrize("command", ["generate", "reconstruct", "interpolate", "inpaint", "nll"])
def test_help_has_an_example(command: str) -> None:
    assert f"rediffuse {command} " in run(command, "--help").partition("Example")[2]
