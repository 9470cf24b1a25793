"""The denoiser: what the U-Net computes and depends on, guidance, the training step, and that it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rediffuse.diffusion.augmentation import SHIFT, augment, draw_augmentation
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.objective import squared_error
from rediffuse.diffusion.schedule import Schedule
from rediffuse.diffusion.step import DenoisingStep
from rediffuse.diffusion.unet import HEAD_DIM, SelfAttention, written_out_attention
from rediffuse.params import load_params
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import SAMPLERS, even_times
from stages.train_ddpm import make_denoiser

SETTINGS = load_params(Path(__file__).resolve().parents[1] / "params.yaml").ddpm
SMALL: dict[str, Any] = {"T": 100, "schedule": "cosine", "predict": "v", "class_names": ["a", "b", "c"]}
SMALL |= {"fold": 2, "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": 7, "dropout": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(shape: Any = (1, 28, 28), *, trained: bool = True, **settings: Any) -> Denoiser:
    """A small denoiser; `trained` shakes every weight, so that nothing is zero any more."""
    torch.manual_seed(0)
    denoiser = Denoiser(shape, **(SMALL | settings))
    if trained:
        for parameter in denoiser.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return denoiser.eval()


def noisy(n: int, shape: Any = (1, 28, 28), seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(seed))


def at(*t: int) -> Tensor:
    return torch.tensor(t)


# The network


@pytest.mark.parametrize(("shape", "fold"), [((1, 28, 28), 1), ((3, 32, 32), 2), ((1, 17, 23), 4)])
def test_output_has_the_shape_of_the_image_and_starts_at_zero(shape, fold):
    settings = {"fold": fold, "multipliers": [1, 2, 2], "blocks": 2}
    output = make(shape, **settings)(noisy(2, shape), at(5, 50), at(0, 2))
    assert output.shape == (2, *shape) and output.dtype == torch.float32
    assert (output.flatten(1).std(1) > 0).all()
    assert not make(shape, trained=False, **settings)(noisy(2, shape), at(1, 100), at(0, 1)).any()


def test_output_depends_on_t_and_on_the_label_of_each_image_alone():
    denoiser, x = make(), noisy(1).repeat(4, 1, 1, 1)
    one, later, other, same = denoiser(x, at(10, 60, 10, 10), at(0, 0, 1, 0))
    torch.testing.assert_close(one, same)
    assert (one - later).abs().max() > 0.01 and (one - other).abs().max() > 0.01
    none = denoiser(x, at(5, 5, 5, 5), None)
    assert torch.equal(none, denoiser(x, at(5, 5, 5, 5), at(3, 3, 3, 3)))  # one past the last label
    assert not torch.equal(none, denoiser(x, at(5, 5, 5, 5), at(2, 2, 2, 2)))


def test_an_unconditional_model_has_no_labels():
    denoiser = make(class_names=[])
    assert denoiser.classes == 0 and guided(denoiser)(noisy(2), at(5, 50), None).shape == (2, 1, 28, 28)
    unconditional = SETTINGS.model_copy(update={"conditional": False})
    assert make_denoiser(SETTINGS, (1, 28, 28), ("a", "b")).class_names == ("a", "b")
    assert make_denoiser(unconditional, (1, 28, 28), ("a", "b")).classes == 0


def test_dropout_acts_in_training_only():
    denoiser, x = make(dropout=0.5), noisy(1)
    assert torch.equal(denoiser(x, at(5), None), denoiser(x, at(5), None))
    denoiser.train()
    assert not torch.equal(denoiser(x, at(5), None), denoiser(x, at(5), None))


# Attention


@pytest.mark.parametrize(("attention", "heights"), [(0, set()), (6, set()), (7, {7}), (14, {7, 14})])
def test_attention_is_where_the_height_allows_it_and_nowhere_else(attention, heights):
    denoiser = make(attention=attention)
    seen = set()
    for layer in denoiser.modules():
        if isinstance(layer, SelfAttention):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(inputs[0].shape[2]))
    denoiser(noisy(1), at(5), at(0))
    assert seen == heights


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
    q, k, v = noisy(3, (2, 2, 49, HEAD_DIM))
    torch.testing.assert_close(written_out_attention(q, k, v), scaled_dot_product_attention(q, k, v))


# D(x_t, t, label) and guidance


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_denoise_gives_the_x_0_that_the_output_means_clamped(predict):
    denoiser, t = make(predict=predict), at(3, 60)
    x_t = torch.tensor([0.2, 50.0]).view(2, 1, 1, 1) * noisy(2)
    alpha_bar = Schedule.make("cosine", 100).alpha_bar[t][:, None, None, None]
    output = denoiser(x_t, t, at(0, 1)).double()
    expected = {
        "eps": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
        "x0": output,
        "v": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
    }[predict]
    found = guided(denoiser)(x_t, t, at(0, 1))
    torch.testing.assert_close(found, expected.clamp(-1, 1).float(), rtol=1e-4, atol=1e-4)
    unclipped = guided(make(predict=predict, clip=False))(x_t, t, at(0, 1))
    torch.testing.assert_close(unclipped, expected.float(), rtol=1e-4, atol=1e-4)


def guided_x_0(scale: float, labels: Tensor | None) -> Tensor:
    """The x_0 of a denoiser whose output is so small that nothing is clamped."""
    denoiser = make(predict="x0")
    for parameter in denoiser.unet.last.parameters():
        parameter.data *= 0.2
    x_0 = guided(denoiser, guidance_scale=scale)(noisy(3), at(10, 50, 90), labels)
    assert x_0.abs().max() < 1
    return x_0


def test_guidance_is_linear_from_the_unconditional_to_the_conditional_model_and_beyond():
    conditional, unconditional = guided_x_0(1, at(0, 1, 2)), guided_x_0(1, at(3, 3, 3))
    assert (conditional - unconditional).abs().max() > 0.01
    for scale in (0, 0.5, 1 + 1e-6, 1.7):
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(guided_x_0(scale, at(0, 1, 2)), expected)
    assert torch.equal(guided_x_0(3.0, None), guided_x_0(1, None))


def test_guidance_is_for_an_interval_of_t():
    denoiser, seen = make(predict="x0"), []  # T = 100
    denoiser.unet.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    guide = guided(denoiser, 3.0, (0.1, 0.5))
    for t, rows in ((9, 2), (10, 4), (50, 4), (51, 2)):
        x_t, labels = noisy(2), at(0, 1)
        found = guide(x_t, at(t, t), labels)
        assert seen.pop() == rows
        everywhere, never = (guided(denoiser, scale)(x_t, at(t, t), labels) for scale in (3.0, 1.0))
        assert torch.equal(found, everywhere if rows == 4 else never) and not torch.equal(everywhere, never)
        seen.clear()


def test_autoguidance_goes_away_from_the_guide_inside_the_interval():
    denoiser, guide = make(predict="x0", clip=False), make(predict="x0", clip=False)
    for parameter in guide.parameters():
        parameter.data *= 0.9
    labels, none = at(0, 1), at(3, 3)
    for t, inside in ((9, False), (10, True), (50, True), (51, False)):
        x_t, times = noisy(2), at(t, t)
        conditional, unconditional, weak = (
            guided(model)(x_t, times, y)
            for model, y in ((denoiser, labels), (denoiser, none), (guide, labels))
        )
        assert not torch.equal(conditional, weak)
        for scale in (1.0, 3.0):
            both = guided(denoiser, scale, (0.1, 0.5), guide=guide, autoguidance_scale=1.7)
            more = (scale - 1) * (conditional - unconditional) + 0.7 * (conditional - weak)
            torch.testing.assert_close(both(x_t, times, labels), conditional + inside * more)
    alone = guided(denoiser, autoguidance_scale=1.7)(x_t, times, labels)
    assert torch.equal(alone, guided(denoiser)(x_t, times, labels))


# The task


def step_of(**changes: Any) -> DenoisingStep:
    return DenoisingStep(**SETTINGS.model_copy(update=changes).select(DenoisingStep))


def grey(n: int) -> Tensor:
    return (noisy(n).sigmoid() * 255).to(torch.uint8)


@pytest.mark.parametrize("class_names", [["a", "b", "c"], []])
def test_a_step_logs_sums_that_belong_to_its_loss(class_names):
    denoiser, images, labels, step = (
        make(class_names=class_names),
        grey(16),
        torch.arange(16) % 3,
        step_of(t_density="uniform"),
    )
    loss, measures = step(denoiser, images, labels, step.draw(denoiser, images.shape, seeded()), 0)
    total, count = measures["loss"]
    assert count == 16 and total / count == pytest.approx(loss.item(), rel=1e-5)
    quarters = [measures[f"loss_q{i}"] for i in (1, 2, 3, 4)]
    torch.testing.assert_close(sum(quarters), measures["loss"])
    assert [quarter[1].item() for quarter in quarters] == [4, 4, 4, 4]
    assert not any(measure.requires_grad for measure in measures.values()) and loss.requires_grad


def test_mirrored_images_are_those_that_the_noise_names():
    denoiser, images, step = make(class_names=[]), grey(16), step_of(flip=True)
    noise = step.draw(denoiser, images.shape, seeded())
    assert "mirrored" not in step_of().draw(denoiser, images.shape, seeded())
    mirrored = noise.pop("mirrored")
    assert 0 < mirrored.sum() < 16
    flipped = [image.flip(-1) if flip else image for image, flip in zip(images, mirrored, strict=True)]
    loss = step(denoiser, images, None, noise | {"mirrored": mirrored}, 0)[0]
    assert loss == step(denoiser, torch.stack(flipped), None, noise, 0)[0]
    assert loss != step(denoiser, images, None, noise, 0)[0]


def told(n: int, **columns: float) -> Tensor:
    """What tells of an augmentation of n images, by the names of its columns."""
    names = ("mirror_x", "mirror_y", "scale", "cos", "sin", "along", "across", "right", "down")
    return torch.tensor([columns.get(name, 0.0) for name in names]).expand(n, -1)


def test_an_image_is_augmented_as_the_network_is_told():
    images = (noisy(3, (2, 16, 24)) / 3).clamp(-1, 1)

    def close(result: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    assert torch.equal(augment(images, told(3)), images)
    close(augment(images, told(3, mirror_x=1)), images.flip(3))
    close(augment(images, told(3, mirror_y=1)), images.flip(2))
    close(augment(images, told(3, cos=-2)), images.flip(2, 3))  # cos - 1 of half a turn
    square = images[:, :, :, :16]
    close(augment(square, told(3, cos=-1, sin=1)), square.rot90(1, (2, 3)))
    right, down = 3 / 24 / SHIFT, -2 / 16 / SHIFT  # 3 pixels to the right and 2 up
    moved = augment(images, told(3, right=right, down=down))
    close(moved[:, :, :-2, 3:], images[:, :, 2:, :-3])
    close(moved[:, :, :-2, :3], images[:, :, 2:, :3].flip(3))  # what was outside is mirrored


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"scale": 5.0}, (2.0, 2.0)),  # 2 ** (5 SPREAD) times as large
        ({"along": 5.0}, (2.0, 0.5)),  # left to right
        ({"along": -5.0}, (0.5, 2.0)),
        ({"scale": 5.0, "along": 5.0}, (4.0, 1.0)),
        ({"along": 5.0, "cos": -1, "sin": 1}, (0.5, 2.0)),  # and a quarter turn
    ],
    ids=str,
)
def test_scale_and_stretch_are_those_that_the_network_is_told(columns, expected):
    """Of a smooth spot in the middle, the widths by its second moments; further out is its mirror image."""
    y, x = torch.meshgrid(torch.arange(128) - 63.5, torch.arange(128) - 63.5, indexing="ij")
    spot = 2 * torch.exp(-(x.square() + y.square()) / (2 * 2.0**2)) - 1
    seen = (augment(spot[None, None], told(1, **columns))[0, 0] + 1) / 2 * (x.abs() < 32) * (y.abs() < 32)
    widths = [((seen * each.square()).sum() / seen.sum()).sqrt().item() / 2 for each in (x, y)]
    assert widths == pytest.approx(expected, rel=0.02)


def test_each_kind_of_augmentation_has_the_probability_asked_for():
    drawn = draw_augmentation(20_000, 0.2, seeded())
    kinds = [
        drawn[:, 0],
        drawn[:, 1],
        drawn[:, 2],
        drawn[:, 3:5].any(1),
        drawn[:, 5:7].any(1),
        drawn[:, 7:].any(1),
    ]
    shares = [(kind != 0).double().mean().item() for kind in kinds]
    five_sigma = 5 * math.sqrt(0.2 * 0.8 / 20_000)
    assert shares == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2], abs=five_sigma)  # half do not mirror
    turned = drawn[drawn[:, 3:5].any(1)]
    torch.testing.assert_close((turned[:, 3] + 1).square() + turned[:, 4].square(), torch.ones(len(turned)))
    assert not draw_augmentation(100, 0.0, seeded()).any()


def test_only_the_network_that_is_told_sees_an_augmentation():
    """What it draws, without being told, is what it learnt of images as they are."""
    denoiser, images, step = make(class_names=[], augment=0.3), grey(16), step_of(augment=0.3)
    noise = step.draw(denoiser, images.shape, seeded())
    assert "augmentation" not in step_of().draw(denoiser, images.shape, seeded())
    how = noise["augmentation"]
    x_0 = images.float() / 127.5 - 1
    by_hand = squared_error(denoiser, augment(x_0, how), None, noise["t"], noise["eps"], how)
    assert step(denoiser, images, None, noise, 0)[0].item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    x_t, t = noisy(4), at(5, 50, 70, 100)
    assert torch.equal(denoiser(x_t, t, None), denoiser(x_t, t, None, told(4)))
    assert not torch.equal(denoiser(x_t, t, None), denoiser(x_t, t, None, told(4, scale=1.0)))
    plain = make(class_names=[])
    assert torch.equal(plain(x_t, t, None), plain(x_t, t, None, told(4, scale=1.0)))


# Learning


def test_a_tiny_denoiser_overfits_and_draws_the_image_of_each_label():
    shapes = -torch.ones(3, 1, 8, 8)  # left half, upper half, diagonal
    shapes[0, :, :, :4], shapes[1, :, :4] = 1, 1
    shapes[2, 0].fill_diagonal_(1)
    images = ((shapes + 1) * 127.5).round().to(torch.uint8).repeat(11, 1, 1, 1)[:32]
    denoiser = make((1, 8, 8), trained=False, width=16, T=50)
    step, labels = step_of(loss_weight="simple", label_drop=0.1), torch.arange(32) % 3
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    losses = []
    for i in range(150):
        loss, _ = step(denoiser, images, labels, step.draw(denoiser, images.shape, seeded(i)), 0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.2 * sum(losses[:3]) / 3
    x_T, times = noisy(3, (1, 8, 8), seed=7), even_times(denoiser.schedule, 25)
    with torch.inference_mode():
        D, schedule = guided(denoiser.eval()), denoiser.schedule
        drawn = SAMPLERS["ddim"](D, schedule, x_T, at(0, 1, 2), times=times, noise=lambda: torch.empty(0))
    assert (drawn.sign() == shapes).double().mean() > 0.95
