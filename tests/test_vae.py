"""The VAE: its bounds against torch.distributions and numerical integration, its shapes, its priors."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.distributions import kl_divergence as exact_kl_divergence

from rediffuse.params import load_params
from rediffuse.vae.model import MIN_SIGMA, VAE, reparameterise
from rediffuse.vae.objective import (
    ELBO,
    active_units,
    bits_per_dim,
    elbo,
    importance_weighted_bound,
    kl_divergence,
    kl_weight,
    negative_log_likelihood,
    training_loss,
)
from rediffuse.vae.prior import fit_mixture, mixture, posterior_means, standard_normal
from rediffuse.vae.step import VAEStep, final_measures, measure

SETTINGS = load_params(Path(__file__).resolve().parents[1] / "params.yaml").vae


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(n, shape, seed=1):
    return torch.rand(n, *shape, generator=seeded(seed))


def make_vae(shape=(1, 8, 8), *, latent_dim=3, channels=(4,), hidden=16, likelihood="bernoulli", seed=0, scale=1.0) -> VAE:
    """A small VAE; scale > 1 enlarges its weights, so that latents matter without training."""
    torch.manual_seed(seed)
    vae = VAE(shape, latent_dim=latent_dim, latent_channels=0, channels=list(channels), hidden=hidden, likelihood=likelihood)
    for name, parameter in vae.named_parameters():
        if name != "log_sigma":
            parameter.data *= scale
    return vae


def patterns(n, size=8, seed=2) -> Tensor:
    """uint8 (n, 1, size, size): bars of random place and direction, grey on black, such as a tiny VAE can learn."""
    generator = seeded(seed)
    images = torch.zeros(n, 1, size, size)
    for image in images:
        at, across, grey = (int(torch.randint(high, (), generator=generator)) for high in (size - 1, 2, 100))
        bar = image[0].T if across else image[0]
        bar[at : at + 2] = (155 + grey) / 255
    return (images * 255).round().to(torch.uint8)


def likelihood_of(vae: VAE, z: Tensor) -> Independent:
    """p(x|z) in float64, from torch.distributions."""
    logits = vae.decode_logits(z).double()
    if vae.likelihood == "bernoulli":
        return Independent(Bernoulli(logits=logits, validate_args=False), 3)  # grey values, not only 0 and 1
    return Independent(Normal(logits.sigmoid(), vae.sigma().double()), 3)


# The terms of the bound


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(2, 50, 7, generator=seeded(), dtype=torch.float64) * 2
    expected = exact_kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_kl_is_the_mean_log_ratio_of_samples():
    mean, log_variance = torch.tensor([1.5, -0.3], dtype=torch.float64), torch.tensor([-1.0, 0.7], dtype=torch.float64)
    posterior = Normal(mean, (log_variance / 2).exp())
    z = reparameterise(mean, log_variance, torch.randn(400_000, 2, generator=seeded(), dtype=torch.float64))
    ratios = posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    error = ratios.std(0) / math.sqrt(len(ratios))
    assert ((kl_divergence(mean, log_variance) - ratios.mean(0)).abs() < 5 * error).all()


def test_kl_is_zero_at_the_prior_only():
    zeros = torch.zeros(1)
    assert kl_divergence(zeros, zeros).item() == 0
    assert kl_divergence(zeros + 0.1, zeros).item() > 0
    assert kl_divergence(zeros, zeros + 0.1).item() > 0


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
def test_likelihood_is_that_of_torch_distributions(likelihood, shape):
    vae = make_vae(shape, likelihood=likelihood, scale=2)
    vae.log_sigma.data.fill_(math.log(0.2))
    x, z = pixels(6, shape), torch.randn(6, 3, generator=seeded())
    torch.testing.assert_close(
        negative_log_likelihood(vae, x, z).double(), -likelihood_of(vae, z).log_prob(x.double()), rtol=1e-5, atol=1e-4
    )


def test_bernoulli_likelihood_is_finite_for_certain_and_wrong_pixels():
    vae = make_vae()
    vae.decoder[-1].weight.data.zero_()
    vae.decoder[-1].bias.data.fill_(500.0)  # sigmoid gives exactly 1: a logarithm of 1 - 1 would be infinite
    nats = negative_log_likelihood(vae, torch.zeros(1, 1, 8, 8), torch.zeros(1, 3))
    assert nats.item() == pytest.approx(64 * 500)


def test_sigma_stops_at_half_a_grey_level():
    vae = make_vae(likelihood="gaussian")
    vae.log_sigma.data.fill_(-100.0)
    assert vae.sigma().item() == pytest.approx(MIN_SIGMA) == pytest.approx(0.5 / 255)
    assert negative_log_likelihood(vae, pixels(2, (1, 8, 8)), torch.zeros(2, 3)).isfinite().all()


def test_elbo_is_reconstruction_plus_kl_of_the_reparameterised_sample():
    vae, x, eps = make_vae(), pixels(5, (1, 8, 8)), torch.randn(5, 3, generator=seeded())
    terms = elbo(vae, x, eps)
    posterior_mean, log_variance = vae.encode(x)
    z = posterior_mean + log_variance.exp().sqrt() * eps
    kl = exact_kl_divergence(Normal(posterior_mean, log_variance.exp().sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms.total.double(), -likelihood_of(vae, z).log_prob(x.double()) + kl.double().sum(1), rtol=1e-5, atol=1e-4)


# The bound as a bound: a latent of one dimension can be integrated out


def exact_negative_log_likelihood(vae: VAE, x: Tensor) -> Tensor:
    """-log of the integral of p(x|z) p(z) over z, float64 (B,), by the trapezoid rule."""
    z = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(z)
    likelihood = likelihood_of(vae, z.float()[:, None])
    log_joint = torch.stack([likelihood.log_prob(image.double()) for image in x], 1) + log_prior[:, None]
    log_joint[[0, -1]] -= math.log(2)
    return -(log_joint.logsumexp(0) + math.log(18 / 6000))


@pytest.fixture(params=["bernoulli", "gaussian"])
def one_latent(request) -> tuple[VAE, Tensor]:
    """A VAE with one latent that matters, and two images."""
    vae = make_vae((1, 4, 4), latent_dim=1, likelihood=request.param, scale=2.5, seed=3)
    vae.log_sigma.data.fill_(math.log(0.4))
    return vae, pixels(2, (1, 4, 4))


@torch.no_grad()
def test_elbo_never_beats_the_exact_likelihood(one_latent):
    vae, x = one_latent
    bounds = torch.stack([elbo(vae, x, torch.randn(len(x), 1, generator=seeded(i))).total for i in range(2000)])
    exact = exact_negative_log_likelihood(vae, x)
    error = bounds.std(0) / math.sqrt(len(bounds))
    gap = bounds.double().mean(0) - exact
    assert (gap > 5 * error).all() and gap.max() > 0.05  # a true gap: a tight posterior would test nothing


@torch.no_grad()
def test_importance_weighted_bound_tightens_to_the_exact_likelihood(one_latent):
    vae, x = one_latent
    exact = exact_negative_log_likelihood(vae, x)
    gaps, errors = [], []
    for k, repeats in [(1, 2000), (4, 500), (32, 60), (2000, 1)]:
        many = x.repeat_interleave(repeats, 0)
        bounds = importance_weighted_bound(vae, many, k=k, generator=seeded(k)).double().unflatten(0, (len(x), repeats))
        gaps.append(bounds.mean(1) - exact)
        errors.append(bounds.std(1) / math.sqrt(repeats) if repeats > 1 else torch.zeros(len(x)))
    for i, j in itertools.pairwise(range(len(gaps))):
        assert (gaps[j] < gaps[i] + 4 * (errors[i] + errors[j])).all()
    assert gaps[0].max() > 0.05
    torch.testing.assert_close(gaps[-1], torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=0.03)


@torch.no_grad()
def test_importance_weighted_bound_with_one_sample_is_the_elbo_on_average(one_latent):
    vae, x = one_latent
    many = x[:1].repeat(4000, 1, 1, 1)
    one = importance_weighted_bound(vae, many, k=1, generator=seeded(5))
    other = elbo(vae, many, torch.randn(4000, 1, generator=seeded(6))).total
    error = math.hypot(one.std().item(), other.std().item()) / math.sqrt(4000)
    assert abs(one.mean().item() - other.mean().item()) < 5 * error


# What training minimises


def test_kl_weight_rises_linearly_to_beta():
    assert [kl_weight(seen, beta=4.0, warmup=100) for seen in (0, 25, 50, 100, 1000)] == [0, 1, 2, 4, 4]
    assert kl_weight(0, beta=4.0, warmup=0) == 4


def test_free_bits_cost_nothing_and_are_counted_per_dimension_on_the_batch_mean():
    kl = torch.tensor([[0.0, 2.0], [0.6, 2.0]], requires_grad=True)  # means 0.3 and 2.0
    terms = ELBO(torch.tensor([10.0, 12.0]), kl)
    loss = training_loss(terms, kl_weight=2.0, free_bits=0.5)
    assert loss.item() == pytest.approx(11 + 2 * (0.5 + 2.0))
    loss.backward()
    assert kl.grad is not None and kl.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert training_loss(terms, kl_weight=2.0, free_bits=0.0).item() == pytest.approx(11 + 2 * 2.3)


def step_of(settings: dict, seen: int) -> tuple[float, dict[str, float]]:
    vae = make_vae()
    step = VAEStep(**SETTINGS.model_copy(update=settings).select(VAEStep))
    images = patterns(16)
    loss, measures = step(vae, images, None, step.draw(vae, images.shape, seeded()), seen)
    return loss.item(), {name: (total / count).item() for name, (total, count) in measures.items()}


def test_a_step_weights_the_kl_but_logs_the_elbo_with_weight_one():
    settings = {"beta": 3.0, "kl_warmup": 1000, "free_bits": 0.0}
    for seen, weight in [(0, 0.0), (500, 1.5), (2000, 3.0)]:
        loss, logged = step_of(settings, seen)
        assert loss == pytest.approx(logged["reconstruction"] + weight * logged["kl"], rel=1e-5)
        assert logged["elbo"] == pytest.approx(logged["reconstruction"] + logged["kl"], rel=1e-5)
    assert step_of(settings, 0)[1] == step_of(settings | {"beta": 0.0, "free_bits": 5.0}, 0)[1]


# Measures


def test_validation_is_the_elbo_with_weight_one_and_the_same_noise_each_time():
    vae, images = make_vae(), patterns(600)  # more than one chunk
    found = measure(vae, images, seed=3)
    assert found == measure(vae, images, seed=3) and found != measure(vae, images, seed=4)
    assert found["elbo"] == found["reconstruction"] + found["kl"]
    mean, log_variance = vae.encode(images / 255)
    kl = exact_kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4)


def test_active_units_are_those_whose_mean_varies_by_more_than_a_hundredth():
    unit = torch.tensor([-1.0, 1.0]).repeat(500)
    means = torch.stack([0 * unit + 7, 0.09 * unit, 0.11 * unit, 2 * unit], 1)  # variances 0, 0.0081, 0.0121, 4
    assert active_units(means) == 2


def test_bits_per_dim_by_hand():
    assert bits_per_dim(make_vae((1, 8, 8)), 64 * math.log(2)) == pytest.approx(1)
    assert bits_per_dim(make_vae((3, 8, 8)), 192 * math.log(2)) == pytest.approx(1)


def test_bits_per_dim_of_a_density_is_that_of_the_probabilities_of_grey_levels():
    vae, sigma = make_vae((1, 1, 1), likelihood="gaussian"), 0.05
    normal = Normal(torch.tensor(0.5, dtype=torch.float64), sigma)
    levels = torch.arange(256, dtype=torch.float64)
    probabilities = normal.cdf((levels + 0.5) / 255) - normal.cdf((levels - 0.5) / 255)
    expected = torch.special.entr(probabilities).sum().item() / math.log(2)
    nats = -(probabilities * normal.log_prob(levels / 255)).sum().item()
    assert bits_per_dim(vae, nats) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_final_measures_hold_every_number_of_the_report(likelihood):
    vae = make_vae(likelihood=likelihood, scale=2)
    report = final_measures(vae, (patterns(80), None), (test := patterns(20, seed=5), None), seed=1)
    assert report["test"].keys() == {"elbo", "reconstruction", "kl", "bits_per_dim"}
    assert report["train"] == {"elbo": measure(vae, patterns(80)[:20], seed=1)["elbo"]}
    assert report["test"]["elbo"] == measure(vae, test, seed=1)["elbo"]
    assert report["iwae_100"] < report["test"]["elbo"]
    assert report["active_units"] == active_units(posterior_means(vae, test))
    assert ("sigma" in report) == (likelihood == "gaussian")


# The model


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 17, 23), (3, 17, 23)])
def test_encoder_halves_and_decoder_restores_the_size(shape, levels):
    channels = [2, 3, 4, 5, 6][:levels]
    vae = make_vae(shape, channels=channels)
    seen: list[tuple[int, ...]] = []
    for layer in vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(tuple(output.shape[1:])))
    mean, log_variance = vae.encode(pixels(2, shape))
    _, height, width = shape
    assert seen == [(c, math.ceil(height / 2**i), math.ceil(width / 2**i)) for i, c in enumerate(channels, start=1)]
    assert mean.shape == log_variance.shape == (2, 3)
    assert vae.decode(mean).shape == (2, *shape)


def test_decoded_pixels_are_in_the_unit_interval():
    decoded = make_vae(scale=10).decode(100 * torch.randn(50, 3, generator=seeded()))
    assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0.1


def test_reparameterised_samples_have_the_moments_of_the_posterior():
    mean, log_variance = torch.tensor([2.0, -1.0]), torch.tensor([math.log(4.0), math.log(0.25)])
    z = reparameterise(mean, log_variance, torch.randn(200_000, 2, generator=seeded()))
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(z.var(0), torch.tensor([4.0, 0.25]), rtol=0.02, atol=0)


def test_gradients_flow_through_the_sample_into_both_heads():
    vae = make_vae()
    elbo(vae, pixels(4, (1, 8, 8)), torch.randn(4, 3, generator=seeded())).reconstruction.sum().backward()
    for head in (vae.mean, vae.log_variance):
        assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0


def test_an_overshooting_encoder_keeps_the_bound_finite():
    vae = make_vae()
    vae.log_variance.bias.data.fill_(1e6)
    assert elbo(vae, pixels(2, (1, 8, 8)), torch.ones(2, 3)).total.isfinite().all()


def test_config_rebuilds_the_model():
    config = make_vae((1, 28, 28), latent_dim=SETTINGS.latent_dim, likelihood=SETTINGS.likelihood).config
    vae = VAE(**config)
    assert vae.config == config
    assert vae.latent_dim == SETTINGS.latent_dim and vae.likelihood == SETTINGS.likelihood
    assert vae.encode(pixels(1, (1, 28, 28)))[0].shape == (1, SETTINGS.latent_dim)


# Learning


def fit(vae: VAE, batch, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    for step in range(steps):
        x = batch(step)
        terms = elbo(vae, x, torch.randn(len(x), vae.latent_dim, generator=seeded(step)))
        optimizer.zero_grad()
        training_loss(terms, kl_weight=1.0, free_bits=0.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_learned_sigma_finds_the_noise_in_the_pixels():
    vae = make_vae((1, 6, 6), likelihood="gaussian")
    fit(vae, lambda step: 0.5 + 0.1 * torch.randn(64, 1, 6, 6, generator=seeded(step)), steps=250, lr=0.03)
    assert vae.sigma().item() == pytest.approx(0.1, rel=0.05)


def test_bernoulli_has_no_sigma_to_learn():
    assert not make_vae().log_sigma.requires_grad


def test_training_lowers_the_elbo_of_images_not_trained_on():
    vae, train, unseen = make_vae(channels=(8, 16), hidden=32), patterns(256) / 255, patterns(64, seed=9)
    before = measure(vae, unseen, seed=1)["elbo"]
    fit(vae, lambda step: train[torch.randint(256, (32,), generator=seeded(step))], steps=250, lr=0.005)
    after = measure(vae, unseen, seed=1)
    assert before > 40 and after["elbo"] < 0.6 * before and after["kl"] > 1


# Priors


def test_standard_normal_prior():
    z = standard_normal(4)(50_000, seeded())
    assert z.shape == (50_000, 4) and z.dtype == torch.float32
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.03)


def two_blobs(n=3000) -> np.ndarray:
    """A quarter at (-3, 0), stretched along y; the rest at (2, 1), correlated."""
    random = np.random.RandomState(0)
    first = random.multivariate_normal([-3, 0], [[0.2, 0], [0, 1.5]], size=n // 4)
    second = random.multivariate_normal([2, 1], [[0.5, 0.4], [0.4, 0.6]], size=n - n // 4)
    return np.concatenate([first, second]).astype(np.float32)


def test_mixture_prior_draws_from_what_it_was_fitted_to():
    means = two_blobs()
    z = mixture(fit_mixture(means, components=2, seed=1))(40_000, seeded()).numpy()
    left = z[:, 0] < -1
    assert left.mean() == pytest.approx(0.25, abs=0.01)
    for drawn, fitted in [(z[left], means[means[:, 0] < -1]), (z[~left], means[means[:, 0] >= -1])]:
        np.testing.assert_allclose(drawn.mean(0), fitted.mean(0), atol=0.05)
        np.testing.assert_allclose(np.cov(drawn.T), np.cov(fitted.T), atol=0.06)


def test_mixture_prior_is_the_same_for_the_same_seed():
    means = two_blobs(400)
    first, again = (mixture(fit_mixture(means, components=3, seed=7))(100, seeded(2)) for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, again)
    assert not torch.equal(first, mixture(fit_mixture(means, components=3, seed=7))(100, seeded(3)))


def test_there_are_no_more_components_than_images(capsys):
    means = np.random.RandomState(0).normal(size=(10, 2)).astype(np.float32)
    fitted = fit_mixture(means, components=11, seed=0)
    assert len(fitted["weights"]) == 10 and fitted["asked"] == 11 and "asked" not in fit_mixture(means, components=10, seed=0)
    assert "sample.vae.components (11) is lowered" in capsys.readouterr().err
    assert torch.isfinite(mixture(fitted)(100, seeded())).all()


def test_posterior_means_are_those_of_the_encoder_whatever_the_chunk():
    vae, images = make_vae(), patterns(501)
    with torch.no_grad():
        torch.testing.assert_close(posterior_means(vae, images), vae.encode(images / 255)[0], rtol=1e-5, atol=1e-6)
