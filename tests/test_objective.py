"""The training objective: times, labels, weights and the validation loss, against plain arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.objective import by_quarter, draw_noise, noised_loss, quarter_means, stratified_t
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

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.asked.append((x_t, t, labels))
        x_0 = self.x_0_hat(x_t, t).double()
        eps = self.schedule.eps_from(x_0, x_t.double(), t)
        return self.schedule.target(self.predict, x_0, eps, t)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int) -> Tensor:
    return torch.rand(n, 3, 5, 5, generator=seeded(1)) * 2 - 1


def noise_of(network: Any, n: int, seed: int = 0, *, label_drop: float = 0.0) -> dict[str, Tensor]:
    shape, T = (n, 3, 5, 5), network.schedule.T
    return draw_noise(shape, T, seeded(seed), stratified=True, label_drop=label_drop)


def loss_of(network: Any, x_0: Tensor, labels: Tensor | None = None, seed: int = 0, **how: Any) -> Any:
    """The loss under the noise that a training draws."""
    noise = noise_of(network, len(x_0), seed, label_drop=how.pop("label_drop", 0.0))
    return noised_loss(network, x_0, labels, noise, **({"weighting": "simple", "gamma": 5.0} | how))


# Noise


@pytest.mark.parametrize(("batch", "T"), [(1, 10), (4, 100), (7, 100), (50, 50), (64, 10), (64, 500), (3, 2)])
def test_every_stratum_of_t_is_met_once(batch, T):
    for seed in range(20):
        t = stratified_t(batch, T, seeded(seed))
        assert t.dtype == torch.int64 and t.shape == (batch,)
        for i, t_i in enumerate(t.sort().values.tolist()):
            assert math.floor(i * T / batch) + 1 <= t_i <= math.ceil((i + 1) * T / batch)


def chi_squared(t: Tensor, T: int) -> float:
    """9 degrees of freedom for T = 10: 37 is exceeded with probability 3e-5."""
    counts, expected = torch.bincount(t, minlength=T + 1).double(), len(t) / T
    assert counts[0] == 0
    return ((counts[1:] - expected) ** 2 / expected).sum().item()


def test_each_single_t_is_uniform_stratified_or_not():
    for batch in (1, 4, 7):
        generator = seeded()
        draws = torch.stack([stratified_t(batch, 10, generator) for _ in range(20_000)])
        assert all(chi_squared(t, 10) < 37 for t in draws.unbind(1))
    independent = [
        draw_noise((10, 1, 1, 1), 10, seeded(i), stratified=False, label_drop=0.0)["t"] for i in range(200)
    ]
    assert chi_squared(torch.cat(independent), 10) < 37
    stratified = torch.arange(1, 11)
    assert sum(torch.equal(t.sort().values, stratified) for t in independent) < 20


def test_labels_are_dropped_one_by_one():
    p, batch, n, generator = 0.1, 64, 2000, seeded()
    how: Any = {"stratified": True, "label_drop": p}
    dropped = torch.stack([draw_noise((batch, 1, 1, 1), 100, generator, **how)["dropped"] for _ in range(n)])
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
@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
def test_a_network_that_knows_the_image_has_no_loss(predict, weighting):
    x_0 = images(16)
    losses, t = loss_of(Guess(predict, lambda x_t, t: x_0), x_0, weighting=weighting)
    assert losses.shape == t.shape == (16,) and losses.dtype == torch.float32 and losses.max() < 1e-5


def test_simple_is_the_plain_error_of_the_target():
    class Zero(Guess):
        def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            return torch.zeros_like(x_t)

    x_0 = images(400)
    (eps_loss, _), (x0_loss, _), (v_loss, t) = (loss_of(Zero(predict), x_0) for predict in PREDICTIONS)
    energy, error = x_0.square().mean((1, 2, 3)), 5 * math.sqrt(2 / x_0.numel())
    torch.testing.assert_close(x0_loss, energy)
    assert eps_loss.mean().item() == pytest.approx(1, abs=error)  # eps^2 has mean 1 and variance 2
    alpha_bar = Schedule.make("cosine", 100).alpha_bar[t]
    expected = (alpha_bar + (1 - alpha_bar) * energy).mean().item()
    assert v_loss.mean().item() == pytest.approx(expected, abs=error)


def test_min_snr_is_one_loss_whatever_is_predicted():
    """The same x_0 in three guises, the same noise: min(SNR, gamma) |x_0 - x_0_hat|^2 each time."""
    x_0, gamma = images(64), 5.0
    networks = [Guess(predict) for predict in PREDICTIONS]
    of = [loss_of(network, x_0, seed=3, weighting="min-snr", gamma=gamma) for network in networks]
    x_t, t, _ = networks[0].asked[0]
    alpha_bar = networks[0].schedule.alpha_bar[t]
    error = (0.5 * x_t.tanh() - x_0).square().mean((1, 2, 3)).double()
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma) * error
    for losses, times in of:
        assert torch.equal(times, t)
        # Float32 through eps at the last, noisiest t costs digits: x_t there is eps to six of them.
        torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-6)


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


def test_the_loss_of_a_slice_is_a_slice_of_the_loss():
    """Two processes that share a batch: noise drawn as a whole, t stratified over all of it."""
    x_0, labels, network = images(8), torch.arange(8), Guess("v")
    settings: dict[str, Any] = {"weighting": "min-snr", "gamma": 5.0}
    noise = noise_of(network, 8, label_drop=0.5)
    whole, t = noised_loss(network, x_0, labels, noise, **settings)
    for part in (slice(0, 3), slice(3, 8)):
        mine = {key: value[part] for key, value in noise.items()}
        losses, times = noised_loss(network, x_0[part], labels[part], mine, **settings)
        torch.testing.assert_close(losses, whole[part])
        assert torch.equal(times, t[part]) and torch.equal(network.asked[-1][2], network.asked[0][2][part])


def test_only_the_generator_decides():
    torch.manual_seed(1)
    one = loss_of(Guess("v"), images(8), torch.arange(8), label_drop=0.5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = loss_of(Guess("v"), images(8), torch.arange(8), label_drop=0.5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    validate(Guess("v"), images(8), None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_to_the_network():
    weight = torch.tensor(0.1, requires_grad=True)
    losses, _ = loss_of(Guess("eps", lambda x_t, t: weight * x_t), images(8), weighting="min-snr")
    losses.mean().backward()
    assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0


@pytest.mark.parametrize("T", [2, 3, 4, 10, 100])
def test_losses_by_quarter_are_those_of_a_plain_loop(T):
    losses, t = torch.rand(60, generator=seeded(1)), torch.randint(1, T + 1, (60,), generator=seeded(2))
    expected: dict[str, list[float]] = {}
    for loss, t_i in zip(losses.tolist(), t.tolist(), strict=True):
        quarter = next(q for q in (1, 2, 3, 4) if (t_i - 1) / T < q / 4)
        expected.setdefault(f"q{quarter}", []).append(loss)
    totals = by_quarter(losses[:25], t[:25], T) + by_quarter(losses[25:], t[25:], T)
    assert totals.shape == (2, 4)
    means = quarter_means(totals)
    assert means == {key: pytest.approx(sum(of) / len(of)) for key, of in sorted(expected.items())}


# Validation


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_validation_is_the_same_each_time_and_in_any_chunks(predict):
    x_0, labels = images(50), torch.arange(50) % 10
    network = Guess(predict, lambda x_t, t: x_t * torch.tensor(0.5, requires_grad=True))  # it builds no graph
    first = validate(network, x_0, labels, seed=4, chunk=50)
    assert validate(network, x_0, labels, seed=4, chunk=50) == first
    assert torch.equal(network.asked[0][2], labels)  # all are kept
    for chunk in (1, 7, 49, 1000):
        assert validate(network, x_0, labels, seed=4, chunk=chunk) == pytest.approx(first, rel=1e-5)
    assert validate(network, x_0, labels, seed=5)["eps_mse"] != first["eps_mse"]


def test_validation_rates_all_predictions_alike():
    """The same x_0 in three guises has the same error of eps, that of the eps it implies."""
    x_0, networks = images(80), [Guess(predict) for predict in PREDICTIONS]
    of = [validate(network, x_0, None, seed=0) for network in networks]
    x_t, t, _ = networks[0].asked[0]
    alpha_bar = networks[0].schedule.alpha_bar[t].float()[:, None, None, None]
    eps, eps_hat = ((x_t - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt() for x in (x_0, 0.5 * x_t.tanh()))
    expected = (eps - eps_hat).square().mean().item()
    for losses in of:
        assert losses["eps_mse"] == pytest.approx(expected, rel=1e-3)
        assert losses == pytest.approx(of[0], rel=1e-3)


def test_validation_of_a_known_error():
    """x_0 missed by c everywhere: the error of eps is SNR c^2."""
    x_0, c = images(50), 0.01
    network = Guess("x0", lambda x_t, t: x_0 + c)
    losses = validate(network, x_0, None, seed=0)
    _, t, _ = network.asked[0]
    assert sorted(((t - 1) // 2).tolist()) == list(range(50))  # stratified over the images
    error, quarter = network.schedule.snr[t] * c**2, (t - 1) // 25
    expected = {"eps_mse": error.mean()} | {f"eps_mse_q{q + 1}": error[quarter == q].mean() for q in range(4)}
    assert losses == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-3)


def test_an_image_meets_the_same_noise_at_the_same_share_of_any_T():
    eps, shares = [], []
    for T in (100, 1000):
        network = Guess("v", schedule=Schedule.make("cosine", T))
        validate(network, images(30), None, seed=0)
        x_t, t, _ = network.asked[0]
        eps.append(network.schedule.eps_from(images(30), x_t, t))
        shares.append(t / T)
    torch.testing.assert_close(eps[0], eps[1], rtol=1e-3, atol=1e-3)
    assert (shares[0] - shares[1]).abs().max() <= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_gpu_trains_on_the_same_noise_as_the_cpu(predict):
    x_0, labels, how = images(32), torch.arange(32) % 10, {"weighting": "min-snr", "label_drop": 0.5}
    cpu = loss_of(Guess(predict), x_0, labels, **how)
    gpu = loss_of(Guess(predict), x_0.cuda(), labels.cuda(), **how)
    assert torch.equal(gpu[1].cpu(), cpu[1])
    torch.testing.assert_close(gpu[0].cpu(), cpu[0], rtol=1e-3, atol=1e-5)
    expected = validate(Guess(predict), x_0, labels, seed=0)
    assert validate(Guess(predict), x_0.cuda(), labels.cuda(), seed=0) == pytest.approx(expected, rel=1e-3)
