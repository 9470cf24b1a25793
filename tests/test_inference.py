"""Likelihood, inpainting and inversion where the truth is known; a loaded model, and the commands on it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from tiny_checkout import SHAPE, T, make_checkout
from torch import Tensor

import rediffuse
from rediffuse.cli import main
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.images.pixels import from_unit, to_signed, to_unit
from rediffuse.inference.inpainting import repaint
from rediffuse.inference.inversion import invert, slerp
from rediffuse.inference.likelihood import LEVELS, stratified_times, variational_bound
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import Denoise, ddim, even_times
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import bits_per_dim, elbo

f64 = torch.float64


def generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=generator(seed))


# Likelihood of pixels that are independent, with probabilities P of the grey levels

VALUES = torch.linspace(-1, 1, LEVELS, dtype=f64)
P = torch.softmax(3 * torch.sin(VALUES * 7), 0)


def pixel_denoiser(schedule: Schedule) -> Denoise:
    """E[x_0 | x_t]."""

    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, variance = schedule.alpha_bar[t[0]].sqrt(), schedule.one_minus_alpha_bar[t[0]]
        log_p = P.log() - (x_t[..., None] - alpha * VALUES).square() / (2 * variance)
        return log_p.softmax(-1) @ VALUES

    return denoise


def pixels(n: int) -> Tensor:
    return VALUES[torch.multinomial(P, n, replacement=True, generator=generator(1))].reshape(-1, 1, 10, 10)


def test_the_bound_of_the_true_denoiser_nears_the_probability_from_above() -> None:
    T, x_0 = 1000, pixels(1000)
    truth = -P.log2()[((x_0 + 1) * (LEVELS - 1) / 2).round().long()].mean().item()
    even_in_log_snr = torch.linspace(14, -14, T, dtype=f64)
    schedule = Schedule(torch.cat([torch.tensor([math.inf], dtype=f64), even_in_log_snr]))
    bound = variational_bound(pixel_denoiser(schedule), schedule, x_0, None, generator()).mean().item()
    # Where pixels look Gaussian, a step of h in log SNR costs (exp(h) - 1 - h) / 2 nats too much, on at most
    # 14 / h steps to SNR 1.
    h = 28 / (T - 1)
    assert truth - 0.03 < bound < truth + (math.expm1(h) - h) / 2 * 14 / h / math.log(2) + 0.03


def test_the_bound_from_some_times_is_unbiased() -> None:
    schedule, x_0 = Schedule.make("cosine", 60), pixels(400)
    denoise = pixel_denoiser(schedule)
    whole = variational_bound(denoise, schedule, x_0, None, generator()).mean()
    parts = []
    for seed in range(200):
        random = generator(seed)
        times = stratified_times(60, 6, random)
        parts.append(variational_bound(denoise, schedule, x_0, None, random, times=times).mean())
    found = torch.stack(parts)
    assert abs(found.mean() - whole) < 4 * found.std() / math.sqrt(len(found)) + 0.008 * whole


def test_stratified_times_cover_2_to_T_evenly() -> None:
    counts = torch.zeros(11)
    for seed in range(2000):
        times = stratified_times(10, 3, generator(seed))
        assert [(t - 2) // 3 for t in times] == [0, 1, 2]
        counts[times] += 1
    assert counts[:2].sum() == 0 and (counts[2:] / 2000 - 1 / 3).abs().max() < 0.05


# Inpainting and inversion of a Gaussian

MEAN = torch.tensor([0.2, -0.1], dtype=f64)
COVARIANCE = torch.tensor([[0.3, 0.2], [0.2, 0.25]], dtype=f64)


def gaussian_denoiser(schedule: Schedule) -> Denoise:
    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha_bar = schedule.alpha_bar[t[0]].item()
        of_x_t = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=f64)
        alpha = math.sqrt(alpha_bar)
        return MEAN + (x_t - alpha * MEAN) @ (alpha * COVARIANCE @ torch.linalg.inv(of_x_t)).T

    return denoise


def test_inpainting_nears_the_conditional_distribution_with_rounds_and_steps() -> None:
    n, schedule = 5000, Schedule.make("cosine", 400)
    x_0, known = torch.tensor([0.9, 0.0], dtype=f64).expand(n, 2), torch.tensor([True, False])
    gain = COVARIANCE[1, 0] / COVARIANCE[0, 0]
    mean, variance = MEAN[1] + gain * (0.9 - MEAN[0]), COVARIANCE[1, 1] - gain * COVARIANCE[0, 1]
    errors = []
    for rounds, steps in [(1, 50), (5, 100), (20, 400)]:
        random, times = generator(3), even_times(schedule, steps)

        def noise(random: torch.Generator = random) -> Tensor:
            return torch.randn(n, 2, dtype=f64, generator=random)

        denoise, x_T = gaussian_denoiser(schedule), normal(n, 2)
        x = repaint(denoise, schedule, x_0, known, x_T, None, times=times, rounds=rounds, noise=noise)
        assert (x[:, 0] == 0.9).all()
        errors.append(abs(x[:, 1].mean() - mean).item())
    assert errors[0] > 0.1 > errors[1] > errors[2] and errors[2] < 0.02
    assert x[:, 1].var().item() == pytest.approx(variance.item(), rel=0.15)


def test_inversion_and_ddim_lead_back_the_nearer_the_more_steps() -> None:
    schedule, x_0 = Schedule.make("cosine", 1000), MEAN + normal(500, 2) @ torch.linalg.cholesky(COVARIANCE).T
    denoise, errors = gaussian_denoiser(schedule), []
    for steps in (50, 200, 1000):
        times = even_times(schedule, steps)
        x_T = invert(denoise, schedule, x_0, None, times=times)
        back = ddim(denoise, schedule, x_T, None, times=times, noise=lambda: pytest.fail("drew noise"))
        errors.append((back - x_0).square().mean().sqrt().item())
    assert errors[2] < 0.01 and errors[0] > errors[1] > errors[2]
    assert x_T.mean().abs() < 0.1 and x_T.std().item() == pytest.approx(1, abs=0.1)


def test_slerp_keeps_the_norm_and_begins_and_ends_where_it_should() -> None:
    a, b = normal(1, 20, 20, seed=1), normal(1, 20, 20, seed=2)
    walk = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(walk[[0, 4]], torch.stack([a, b]))
    norms = walk.flatten(1).norm(dim=1)
    assert (norms - norms[0]).abs().max() < abs(norms[0] - norms[4]) + 0.5
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3]))[0], a)


# A loaded model


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkout(tmp_path / "checkout", precision="float32")
    monkeypatch.chdir(tmp_path / "checkout")
    return tmp_path / "checkout"


def some(n: int) -> NDArray[np.uint8]:
    return np.random.RandomState(0).randint(0, 256, (n, *SHAPE)).astype(np.uint8)


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_an_image_comes_out_the_same_whatever_else_is_asked_for(model: str) -> None:
    loaded, images = rediffuse.load(model), some(70)
    back = loaded.reconstruct(images)
    assert back.shape == images.shape and back.dtype == np.uint8
    np.testing.assert_array_equal(back[:3], loaded.reconstruct(images[:3]))
    np.testing.assert_array_equal(loaded.nll(images[:5])[:2], loaded.nll(images[:2]))
    walk = loaded.interpolate(images[0], images[1], 5)
    assert np.abs(walk[[0, 4]].astype(int) - back[:2]).max() <= 1 and not np.array_equal(walk[1], walk[2])


def test_a_vae_reconstructs_by_its_means(checkout: Path) -> None:
    vae, images = load_model(VAE, checkout / "data/models/vae", torch.device("cpu")), some(3)
    with torch.inference_mode():
        expected = from_unit(vae.decode(vae.encode(to_unit(torch.from_numpy(images)))[0]))
    found = rediffuse.load("vae").reconstruct(images)
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 1  # other batch, other rounding


@pytest.mark.usefixtures("checkout")
def test_a_seed_means_its_first_image_and_settings_can_be_changed() -> None:
    loaded = rediffuse.load("ddpm", sampler="ddim", steps=T, spacing="even")
    ends = loaded.interpolate(3, 4, 2, label=1, steps=T)
    for image, seed in zip(ends, (3, 4), strict=True):
        assert np.abs(image.astype(int) - loaded.generate(1, seed=seed, label=1)[0]).max() <= 1
    five, again, two = (rediffuse.load("ddpm", steps=steps).generate(2) for steps in (5, 5, 2))
    assert np.array_equal(five, again) and not np.array_equal(five, two)


def test_bits_are_those_of_the_bounds(checkout: Path) -> None:
    images, cpu = some(2), torch.device("cpu")
    shard = torch.from_numpy(np.concatenate([images, np.repeat(images[-1:], 62, 0)]))
    vae = load_model(VAE, checkout / "data/models/vae", cpu)
    denoiser = load_model(Denoiser, checkout / "data/models/ddpm", cpu)
    with torch.inference_mode():
        eps = torch.randn(64, vae.latent_dim, generator=shard_generator(7, 0))
        nats = elbo(vae, to_unit(shard), eps).total[:2]
        random, x_0 = shard_generator(7, 0), to_signed(shard)
        bound = variational_bound(guided(denoiser), denoiser.schedule, x_0, None, random)[:2]
    expected = {"vae": [bits_per_dim(vae, each) for each in nats.tolist()], "ddpm": bound.tolist()}
    for model, bits in expected.items():
        assert rediffuse.load(model).nll(images, seed=7).tolist() == pytest.approx(bits)


@pytest.mark.usefixtures("checkout")
def test_inpainting_keeps_what_is_not_in_the_mask() -> None:
    image, mask, how = some(1)[0], np.zeros(SHAPE[1:], bool), {"seed": 2, "steps": 4, "rounds": 2}
    mask[:, :3] = True
    filled, first = (rediffuse.load("ddpm").inpaint(image, mask, n, **how) for n in (3, 1))
    assert (filled[:, :, :, 3:] == image[:, :, 3:]).all()
    assert len({one.tobytes() for one in filled}) == 3 and np.array_equal(first[0], filled[0])


IMAGES, MASK = some(2), np.ones(SHAPE[1:], bool)


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae, ddpm: rediffuse.load("ddpm", typo=1), "typo"),
        (lambda vae, ddpm: ddpm.reconstruct(IMAGES[:, :, :4]), r"must be uint8 \(n, 1, 8, 8\)"),
        (lambda vae, ddpm: ddpm.reconstruct(IMAGES.astype(float)), "got float64"),
        (lambda vae, ddpm: ddpm.interpolate(1, 2, 1), "n, .* at least 2, got 1"),
        (lambda vae, ddpm: ddpm.interpolate(1, 2, steps=T + 1), f"steps .* at most T, the {T}"),
        (lambda vae, ddpm: ddpm.interpolate(-1, 2), "seed must be an integer from 0"),
        (lambda vae, ddpm: ddpm.inpaint(IMAGES[0], ~MASK), "mask .* true .* somewhere"),
        (lambda vae, ddpm: ddpm.inpaint(IMAGES[0], MASK[:4]), "mask .* 8 x 8 pixels"),
        (lambda vae, ddpm: ddpm.inpaint(IMAGES[0], MASK, rounds=0), "rounds must be at least 1"),
        (lambda vae, ddpm: vae.inpaint(IMAGES[0], MASK), "take a DDPM"),
        (lambda vae, ddpm: ddpm.nll(IMAGES, evaluations=0), "evaluations must be at least 1"),
        (lambda vae, ddpm: ddpm.nll(IMAGES, evaluations=T), rf"evaluations .* \({T - 1}\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, words: str) -> None:
    vae, ddpm = rediffuse.load("vae"), rediffuse.load("ddpm")
    with pytest.raises(UserError, match=words):
        call(vae, ddpm)


# The commands


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def arrays(*arguments: str) -> NDArray[np.uint8]:
    """The images that the command writes."""
    run(arguments[0], "out.npz", *arguments[1:])
    with np.load("out.npz") as file:
        return np.asarray(file["images"])


def files(n: int, side: int = 8, prefix: str = "") -> list[str]:
    names = [f"{prefix}{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        pixels = np.random.RandomState(i).randint(0, 256, (side, side)).astype(np.uint8)
        Image.fromarray(pixels).save(name)
    return names


@pytest.mark.usefixtures("checkout")
def test_the_commands_write_images_and_print_bits() -> None:
    (a, b), (large, _) = files(2), files(2, side=20, prefix="large-")
    assert arrays("reconstruct", a, b, "--model", "vae").shape == (2, *SHAPE)
    run("reconstruct", "out.png", a, b, "--model", "vae")
    assert np.array_equal(np.asarray(Image.open("out.png"))[2:18:2, 2:18:2], np.asarray(Image.open(a)))
    for ends in ((a, large), (a, "4"), ("3", "4")):
        found = arrays("interpolate", *ends, "-n", "5", "--steps", "3", "--label", "bag")
        assert found.shape == (5, *SHAPE)
    Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, 0).astype(np.uint8)).save("mask.png")
    found = arrays("inpaint", a, "mask.png", "-n", "2", "--steps", "3", "--rounds", "2")
    assert (found[:, 0, :, :4] == np.asarray(Image.open(a))[:, :4]).all()
    bits = json.loads(run("nll", a, b, "--evaluations", "3", "--json"))
    assert list(bits["images"]) == [a, b]
    assert bits["mean"] == pytest.approx(sum(bits["images"].values()) / 2)
    lines = run("nll", a, b, "--evaluations", "3").splitlines()
    expected = [*bits["images"].values(), bits["mean"]]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(expected, abs=6e-4)
    Path("a.png").write_text("no image")
    assert "a.png cannot be read" in CliRunner().invoke(main, ["nll", a, "a.png"]).output
