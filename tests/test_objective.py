"""The training objective: times, labels, weights and the validation loss, against plain arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from rediffuse.diffusion.objective import draw_noise, laplace_times, noised_loss, stratified_t, uniform_times
from rediffuse.diffusion.schedule import Predict, Schedule
from rediffuse.diffusion.step import validate

PREDICTIONS: list[Predict] = ["eps", "x0", "v"]


@dataclass
class Guess:
    """A network whose implied x_0 is `x_0_hat(x_t, t)`; it notes the times and labels it is asked for."""

    predict: Predict
    x_0_hat: Callable[[Tensor, Tensor], Tensor] = lambda x_t, t: 0.5 * x_t.tanh()
    schedule: Schedule = field(default_factory=lambda: Schedule.make("cosine", 100))
    classes: int = 10
    asked: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, told: Tensor | None = None) -> Tensor:
        self.asked.append((x_t, t, labels))
        x_0 = self.x_0_hat(x_t, t).double()
        eps = self.schedule.eps_from(x_0, x_t.double(), t)
        return self.schedule.target(self.predict, x_0, eps, t)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int) -> Tensor:
    return torch.rand(n, 3, 5, 5, generator=seeded(1)) * 2 - 1


def noise_of(network: Any, n: int, seed: int = 0, *, label_drop: float = 0.0) -> dict[str, Tensor]:
    shape, times = (n, 3, 5, 5), uniform_times(network.schedule.T)
    return draw_noise(shape, times, seeded(seed), stratified=True, label_drop=label_drop)


def loss_of(network: Any, x_0: Tensor, labels: Tensor | None = None, seed: int = 0, **how: Any) -> Any:
    """The loss under the noise that a training draws."""
    noise = noise_of(network, len(x_0), seed, label_drop=how.pop("label_drop", 0.0))
    return noised_loss(network, x_0, labels, noise, **({"weighting": "simple", "gamma": 5.0} | how))


# Noise


@pytest.mark.parametrize(("batch", "T"), [(7, 100), (50, 50), (64, 10), (3, 2)])
def test_every_stratum_of_t_is_met_once(batch, T):
    for seed in range(20):
        t = stratified_t(batch, uniform_times(T), seeded(seed))
        assert t.dtype == torch.int64 and t.shape == (batch,)
        for i, t_i in enumerate(t.sort().values.tolist()):
            assert math.floor(i * T / batch) + 1 <= t_i <= math.ceil((i + 1) * T / batch)


def chi_squared(t: Tensor, T: int) -> float:
    """9 degrees of freedom for T = 10: 37 is exceeded with probability 3e-5."""
    counts, expected = torch.bincount(t, minlength=T + 1).double(), len(t) / T
    assert counts[0] == 0
    return ((counts[1:] - expected) ** 2 / expected).sum().item()


def test_each_single_t_is_uniform_stratified_or_not():
    generator = seeded()
    draws = torch.stack([stratified_t(4, uniform_times(10), generator) for _ in range(20_000)])
    assert all(chi_squared(t, 10) < 37 for t in draws.unbind(1))
    how: Any = {"stratified": False, "label_drop": 0.0}
    independent = [draw_noise((10, 1, 1, 1), uniform_times(10), seeded(i), **how)["t"] for i in range(200)]
    assert chi_squared(torch.cat(independent), 10) < 37
    stratified = torch.arange(1, 11)
    assert sum(torch.equal(t.sort().values, stratified) for t in independent) < 20


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_log_snr_of_t_has_a_laplace_distribution(name, stratified):
    """Against scipy's, with 5% of uniform t; 100,000 draws are within 0.006 of it with probability 0.999."""
    schedule, mean, scale = Schedule.make(name, 4000), 1.5, 1.0
    times = laplace_times(schedule, mean, scale)
    how: Any = {"stratified": stratified, "label_drop": 0.0}
    t = draw_noise((100_000, 1, 1, 1), times, seeded(), **how)["t"]
    rank = torch.arange(1, len(t) + 1) / len(t)
    at = t.sort().values
    laplace = torch.from_numpy(scipy.stats.laplace.sf(schedule.log_snr[at].numpy(), mean, scale))
    expected = 0.95 * laplace + 0.05 * at / schedule.T
    assert (rank - expected).abs().max() < 0.006 and len(t.unique()) > 1000


