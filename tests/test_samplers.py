"""The samplers on data whose denoiser E[x_0 | x_t] and probability flow are known in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
every_name = pytest.mark.parametrize("name", NAMES)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
every_eta = pytest.mark.parametrize(
    ("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.5), ("ddim", 1.0)]
)


@dataclass
class Mixture:
    """Data p(x_0) = sum_k w_k N(m_k, s^2) on the line; s = 0 puts all mass on the points m_k."""

    means: tuple[float, ...]
    weights: tuple[float, ...]
    s: float

    def components(self, alpha_bar: float) -> tuple[Tensor, Tensor, float]:
        """Weights, means and variance of the components of q(x_t)."""
        means = math.sqrt(alpha_bar) * torch.tensor(self.means, dtype=f64)
        return torch.tensor(self.weights, dtype=f64), means, alpha_bar * self.s**2 + 1 - alpha_bar

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            alpha_bar = schedule.alpha_bar[t[0]].item()
            w, m_t, variance = self.components(alpha_bar)
            x = x_t.to(f64)[:, None]
            responsibility = (w.log() - (x - m_t) ** 2 / (2 * variance)).softmax(1)
            # Regression of x_0 on x_t within a component: Cov(x_0, x_t) / Var(x_t)
            slope = math.sqrt(alpha_bar) * self.s**2 / variance
            x_0 = torch.tensor(self.means, dtype=f64) + slope * (x - m_t)
            return (responsibility * x_0).sum(1).to(x_t.dtype)

        return denoise

    def cdf(self, x: Tensor, alpha_bar: float = 1.0) -> Tensor:
        w, m_t, variance = self.components(alpha_bar)
        probability: Tensor = (w * torch.special.ndtr((x[:, None] - m_t) / math.sqrt(variance))).sum(1)
        return probability

    def flow(self, x_T: Tensor, schedule: Schedule) -> Tensor:
        """The exact probability flow from x_T to x_0, by bisection: on the line it keeps quantiles."""
        q = self.cdf(x_T, schedule.alpha_bar[-1].item())
        low, high = torch.full_like(x_T, -10), torch.full_like(x_T, 10)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle


TWO_BUMPS = Mixture((-0.6, 0.5), (0.35, 0.65), 0.3)
TWO_POINTS = Mixture((-0.8, 0.4), (0.3, 0.7), 0.0)
PIXELS = Mixture((-0.9, 0.1, 0.7), (0.5, 0.2, 0.3), 0.05)


def standard_normal(*shape: int, seed: int = 9, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def draw(sampler: str, denoise: Any, schedule: Schedule, x_T: Tensor, steps: int, **how: Any) -> Tensor:
    """denoise: a function of (x_t, t, labels), or a mixture.  how: also the spacing of the times."""
    generator = torch.Generator().manual_seed(0)
    denoise = denoise.denoiser(schedule) if isinstance(denoise, Mixture) else denoise
    how = {"noise": lambda: torch.randn(x_T.shape, dtype=x_T.dtype, generator=generator)} | how
    times = SPACINGS[how.pop("spacing", "even")](schedule, steps)
    return SAMPLERS[sampler](denoise, schedule, x_T, how.pop("labels", None), times=times, **how)


# The times


@every_name
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_fall_from_T_to_0_in_any_number_of_steps(spacing, name):
    for T in [*range(1, 21), 100]:
        schedule = Schedule.make(name, T)
        for steps in range(1, T + 1):
            times = SPACINGS[spacing](schedule, steps)
            assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
            assert all(t > s for t, s in pairwise(times))
            if spacing == "even":  # as far as integers can be
                assert np.abs(times - np.linspace(T, 0, steps + 1)).max() <= 0.5 + 1e-9


@every_name
def test_karras_times_are_even_in_the_fourth_root_of_sigma(name):
    schedule, steps = Schedule.make(name, 100_000), 20  # so fine that rounding to a time costs little
    times = karras_times(schedule, steps)[1:-1]  # T comes before, 0 after
    sigma = (schedule.one_minus_alpha_bar / schedule.alpha_bar).sqrt()[times]
    highest = min(SIGMA_MAX, (-schedule.log_snr[-1] / 2).exp().item())
    roots = np.linspace(highest ** (1 / 4), SIGMA_MIN ** (1 / 4), steps)
    np.testing.assert_allclose(sigma.numpy() ** (1 / 4), roots[1:], rtol=0.005)


# Every sampler reaches the distribution


@pytest.mark.parametrize(("name", "spacing"), [("linear", "even"), ("cosine", "karras")])
@every_eta
@pytest.mark.parametrize("data", [TWO_BUMPS, TWO_POINTS], ids=["bumps", "points"])
def test_samplers_reach_the_distribution(name, spacing, sampler, eta, data):
    n, schedule = 20_000, Schedule.make(name, 500)
    x = draw(sampler, data, schedule, standard_normal(n), 200, spacing=spacing, eta=eta).sort().values
    if data.s:  # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.2 with probability 1e-4
        distance = (data.cdf(x) - (torch.arange(n) + 0.5) / n).abs().max().item()
        assert distance < 2.2 / math.sqrt(n)
    else:
        points, p = torch.tensor(data.means), data.weights[1]
        assert ((x[:, None] - points).abs().min(1).values < 1e-3).double().mean() > 0.999
        # Four standard errors of a share, 0.005 for what 200 steps leave undone.
        share = (x > points.mean()).double().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n) + 0.005


@every_name
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("T", [50, 4000])
def test_twenty_steps_are_usable_on_every_schedule(name, spacing, sampler, T):
    """Sharp data, few steps, also where the schedule's last step is a leap: all end near the flow."""
    schedule, x_T = Schedule.make(name, T), standard_normal(4000)
    x = draw(sampler, PIXELS, schedule, x_T, 20, spacing=spacing)
    assert (x - PIXELS.flow(x_T, schedule)).abs().mean() < 0.06


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2), ("heun", 2)])
def test_order_of_convergence_to_the_exact_flow(sampler, order):
    log_snr = torch.linspace(14, -8, 641, dtype=f64)  # even in t: the grid for which orders are stated
    log_snr[0] = math.inf
    schedule, x_T = Schedule(log_snr), standard_normal(500)
    x_0 = TWO_BUMPS.flow(x_T, schedule)
    steps = [20, 40, 80, 160, 320]  # divisors of T: the grid has no rounding
    errors = [(draw(sampler, TWO_BUMPS, schedule, x_T, n) - x_0).square().mean().sqrt().item() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.1), errors
    assert errors[-1] < {1: 5e-3, 2: 1e-4}[order]


