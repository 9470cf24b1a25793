"""The denoiser: the U-Net's shapes and what it depends on, guidance, and that it learns."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.diffusion.step import DenoisingStep, validate
from rediffuse.diffusion.unet import HEAD_DIM, SelfAttention, UNet, parts, sinusoids, written_out_attention
from rediffuse.params import load_params
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import SAMPLERS, even_times
from rediffuse.training.average import Average
from stages.train_ddpm import make_denoiser

SETTINGS = load_params(Path(__file__).resolve().parents[1] / "params.yaml").ddpm
CPU = torch.device("cpu")
SMALL = {
    "T": 100,
    "schedule": "cosine",
    "predict": "v",
    "class_names": ["a", "b", "c"],
    "fold": 2,
    "width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": 7,
    "dropout": 0.0,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(shape=(1, 28, 28), *, trained=True, **settings) -> Denoiser:
    """A small denoiser; `trained` shakes every weight, so that nothing is zero any more."""
    torch.manual_seed(0)
    denoiser = Denoiser(shape, **(SMALL | settings))
    if trained:
        for parameter in denoiser.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return denoiser.eval()


def noisy(n, shape=(1, 28, 28), seed=1) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(seed))


def at(*t: int) -> Tensor:
    return torch.tensor(t)


# Shapes


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 17, 23), (3, 30, 29)])
@pytest.mark.parametrize("fold", [1, 2, 4])
def test_output_has_the_shape_of_the_image(shape, fold):
    output = make(shape, fold=fold, multipliers=[1, 2, 2])(noisy(2, shape), at(5, 50), at(0, 2))
    assert output.shape == (2, *shape) and output.dtype == torch.float32
    assert (output.flatten(1).std(1) > 0).all()


def test_an_odd_image_is_padded_at_the_far_edges_and_cropped_again():
    small, large, x = make((1, 17, 23)), make((1, 20, 24)), noisy(2, (1, 17, 23))
    padded = torch.nn.functional.pad(x, (0, 1, 0, 3))
    torch.testing.assert_close(small(x, at(5, 50), at(0, 1)), large(padded, at(5, 50), at(0, 1))[:, :, :17, :23])


def test_blocks_and_levels_are_as_many_as_asked_for():
    small, large = make(blocks=1), make(blocks=3)
    assert len(small.unet.down) == 1 + 1 + 1 and len(large.unet.down) == 3 + 1 + 3
    assert large(noisy(1), at(5), at(0)).shape == (1, 1, 28, 28)


# A new network


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 23)])
def test_a_new_network_puts_out_zero(shape):
    assert not make(shape, trained=False)(noisy(2, shape), at(1, 100), at(0, 1)).any()


def test_a_new_residual_block_is_the_identity():
    for block in make(trained=False).unet.middle:
        x, embedding = noisy(2, (16, 7, 7)), noisy(2, (32,))
        assert torch.equal(block(x, embedding), x)


# What the output depends on


def test_output_depends_on_t_and_on_the_label_of_each_image_alone():
    denoiser, x = make(), noisy(1).repeat(4, 1, 1, 1)
    one, later, other, same = denoiser(x, at(10, 60, 10, 10), at(0, 0, 1, 0))
    torch.testing.assert_close(one, same)
    assert (one - later).abs().max() > 0.01 and (one - other).abs().max() > 0.01


def test_neighbouring_times_differ_at_the_finest_schedule():
    embedding = sinusoids(torch.arange(1, 1001) / 1000, 64)
    assert embedding.shape == (1000, 64)
    assert (embedding[1:] - embedding[:-1]).norm(dim=1).min() > 0.1
    assert torch.cdist(embedding, embedding).fill_diagonal_(math.inf).min() > 0.1


def test_no_labels_are_the_label_one_past_the_last():
    denoiser, x = make(), noisy(2)
    none = denoiser(x, at(5, 50), None)
    assert torch.equal(none, denoiser(x, at(5, 50), at(3, 3)))
    assert not torch.equal(none, denoiser(x, at(5, 50), at(2, 2)))


def test_an_unconditional_model_has_no_labels():
    denoiser = make(class_names=[])
    assert denoiser.classes == 0 and denoiser.unet.embed_label is None
    assert denoiser(noisy(2), at(5, 50), None).shape == (2, 1, 28, 28)
    assert guided(denoiser)(noisy(2), at(5, 50), None).shape == (2, 1, 28, 28)


def test_dropout_acts_in_training_only():
    denoiser, x = make(dropout=0.5), noisy(1)
    assert torch.equal(denoiser(x, at(5), None), denoiser(x, at(5), None))
    denoiser.train()
    assert not torch.equal(denoiser(x, at(5), None), denoiser(x, at(5), None))


# Attention


@pytest.mark.parametrize(
    ("fold", "multipliers", "attention", "heights"),
    [
        (2, [1, 2], 7, {7}),
        (2, [1, 2], 14, {7, 14}),
        (2, [1, 2], 6, set()),
        (2, [1, 2], 0, set()),
        (1, [1, 1, 1], 14, {7, 14}),
        (1, [1, 1, 1], 0, set()),
        (4, [1], 7, {7}),
    ],
)
def test_attention_is_where_the_height_allows_it_and_nowhere_else(fold, multipliers, attention, heights):
    denoiser = make(fold=fold, multipliers=multipliers, attention=attention)
    seen = set()
    for layer in denoiser.modules():
        if isinstance(layer, SelfAttention):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(inputs[0].shape[2]))
    denoiser(noisy(1), at(5), at(0))
    assert seen == heights


def test_attention_reaches_across_the_image():
    torch.manual_seed(0)
    attention = SelfAttention(features := 2 * HEAD_DIM)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.2)
    assert attention.heads == 2
    x = noisy(1, (features, 5, 6))
    moved = x.clone()
    moved[0, :, 0, 0] += 1
    assert (attention(moved) - attention(x)).abs()[0, :, 4, 5].max() > 1e-3


def test_heads_divide_every_width_that_params_allow():
    for features in range(8, 1025, 8):
        heads = SelfAttention(features).heads
        assert features % heads == 0 and (heads == 1 or features // heads >= HEAD_DIM)
    assert SelfAttention(4 * HEAD_DIM).heads == 4


def test_attention_is_that_of_the_paper():
    """Softmax of q k / sqrt(d) over all positions, head by head, in plain arithmetic."""
    torch.manual_seed(0)
    attention = SelfAttention(2 * HEAD_DIM)
    torch.nn.init.normal_(attention.out.weight, std=0.2)
    x = noisy(2, (2 * HEAD_DIM, 3, 4))
    q, k, v = attention.qkv(attention.norm(x).flatten(2).mT).chunk(3, dim=-1)  # each (2, 12, features)
    heads = []
    for i in (slice(0, HEAD_DIM), slice(HEAD_DIM, None)):
        weights = (q[..., i] @ k[..., i].mT / math.sqrt(HEAD_DIM)).softmax(-1)
        heads.append(weights @ v[..., i])
    expected = x + attention.out(torch.cat(heads, -1)).mT.reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_attention_written_out_is_that_of_torch():
    q, k, v = noisy(3, (2, 2, 49, HEAD_DIM))
    torch.testing.assert_close(written_out_attention(q, k, v), scaled_dot_product_attention(q, k, v))


# D(x_t, t, label) and guidance


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_denoise_gives_the_x_0_that_the_output_means(predict):
    denoiser, t = make(predict=predict), at(3, 60)
    x_t = 0.2 * noisy(2)
    alpha_bar = Schedule.make("cosine", 100).alpha_bar[t][:, None, None, None]
    output = denoiser(x_t, t, at(0, 1)).double()
    expected = {
        "eps": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
        "x0": output,
        "v": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
    }[predict]
    torch.testing.assert_close(guided(denoiser)(x_t, t, at(0, 1)), expected.clamp(-1, 1).float(), rtol=1e-4, atol=1e-5)


def test_denoised_pixels_are_clamped():
    denoise = guided(make())
    x_0 = denoise(50 * noisy(2), at(3, 60), at(0, 1))
    assert x_0.min() == -1 and x_0.max() == 1


def outputs_at(scale: float, labels: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """The guided x_0 of a denoiser whose output is so small that nothing is clamped."""
    denoiser = make(predict="x0")
    for parameter in denoiser.unet.last.parameters():
        parameter.data *= 0.2
    x_0 = guided(denoiser, guidance_scale=scale)(noisy(3), at(10, 50, 90), at(*labels))
    assert x_0.abs().max() < 1
    return x_0


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional():
    conditional, unconditional = outputs_at(1), outputs_at(1, labels=(3, 3, 3))
    assert (conditional - unconditional).abs().max() > 0.01
    torch.testing.assert_close(outputs_at(0), unconditional)
    torch.testing.assert_close(outputs_at(1 + 1e-6), conditional)


def test_guidance_is_linear_in_its_scale():
    zero, one, half, beyond = (outputs_at(scale) for scale in (0, 1, 0.5, 1.7))
    torch.testing.assert_close(half, (zero + one) / 2)
    torch.testing.assert_close(beyond, zero + 1.7 * (one - zero))


def test_guidance_without_labels_changes_nothing():
    denoiser, x = make(), noisy(2)
    assert torch.equal(guided(denoiser, guidance_scale=3.0)(x, at(5, 50), None), guided(denoiser)(x, at(5, 50), None))


# Files and averages


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 23)])
def test_a_saved_denoiser_gives_the_same_bits(tmp_path, shape):
    denoiser = make(shape).to(memory_format=torch.channels_last)
    save_model(denoiser, tmp_path / "model")
    loaded = load_model(Denoiser, tmp_path / "model", CPU)
    assert not loaded.training and loaded.class_names == ("a", "b", "c")
    assert torch.equal(loaded.schedule.log_snr, denoiser.schedule.log_snr)
    x = noisy(2, shape)
    assert torch.equal(loaded(x, at(5, 50), at(0, 1)), denoiser(x, at(5, 50), at(0, 1)))
    first = (tmp_path / "model/model.safetensors").read_bytes()
    save_model(loaded, tmp_path / "again")
    assert first == (tmp_path / "again/model.safetensors").read_bytes()


def test_averaging_leaves_the_schedule_alone():
    denoiser = make()
    average = Average(denoiser, half_life=100)
    for seen in (64, 128, 192):
        for parameter in denoiser.parameters():
            parameter.data += 1
        average.update(denoiser, seen=seen, batch=64)
    assert torch.equal(average.model.schedule.log_snr, Schedule.make("cosine", 100).log_snr)
    assert not any("schedule" in name for name in denoiser.state_dict())


@pytest.mark.parametrize(("features", "size", "expected"), [(64, 16, 4), (8, 16, 1), (24, 16, 1), (40, 16, 2), (56, 16, 2), (192, 64, 3)])
def test_features_are_divided_into_equal_parts_of_at_least_a_size(features, size, expected):
    assert parts(features, size) == expected


# The task


def test_config_of_an_unconditional_model_has_no_classes():
    assert make_denoiser(SETTINGS, (1, 28, 28), ("a", "b")).config["class_names"] == ["a", "b"]
    assert make_denoiser(SETTINGS.model_copy(update={"conditional": False}), (1, 28, 28), ("a", "b")).classes == 0


@pytest.mark.parametrize("class_names", [["a", "b", "c"], []])
def test_a_step_logs_sums_that_belong_to_its_loss(class_names):
    denoiser, images, labels = make(class_names=class_names), (noisy(16).sigmoid() * 255).to(torch.uint8), torch.arange(16) % 3
    step = DenoisingStep(**SETTINGS.select(DenoisingStep))
    loss, measures = step(denoiser, images, labels, step.draw(denoiser, images.shape, seeded()), 0)
    total, count = measures["loss"]
    assert count == 16 and total / count == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(sum(measures[f"loss_q{i}"] for i in (1, 2, 3, 4)), measures["loss"])
    assert [measures[f"loss_q{i}"][1].item() for i in (1, 2, 3, 4)] == [4, 4, 4, 4]
    assert not any(measure.requires_grad for measure in measures.values()) and loss.requires_grad


def test_mirrored_images_are_those_that_the_noise_names():
    denoiser, images = make(class_names=[]), (noisy(16).sigmoid() * 255).to(torch.uint8)
    step = DenoisingStep(**SETTINGS.model_copy(update={"flip": True}).select(DenoisingStep))
    noise = step.draw(denoiser, images.shape, seeded())
    mirrored = noise.pop("mirrored")
    assert 0 < mirrored.sum() < 16 and "mirrored" not in DenoisingStep(**SETTINGS.select(DenoisingStep)).draw(
        denoiser, images.shape, seeded()
    )
    by_hand = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images, mirrored, strict=True)])
    assert step(denoiser, images, None, noise | {"mirrored": mirrored}, 0)[0] == step(denoiser, by_hand, None, noise, 0)[0]
    assert step(denoiser, images, None, noise, 0)[0] != step(denoiser, by_hand, None, noise, 0)[0]


def test_validation_of_a_new_network_is_that_of_putting_out_zero():
    images = (noisy(64).sigmoid() * 255).to(torch.uint8)
    found = validate(make(predict="eps", trained=False), images, torch.zeros(64, dtype=torch.int64), seed=1)
    assert found["eps_mse"] == pytest.approx(1, abs=0.02)  # the variance of the noise


# Learning


def shapes(size=8) -> Tensor:
    """Three images in [-1, 1]: left half, upper half, diagonal."""
    images = -torch.ones(3, 1, size, size)
    images[0, :, :, : size // 2] = 1
    images[1, :, : size // 2] = 1
    images[2, 0].fill_diagonal_(1)
    return images


def overfit(predict: str) -> tuple[Denoiser, float, float]:
    """A denoiser that has seen three labelled images again and again, and its loss before and after."""
    denoiser = make((1, 8, 8), predict=predict, trained=False, width=16, T=50)
    step = DenoisingStep(**SETTINGS.model_copy(update={"loss_weight": "simple", "label_drop": 0.1}).select(DenoisingStep))
    images = ((shapes() + 1) * 127.5).round().to(torch.uint8).repeat(11, 1, 1, 1)[:32]
    labels = torch.arange(32) % 3
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    losses = []
    for i in range(250):
        loss, _ = step(denoiser, images, labels, step.draw(denoiser, images.shape, seeded(i)), 0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return denoiser.eval(), sum(losses[:3]) / 3, sum(losses[-20:]) / 20


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_a_tiny_denoiser_overfits_and_draws_the_image_of_each_label(predict):
    denoiser, before, after = overfit(predict)
    assert after < 0.2 * before
    with torch.inference_mode():
        x_T, times = noisy(3, (1, 8, 8), seed=7), even_times(denoiser.schedule, 25)
        drawn = SAMPLERS["ddim"](guided(denoiser), denoiser.schedule, x_T, at(0, 1, 2), times=times, eta=0.0, noise=lambda: torch.empty(0))
    assert (drawn.sign() == shapes()).double().mean() > 0.95


def test_a_copy_is_independent():
    """The schedule keeps tables per device; a deep copy, as the average makes one, must work on its own."""
    denoiser = make()
    guided(denoiser)(noisy(1), at(5), at(0))
    twin = copy.deepcopy(denoiser)
    assert torch.equal(guided(twin)(noisy(1), at(5), at(0)), guided(denoiser)(noisy(1), at(5), at(0)))


def test_the_unet_takes_time_as_a_share_of_T():
    """The same weights at half the steps see the same t/T."""
    torch.manual_seed(0)
    fine, coarse = make(T=100), make(T=50)
    assert isinstance(fine.unet, UNet)
    torch.testing.assert_close(fine(noisy(1), at(40), at(0)), coarse(noisy(1), at(20), at(0)))
