"""The VAE against torch.distributions and numerical integration; with labels, also through the stages."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_training import workspace
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.distributions import kl_divergence as exact_kl_divergence

import rediffuse
from rediffuse.commands.generate import generate
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.images.pixels import to_unit
from rediffuse.images.sample_sets import load_sets
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model
from rediffuse.vae.model import MIN_SIGMA, VAE
from rediffuse.vae.objective import (
    ELBO,
    active_units,
    bits_per_dim,
    elbo,
    entropy_floor,
    importance_weighted_bound,
    negative_log_likelihood,
    training_loss,
)
from rediffuse.vae.prior import CHUNK, fit_mixture, mixture, posterior_means, standard_normal
from rediffuse.vae.step import VAEStep, final_measures, measure
from stages import sample_vae, train_vae

SETTINGS = load_params(Path(__file__).resolve().parents[1] / "params.yaml").vae
SHAPE, NAMES = (1, 8, 8), ("dark", "bright")
both_likelihoods = pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
both_latents = pytest.mark.parametrize("latent_channels", [0, 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=seeded(1))


def grey(n: int) -> Tensor:
    return (pixels(n) * 255).round().to(torch.uint8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def make_vae(shape: Any = SHAPE, *, seed: int = 0, scale: float = 1.0, **changes: Any) -> VAE:
    """A small VAE; scale > 1 enlarges its weights, so that latents matter without training."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"latent_dim": 3, "latent_channels": 0, "channels": [4], "hidden": 16}
    vae = VAE(shape, **(settings | {"likelihood": "bernoulli"} | changes))
    for name, parameter in vae.named_parameters():
        if name != "log_sigma" and not name.endswith("by_label"):
            parameter.data *= scale
    return vae


def likelihood_of(vae: VAE, z: Tensor) -> Independent:
    """p(x|z) in float64, from torch.distributions."""
    logits = vae.decode_logits(z).double()
    if vae.likelihood == "bernoulli":
        return Independent(Bernoulli(logits=logits, validate_args=False), 3)  # grey values, not only 0 and 1
    return Independent(Normal(logits.sigmoid(), vae.sigma().double()), 3)


# The terms of the bound


@both_likelihoods
def test_elbo_is_that_of_torch_distributions(likelihood):
    shape = (3, 7, 5)
    vae, x, eps = make_vae(shape, likelihood=likelihood, scale=2), pixels(6, shape), normal(6, 3)
    vae.log_sigma.data.fill_(math.log(0.2))
    mean, log_variance = vae.encode(x)
    q = Normal(mean, (log_variance / 2).exp())
    z = q.mean + q.stddev * eps
    nats, kl = -likelihood_of(vae, z).log_prob(x.double()), exact_kl_divergence(q, Normal(0.0, 1.0))
    terms = elbo(vae, x, eps)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.reconstruction.double(), nats, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(terms.total.double(), nats + kl.double().sum(1), rtol=1e-5, atol=1e-4)
    terms.reconstruction.sum().backward()  # gradients flow through the sample into both heads
    for head in (vae.mean, vae.log_variance):
        assert head.weight.grad.abs().sum() > 0
    assert (vae.log_sigma.grad is not None) == (likelihood == "gaussian")  # a Bernoulli has none to learn


def test_the_bound_stays_finite_at_its_extremes():
    vae = make_vae()
    vae.decoder[-1].weight.data.zero_()
    vae.decoder[-1].bias.data.fill_(500.0)  # sigmoid gives exactly 1: a logarithm of 1 - 1 would be infinite
    assert negative_log_likelihood(vae, torch.zeros(1, *SHAPE), torch.zeros(1, 3)).item() == 64 * 500
    vae = make_vae(likelihood="gaussian")
    vae.log_sigma.data.fill_(-100.0)
    vae.log_variance.bias.data.fill_(1e6)
    assert vae.sigma().item() == pytest.approx(MIN_SIGMA) == pytest.approx(0.5 / 255)
    assert elbo(vae, pixels(2), torch.ones(2, 3)).total.isfinite().all()


# The bound as a bound: a latent of one dimension can be integrated out


def exact_negative_log_likelihood(vae: VAE, x: Tensor) -> Tensor:
    """-log of the integral of p(x|z) p(z) over z, float64 (B,), by the trapezoid rule."""
    z = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(z)
    likelihood = likelihood_of(vae, z.float()[:, None])
    log_joint = torch.stack([likelihood.log_prob(image.double()) for image in x], 1) + log_prior[:, None]
    log_joint[[0, -1]] -= math.log(2)
    return -(log_joint.logsumexp(0) + math.log(18 / 6000))


