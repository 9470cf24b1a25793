"""The schedule against the papers' formulas, simulation of the noising chain, and Bayes' rule on a grid."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.schedule import LOG_ALPHA_BAR, Predict, Schedule

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
@pytest.mark.parametrize("T", [2, 10, 50, 500, 1000, 4000])
def test_cosine_and_sigmoid_are_those_of_the_papers(name, T):
    """As improved-diffusion's betas_for_alpha_bar makes them: betas clipped at 0.999, then a product."""
    paper = PAPERS[name]
    betas = [min(1 - paper((t + 1) / T) / paper(t / T), 0.999) for t in range(T)]
    expected = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(Schedule.make(name, T).alpha_bar[1:], expected, rtol=1e-9)


@pytest.mark.parametrize("T", [10, 50, 500, 1000, 4000])
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
@pytest.mark.parametrize("T", [1, 2, 3, 10, 500, 1000, 4000, 10_000])
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


@every_name
@pytest.mark.parametrize("T", [2, 10, 50, 500, 1000, 4000])
def test_the_last_step_is_close_to_pure_noise(name, T):
    """KL(q(x_T | x_0) || N(0, 1)) of a pixel at the end of its range."""
    schedule, one = Schedule.make(name, T), torch.ones(1, dtype=f64)
    mean = schedule.q_sample(one, T, 0 * one)
    variance = schedule.q_sample(0 * one, T, one) ** 2
    kl = 0.5 * (variance + mean**2 - 1 - variance.log())
    assert 0 <= kl.item() < (3e-4 if T == 2 else 3e-5)  # nats


@every_name
def test_q_has_the_moments_of_the_simulated_chain(name):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, step by step, against q(x_t | x_0)."""
    T, n, x_0 = 40, 200_000, torch.full((1,), 0.7, dtype=f64)
    schedule, generator = Schedule.make(name, T), torch.Generator().manual_seed(1)
    x = x_0.expand(n)
    for t in range(1, T + 1):
        beta = schedule.beta[t]
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, dtype=f64, generator=generator)
        mean = schedule.q_sample(x_0, t, torch.zeros(1, dtype=f64)).item()
        sd = schedule.q_sample(0 * x_0, t, torch.ones(1, dtype=f64)).item()
        # Five standard errors: of a mean sd / sqrt(n), of a standard deviation sd / sqrt(2n).
        assert abs(x.mean().item() - mean) < 5 * sd / math.sqrt(n)
        assert abs(x.std().item() - sd) < 5 * sd / math.sqrt(2 * n)


def density(x: Any, mean: Any, variance: Any) -> Any:
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)


@every_name
@pytest.mark.parametrize(("t", "s"), [(2, 1), (7, 6), (20, 19), (20, 3), (13, 1), (12, 6)])
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
def test_posterior_at_the_clean_end_is_x_0_itself(name):
    schedule = Schedule.make(name, 30)
    x_0, x_t = normal(2, 3, 1, 2, 2, seed=2)
    clean = schedule.q_posterior(x_0, x_t, torch.tensor([1, 15, 30]), torch.tensor([0, 0, 0]))
    for mean, variance in (schedule.q_posterior(x_0, x_t, 1), clean):
        assert torch.equal(mean, x_0) and (variance == 0).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_each_image_of_a_batch_has_its_own_time(dtype):
    schedule, t = Schedule.make("cosine", 10), torch.tensor([1, 10, 4, 4])
    x_0, eps = normal(2, 4, 3, 2, 2, seed=4, dtype=dtype)
    batch = schedule.q_sample(x_0, t, eps)
    mean, _ = schedule.q_posterior(x_0, batch, t)
    assert batch.dtype == mean.dtype == dtype
    for i, t_i in enumerate(t.tolist()):
        single = schedule.q_sample(x_0[i : i + 1], t_i, eps[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], single)
        torch.testing.assert_close(mean[i : i + 1], schedule.q_posterior(x_0[i : i + 1], single, t_i)[0])


@every_prediction
def test_error_scale_is_how_an_error_of_x_0_shows_in_the_output(predict):
    """Move x_0 by delta at the same x_t and see how far the target moves."""
    schedule, delta, t = Schedule.make("cosine", 20), 0.37, torch.arange(1, 21)
    x_0, eps = normal(2, 20, seed=5)
    x_t, moved = schedule.q_sample(x_0, t, eps), x_0 + delta
    after = schedule.target(predict, moved, schedule.eps_from(moved, x_t, t), t)
    change = after - schedule.target(predict, x_0, eps, t)
    torch.testing.assert_close(change**2 / delta**2, schedule.error_scale(predict, t), rtol=1e-7, atol=0)


def test_min_snr_weights_are_the_papers():
    schedule, gamma, t = Schedule.make("cosine", 200), 5.0, torch.arange(1, 201)
    snr = (schedule.alpha_bar / (1 - schedule.alpha_bar))[1:]
    clipped = torch.minimum(snr, torch.tensor(gamma))
    weights: dict[Predict, Tensor] = {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}
    for predict, expected in weights.items():
        found = schedule.loss_weight(predict, "min-snr", gamma, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert (schedule.loss_weight(predict, "simple", gamma, t) == 1).all()


def test_what_is_wrong_is_named():
    schedule: Any = Schedule.make("cosine", 10)
    x, t = torch.zeros(1), torch.tensor([1])
    for method, arguments, words in [
        (schedule.make, ("cubic", 10), "linear, cosine, sigmoid, got 'cubic'"),
        (schedule.make, ("cosine", 0), "T must be at least 1, got 0"),
        (schedule.target, ("score", x, x, 1), "eps, x0, v, got 'score'"),
        (schedule.x_0_from, ("score", x, x, 1), "eps, x0, v, got 'score'"),
        (schedule.error_scale, ("score", t), "eps, x0, v, got 'score'"),
        (schedule.loss_weight, ("eps", "p2", 5.0, t), "simple, min-snr, got 'p2'"),
    ]:
        with pytest.raises(ValueError, match=words):
            method(*arguments)


def test_a_schedule_can_be_copied_with_the_model_that_holds_it():
    schedule = Schedule.make("sigmoid", 10)
    schedule.q_sample(torch.zeros(1), 3, torch.zeros(1))
    assert torch.equal(copy.deepcopy(schedule).beta, schedule.beta)
