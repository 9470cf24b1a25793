"""A DDPM as a folder that `diffusers.DDPMPipeline` loads, code and all: it draws what our sampler `ddpm` draws over all T steps."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rediffuse.diffusion.schedule import Schedule
from rediffuse.diffusion.unet import unet_arguments
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind
from rediffuse.vae.latents import has_latents

MODULE, CLASS = "rediffuse_unet", "RediffuseUNet"
PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def diffusers_files(kind: Kind, folder: Path, config: dict[str, Any], label: int | None) -> dict[str, bytes]:
    """The files of the folder, by their paths.  label: of all images; None: no label.

    Raises UserError for a model that is no DDPM in pixels.
    """
    if kind == "vae":
        raise UserError(
            "--format diffusers takes a DDPM, but --model is vae: diffusers has no pipeline that draws from a VAE alone; take"
            " --format folder or onnx"
        )
    if has_latents(folder):
        raise UserError(
            "--format diffusers takes a DDPM of pixels, but this one works in the latents of a VAE (ddpm.space), whose decoder"
            " DDPMPipeline does not run; take --format folder or onnx"
        )
    return {
        "model_index.json": _json({"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": [MODULE, CLASS]}),
        "scheduler/scheduler_config.json": _json(_scheduler(config)),
        "unet/config.json": _json(_network(config, label)),
        "unet/diffusion_pytorch_model.safetensors": (folder / "model.safetensors").read_bytes(),
        f"unet/{MODULE}.py": _source().encode(),
    }


def diffusers_usage(config: dict[str, Any], label: int | None) -> str:
    """What the model card says of the use."""
    if label is not None:
        drawn = f"of the class {config['class_names'][label].strip()}"
    else:
        drawn = "of no class in particular, which it also learnt" if config["class_names"] else "without classes"
    return f"""\
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
    images = pipeline(batch_size=16, num_inference_steps={config["T"]}).images

Needs torch and diffusers, in float32.  `trust_remote_code` lets diffusers run `unet/{MODULE}.py`, the network, which is no class of its
own: read it first.  It draws images {drawn}, over all {config["T"]} steps and without guidance, so the settings
and scores below are not of these images."""


def _scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """DDPMScheduler with our transitions; and DDIMScheduler with ours of `ddim`, wherever the number of steps divides T.

    Its timestep t is our t + 1; trailing: the first step starts at T, as ours.
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
    own = {"sample_size": size, "in_channels": channels, "T": config["T"], "classes": len(config["class_names"]), "label": label}
    return {"_class_name": CLASS} | own | {"network": unet_arguments(config)}


def _source() -> str:
    """One module: of two, diffusers would take the second for the one of that name that another folder brought before."""
    network = files("rediffuse.diffusion").joinpath("unet.py").read_text()
    wrapper = files("rediffuse.inference").joinpath(f"{MODULE}.py").read_text()
    after_docstring = wrapper.split('"""\n\n', 1)[1]
    return network + "\n\n" + after_docstring.replace("from rediffuse.diffusion.unet import UNet\n", "", 1)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
