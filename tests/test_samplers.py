"""The samplers on data whose denoiser E[x_0 | x_t] and probability flow are known in closed form."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.schedule import LOG_ALPHA_BAR, Schedule
from rediffuse.sampling.samplers import SAMPLERS, SIGMA_MAX, SIGMA_MIN, SPACINGS, even_times, karras_times

NAMES = list(LOG_ALPHA_BAR)
RANDOM = ["ddpm", "sde-dpm-solver++"]
DETERMINISTIC = ["ddim", "dpm-solver++", "heun"]
f64 = torch.float64


@dataclass
class Mixture:
    """Data p(x_0) = sum_k w_k N(m_k, s^2) on the line; s = 0 puts all mass on the points m_k."""

    means: tuple[float, ...]
    weights: tuple[float, ...]
    s: float

    def components(self, alpha_bar: float) -> tuple[Tensor, Tensor, float]:
        """Weights, means and variance of the components of q(x_t)."""
        return (
            torch.tensor(self.weights, dtype=f64),
            math.sqrt(alpha_bar) * torch.tensor(self.means, dtype=f64),
            alpha_bar * self.s**2 + 1 - alpha_bar,
        )

    def denoiser(self, schedule: Schedule):
        def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            alpha_bar = schedule.alpha_bar[t[0]].item()
            w, m_t, variance = self.components(alpha_bar)
            x = x_t.to(f64)[:, None]
            responsibility = (w.log() - (x - m_t) ** 2 / (2 * variance)).softmax(1)
            # Regression of x_0 on x_t within a component: Cov(x_0, x_t) / Var(x_t) = sqrt(alpha_bar) s^2 / variance
            x_0 = torch.tensor(self.means, dtype=f64) + math.sqrt(alpha_bar) * self.s**2 / variance * (x - m_t)
            return (responsibility * x_0).sum(1).to(x_t.dtype)

        return denoise

    def cdf(self, x: Tensor, alpha_bar: float = 1.0) -> Tensor:
        w, m_t, variance = self.components(alpha_bar)
        probability: Tensor = (w * torch.special.ndtr((x[:, None] - m_t) / math.sqrt(variance))).sum(1)
        return probability

    def flow(self, x_T: Tensor, schedule: Schedule) -> Tensor:
        """The exact probability-flow map from x_T to x_0: on the line it keeps quantiles, F_0(x_0) = F_T(x_T).  By bisection."""
        q = self.cdf(x_T, schedule.alpha_bar[-1].item())
        low, high = torch.full_like(x_T, -10), torch.full_like(x_T, 10)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle


GAUSSIAN = Mixture((0.3,), (1.0,), 0.5)
TWO_BUMPS = Mixture((-0.6, 0.5), (0.35, 0.65), 0.3)
TWO_POINTS = Mixture((-0.8, 0.4), (0.3, 0.7), 0.0)
PIXELS = Mixture((-0.9, 0.1, 0.7), (0.5, 0.2, 0.3), 0.05)


def draw(name, data, schedule, x_T, steps, *, spacing="even", eta=0.0, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return SAMPLERS[name](
        data.denoiser(schedule),
        schedule,
        x_T,
        None,
        times=SPACINGS[spacing](schedule, steps),
        eta=eta,
        noise=lambda: torch.randn(x_T.shape, dtype=x_T.dtype, generator=generator),
        **more,
    )


def standard_normal(*shape, seed=9, dtype=f64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def even_in_lambda(T):
    """log SNR even in t, from 14 to -8: the grid for which orders of convergence are stated."""
    return Schedule(torch.cat([torch.tensor([math.inf], dtype=f64), torch.linspace(14, -8, T + 1, dtype=f64)[1:]]))


# The times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_fall_from_T_to_0_in_any_number_of_steps(spacing, name):
    for T in [*range(1, 21), 500]:
        schedule = Schedule.make(name, T)
        for steps in range(1, T + 1):
            times = SPACINGS[spacing](schedule, steps)
            assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
            assert all(t > s for t, s in pairwise(times))


def test_even_times_are_as_even_as_integers_can_be():
    for T in [1, 7, 40, 500, 1000]:
        schedule = Schedule.make("cosine", T)
        for steps in range(1, T + 1):
            assert max(abs(t - T * (1 - i / steps)) for i, t in enumerate(even_times(schedule, steps))) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_karras_times_are_even_in_the_fourth_root_of_sigma(name):
    schedule, steps = Schedule.make(name, 100_000), 20  # so fine that rounding to a time costs little
    sigma = (schedule.one_minus_alpha_bar / schedule.alpha_bar).sqrt()[karras_times(schedule, steps)[1:-1]]  # T comes before, 0 after
    roots = np.linspace(min(SIGMA_MAX, (-schedule.log_snr[-1] / 2).exp().item()) ** (1 / 4), SIGMA_MIN ** (1 / 4), steps)
    np.testing.assert_allclose(sigma.numpy() ** (1 / 4), roots[1:], rtol=0.005)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_numbers_of_steps_are_refused(spacing, steps):
    with pytest.raises(ValueError, match=rf"steps must be between 1 and T \(10\), got {steps}"):
        SPACINGS[spacing](Schedule.make("linear", 10), steps)


# Every sampler reaches the distribution


@pytest.mark.parametrize(("name", "spacing"), [*((name, "even") for name in NAMES), ("cosine", "karras")])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm-solver++", 0.0), ("sde-dpm-solver++", 0.0), ("heun", 0.0)],
)
@pytest.mark.parametrize("data", [GAUSSIAN, TWO_BUMPS], ids=["gaussian", "two bumps"])
def test_samplers_reach_a_smooth_distribution(name, sampler, eta, data, spacing):
    n, schedule = 20_000, Schedule.make(name, 500)
    x = draw(sampler, data, schedule, standard_normal(n), 200, spacing=spacing, eta=eta).sort().values
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.2 with probability 1e-4.
    distance = (data.cdf(x) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 2.2 / math.sqrt(n)


@pytest.mark.parametrize(("name", "spacing"), [*((name, "even") for name in NAMES), ("cosine", "karras")])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm-solver++", 0.0), ("sde-dpm-solver++", 0.0), ("heun", 0.0)],
)
def test_samplers_reach_the_masses_of_two_points(name, sampler, eta, spacing):
    n, schedule = 20_000, Schedule.make(name, 500)
    x = draw(sampler, TWO_POINTS, schedule, standard_normal(n), 200, spacing=spacing, eta=eta)
    points, p = TWO_POINTS.means, TWO_POINTS.weights[1]
    distance = torch.stack([(x - point).abs() for point in points]).min(0).values
    assert (distance < 1e-3).double().mean() > 0.999
    # Four standard errors of a share, 0.005 for what 200 steps leave undone.
    assert abs((x > sum(points) / 2).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n) + 0.005


@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm-solver++", 0.0), ("sde-dpm-solver++", 0.0), ("heun", 0.0)]
)
def test_samplers_reach_a_correlated_gaussian(sampler, eta):
    n, schedule, generator = 20_000, Schedule.make("cosine", 500), torch.Generator().manual_seed(3)
    mean, covariance = torch.tensor([0.4, -0.2], dtype=f64), torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=f64)

    def denoise(x_t, t, labels):
        alpha_bar = schedule.alpha_bar[t[0]].item()
        gain = math.sqrt(alpha_bar) * covariance @ torch.linalg.inv(alpha_bar * covariance + (1 - alpha_bar) * torch.eye(2, dtype=f64))
        return mean + (x_t - math.sqrt(alpha_bar) * mean) @ gain.T

    x = SAMPLERS[sampler](
        denoise,
        schedule,
        standard_normal(n, 2),
        None,
        times=even_times(schedule, 500),
        eta=eta,
        noise=lambda: torch.randn(n, 2, dtype=f64, generator=generator),
    )
    variances = covariance.diag()
    # Four standard errors: of a mean sqrt(c_ii / n), of a covariance sqrt((c_ii c_jj + c_ij^2) / n); 1% for the steps.
    assert ((x.mean(0) - mean).abs() < 4 * (variances / n).sqrt() + 0.005).all()
    spread = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() < 4 * spread + 0.01 * covariance.abs()).all()


@pytest.mark.parametrize(("name", "spacing"), [*((name, "even") for name in NAMES), ("cosine", "karras")])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("T", [50, 500, 4000])
def test_twenty_steps_are_usable_on_every_schedule(name, sampler, T, spacing):
    """Sharp data, few steps, also where the schedule's last step is a leap: nobody is left far from where the flow ends."""
    schedule, x_T = Schedule.make(name, T), standard_normal(4000)
    x = draw(sampler, PIXELS, schedule, x_T, 20, spacing=spacing)
    assert (x - PIXELS.flow(x_T, schedule)).abs().mean() < 0.06


