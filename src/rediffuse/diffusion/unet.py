"""The U-Net (Ronneberger et al. 2015) that sees x_t, the time t and, if there are labels, the label.

Residual blocks with GroupNorm whose scale and shift come from t and label (Dhariwal & Nichol 2021),
self-attention at the small resolutions, last layers that start at zero.  The image is first folded: fold x
fold pixels become channels, so that the convolutions run at a resolution where a CPU and a GPU are fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

# The fewest features in a group of GroupNorm, and in a head.  With smaller groups PyTorch's kernel for
# channels_last takes 10 times as long on a CPU.
GROUP, HEAD_DIM = 16, 64
TOLD = 9  # numbers that tell how an image was augmented, see augmentation.py

M = TypeVar("M", bound=nn.Module)


class Architecture(TypedDict):
    """The arguments of a UNet except the images' shape and the number of classes."""

    fold: int
    width: int
    multipliers: Sequence[int]
    blocks: int
    attention: int
    dropout: float
    augment: NotRequired[float]  # which older models lack


def unet_arguments(config: Mapping[str, Any]) -> Architecture:
    """Select the arguments of the network from those of a model."""
    return cast(Architecture, {name: config[name] for name in Architecture.__annotations__ if name in config})


class UNet(nn.Module):
    """Map x (B, C, H, W), t in [0, 1] (B,) and labels int64 (B,) or None to (B, C, H, W).

    told: how the images were augmented, (B, TOLD), by a network that trains with augmentation; None: not.

    shape: (C, H, W), with any H and W: the image is padded inside, and cropped again.
    classes: number of labels; the index `classes` means "no label"; 0: unconditional.
    width: features at the first resolution.  multipliers: features of each resolution, in widths; each is
    half the one before.  blocks: residual blocks per resolution, on the way down and on the way up.
    attention: the largest height with self-attention, 0 for none.  augment: above 0 if it is trained with
    augmentation.
    """

    def __init__(self, shape: Sequence[int], *, classes: int, **architecture: Unpack[Architecture]) -> None:
        super().__init__()
        fold, width, multipliers = architecture["fold"], architecture["width"], architecture["multipliers"]
        blocks, dropout = architecture["blocks"], architecture["dropout"]
        channels, height, _ = shape
        self.multiple = fold * 2 ** (len(multipliers) - 1)
        self.width, self.classes = width, classes
        embedding = 4 * width
        self.embed_t = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.embed_label = nn.Embedding(classes + 1, embedding) if classes else None
        self.embed_told = nn.Linear(TOLD, embedding, bias=False) if architecture.get("augment") else None
        self.fold, self.unfold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)

        def block(inputs: int, outputs: int, size: int) -> ResidualBlock:
            attention = size <= architecture["attention"]
            return ResidualBlock(inputs, outputs, embedding, attention=attention, dropout=dropout)

        features = [width * multiplier for multiplier in multipliers]
        folded = math.ceil(height / self.multiple) * self.multiple // fold
        sizes = [folded // 2**level for level in range(len(features))]
        self.first = nn.Conv2d(channels * fold**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = width
        for level, (outputs, size) in enumerate(zip(features, sizes, strict=True)):
            for _ in range(blocks):
                self.down.append(block(before, outputs, size))
                before = outputs
            if level + 1 < len(features):
                self.down.append(nn.Conv2d(outputs, outputs, 3, stride=2, padding=1))
        self.middle = nn.ModuleList(block(before, before, sizes[-1]) for _ in range(2))
        for level in reversed(range(len(features))):
            outputs, size = features[level], sizes[level]
            if level + 1 < len(features):
                self.up.append(Upsample(before, outputs))
            self.up.extend(block(2 * outputs, outputs, size) for _ in range(blocks))
            before = outputs
        to_pixels = nn.Conv2d(before, channels * fold**2, 3, padding=1)
        self.last = nn.Sequential(group_norm(before), nn.SiLU(), zero(to_pixels))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, told: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        x = pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        embedding = self.embed_t(sinusoids(t, self.width))
        if self.embed_label is not None:
            if labels is None:
                labels = torch.full((len(x),), self.classes, device=x.device)
            embedding = embedding + self.embed_label(labels)
        if self.embed_told is not None and told is not None:
            embedding = embedding + self.embed_told(told)
        embedding = silu(embedding)
        h = self.first(self.fold(x))  # (B, width, H / fold, W / fold)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResidualBlock):
                h = layer(h, embedding)
                skips.append(h)
            else:
                h = layer(h)
        for block in self.middle:
            h = block(h, embedding)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(torch.cat([h, skips.pop()], 1), embedding)
            else:
                h = layer(h)
        output: Tensor = self.unfold(self.last(h))
        return output[:, :, :height, :width]


class ResidualBlock(nn.Module):
    """Add two convolutions, modulated by the embedding, to x; then apply self-attention if asked to."""

    def __init__(self, inputs: int, outputs: int, embedding: int, *, attention: bool, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm_2, self.conv_2 = group_norm(outputs), zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv_1(silu(self.norm_1(x)))
        h = torch.addcmul(shift, self.norm_2(h), scale + 1)
        h = self.conv_2(self.dropout(silu(h)))
        attended: Tensor = self.attention(self.skip(x) + h)
        return attended


class SelfAttention(nn.Module):
    """Add attention among all positions to x (Vaswani et al. 2017)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.heads = parts(features, HEAD_DIM)
        self.norm = group_norm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), zero(nn.Linear(features, features))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, features)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, HW, dim)
        mixed = scaled_dot_product_attention(q, k, v) if x.is_cuda else written_out_attention(q, k, v)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return x + attended.transpose(1, 2).reshape(x.shape)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(dim)) v, all (B, heads, N, dim).

    On a CPU, at 7x7 positions, scaled_dot_product_attention takes 2.8 to 4.5 times as long, forward and
    backward (docs/performance.md); on CUDA it is faster.
    """
    weights: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)  # (B, heads, N, N)
    return weights @ v


class Upsample(nn.Module):
    """Double the height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


def group_norm(features: int) -> nn.GroupNorm:
    """Make a GroupNorm (Wu & He 2018) with groups of GROUP features, or more where GROUP does not divide."""
    return nn.GroupNorm(parts(features, GROUP), features)


def parts(features: int, size: int) -> int:
    """Return the largest number of equal parts with at least `size` features each, 1 if there is none."""
    return next(n for n in range(max(1, features // size), 0, -1) if features % n == 0)


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of t in [0, 1], (B, width), at frequencies 1 to 1000 (DDPM, appendix B)."""
    frequencies = torch.logspace(0, 3, width // 2, device=t.device)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def zero(module: M) -> M:
    """Set a layer to zero, so that a residual block starts as the identity and the network's output as 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
