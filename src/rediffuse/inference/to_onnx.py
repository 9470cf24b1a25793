"""The networks of a trained model as ONNX, for any batch, with what is needed to draw images from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rediffuse.diffusion.denoiser import GUIDE, Denoiser
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model
from rediffuse.vae.latents import has_latents, load_latents
from rediffuse.vae.model import VAE

NETWORK, GUIDE_NETWORK, DECODER = "model.onnx", "guide.onnx", "decoder.onnx"
OPSET = 18
CPU = torch.device("cpu")


def write_onnx(folder: Path, config: dict[str, Any], target: Path) -> str:
    """Write the networks of the model in `folder`, and its config.json, into the folder `target`.

    Returns what the model card says under "Use".  Raises UserError if packages are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        missing = "--format onnx needs the packages onnx and onnxscript"
        raise UserError(f"{missing}: pip install 'rediffuse[onnx]'") from None
    usage, more = _write_vae(folder, target) if config["kind"] == "vae" else _write_ddpm(folder, target)
    (target / "config.json").write_text(json.dumps(config | more, indent=2, allow_nan=False) + "\n")
    return usage


def _write_vae(folder: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """Write the decoder.  Returns the usage, and what config.json has beside the arguments of the model."""
    vae = load_model(VAE, folder, CPU)
    inputs, given = {"z": torch.zeros(2, vae.latent_dim)}, ""
    if vae.classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.int64)
        given = f" and `labels`, int64 (batch), 0 to {vae.classes - 1}, as numbered in config.json"
    _write(vae, vae.decode, inputs, "image", target / NETWORK)
    usage = f"""\
`{NETWORK}`: `z`, float32 (batch, {vae.latent_dim}), drawn from N(0, I){given} -> `image`,
float32 (batch, C, H, W), 0 to 1.  Batch: any.  If `prior` below is `mixture`, draw z from the Gaussian
mixture in prior.safetensors instead."""
    return usage, {}


def _write_ddpm(folder: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """Write the network, its guide, and the decoder of a DDPM in latents.  Returns as `_write_vae`."""
    denoiser = load_model(Denoiser, folder, CPU)
    networks = {NETWORK: denoiser}
    inputs = {"x_t": torch.zeros(2, *denoiser.shape), "t": torch.ones(2, dtype=torch.int64)}
    usage = f"""\
`{NETWORK}`: `x_t`, float32 (batch, C, H, W); `t`, int64 (batch), 1 to {denoiser.schedule.T} -> `output`,
like x_t, the estimate of {denoiser.predict}.  Batch: any.
`alpha_bar[t]` in config.json, t = 0 to T, is the schedule:
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps and v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    if (folder / GUIDE).is_dir():
        networks[GUIDE_NETWORK] = load_model(Denoiser, folder / GUIDE, CPU)
        usage += f"""
`{GUIDE_NETWORK}`: the same early in its training.  Autoguidance adds (autoguidance_scale - 1) times the
difference between both outputs to that of `{NETWORK}`."""
    labels = {}
    if n := denoiser.classes:
        labels["labels"] = torch.zeros(2, dtype=torch.int64)
        usage += f"\n`labels`, int64 (batch): 0 to {n - 1}, as numbered in config.json; {n}: no class."
    for name, network in networks.items():
        function = network.forward if labels else partial(network, labels=None)
        _write(network, function, inputs | labels, "output", target / name)
    if has_latents(folder):
        latents = load_latents(folder, CPU)

        def decode(x_0: Tensor) -> Tensor:
            return latents.vae.decode((x_0 * latents.std + latents.mean).flatten(1))

        _write(latents.vae, decode, {"x_0": inputs["x_t"]}, "image", target / DECODER)
        usage += f"\nx_0 is a latent: `{DECODER}` decodes it to `image`, float32 (batch, C, H, W) in [0, 1]."
    else:
        usage += "\nx_0 is an image with pixels from -1 to 1: clip each estimate of it to this range."
    return usage, {"alpha_bar": denoiser.schedule.alpha_bar.tolist()}


def _write(
    model: nn.Module, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], output: str, target: Path
) -> None:
    """Write a function of the model, with these inputs, by name, for any batch."""
    target.parent.mkdir(parents=True, exist_ok=True)
    batch = ({0: torch.export.Dim("batch", min=1)},) * len(inputs)
    with warnings.catch_warnings():
        # All inputs share one axis, on purpose.
        warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")
        torch.onnx.export(
            _Network(model, function).eval(),
            tuple(inputs.values()),
            target,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(batch,),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,  # one file, up to 2 GB
            verbose=False,
        )


class _Network(nn.Module):
    """A function of a model as a network of its own."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)