@both_likelihoods
@torch.no_grad()
def test_importance_weighted_bound_is_the_elbo_and_tightens_to_the_exact_likelihood(likelihood):
    vae = make_vae((1, 4, 4), latent_dim=1, likelihood=likelihood, scale=2.5, seed=3)
    vae.log_sigma.data.fill_(math.log(0.4))
    x = pixels(2, (1, 4, 4))
    exact = exact_negative_log_likelihood(vae, x)
    many = x.repeat_interleave(4000, 0)
    elbos = elbo(vae, many, normal(len(many), 1, seed=6)).total.double().view(len(x), -1)
    gaps, errors = [elbos.mean(1) - exact], [elbos.std(1) / math.sqrt(4000)]
    for k, repeats in [(1, 2000), (4, 500), (32, 60), (2000, 1)]:
        many = x.repeat_interleave(repeats, 0)
        bounds = importance_weighted_bound(vae, many, k=k, generator=seeded(k)).double().view(len(x), -1)
        gaps.append(bounds.mean(1) - exact)
        errors.append(bounds.std(1) / math.sqrt(repeats) if repeats > 1 else torch.zeros(len(x)))
    assert ((gaps[0] - gaps[1]).abs() < 5 * (errors[0] + errors[1])).all()  # with one sample, on average
    for i, j in pairwise(range(1, 5)):
        assert (gaps[j] < gaps[i] + 4 * (errors[i] + errors[j])).all()
    assert gaps[1].max() > 0.05
    torch.testing.assert_close(gaps[-1], torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=0.03)


# What training minimises


def test_free_bits_cost_nothing_and_are_counted_per_dimension_on_the_batch_mean():
    kl = torch.tensor([[0.0, 2.0], [0.6, 2.0]], requires_grad=True)  # means 0.3 and 2.0
    terms = ELBO(torch.tensor([10.0, 12.0]), kl)
    loss = training_loss(terms, kl_weight=2.0, free_bits=0.5)
    assert loss.item() == pytest.approx(11 + 2 * (0.5 + 2.0))
    loss.backward()
    assert kl.grad is not None and kl.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert training_loss(terms, kl_weight=2.0, free_bits=0.0).item() == pytest.approx(11 + 2 * 2.3)


def step_of(seen: int, **settings: float) -> tuple[float, dict[str, float]]:
    vae, images = make_vae(), grey(16)
    step = VAEStep(**SETTINGS.model_copy(update=settings).select(VAEStep))
    loss, measures = step(vae, images, None, step.draw(vae, images.shape, seeded()), seen)
    return loss.item(), {name: (total / count).item() for name, (total, count) in measures.items()}


def test_a_step_weights_the_kl_but_logs_the_elbo_with_weight_one():
    for seen, weight in [(0, 0.0), (500, 1.5), (2000, 3.0)]:
        loss, logged = step_of(seen, beta=3.0, kl_warmup=1000, free_bits=0.0)
        assert loss == pytest.approx(logged["reconstruction"] + weight * logged["kl"], rel=1e-5)
        assert logged["elbo"] == pytest.approx(logged["reconstruction"] + logged["kl"], rel=1e-5)
    assert step_of(0, beta=3.0, free_bits=0.0)[1] == step_of(0, beta=0.0, free_bits=5.0)[1]


# Measures


@torch.no_grad()
@pytest.mark.parametrize("class_names", [(), ("a", "b", "c")])
def test_validation_is_the_elbo_of_each_image_with_the_same_noise_each_time(class_names):
    vae, images = make_vae(class_names=class_names), grey(CHUNK + 3)  # more than one chunk
    labels = torch.arange(len(images)) % 3 if class_names else None
    found, generator = measure(vae, images, labels, seed=3), seeded(3)
    assert found == measure(vae, images, labels, seed=3) != measure(vae, images, labels, seed=4)
    eps = torch.cat([torch.randn(n, 3, generator=generator) for n in (CHUNK, 3)])
    terms = elbo(vae, to_unit(images), eps, labels)
    assert found["kl"] == pytest.approx(terms.kl.sum(1).mean().item(), rel=1e-5)
    assert found["elbo"] == pytest.approx(terms.total.mean().item(), rel=1e-5)
    assert found["elbo"] == found["reconstruction"] + found["kl"]
    expected = vae.encode(to_unit(images), labels)[0]
    torch.testing.assert_close(posterior_means(vae, images, labels), expected, rtol=1e-5, atol=1e-6)


