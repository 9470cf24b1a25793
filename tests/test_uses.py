"""What a denoiser is good for beside drawing: likelihood, inpainting and inversion, on data where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.inference.inpainting import repaint
from rediffuse.inference.inversion import invert, slerp
from rediffuse.inference.likelihood import LEVELS, stratified_times, variational_bound
from rediffuse.sampling.samplers import ddim, even_times

f64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


# Likelihood

VALUES = torch.linspace(-1, 1, LEVELS, dtype=f64)
P = torch.softmax(3 * torch.sin(VALUES * 7), 0)  # of a grey level; pixels are independent
ENTROPY = -(P * P.log2()).sum().item()


def pixel_denoiser(schedule: Schedule):
    """E[x_0 | x_t] for such pixels."""

    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, variance = schedule.alpha_bar[t[0]].sqrt(), schedule.one_minus_alpha_bar[t[0]]
        return (P.log() - (x_t[..., None] - alpha * VALUES).square() / (2 * variance)).softmax(-1) @ VALUES

    return denoise


def pixels(n: int, seed: int = 1) -> Tensor:
    return VALUES[torch.multinomial(P, n, replacement=True, generator=torch.Generator().manual_seed(seed))].reshape(-1, 1, 10, 10)


def even_in_log_snr(T: int) -> Schedule:
    return Schedule(torch.cat([torch.tensor([math.inf], dtype=f64), torch.linspace(14, -14, T, dtype=f64)]))


@pytest.mark.parametrize("T", [100, 1000])
def test_the_bound_of_the_true_denoiser_nears_the_probability_from_above(T: int) -> None:
    """In steps that are short in log SNR; in long ones, such as those of the usual schedules near t = 0, it stays above."""
    x_0 = pixels(10_000)
    truth = -P.log2()[((x_0 + 1) * (LEVELS - 1) / 2).round().long()].mean().item()
    schedule = even_in_log_snr(T)
    bound = variational_bound(pixel_denoiser(schedule), schedule, x_0, None, torch.Generator().manual_seed(2)).total.mean().item()
    # Where pixels look Gaussian, a step of h in log SNR costs (exp(h) - 1 - h) / 2 nats too much, on at most 14 / h steps to SNR 1.
    h = 28 / (T - 1)
    assert truth - 0.03 < bound < truth + (math.expm1(h) - h) / 2 * 14 / h / math.log(2) + 0.03


def test_a_denoiser_that_knows_less_has_a_higher_bound() -> None:
    schedule, x_0 = Schedule.make("cosine", 200), pixels(1000)
    right = pixel_denoiser(schedule)

    def wrong(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return 0.9 * right(x_t, t, labels)

    bounds = [variational_bound(each, schedule, x_0, None, torch.Generator().manual_seed(2)).total.mean() for each in (right, wrong)]
    assert bounds[1] > bounds[0] + 0.01


def test_some_times_stand_for_all_without_bias() -> None:
    schedule, x_0 = Schedule.make("cosine", 60), pixels(400)
    whole = variational_bound(pixel_denoiser(schedule), schedule, x_0, None, torch.Generator().manual_seed(2)).diffusion.mean()
    parts = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        times = stratified_times(60, 6, generator)
        parts.append(variational_bound(pixel_denoiser(schedule), schedule, x_0, None, generator, times=times).diffusion.mean())
    found = torch.stack(parts)
    assert abs(found.mean() - whole) < 4 * found.std() / math.sqrt(len(found)) + 0.02 * whole


def test_stratified_times_cover_2_to_T_evenly() -> None:
    counts = torch.zeros(11)
    for seed in range(2000):
        times = stratified_times(10, 3, torch.Generator().manual_seed(seed))
        assert [2 <= t <= 4 or 4 <= t <= 8 or 8 <= t <= 10 for t in times] == [True] * 3 and times == sorted(times)
        counts[times] += 1
    assert counts[:2].sum() == 0 and (counts[2:] / 2000 - 1 / 3).abs().max() < 0.05
    with pytest.raises(ValueError, match=r"between 1 and T - 1 \(9\), got 10"):
        stratified_times(10, 10, torch.Generator())


# Inpainting

MEAN = torch.tensor([0.2, -0.1], dtype=f64)
COVARIANCE = torch.tensor([[0.3, 0.2], [0.2, 0.25]], dtype=f64)


def gaussian_denoiser(schedule: Schedule):
    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha_bar = schedule.alpha_bar[t[0]].item()
        gain = math.sqrt(alpha_bar) * COVARIANCE @ torch.linalg.inv(alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=f64))
        return MEAN + (x_t - math.sqrt(alpha_bar) * MEAN) @ gain.T

    return denoise


def test_inpainting_nears_the_conditional_distribution_with_rounds_and_steps() -> None:
    n, schedule, x_0, known = 5000, Schedule.make("cosine", 400), torch.tensor([0.9, 0.0], dtype=f64), torch.tensor([True, False])
    gain = COVARIANCE[1, 0] / COVARIANCE[0, 0]
    mean, variance = (MEAN[1] + gain * (0.9 - MEAN[0])).item(), (COVARIANCE[1, 1] - gain * COVARIANCE[0, 1]).item()
    errors = []
    for rounds, steps in [(1, 50), (5, 100), (20, 400)]:
        generator = torch.Generator().manual_seed(3)
        x = repaint(
            gaussian_denoiser(schedule),
            schedule,
            x_0.expand(n, 2),
            known,
            normal(n, 2),
            None,
            times=even_times(schedule, steps),
            rounds=rounds,
            noise=lambda generator=generator: torch.randn(n, 2, dtype=f64, generator=generator),
        )
        assert (x[:, 0] == 0.9).all()
        errors.append(abs(x[:, 1].mean().item() - mean))
    assert errors[0] > 0.1 > errors[1] > errors[2] and errors[2] < 0.02
    assert x[:, 1].var().item() == pytest.approx(variance, rel=0.15)


def test_what_is_known_stays_to_the_bit_and_rounds_cost_evaluations() -> None:
    schedule, calls = Schedule.make("cosine", 50), list[int]()
    x_0, known = normal(3, 1, 4, 4).clamp(-1, 1), torch.zeros(1, 4, 4, dtype=torch.bool)
    known[:, :2] = True

    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        calls.append(int(t[0]))
        return x_t.tanh()

    arguments = {"times": even_times(schedule, 5), "noise": lambda: normal(3, 1, 4, 4, seed=9)}
    x = repaint(denoise, schedule, x_0, known, normal(3, 1, 4, 4, seed=1), None, rounds=3, **arguments)
    assert (x[:, :, :2] == x_0[:, :, :2]).all() and not (x[:, :, 2:] == x_0[:, :, 2:]).any()
    assert calls == [50] * 3 + [40] * 3 + [30] * 3 + [20] * 3 + [10]
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        repaint(denoise, schedule, x_0, known, x_0, None, rounds=0, **arguments)


# Inversion


def test_inversion_and_ddim_lead_back_the_nearer_the_more_steps() -> None:
    schedule, x_0 = Schedule.make("cosine", 1000), MEAN + normal(500, 2) @ torch.linalg.cholesky(COVARIANCE).T
    errors = []
    for steps in (50, 200, 1000):
        times = even_times(schedule, steps)
        x_T = invert(gaussian_denoiser(schedule), schedule, x_0, None, times=times)
        back = ddim(gaussian_denoiser(schedule), schedule, x_T, None, times=times, noise=lambda: pytest.fail("drew noise"))
        errors.append((back - x_0).square().mean().sqrt().item())
    assert errors[2] < 0.01 and errors[0] > errors[1] > errors[2]
    assert x_T.mean().abs() < 0.1 and x_T.std().item() == pytest.approx(1, abs=0.1)


def test_slerp_keeps_the_norm_and_begins_and_ends_where_it_should() -> None:
    a, b = normal(1, 20, 20, seed=1), normal(1, 20, 20, seed=2)
    walk = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(walk[0], a)
    torch.testing.assert_close(walk[4], b)
    norms = walk.flatten(1).norm(dim=1)
    assert (norms - norms[0]).abs().max() < abs(norms[0] - norms[4]) + 0.5
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3]))[0], a)
