"""Encode the images by the trained VAE, for a DDPM that works in its latents (ddpm.space).  Run by `dvc repro`; see dvc.yaml.

For one that works in pixels there is nothing to do.
"""

from pathlib import Path

import numpy as np
import torch

from rediffuse.images.image_set import load_images
from rediffuse.params import load_params
from rediffuse.runtime.device import device, make_deterministic, to_device
from rediffuse.runtime.files import write_json
from rediffuse.tracking.row import stage_run
from rediffuse.vae.latents import VAE_FOLDER, measure_latents
from rediffuse.vae.prior import CHUNK
from stages import run_stage

FOLDER = Path("data/spaces/latents")


def main() -> None:
    params = load_params()
    with stage_run("encode", params), torch.no_grad():
        if params.ddpm.space == "pixels":
            write_json(FOLDER / "space.json", {"space": "latents", "made": False})
            return
        make_deterministic()
        splits = {split: to_device(load_images("data/prepared", split).images, device()) for split in ("train", "validation")}
        latents = measure_latents(Path("data/models/vae"), splits["train"], FOLDER / VAE_FOLDER, device())
        for name, images in splits.items():
            np.save(FOLDER / f"{name}.npy", torch.cat([latents.encode(part).cpu() for part in torch.split(images, CHUNK)]).numpy())
        write_json(FOLDER / "space.json", {"space": "latents", "made": True})


if __name__ == "__main__":
    run_stage(main)