# Single steps


def walk(sampler: str, denoise: Any, schedule: Schedule, x_T: Tensor, steps: int, **how: Any) -> list[Any]:
    """(t, x_t) at the beginning of each step, and (0, x_0)."""
    seen: list[Any] = []
    how["observe"] = lambda t, x_t, x_0: seen.append((t, x_t))
    x_0 = draw(sampler, denoise, schedule, x_T, steps, **how)
    return [*seen, (0, x_0)]


@pytest.mark.parametrize("steps", [7, 100])
def test_ddim_with_eta_one_is_ancestral_sampling_step_for_step(steps):
    schedule, x_T = Schedule.make("cosine", 100), standard_normal(200)
    implicit, ancestral = (walk(of, TWO_BUMPS, schedule, x_T, steps, eta=1.0) for of in ("ddim", "ddpm"))
    for (t, x), (t_other, x_other) in zip(implicit, ancestral, strict=True):
        assert t == t_other
        torch.testing.assert_close(x, x_other, rtol=1e-9, atol=1e-9)


def test_eta_scales_the_standard_deviation_of_each_step():
    """Song et al.: sigma_t = eta times the posterior's standard deviation, from the betas of the leap."""
    schedule, x_T, eta = Schedule.make("cosine", 40), torch.ones(1, dtype=f64), 0.25
    after = []
    for size in (0.0, 1.0):
        how: Any = {"eta": eta, "noise": iter([size * x_T, 0 * x_T, 0 * x_T]).__next__}
        after.append(walk("ddim", lambda x_t, *_: 0.2 + 0 * x_t, schedule, x_T, 4, **how)[1][1].item())
    keep = torch.cumprod(1 - schedule.beta, 0)
    t, s = 40, 30
    posterior_variance = (1 - keep[s]) / (1 - keep[t]) * (1 - keep[t] / keep[s])
    assert after[1] - after[0] == pytest.approx(eta * posterior_variance.sqrt().item(), rel=1e-9)


# What they call, and their numbers


@every_sampler
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_calls_of_denoiser_observer_and_noise(sampler, steps, eta):
    schedule, x_T, seen, drawn, evaluated = Schedule.make("cosine", 50), standard_normal(3), [], [], []
    labels = torch.tensor([4, 5, 6])

    def denoise(x_t: Tensor, t: Tensor, labels_: Tensor | None) -> Tensor:
        assert x_t.shape == (3,) and t.dtype == torch.int64 and torch.equal(labels_, labels)
        assert t.shape == (3,) and len(set(t.tolist())) == 1
        evaluated.append(t[0].item())
        return x_t.tanh()

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros(3, dtype=f64)

    how: Any = {"noise": noise, "labels": labels, "eta": eta, "observe": lambda *of: seen.append(of)}
    x = draw(sampler, denoise, schedule, x_T, steps, **how)
    assert [t for t, _, _ in seen] == even_times(schedule, steps)[:-1]
    assert len(evaluated) == (max(1, 2 * steps - 2) if sampler == "heun" else steps) and 0 not in evaluated
    random = sampler in RANDOM or (sampler == "ddim" and eta > 0)
    assert len(drawn) == (steps - 1 if random else 0)
    torch.testing.assert_close(seen[0][1], x_T)
    torch.testing.assert_close(x, seen[-1][2])  # the last step, to no noise, gives the last D


@every_name
@every_sampler
def test_float32_stays_float32_and_agrees_with_float64(name, sampler):
    schedule, x_T, noise = Schedule.make(name, 1000), standard_normal(100), standard_normal(100, seed=11)
    single, double = (
        draw(sampler, TWO_BUMPS, schedule, x_T.to(dtype), 200, noise=lambda dtype=dtype: noise.to(dtype))
        for dtype in (torch.float32, f64)
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(f64), double, rtol=1e-3, atol=1e-3)
