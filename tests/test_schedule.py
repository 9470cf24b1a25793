"""The schedule against the papers' formulas, simulation of the noising chain, and Bayes' rule on a grid."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.schedule import LOG_ALPHA_BAR, Schedule

NAMES = list(LOG_ALPHA_BAR)
f64 = torch.float64
every_name = pytest.mark.parametrize("name", NAMES)
every_prediction = pytest.mark.parametrize("predict", ["eps", "x0", "v"])


def normal(*shape: int, seed: int, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z))


PAPERS = {
    "cosine": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
    "sigmoid": lambda u: (logistic(3) - logistic(6 * u - 3)) / (logistic(3) - logistic(-3)),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("T", [2, 50, 4000])
def test_cosine_and_sigmoid_are_those_of_the_papers(name, T):
    """As improved-diffusion's betas_for_alpha_bar makes them: betas clipped at 0.999, then a product."""
    paper = PAPERS[name]
    betas = [min(1 - paper((t + 1) / T) / paper(t / T), 0.999) for t in range(T)]
    expected = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(Schedule.make(name, T).alpha_bar[1:], expected, rtol=1e-9)


@pytest.mark.parametrize("T", [10, 1000])
def test_linear_is_the_integral_of_beta_and_at_a_thousand_steps_hos_product(T):
    u = np.linspace(0, 1, 100 * T + 1)
    beta = 0.1 + (20 - 0.1) * u
    integral = np.concatenate([[0], np.cumsum((beta[1:] + beta[:-1]) / 2 * np.diff(u))])
    schedule = Schedule.make("linear", T)
    np.testing.assert_allclose(schedule.alpha_bar, np.exp(-integral[::100]), rtol=1e-9)
    if T == 1000:  # a product of 1 - beta/1000 is its exponential limit but for terms of the order of 1/T
        ho = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=f64), 0)
        assert (schedule.alpha_bar[1:] - ho).abs().max() < 1e-3
        assert (schedule.log_snr[1:] - torch.logit(ho)).abs().max() < 0.1


@every_name
@pytest.mark.parametrize("T", [1, 2, 500, 10_000])
def test_every_table_is_finite_and_its_ends_are_exact(name, T):
    schedule = Schedule.make(name, T)
    alpha_bar, rest, beta = schedule.alpha_bar, schedule.one_minus_alpha_bar, schedule.beta
    for table in (schedule.log_snr, schedule.snr, alpha_bar, rest, beta):
        assert table.dtype == f64 and table.shape == (T + 1,) and table[1:].isfinite().all()
    assert schedule.T == T and schedule.log_snr[0] == schedule.snr[0] == math.inf
    assert (alpha_bar[0], rest[0], beta[0]) == (1, 0, 0)
    assert (alpha_bar > 0).all() and (alpha_bar.diff() < 0).all()
    assert (beta[1:] > 0).all() and beta.max() <= 0.999 + 1e-12
    torch.testing.assert_close(alpha_bar + rest, torch.ones(T + 1, dtype=f64))
    torch.testing.assert_close(torch.cumprod(1 - beta, 0), alpha_bar, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.snr[1:], (alpha_bar / rest)[1:], rtol=1e-9, atol=0)


def test_the_variance_of_little_noise_is_not_lost_in_rounding():
    u = 1 / 10_000
    expected = -math.expm1(-(0.1 * u + 9.95 * u**2))
    found = Schedule.make("linear", 10_000).one_minus_alpha_bar[1].item()
    assert found == pytest.approx(expected, rel=1e-13, abs=0)


def density(x: Any, mean: Any, variance: Any) -> Any:
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)


@every_name
@pytest.mark.parametrize(("t", "s"), [(2, 1), (20, 19), (12, 6)])
def test_posterior_is_bayes_rule(name, t, s):
    """q(x_s | x_t, x_0) on a grid of x_s, from the prior q(x_s | x_0) and the likelihood q(x_t | x_s)."""
    schedule, x_0, x_t = Schedule.make(name, 20), 0.6, -0.4
    keep = np.cumprod(1 - schedule.beta.numpy())
    x_s, step = np.linspace(-8, 8, 400_001), keep[t] / keep[s]
    prior = density(x_s, math.sqrt(keep[s]) * x_0, 1 - keep[s])
    posterior = prior * density(x_t, math.sqrt(step) * x_s, 1 - step)
    posterior /= posterior.sum()
    expected_mean = (posterior * x_s).sum()
    expected_variance = (posterior * (x_s - expected_mean) ** 2).sum()
    pixels = (torch.tensor([x], dtype=f64) for x in (x_0, x_t))
    mean, variance = schedule.q_posterior(*pixels, torch.tensor([t]), torch.tensor([s]))
    assert mean.item() == pytest.approx(expected_mean, rel=1e-6, abs=1e-8)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-6)


@every_name
@every_prediction
def test_conversions_are_inverse_of_each_other(name, predict):
    schedule, t = Schedule.make(name, 100), torch.arange(1, 101)
    x_0, eps = normal(2, 100, 1, 3, 3, seed=3)
    x_t = schedule.q_sample(x_0, t, eps)
    output = schedule.target(predict, x_0, eps, t)
    torch.testing.assert_close(schedule.x_0_from(predict, output, x_t, t), x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.eps_from(x_0, x_t, t), eps, rtol=1e-9, atol=1e-9)
    half = schedule.x_0_from(predict, output.bfloat16(), x_t.float(), t)  # of a network in bfloat16
    assert half.dtype == torch.float32


def test_v_is_the_velocity_along_the_circle_from_image_to_noise():
    """Salimans & Ho: with alpha = cos(phi), sigma = sin(phi), v = d x_phi / d phi, a difference quotient."""
    schedule, h = Schedule.make("cosine", 50), 1e-5
    x_0, eps = torch.tensor([0.8], dtype=f64), torch.tensor([-1.3], dtype=f64)
    for t in (1, 25, 49):
        phi = math.atan2(math.sqrt(schedule.one_minus_alpha_bar[t]), math.sqrt(schedule.alpha_bar[t]))
        plus, minus = (math.cos(p) * x_0 + math.sin(p) * eps for p in (phi + h, phi - h))
        v = schedule.target("v", x_0, eps, t)
        torch.testing.assert_close(v, (plus - minus) / (2 * h), rtol=1e-8, atol=1e-8)


def test_what_is_wrong_is_named():
    schedule: Any = Schedule.make("cosine", 10)
    x, t = torch.zeros(1), torch.tensor([1])
    with pytest.raises(ValueError, match="linear, cosine, sigmoid, got 'cubic'"):
        schedule.make("cubic", 10)
    with pytest.raises(ValueError, match="eps, x0, v, got 'score'"):
        schedule.target("score", x, x, t)