def test_labels_are_dropped_one_by_one():
    p, batch, n, generator = 0.1, 64, 2000, seeded()
    how: Any = {"stratified": True, "label_drop": p}
    dropped = torch.stack(
        [draw_noise((batch, 1, 1, 1), uniform_times(100), generator, **how)["dropped"] for _ in range(n)]
    )
    assert abs(dropped.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / (batch * n))
    # The number per batch varies as a binomial does; dropping whole batches would have 64 times its variance.
    assert dropped.sum(1).double().var().item() == pytest.approx(batch * p * (1 - p), rel=0.2)


def test_labels_reach_the_network_unless_they_are_dropped():
    labels, network = torch.arange(500) % 10, Guess("v")
    for label_drop in (0.0, 0.5):
        loss_of(network, images(500), labels, label_drop=label_drop)
    (_, _, all_kept), (_, _, kept) = network.asked
    assert torch.equal(all_kept, labels) and torch.equal(labels, torch.arange(500) % 10)
    dropped = noise_of(network, 500, label_drop=0.5)["dropped"]
    assert dropped.any() and torch.equal(kept, torch.where(dropped, 10, labels))


# The loss


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_loss_is_that_of_the_x_0_that_the_output_implies(predict):
    """|x_0 - x_0_hat|^2, weighted: min-snr is one loss whatever is predicted, simple the plain error."""
    x_0, gamma, network = images(64), 5.0, Guess(predict)
    min_snr, times = loss_of(network, x_0, seed=3, weighting="min-snr", gamma=gamma)
    simple, _ = loss_of(network, x_0, seed=3)
    x_t, t, _ = network.asked[0]
    snr = network.schedule.alpha_bar[t] / (1 - network.schedule.alpha_bar[t])
    error = (0.5 * x_t.tanh() - x_0).square().mean((1, 2, 3)).double()
    # Float32 through eps at the last, noisiest t costs digits: x_t there is eps to six of them.
    torch.testing.assert_close(min_snr.double(), snr.clamp(max=gamma) * error, rtol=1e-3, atol=1e-6)
    plain = {"x0": 1, "eps": snr, "v": snr + 1}[predict] * error
    torch.testing.assert_close(simple.double(), plain, rtol=1e-3, atol=1e-6)
    assert torch.equal(times, t)


def test_the_network_sees_images_noised_to_their_own_time():
    x_0, network = images(200), Guess("x0")
    _, t = loss_of(network, x_0)
    x_t, seen, labels = network.asked[0]
    assert torch.equal(seen, t) and labels is None
    alpha_bar = network.schedule.alpha_bar[t].float()[:, None, None, None]
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(eps, noise_of(network, 200)["eps"], rtol=1e-3, atol=1e-4)
    assert abs(eps.mean().item()) < 5 / math.sqrt(eps.numel())
    assert abs(eps.std().item() - 1) < 5 / math.sqrt(2 * eps.numel())


# Validation


def test_validation_is_the_same_each_time_and_in_any_chunks():
    x_0, labels = images(1000), torch.arange(1000) % 10
    network = Guess("v", lambda x_t, t: x_t * torch.tensor(0.5, requires_grad=True))  # it builds no graph
    first = validate(network, x_0, labels, seed=4, chunk=1000)
    assert validate(network, x_0, labels, seed=4, chunk=1000) == first
    assert torch.equal(network.asked[0][2], labels)  # all are kept
    for chunk in (77, 256):
        assert validate(network, x_0, labels, seed=4, chunk=chunk) == pytest.approx(first, rel=1e-5)
    assert validate(network, x_0, labels, seed=5)["eps_mse"] != first["eps_mse"]


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_validation_of_a_known_error(predict):
    """x_0 missed by c everywhere: the error of eps is SNR c^2."""
    x_0, c = images(1000), 0.01
    network = Guess(predict, lambda x_t, t: x_0 + c)
    losses = validate(network, x_0, None, seed=0, chunk=1000)
    _, t, _ = network.asked[0]
    assert torch.equal(t.bincount()[1:], torch.full((100,), 10))  # stratified over the images
    error, quarter = network.schedule.snr[t] * c**2, (t - 1) // 25
    expected = {"eps_mse": error.mean()} | {f"eps_mse_q{q + 1}": error[quarter == q].mean() for q in range(4)}
    assert losses == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-3)


def test_few_images_are_each_validated_equally_often_with_noise_of_their_own():
    x_0, labels = images(7), torch.arange(7)
    network = Guess("v", lambda x_t, t: x_t / 2)
    losses = validate(network, x_0, labels, seed=4)
    rated = torch.cat([seen for _, _, seen in network.asked])
    assert torch.equal(rated.bincount(), torch.full((7,), 143))  # 1,001 in all
    assert validate(Guess("v", lambda x_t, t: x_t / 2), x_0[rated], rated, seed=4) == losses