# Deterministic samplers converge to the probability flow, at their order


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_BUMPS], ids=["gaussian", "two bumps"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2), ("heun", 2)])
def test_order_of_convergence_to_the_exact_flow(sampler, order, data):
    schedule, x_T = even_in_lambda(640), standard_normal(500)
    x_0 = data.flow(x_T, schedule)
    steps = [20, 40, 80, 160, 320]  # divisors of T: the grid has no rounding
    errors = [(draw(sampler, data, schedule, x_T, n) - x_0).square().mean().sqrt().item() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.1), errors
    assert errors[-1] < {1: 5e-3, 2: 1e-4}[order]


def test_the_exact_flow_of_a_gaussian_is_the_known_scaling():
    """The oracle itself, against the closed form m + s (x_T - alpha_T m) / sqrt(alpha_bar_T s^2 + 1 - alpha_bar_T)."""
    schedule, x_T = Schedule.make("cosine", 100), standard_normal(100)
    alpha_bar = schedule.alpha_bar[-1].item()
    expected = 0.3 + 0.5 * (x_T - math.sqrt(alpha_bar) * 0.3) / math.sqrt(alpha_bar * 0.25 + 1 - alpha_bar)
    torch.testing.assert_close(GAUSSIAN.flow(x_T, schedule), expected, rtol=1e-6, atol=1e-6)