def test_active_units_are_those_whose_mean_varies_by_more_than_a_hundredth():
    unit = torch.tensor([-1.0, 1.0]).repeat(500)
    means = torch.stack([0 * unit + 7, 0.09 * unit, 0.11 * unit, 2 * unit], 1)  # 0, 0.0081, 0.0121, 4
    assert active_units(means) == 2


def test_the_floor_of_the_elbo_is_the_entropy_of_the_pixels():
    x = torch.tensor([[0.0, 1.0, 0.5, 0.25]]).view(1, 1, 2, 2)
    assert entropy_floor(x).item() == pytest.approx(3 * math.log(2) - 0.75 * math.log(3))
    perfect = x.clamp(1e-6, 1 - 1e-6).logit()  # of a decoder that gives back every grey value
    cost = torch.nn.functional.binary_cross_entropy_with_logits(perfect, x, reduction="sum")
    assert entropy_floor(x).item() == pytest.approx(cost.item(), abs=1e-4)


def test_bits_per_dim_are_those_of_the_probabilities_of_grey_levels():
    assert bits_per_dim(make_vae((3, 8, 8)), 192 * math.log(2)) == pytest.approx(1)
    vae, sigma = make_vae((1, 1, 1), likelihood="gaussian"), 0.05
    density = Normal(torch.tensor(0.5, dtype=torch.float64), sigma)
    levels = torch.arange(256, dtype=torch.float64)
    probabilities = density.cdf((levels + 0.5) / 255) - density.cdf((levels - 0.5) / 255)
    expected = torch.special.entr(probabilities).sum().item() / math.log(2)
    nats = -(probabilities * density.log_prob(levels / 255)).sum().item()
    assert bits_per_dim(vae, nats) == pytest.approx(expected, abs=1e-3)


@both_likelihoods
def test_final_measures_hold_every_number_of_the_report(likelihood):
    vae, labels = make_vae(likelihood=likelihood, scale=2, class_names=("a", "b", "c")), torch.arange(80) % 3
    test = grey(100)[80:], labels[:20]
    report = final_measures(vae, (grey(80), labels), test, seed=1)
    floor = ["floor"] if likelihood == "bernoulli" else []
    assert list(report["test"]) == ["elbo", "reconstruction", "kl", "bits_per_dim", *floor]
    assert report["test"].get("floor", 0) < report["test"]["reconstruction"]
    assert report["train"] == {"elbo": measure(vae, grey(80)[:20], test[1], seed=1)["elbo"]}
    assert report["test"]["elbo"] == measure(vae, *test, seed=1)["elbo"] > report["iwae_100"]
    assert report["active_units"] == active_units(posterior_means(vae, *test))
    assert ("sigma" in report) == (likelihood == "gaussian")


# The model


@both_latents
@pytest.mark.parametrize(("shape", "channels"), [((1, 28, 28), [4]), ((3, 17, 23), [2, 3, 4, 5])])
def test_decoder_restores_the_size_that_the_encoder_halved(shape, channels, latent_channels):
    vae = make_vae(shape, channels=channels, latent_channels=latent_channels, scale=5)
    halved = [math.ceil(size / 2 ** len(channels)) for size in shape[1:]]
    assert vae.latent_shape == ((2, *halved) if latent_channels else (3, 1, 1))
    mean, log_variance = vae.encode(pixels(2, shape))
    assert mean.shape == log_variance.shape == (2, vae.latent_dim)
    decoded = vae.decode(100 * normal(2, vae.latent_dim))
    assert decoded.shape == (2, *shape) and decoded.min() >= 0 and decoded.max() <= 1


# Priors


def test_standard_normal_prior():
    z = standard_normal(4)(50_000, seeded())
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.03)


