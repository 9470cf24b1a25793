"""The networks of a trained model as ONNX, for any batch, and what one needs beside them to draw images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import load_model
from rediffuse.vae.latents import Latents, has_latents, load_latents
from rediffuse.vae.model import VAE

NETWORK, DECODER = "model.onnx", "decoder.onnx"
OPSET = 18


def write_onnx(kind: Kind, folder: Path, config: dict[str, Any], target: Path) -> None:
    """Write the networks of the model in `folder`, and its config.json, into the folder `target`.

    Raises UserError if packages are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--format onnx needs the packages onnx and onnxscript: pip install 'rediffuse[onnx]'") from None
    cpu = torch.device("cpu")
    if kind == "vae":
        vae = load_model(VAE, folder, cpu)
        labels = {"labels": torch.zeros(2, dtype=torch.int64)} if vae.classes else {}
        _write(_Decoder(vae), {"z": torch.zeros(2, vae.latent_dim)} | labels, "image", target / NETWORK)
    else:
        denoiser = load_model(Denoiser, folder, cpu)
        x_t, t = torch.zeros(2, *denoiser.shape), torch.ones(2, dtype=torch.int64)
        if denoiser.classes:
            _write(denoiser, {"x_t": x_t, "t": t, "labels": torch.zeros(2, dtype=torch.int64)}, "output", target / NETWORK)
        else:
            _write(_Unconditional(denoiser), {"x_t": x_t, "t": t}, "output", target / NETWORK)
        if has_latents(folder):
            _write(_LatentDecoder(load_latents(folder, cpu)), {"x_0": x_t}, "image", target / DECODER)
        config = config | {"alpha_bar": denoiser.schedule.alpha_bar.tolist()}
    (target / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")


def onnx_usage(kind: Kind, folder: Path, config: dict[str, Any]) -> str:
    """What the model card says of the use: inputs, outputs, and what to make of them."""
    if kind == "vae":
        names = config.get("class_names", ())
        given = f" and `labels`, int64 (batch), 0 to {len(names) - 1}, as numbered in config.json" if names else ""
        return (
            f"`{NETWORK}`: `z`, float32 (batch, {_latent_dim(config)}), drawn from N(0, I){given} -> `image`, float32 (batch, C, H, W), 0"
            " to 1.\nBatch: any.  Where `prior` below is `mixture`, draw z from the Gaussian mixture in prior.safetensors instead."
        )
    lines = [
        f"`{NETWORK}`: `x_t`, float32 (batch, C, H, W); `t`, int64 (batch), 1 to {config['T']} -> `output`, like x_t, the estimate of"
        f" {config['predict']}.  Batch: any.",
    ]
    if names := config["class_names"]:
        lines.append(f"`labels`, int64 (batch), 0 to {len(names) - 1}: the class, as numbered in config.json; {len(names)}: no class.")
    lines.append(
        "`alpha_bar[t]` in config.json, t = 0 to T, is the schedule: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, and"
        " v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."
    )
    if has_latents(folder):
        lines.append(f"x_0 is a latent: `{DECODER}` makes of `x_0`, float32 (batch, c, h, w), `image`, float32 (batch, C, H, W) in [0, 1].")
    else:
        lines.append("x_0 is an image with pixels from -1 to 1, to which each estimate of it is to be clipped.")
    return "\n".join(lines)


def _latent_dim(config: Mapping[str, Any]) -> int:
    with torch.device("meta"):  # only its size is asked for
        return VAE(**{name: value for name, value in config.items() if name != "kind"}).latent_dim


def _write(network: nn.Module, inputs: Mapping[str, Tensor], output: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")  # it is one axis for all inputs, as it should
        torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            target,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) * len(inputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,  # one file, which is easily sent; up to 2 GB
            verbose=False,
        )


class _Unconditional(nn.Module):
    """x_t, t -> the output of a denoiser without labels."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.denoiser(x_t, t, None)
        return output


class _Decoder(nn.Module):
    """z, and labels for a conditional one -> the image that a VAE decodes it to."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.vae.decode(z, labels)


class _LatentDecoder(nn.Module):
    """x_0 in the space of latents -> the image."""

    def __init__(self, latents: Latents) -> None:
        super().__init__()
        self.vae, self.mean, self.std = latents.vae, latents.mean, latents.std

    def forward(self, x_0: Tensor) -> Tensor:
        return self.vae.decode((x_0 * self.std + self.mean).flatten(1))
