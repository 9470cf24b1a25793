"""A DDPM as a folder for `diffusers.DDPMPipeline`, which draws what our sampler `ddpm` draws."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rediffuse.diffusion.schedule import Schedule
from rediffuse.diffusion.unet import unet_arguments
from rediffuse.runtime.errors import UserError
from rediffuse.vae.latents import has_latents

MODULE, CLASS = "rediffuse_unet", "RediffuseUNet"
PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def diffusers_files(folder: Path, config: dict[str, Any], label: int | None) -> dict[str, bytes]:
    """Return the files of the exported folder, by path.  label: of all images; None: no label.

    Raises UserError if the model is not a DDPM of pixels.
    """
    if config["kind"] == "vae" or has_latents(folder):
        found = "--model is vae" if config["kind"] == "vae" else "this one works in latents (ddpm.space)"
        remedy = "take --format folder or onnx"
        raise UserError(f"--format diffusers takes a DDPM of pixels, but {found}: {remedy}")
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": [MODULE, CLASS]}
    return {
        "model_index.json": _json({"_class_name": "DDPMPipeline"} | parts),
        "scheduler/scheduler_config.json": _json(_scheduler(config)),
        "unet/config.json": _json(_network(config, label)),
        "unet/diffusion_pytorch_model.safetensors": (folder / "model.safetensors").read_bytes(),
        f"unet/{MODULE}.py": _source().encode(),
    }


def diffusers_usage(config: dict[str, Any], label: int | None) -> str:
    """Return what the model card says under "Use"."""
    if label is not None:
        drawn = f"of the class {config['class_names'][label].strip()}"
    else:
        drawn = "of no particular class" if config["class_names"] else "without classes"
    return f"""\
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
    images = pipeline(batch_size=16, num_inference_steps={config["T"]}).images

Needs torch and diffusers, in float32.  `trust_remote_code` lets diffusers run the network in
`unet/{MODULE}.py`: read it first.  The images are {drawn}, drawn over all {config["T"]} steps
and without guidance.  The settings and scores below are not of these images."""


def _scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """Return a DDPMScheduler with the transitions of our sampler `ddpm`.

    As a DDIMScheduler it has those of `ddim`, if the number of steps divides T.  Its timestep is our t - 1.
    With the spacing "trailing" the first step starts at T, as ours does.
    """
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config["T"],
        "trained_betas": Schedule.make(config["schedule"], config["T"]).beta[1:].tolist(),
        "prediction_type": PREDICTION_TYPE[config["predict"]],
        "variance_type": "fixed_small",
        "clip_sample": config["clip"],
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
    }


def _network(config: dict[str, Any], label: int | None) -> dict[str, Any]:
    channels, *size = config["shape"]
    return {
        "_class_name": CLASS,
        "sample_size": size,
        "in_channels": channels,
        "T": config["T"],
        "classes": len(config["class_names"]),
        "label": label,
        "network": unet_arguments(config),
    }


def _source() -> str:
    """Return the network and its wrapper as one module: diffusers confuses second modules of one name."""
    network = files("rediffuse.diffusion").joinpath("unet.py").read_text()
    wrapper = files("rediffuse.inference").joinpath(f"{MODULE}.py").read_text()
    after_docstring = wrapper.split('"""\n\n', 1)[1]
    return network + "\n\n" + after_docstring.replace("from rediffuse.diffusion.unet import UNet\n", "", 1)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