def test_mixture_prior_draws_from_what_it_was_fitted_to():
    """A quarter at (-3, 0), stretched along y; the rest at (2, 1), correlated."""
    random = np.random.RandomState(0)
    first = random.multivariate_normal([-3, 0], [[0.2, 0], [0, 1.5]], size=750)
    second = random.multivariate_normal([2, 1], [[0.5, 0.4], [0.4, 0.6]], size=2250)
    means = np.concatenate([first, second]).astype(np.float32)
    prior = mixture(fit_mixture(means, components=2, seed=1))
    z = prior(40_000, seeded()).numpy()
    left = z[:, 0] < -1
    assert z.dtype == np.float32 and left.mean() == pytest.approx(0.25, abs=0.01)
    for drawn, fitted in [(z[left], means[means[:, 0] < -1]), (z[~left], means[means[:, 0] >= -1])]:
        np.testing.assert_allclose(drawn.mean(0), fitted.mean(0), atol=0.05)
        np.testing.assert_allclose(np.cov(drawn.T), np.cov(fitted.T), atol=0.06)
    again = mixture(fit_mixture(means, components=2, seed=1))
    assert torch.equal(prior(9, seeded()), again(9, seeded()))
    assert not torch.equal(prior(9, seeded()), again(9, seeded(1)))


def test_there_are_no_more_components_than_images(capsys):
    means = np.random.RandomState(0).normal(size=(10, 2)).astype(np.float32)
    fitted = fit_mixture(means, components=11, seed=0)
    assert len(fitted["weights"]) == 10 and fitted["asked"] == 11
    assert "asked" not in fit_mixture(means, components=10, seed=0)
    assert "sample.vae.components (11)" in capsys.readouterr().err
    assert torch.isfinite(mixture(fitted)(100, seeded())).all()


# Labels: the mathematics


def plain_of(vae: VAE, label: int) -> VAE:
    """The VAE of one label, unconditional: the label's rows of the weights are part of the biases."""
    plain = VAE(**vae.config | {"class_names": []})
    weights = vae.state_dict()
    plain.load_state_dict({key: value for key, value in weights.items() if not key.endswith("by_label")})
    for layers, of in ((plain.encoder, vae.encoder), (plain.decoder, vae.decoder)):
        first = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.ReLU))
        layers[first - 1].bias.data += of.by_label.data[label]
    return plain


@both_latents
@both_likelihoods
@torch.no_grad()
def test_given_a_label_it_is_the_vae_of_that_label(latent_channels, likelihood):
    how: Any = {"class_names": ("a", "b", "c"), "channels": [4, 6], "scale": 1.5}
    vae = make_vae(latent_channels=latent_channels, likelihood=likelihood, **how)
    y = torch.tensor([2, 0, 1, 1, 0, 2])
    x, eps = pixels(6), normal(6, vae.latent_dim)
    found, bounds = elbo(vae, x, eps, y), importance_weighted_bound(vae, x, y, k=5, generator=seeded(2))
    for label in range(3):
        plain, of = plain_of(vae, label), y == label
        expected = elbo(plain, x, eps, y)  # labels are ignored
        torch.testing.assert_close(found.reconstruction[of], expected.reconstruction[of])
        torch.testing.assert_close(found.kl[of], expected.kl[of])
        bound = importance_weighted_bound(plain, x, k=5, generator=seeded(2))
        torch.testing.assert_close(bounds[of], bound[of])
        torch.testing.assert_close(vae.decode(eps, y)[of], plain.decode(eps)[of])
    assert (found.total - elbo(vae, x, eps, (y + 1) % 3).total).abs().min() > 0.01


# Labels: from images to drawn images


def toy(n: int, *, labelled: bool = True) -> ImageSet:
    """Dark and bright images in turn, in each of which the left or the right half is the brighter one."""
    labels, random = np.arange(n, dtype=np.int64) % 2, np.random.RandomState(n)
    images = np.where(labels, 160, 20)[:, None, None, None] + random.randint(0, 11, (n, *SHAPE))
    left = random.randint(0, 2, n) == 1
    images[left, ..., :4] += 70
    images[~left, ..., 4:] += 70
    return ImageSet(images.astype(np.uint8), labels if labelled else None, NAMES if labelled else ())


def make_checkout(root: Path, changes: dict[str, Any], *, labelled: bool = True) -> None:
    wanted: dict[str, Any] = {"vae.conditional": True, "vae.channels": [16, 16]}
    wanted |= {"vae.kl_warmup": 4000, "seed": 3}  # other seeds end in optima that leave some halves untold
    durations = ("images", "log_every", "validate_every", "checkpoint_every")
    wanted |= {f"vae.training.{name}": 16_000 for name in durations}
    wanted |= {"vae.training.batch": 32, "vae.training.lr": 5e-3, "precision": "float32"}
    workspace(root, wanted | changes)
    sizes = {"train": 200, "validation": 20, "test": 40}
    splits = {name: toy(n, labelled=labelled) for name, n in sizes.items()}
    save_images(root / "data/pixels", splits, {"classes": NAMES if labelled else ()})