# How they relate, and what they call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_ddim_with_eta_one_is_ancestral_sampling_step_for_step(name, steps):
    schedule, x_T = Schedule.make(name, 100), standard_normal(200)
    walks: dict[str, list[Tensor]] = {}
    for sampler in ("ddpm", "ddim"):
        walk: list[Tensor] = []
        walks[sampler] = walk
        walk.append(draw(sampler, TWO_BUMPS, schedule, x_T, steps, eta=1.0, observe=lambda t, x_t, x_0, walk=walk: walk.append(x_t)))
    for ancestral, implicit in zip(walks["ddpm"], walks["ddim"], strict=True):
        torch.testing.assert_close(implicit, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_eta_scales_the_standard_deviation_of_each_step(eta):
    """Song et al.: sigma_t = eta times the posterior's standard deviation, here from the betas of the leap t -> s."""
    schedule = Schedule.make("cosine", 40)

    def walk(noise):
        seen = []
        SAMPLERS["ddim"](
            lambda x_t, t, labels: torch.full_like(x_t, 0.2),
            schedule,
            torch.ones(1, dtype=f64),
            None,
            times=[40, 30, 20, 10, 0],
            eta=eta,
            noise=iter([noise, torch.zeros(1, dtype=f64), torch.zeros(1, dtype=f64)]).__next__,
            observe=lambda t, x_t, x_0: seen.append(x_t),
        )
        return seen[1]

    keep = torch.cumprod(1 - schedule.beta, 0)
    t, s = 40, 30
    posterior_variance = (1 - keep[s]) / (1 - keep[t]) * (1 - keep[t] / keep[s])
    difference = walk(torch.ones(1, dtype=f64)) - walk(torch.zeros(1, dtype=f64))
    assert difference.item() == pytest.approx(eta * posterior_variance.sqrt().item(), rel=1e-9)


def steps_where_D_is_a_line(sampler, noise):
    """The schedule, and (t, x_t), (s, x_s) and D at the middle for the second and later of 6 steps, which are uneven in lambda."""
    schedule, seen = Schedule.make("cosine", 60), []
    lambda_ = 0.5 * (schedule.alpha_bar / schedule.one_minus_alpha_bar).log()

    def line(at):
        return 0.3 - 0.04 * at

    SAMPLERS[sampler](
        lambda x_t, t, labels: line(lambda_[t]),
        schedule,
        standard_normal(1),
        None,
        times=even_times(schedule, 6),
        noise=noise,
        observe=lambda t, x_t, x_0: seen.append((t, x_t)),
    )
    return schedule, [(before, after, line((lambda_[before[0]] + lambda_[after[0]]) / 2)) for before, after in pairwise(seen[1:])]


def test_dpm_solver_pp_extrapolates_the_denoiser_to_the_middle_of_the_step():
    """Where D is a line in lambda = log(alpha / sigma), the second and later steps see it at their middle."""
    schedule, steps = steps_where_D_is_a_line("dpm-solver++", lambda: pytest.fail("a deterministic sampler drew noise"))
    for (t, x_t), (s, x_s), x_0 in steps:
        # The exact solution of the flow under a constant x_0: the noise in x_t shrinks, the image is x_0.
        eps = (x_t - schedule.alpha_bar[t].sqrt() * x_0) / schedule.one_minus_alpha_bar[t].sqrt()
        torch.testing.assert_close(x_s, schedule.alpha_bar[s].sqrt() * x_0 + schedule.one_minus_alpha_bar[s].sqrt() * eps)


def test_sde_dpm_solver_pp_is_ancestral_where_the_denoiser_is_constant():
    """It solves the reverse SDE exactly for a constant D, and then its steps are q(x_s | x_t, x_0 = D)."""
    schedule, walks = Schedule.make("cosine", 60), []
    for sampler in ("ddpm", "sde-dpm-solver++"):
        generator, walk = torch.Generator().manual_seed(5), list[Tensor]()
        SAMPLERS[sampler](
            lambda x_t, t, labels: torch.full_like(x_t, 0.2),
            schedule,
            standard_normal(100),
            None,
            times=karras_times(schedule, 9),
            noise=lambda generator=generator: torch.randn(100, dtype=f64, generator=generator),
            observe=lambda t, x_t, x_0, walk=walk: walk.append(x_t),
        )
        walks.append(walk)
    for ancestral, solved in zip(*walks, strict=True):
        torch.testing.assert_close(solved, ancestral, rtol=1e-9, atol=1e-9)


def test_sde_dpm_solver_pp_extrapolates_the_denoiser_to_the_middle_of_the_step():
    """Where D is a line in lambda, the second and later steps are ancestral for D at their middle."""
    schedule, steps = steps_where_D_is_a_line("sde-dpm-solver++", lambda: torch.zeros(1, dtype=f64))
    for (t, x_t), (s, x_s), x_0 in steps:
        mean, _ = schedule.q_posterior(x_0, x_t, t, s)
        torch.testing.assert_close(x_s, mean, rtol=1e-9, atol=1e-9)


def test_one_step_of_any_sampler_is_the_denoiser():
    schedule, x_T = Schedule.make("cosine", 100), standard_normal(50)
    x_0 = TWO_BUMPS.denoiser(schedule)(x_T, torch.full((50,), 100), None)
    for sampler in SAMPLERS:
        torch.testing.assert_close(draw(sampler, TWO_BUMPS, schedule, x_T, 1), x_0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_calls_of_denoiser_observer_and_noise(sampler, steps):
    schedule, x_T, seen, drawn, evaluated = Schedule.make("cosine", 50), standard_normal(3), [], [], []

    def denoise(x_t, t, labels):
        assert x_t.shape == (3,) and t.dtype == torch.int64 and t.shape == (3,) and len(set(t.tolist())) == 1
        assert labels.tolist() == [4, 5, 6]
        evaluated.append(t[0].item())
        return x_t.tanh()

    def noise():
        drawn.append(1)
        return torch.zeros(3, dtype=f64)

    x = SAMPLERS[sampler](
        denoise,
        schedule,
        x_T,
        torch.tensor([4, 5, 6]),
        times=even_times(schedule, steps),
        noise=noise,
        observe=lambda t, x_t, x_0: seen.append((t, x_t, x_0)),
    )
    assert [t for t, _, _ in seen] == even_times(schedule, steps)[:-1]
    assert len(evaluated) == (max(1, 2 * steps - 2) if sampler == "heun" else steps) and 0 not in evaluated
    assert len(drawn) == (steps - 1 if sampler in RANDOM else 0)
    torch.testing.assert_close(seen[0][1], x_T)
    torch.testing.assert_close(x, seen[-1][2])  # the last step, to no noise, gives the last D


def test_ddim_with_eta_draws_noise_in_all_steps_but_the_last():
    drawn, x_T = [], standard_normal(3)

    def noise():
        drawn.append(1)
        return torch.zeros(3, dtype=f64)

    SAMPLERS["ddim"](
        lambda x_t, t, labels: x_t.tanh(),
        Schedule.make("cosine", 50),
        x_T,
        None,
        times=[50, 40, 30, 20, 10, 5, 2, 0],
        eta=0.3,
        noise=noise,
    )
    assert len(drawn) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [20, 1000])
def test_float32_stays_float32_and_agrees_with_float64(name, sampler, steps):
    schedule, x_T, noise = Schedule.make(name, 1000), standard_normal(100), standard_normal(100, seed=11)

    def sample(dtype):
        times = even_times(schedule, steps)
        return SAMPLERS[sampler](TWO_BUMPS.denoiser(schedule), schedule, x_T.to(dtype), None, times=times, noise=lambda: noise.to(dtype))

    single = sample(torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(f64), sample(f64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_steps_gives_finite_images(name, sampler):
    schedule, x_T = Schedule.make(name, 12), standard_normal(2, 1, 2, 2, dtype=torch.float32)
    for steps in range(1, 13):
        times = even_times(schedule, steps)
        x = SAMPLERS[sampler](lambda x_t, t, labels: x_t.tanh(), schedule, x_T, None, times=times, noise=lambda: torch.ones_like(x_T))
        assert x.shape == x_T.shape and x.isfinite().all() and x.abs().max() <= 1
