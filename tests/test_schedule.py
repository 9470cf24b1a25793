"""The schedule against the papers' own formulas, simulation of the noising chain, and Bayes' rule on a grid."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from rediffuse.diffusion.schedule import LOG_ALPHA_BAR, Predict, Schedule

NAMES = list(LOG_ALPHA_BAR)
PREDICTIONS: list[Predict] = ["eps", "x0", "v"]
f64 = torch.float64


def normal(x, mean, variance):
    """The density of N(mean, variance)."""
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)


def cumulated(alpha_bar_at, T):
    """alpha_bar_1..T as improved-diffusion's betas_for_alpha_bar makes it: betas clipped at 0.999, then a product."""
    betas = [min(1 - alpha_bar_at((t + 1) / T) / alpha_bar_at(t / T), 0.999) for t in range(T)]
    return np.cumprod(1 - np.array(betas))


@pytest.mark.parametrize("T", [2, 10, 50, 500, 1000, 4000])
def test_cosine_is_nichol_and_dhariwals(T):
    expected = cumulated(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T)
    np.testing.assert_allclose(Schedule.make("cosine", T).alpha_bar[1:], expected, rtol=1e-9)


@pytest.mark.parametrize("T", [2, 10, 50, 500, 1000, 4000])
def test_sigmoid_is_jabris(T):
    def logistic(z):
        return 1 / (1 + math.exp(-z))

    expected = cumulated(lambda u: (logistic(3) - logistic(6 * u - 3)) / (logistic(3) - logistic(-3)), T)
    np.testing.assert_allclose(Schedule.make("sigmoid", T).alpha_bar[1:], expected, rtol=1e-9)


@pytest.mark.parametrize("T", [10, 50, 500, 1000, 4000])
def test_linear_is_the_integral_of_beta(T):
    u = np.linspace(0, 1, 100 * T + 1)
    beta = 0.1 + (20 - 0.1) * u
    integral = np.concatenate([[0], np.cumsum((beta[1:] + beta[:-1]) / 2 * np.diff(u))])
    np.testing.assert_allclose(Schedule.make("linear", T).alpha_bar, np.exp(-integral[::100]), rtol=1e-9)


def test_linear_at_a_thousand_steps_is_close_to_hos_product():
    ho = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=f64), 0)
    schedule = Schedule.make("linear", 1000)
    # A product of 1 - beta/1000 is its exponential limit but for terms of the order of 1/T.
    assert (schedule.alpha_bar[1:] - ho).abs().max() < 1e-3
    assert (schedule.log_snr[1:] - torch.logit(ho)).abs().max() < 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 500, 1000, 4000, 10_000])
def test_every_table_is_finite_and_its_ends_are_exact(name, T):
    schedule = Schedule.make(name, T)
    assert schedule.T == T
    for table in (schedule.log_snr, schedule.snr, schedule.alpha_bar, schedule.one_minus_alpha_bar, schedule.beta):
        assert table.dtype == f64 and table.shape == (T + 1,) and table[1:].isfinite().all()
    assert schedule.log_snr[0] == schedule.snr[0] == math.inf
    assert schedule.alpha_bar[0] == 1 and schedule.one_minus_alpha_bar[0] == 0 and schedule.beta[0] == 0
    assert (schedule.alpha_bar > 0).all() and (schedule.alpha_bar.diff() < 0).all()
    assert (schedule.beta[1:] > 0).all() and schedule.beta.max() <= 0.999 + 1e-12
    torch.testing.assert_close(schedule.alpha_bar + schedule.one_minus_alpha_bar, torch.ones(T + 1, dtype=f64))
    torch.testing.assert_close(torch.cumprod(1 - schedule.beta, 0), schedule.alpha_bar, rtol=1e-9, atol=0)


def test_the_variance_of_little_noise_is_not_lost_in_rounding():
    u = 1 / 10_000
    expected = -math.expm1(-(0.1 * u + 9.95 * u**2))
    assert Schedule.make("linear", 10_000).one_minus_alpha_bar[1].item() == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [2, 10, 50, 500, 1000, 4000])