@pytest.fixture(scope="module", params=[0, 2], ids=["dense", "spatial"])
def trained(request, tmp_path_factory) -> Path:
    """A checkout whose VAE the stage has trained."""
    root = tmp_path_factory.mktemp("checkout") / "root"
    make_checkout(root, {"vae.latent_channels": request.param})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
        train_vae.main()
    return root


@pytest.fixture
def checkout(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return trained


def looks(images: NDArray[np.uint8] | Tensor) -> list[int]:
    """The class that each image looks like: 60 and 200 are the mean grey levels of the classes."""
    greys = np.asarray(images, np.float64).mean((1, 2, 3))
    near = np.minimum(np.abs(greys - 60), np.abs(greys - 200)) < 40
    assert near.mean() > 0.98, greys  # a latent far out may be off
    return [int(grey > 130) for grey in greys]


def brighter_half(images: NDArray[np.uint8] | Tensor) -> list[int]:
    """0: the left one, 1: the right one."""
    halves = np.asarray(images, np.float64).reshape(-1, 8, 2, 4).mean((1, 3))
    return list(halves.argmax(1))


@torch.no_grad()
def test_the_label_decides_the_class_and_the_latent_holds_the_rest(checkout):
    vae, test = load_model(VAE, checkout / "data/models/vae", torch.device("cpu")), toy(40)
    z = normal(50, vae.latent_dim)
    for label in (0, 1):
        assert looks(vae.decode(z, torch.full((50,), label)) * 255) == [label] * 50
    x, y = to_unit(torch.tensor(test.images)), torch.tensor(test.labels)
    for labels in (y, 1 - y):
        decoded = vae.decode(vae.encode(x, y)[0], labels) * 255
        assert looks(decoded) == labels.tolist() and brighter_half(decoded) == brighter_half(test.images)
    kl = json.loads((checkout / "metrics/train_vae.json").read_text())["test"]["kl"]
    assert 0.9 * np.log(2) < kl < 2 * np.log(2)  # a bit for the half; the class would take another one


@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_the_stage_and_generate_draw_the_labels_in_turn(checkout, prior):
    raw = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(raw.replace("prior: normal", f"prior: {prior}"))
    assert load_params().sample.vae.prior == prior
    sample_vae.main()
    generate("vae", "drawn.npz", n=1000, seed=3)
    (checkout / "params.yaml").write_text(raw)
    found = load_sets(checkout / "data/samples/vae", SHAPE, 2)
    assert found.labels.tolist() == looks(found.sets[0].images) == [0, 1] * 500
    assert looks(found.reconstructions) == toy(40).labels.tolist()
    with np.load("drawn.npz") as drawn:
        assert np.array_equal(drawn["images"], found.sets[0].images)
        assert np.array_equal(drawn["labels"], found.labels)


def test_a_loaded_model_takes_labels_by_name(checkout):
    model, of_class = rediffuse.load("vae"), toy(40).images[1::2]
    assert looks(model.generate(20, label="Bright")) == [1] * 20 and looks(model.generate(4)) == [0, 1, 0, 1]
    assert set(looks(model.reconstruct(of_class, label="bright"))) == {1}
    assert set(looks(model.interpolate(of_class[0], 3, 5, label="bright"))) == {1}
    assert (model.nll(of_class[:3], label="bright") < model.nll(of_class[:3], label="dark")).all()
    for use, *inputs in ((model.reconstruct, of_class), (model.interpolate, 1, 2), (model.nll, of_class)):
        for label in ({}, {"label": "grey"}):
            with pytest.raises(UserError, match=r"label.*0 dark, 1 bright"):
                use(*inputs, **label)


def test_without_labels_in_the_set_the_stages_make_an_unconditional_vae(tmp_path, monkeypatch):
    make_checkout(tmp_path / "root", {"vae.training.images": 640}, labelled=False)
    monkeypatch.chdir(tmp_path / "root")
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    train_vae.main()
    sample_vae.main()
    assert [path.name for path in Path("data/samples/vae/3").iterdir()] == ["images.npy"]
    with pytest.raises(UserError, match="without labels"):
        rediffuse.load("vae").generate(1, label="dark")
