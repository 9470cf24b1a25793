"""Encode the images by the VAE, for a DDPM that works in latents (ddpm.space); otherwise do nothing.

Run by `dvc repro`; see dvc.yaml.
"""

from pathlib import Path

from rediffuse.images.image_set import load_images, save_images
from rediffuse.images.pixels import on_device
from rediffuse.params import load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.weights import load_model
from rediffuse.tracking.row import stage_run
from rediffuse.vae.latents import encode_set, measure_latents, save_latents
from rediffuse.vae.model import VAE
from stages import run_stage

IMAGES, FOLDER = Path("data/pixels"), Path("data/latents")


def main() -> None:
    params = load_params()
    with stage_run("encode", params):
        if params.ddpm.space == "pixels":
            save_images(FOLDER, {}, {"space": "latents", "made": False})
            return
        make_deterministic()
        train, validation = load_images(IMAGES, "train"), load_images(IMAGES, "validation")
        latents = measure_latents(load_model(VAE, Path("data/models/vae"), device()), on_device(train)[0])
        splits = {"train": encode_set(latents, train), "validation": encode_set(latents, validation)}
        save_images(FOLDER, splits, {"space": "latents", "made": True, "classes": list(train.classes)})
        save_latents(latents, FOLDER)


if __name__ == "__main__":
    run_stage(main)