def test_the_last_step_is_close_to_pure_noise(name, T):
    """KL(q(x_T | x_0) || N(0, 1)) of a pixel at the end of its range."""
    schedule, one = Schedule.make(name, T), torch.ones(1, dtype=f64)
    mean = schedule.q_sample(one, T, 0 * one)
    variance = schedule.q_sample(0 * one, T, one) ** 2
    kl = 0.5 * (variance + mean**2 - 1 - variance.log())
    assert 0 <= kl.item() < (3e-4 if T == 2 else 3e-5)  # nats


@pytest.mark.parametrize("name", NAMES)
def test_q_has_the_moments_of_the_simulated_chain(name):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, step by step, against the closed form of q(x_t | x_0)."""
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("t", "s"), [(2, 1), (7, 6), (20, 19), (20, 3), (13, 1), (12, 6)])
def test_posterior_is_bayes_rule(name, t, s):
    """q(x_s | x_t, x_0) on a grid of x_s, from the prior q(x_s | x_0) and the likelihood q(x_t | x_s) of the chain."""
    schedule, x_0, x_t = Schedule.make(name, 20), 0.6, -0.4
    keep = np.cumprod(1 - schedule.beta.numpy())
    x_s = np.linspace(-8, 8, 400_001)
    step = keep[t] / keep[s]
    posterior = normal(x_s, math.sqrt(keep[s]) * x_0, 1 - keep[s]) * normal(x_t, math.sqrt(step) * x_s, 1 - step)
    posterior /= posterior.sum()
    expected_mean = (posterior * x_s).sum()
    expected_variance = (posterior * (x_s - expected_mean) ** 2).sum()

    for times in ((t, s), (torch.tensor([t]), torch.tensor([s]))):
        mean, variance = schedule.q_posterior(torch.tensor([x_0], dtype=f64), torch.tensor([x_t], dtype=f64), *times)
        assert mean.item() == pytest.approx(expected_mean, rel=1e-6, abs=1e-8)
        assert variance.item() == pytest.approx(expected_variance, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_at_the_clean_end_is_x_0_itself(name):
    schedule = Schedule.make(name, 30)
    x_0, x_t = torch.randn(2, 3, 1, 2, 2, dtype=f64, generator=torch.Generator().manual_seed(2))
    for mean, variance in (
        schedule.q_posterior(x_0, x_t, 1),
        schedule.q_posterior(x_0, x_t, torch.tensor([1, 15, 30]), torch.tensor([0, 0, 0])),
    ):
        assert torch.equal(mean, x_0) and (variance == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_conversions_are_inverse_of_each_other(name, predict):
    T = 100
    schedule = Schedule.make(name, T)
    x_0, eps = torch.randn(2, T, 1, 3, 3, dtype=f64, generator=torch.Generator().manual_seed(3))
    t = torch.arange(1, T + 1)
    x_t = schedule.q_sample(x_0, t, eps)
    output = schedule.target(predict, x_0, eps, t)
    torch.testing.assert_close(schedule.x_0_from(predict, output, x_t, t), x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.eps_from(x_0, x_t, t), eps, rtol=1e-9, atol=1e-9)


def test_v_is_the_velocity_along_the_circle_from_image_to_noise():
    """Salimans & Ho: with alpha = cos(phi), sigma = sin(phi), v = d x_phi / d phi; here by a difference quotient."""
    schedule, h = Schedule.make("cosine", 50), 1e-5
    x_0, eps = torch.tensor([0.8], dtype=f64), torch.tensor([-1.3], dtype=f64)
    for t in (1, 25, 49):
        phi = math.atan2(math.sqrt(schedule.one_minus_alpha_bar[t]), math.sqrt(schedule.alpha_bar[t]))
        plus, minus = (math.cos(p) * x_0 + math.sin(p) * eps for p in (phi + h, phi - h))
        torch.testing.assert_close(schedule.target("v", x_0, eps, t), (plus - minus) / (2 * h), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_each_image_of_a_batch_has_its_own_time(dtype):
    schedule, generator = Schedule.make("cosine", 10), torch.Generator().manual_seed(4)
    x_0, eps = torch.randn(2, 4, 3, 2, 2, dtype=dtype, generator=generator)
    t = torch.tensor([1, 10, 4, 4])
    batch = schedule.q_sample(x_0, t, eps)
    assert batch.dtype == dtype
    mean, _ = schedule.q_posterior(x_0, batch, t)
    for i, t_i in enumerate(t.tolist()):
        single = schedule.q_sample(x_0[i : i + 1], t_i, eps[i : i + 1])
        assert single.dtype == dtype
        torch.testing.assert_close(batch[i : i + 1], single)
        torch.testing.assert_close(mean[i : i + 1], schedule.q_posterior(x_0[i : i + 1], single, t_i)[0])


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_network_in_bfloat16_gives_x_0_in_the_precision_of_x_t(predict):
    x_t = torch.ones(2, 1, 2, 2)
    assert Schedule.make("cosine", 10).x_0_from(predict, x_t.bfloat16(), x_t, torch.tensor([1, 9])).dtype == torch.float32


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_error_scale_is_how_an_error_of_x_0_shows_in_the_output(predict):
    """Move x_0 by delta at the same x_t and see how far the target moves."""
    schedule, delta = Schedule.make("cosine", 20), 0.37
    x_0, eps = torch.randn(2, 20, dtype=f64, generator=torch.Generator().manual_seed(5))
    t = torch.arange(1, 21)
    x_t = schedule.q_sample(x_0, t, eps)
    moved = x_0 + delta
    change = schedule.target(predict, moved, schedule.eps_from(moved, x_t, t), t) - schedule.target(predict, x_0, eps, t)
    torch.testing.assert_close(change**2 / delta**2, schedule.error_scale(predict, t), rtol=1e-7, atol=0)


def test_min_snr_weights_are_the_papers():
    schedule, gamma = Schedule.make("cosine", 200), 5.0
    t = torch.arange(1, 201)
    snr = (schedule.alpha_bar / (1 - schedule.alpha_bar))[1:]
    clipped = torch.minimum(snr, torch.tensor(gamma))
    weights: dict[Predict, torch.Tensor] = {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}
    for predict, expected in weights.items():
        torch.testing.assert_close(schedule.loss_weight(predict, "min-snr", gamma, t), expected, rtol=1e-9, atol=0)
        assert (schedule.loss_weight(predict, "simple", gamma, t) == 1).all()


def test_what_is_wrong_is_named():
    cubic: Any = "cubic"
    score: Any = "score"
    p2: Any = "p2"
    with pytest.raises(ValueError, match="linear, cosine, sigmoid, got 'cubic'"):
        Schedule.make(cubic, 10)
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        Schedule.make("cosine", 0)
    schedule, x, t = Schedule.make("cosine", 10), torch.zeros(1), torch.tensor([1])
    for call in (
        lambda: schedule.target(score, x, x, 1),
        lambda: schedule.x_0_from(score, x, x, 1),
        lambda: schedule.error_scale(score, t),
        lambda: schedule.loss_weight(score, "min-snr", 5.0, t),
    ):
        with pytest.raises(ValueError, match="eps, x0, v, got 'score'"):
            call()
    with pytest.raises(ValueError, match="simple, min-snr, got 'p2'"):
        schedule.loss_weight("eps", p2, 5.0, t)


@pytest.mark.parametrize(
    "log_snr",
    [
        torch.tensor([math.inf, 1.0]),  # float32
        torch.tensor([math.inf], dtype=f64),  # T = 0
        torch.tensor([3.0, 1.0], dtype=f64),  # 0 is not clean
        torch.tensor([math.inf, 1.0, 1.0], dtype=f64),  # a step that does nothing
        torch.tensor([math.inf, 1.0, -math.inf], dtype=f64),  # the end is beyond return
        torch.tensor([math.inf, math.nan], dtype=f64),
    ],
)
def test_an_impossible_table_is_refused(log_snr):
    with pytest.raises(ValueError, match="log_snr must"):
        Schedule(log_snr)


def test_a_schedule_can_be_copied_with_the_model_that_holds_it():
    schedule = Schedule.make("sigmoid", 10)
    schedule.q_sample(torch.zeros(1), 3, torch.zeros(1))
    assert torch.equal(copy.deepcopy(schedule).beta, schedule.beta)
