"""The training objective: times, labels, weights and the validation loss, against plain arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rediffuse.diffusion.objective import by_quarter, draw_noise, noised_loss, quarter_means, stratified_t, validation_loss
from rediffuse.diffusion.schedule import Predict, Schedule

PREDICTIONS: list[Predict] = ["eps", "x0", "v"]


def denoising_loss(network, x_0, labels, generator, *, weighting="simple", gamma=5.0, label_drop=0.0):
    """Noise as the training draws it, and the loss under it."""
    noise = draw_noise(x_0.shape, network.schedule.T, generator, label_drop=label_drop)
    return noised_loss(network, x_0, labels, noise, weighting=weighting, gamma=gamma)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, seed=1):
    return torch.rand(n, 3, 5, 5, generator=seeded(seed)) * 2 - 1


@dataclass
class Guess:
    """A network of any prediction whose implied x_0 is `x_0_hat(x_t, t)`; it notes the times and labels it is asked for."""

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


@dataclass
class Zero:
    """A network that puts out nothing."""

    predict: Predict
    schedule: Schedule = field(default_factory=lambda: Schedule.make("cosine", 100))
    classes: int = 10

    def __call__(self, x_t, t, labels):
        return torch.zeros_like(x_t)


# Times


@pytest.mark.parametrize(("batch", "T"), [(1, 10), (4, 100), (7, 100), (100, 100), (64, 10), (64, 500), (3, 2)])
def test_every_stratum_of_t_is_met_once(batch, T):
    for seed in range(20):
        t = stratified_t(batch, T, seeded(seed))
        assert t.dtype == torch.int64 and t.shape == (batch,)
        for i, t_i in enumerate(t.sort().values.tolist()):
            assert math.floor(i * T / batch) + 1 <= t_i <= math.ceil((i + 1) * T / batch)


def test_a_batch_as_long_as_the_schedule_meets_every_t_once():
    assert sorted(stratified_t(50, 50, seeded()).tolist()) == list(range(1, 51))


def test_independent_times_are_uniform_and_not_stratified():
    T, n = 10, 200
    draws = torch.stack([draw_noise((T, 1, 1, 1), T, seeded(seed), stratified=False)["t"] for seed in range(n)])
    counts = torch.bincount(draws.flatten(), minlength=T + 1).double()
    assert counts[0] == 0 and ((counts[1:] - n) ** 2 / n).sum().item() < 37  # as below
    assert (draws.sort(1).values != torch.arange(1, T + 1)).any(1).double().mean() > 0.9  # stratified ones would all be 1..T


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_each_single_t_is_uniform(batch):
    T, n, generator = 10, 20_000, seeded()
    draws = torch.stack([stratified_t(batch, T, generator) for _ in range(n)])
    for position in range(batch):
        counts = torch.bincount(draws[:, position], minlength=T + 1)[1:].double()
        chi_squared = ((counts - n / T) ** 2 / (n / T)).sum().item()
        assert chi_squared < 37  # 9 degrees of freedom: exceeded with probability 3e-5


# Labels


def test_labels_are_dropped_one_by_one():
    p, batch, n, generator = 0.1, 64, 2000, seeded()
    dropped = torch.stack([draw_noise((batch, 1, 1, 1), 100, generator, label_drop=p)["dropped"] for _ in range(n)])
    share = dropped.double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / (batch * n))
    # Independent drops: the number per batch varies as a binomial does; dropping whole batches would have 64 times its variance.
    assert dropped.sum(1).double().var().item() == pytest.approx(batch * p * (1 - p), rel=0.2)


def test_labels_that_are_not_dropped_stay():
    labels, network = torch.arange(500) % 10, Guess("v")
    for label_drop in (0.0, 0.5):
        denoising_loss(network, images(500), labels, seeded(), label_drop=label_drop)
    (_, _, all_kept), (_, _, kept) = network.asked
    assert torch.equal(all_kept, labels) and torch.equal(labels, torch.arange(500) % 10)
    assert ((kept == labels) | (kept == 10)).all() and (kept == 10).any()


def test_the_loss_of_a_slice_is_a_slice_of_the_loss():
    """Two processes that share a batch: noise drawn as a whole, t stratified over all of it."""
    x_0, labels, network = images(8), torch.arange(8), Guess("v")
    noise = draw_noise(x_0.shape, network.schedule.T, seeded(5), label_drop=0.5)
    settings: dict[str, Any] = {"weighting": "min-snr", "gamma": 5.0}
    whole = denoising_loss(network, x_0, labels, seeded(5), label_drop=0.5, **settings)
    for part in (slice(0, 3), slice(3, 8)):
        losses, t = noised_loss(network, x_0[part], labels[part], {key: value[part] for key, value in noise.items()}, **settings)
        torch.testing.assert_close(losses, whole[0][part])
        assert torch.equal(t, whole[1][part])
        assert torch.equal(network.asked[-1][2], network.asked[0][2][part])


# The loss


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
def test_a_network_that_knows_the_image_has_no_loss(predict, weighting):
    x_0 = images(16)
    losses, t = denoising_loss(Guess(predict, lambda x_t, t: x_0), x_0, None, seeded(), weighting=weighting)
    assert losses.shape == t.shape == (16,) and losses.dtype == torch.float32
    assert losses.max() < 1e-5


def test_simple_is_the_plain_error_of_the_target():
    x_0 = images(400)
    eps_loss, _ = denoising_loss(Zero("eps"), x_0, None, seeded())
    x0_loss, _ = denoising_loss(Zero("x0"), x_0, None, seeded())
    v_loss, t = denoising_loss(Zero("v"), x_0, None, seeded())
    energy = x_0.square().mean((1, 2, 3))
    torch.testing.assert_close(x0_loss, energy)
    assert abs(eps_loss.mean().item() - 1) < 5 * math.sqrt(2 / x_0.numel())  # eps^2 has mean 1 and variance 2
    alpha_bar = Schedule.make("cosine", 100).alpha_bar[t]
    expected = (alpha_bar + (1 - alpha_bar) * energy).mean().item()
    assert v_loss.mean().item() == pytest.approx(expected, abs=5 * math.sqrt(2 / x_0.numel()))


def test_min_snr_is_one_loss_whatever_is_predicted():
    """The same x_0 in three guises, the same noise: min(SNR, gamma) |x_0 - x_0_hat|^2 each time."""
    x_0, gamma = images(64), 5.0
    networks = [Guess(predict) for predict in PREDICTIONS]
    of = [denoising_loss(network, x_0, None, seeded(3), weighting="min-snr", gamma=gamma) for network in networks]
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
    _, t = denoising_loss(network, x_0, None, seeded())
    x_t, seen, labels = network.asked[0]
    assert torch.equal(seen, t) and labels is None
    alpha_bar = network.schedule.alpha_bar[t].float()[:, None, None, None]
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    assert abs(eps.mean().item()) < 5 / math.sqrt(eps.numel())
    assert abs(eps.std().item() - 1) < 5 / math.sqrt(2 * eps.numel())


def test_labels_reach_the_network_with_some_dropped():
    labels, network = torch.arange(500) % 10, Guess("v")
    denoising_loss(network, images(500), labels, seeded(), label_drop=0.2)
    _, _, seen = network.asked[0]
    dropped = seen == 10
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert abs(dropped.double().mean().item() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 500)


def test_an_images_loss_is_its_own():
    x_0 = images(8)
    changed = x_0.clone()
    changed[3] = -changed[3]
    one, _ = denoising_loss(Guess("v"), x_0, None, seeded())
    two, _ = denoising_loss(Guess("v"), changed, None, seeded())
    assert (one != two).nonzero().flatten().tolist() == [3]


def test_the_generator_alone_decides():
    x_0 = images(8)
    torch.manual_seed(1)
    one = denoising_loss(Guess("v"), x_0, torch.arange(8), seeded(5), label_drop=0.5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = denoising_loss(Guess("v"), x_0, torch.arange(8), seeded(5), label_drop=0.5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_to_the_network():
    weight = torch.tensor(0.1, requires_grad=True)
    losses, _ = denoising_loss(Guess("eps", lambda x_t, t: weight * x_t), images(8), None, seeded(), weighting="min-snr")
    losses.mean().backward()
    assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0


# By quarter of t


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
    x_0, labels, network = images(50), torch.arange(50) % 10, Guess(predict)
    before = torch.get_rng_state()
    first = validation_loss(network, x_0, labels, seed=4, chunk=50)
    assert validation_loss(network, x_0, labels, seed=4, chunk=50) == first
    assert torch.equal(torch.get_rng_state(), before)
    for chunk in (1, 7, 49, 1000):
        assert validation_loss(network, x_0, labels, seed=4, chunk=chunk) == pytest.approx(first, rel=1e-5)
    assert validation_loss(network, x_0, labels, seed=5)["eps_mse"] != first["eps_mse"]


def test_validation_rates_all_predictions_alike():
    """The same x_0 in three guises has the same error of eps, that of the eps it implies."""
    x_0, networks = images(80), [Guess(predict) for predict in PREDICTIONS]
    of = [validation_loss(network, x_0, None, seed=0) for network in networks]
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
    losses = validation_loss(network, x_0, None, seed=0)
    _, t, _ = network.asked[0]
    assert sorted(((t - 1) // 2).tolist()) == list(range(50))  # stratified over the images
    assert losses["eps_mse"] == pytest.approx((network.schedule.snr[t] * c**2).mean().item(), rel=1e-3)
    quarter = (t - 1) // 25
    for q in range(4):
        assert losses[f"eps_mse_q{q + 1}"] == pytest.approx((network.schedule.snr[t[quarter == q]] * c**2).mean().item(), rel=1e-3)
    assert list(losses) == ["eps_mse", "eps_mse_q1", "eps_mse_q2", "eps_mse_q3", "eps_mse_q4"]


def test_validation_keeps_all_labels_and_builds_no_graph():
    labels, network = torch.arange(30) % 10, Guess("v", lambda x_t, t: x_t * torch.tensor(0.5, requires_grad=True))
    validation_loss(network, images(30), labels, seed=0, chunk=20)
    assert torch.equal(torch.cat([seen for _, _, seen in network.asked]), labels)


def test_an_image_meets_the_same_noise_at_the_same_share_of_any_T():
    networks = [Guess("v", schedule=Schedule.make("cosine", T)) for T in (100, 1000)]
    eps = []
    for network in networks:
        validation_loss(network, images(30), None, seed=0)
        x_t, t, _ = network.asked[0]
        eps.append(network.schedule.eps_from(images(30), x_t, t))
    torch.testing.assert_close(eps[0], eps[1], rtol=1e-3, atol=1e-3)
    (_, t, _), (_, t_longer, _) = networks[0].asked[0], networks[1].asked[0]
    assert (t / 100 - t_longer / 1000).abs().max() <= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_gpu_trains_on_the_same_noise_as_the_cpu(predict):
    x_0, labels = images(32), torch.arange(32) % 10
    cpu = denoising_loss(Guess(predict), x_0, labels, seeded(), weighting="min-snr", label_drop=0.5)
    gpu = denoising_loss(Guess(predict), x_0.cuda(), labels.cuda(), seeded(), weighting="min-snr", label_drop=0.5)
    assert torch.equal(gpu[1].cpu(), cpu[1])
    torch.testing.assert_close(gpu[0].cpu(), cpu[0], rtol=1e-3, atol=1e-5)
    assert validation_loss(Guess(predict), x_0.cuda(), labels.cuda(), seed=0) == pytest.approx(
        validation_loss(Guess(predict), x_0, labels, seed=0), rel=1e-3
    )
