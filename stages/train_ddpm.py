"""Train the denoiser of the DDPM on the prepared images or latents.  Run by `dvc repro`; see dvc.yaml."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import GUIDE, Architecture, Denoiser
from rediffuse.diffusion.step import DenoisingStep, validate
from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import on_device
from rediffuse.params import DDPM, load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.files import copy_folder, write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.runtime.weights import save_model
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import resumable
from rediffuse.training.curves import write_curves
from rediffuse.training.loop import Trainer
from stages import checkpoint_folder, run_stage

MODEL, METRICS = Path("data/models/ddpm"), Path("metrics/train_ddpm.json")
PLOTS = Path("metrics/plots/train_ddpm")
VAE_FOLDER = "vae"  # as in rediffuse.vae.latents, which this stage does not depend on


def make_denoiser(params: DDPM, shape: Sequence[int], classes: Sequence[str] = ()) -> Denoiser:
    names = classes if params.conditional else ()
    return Denoiser(shape, class_names=names, clip=params.space == "pixels", **params.select(Architecture))


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    folder = Path("data", params.ddpm.space)
    train, validation = load_images(folder, "train"), load_images(folder, "validation")

    def measure(denoiser: Denoiser, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        with autocast(device(), params.precision):
            return validate(denoiser, images, labels, seed=params.seed)

    torch.manual_seed(params.seed)
    with stage_run("train_ddpm", params) as run:
        trainer = Trainer(
            make_denoiser(params.ddpm, train.shape, train.classes),
            DenoisingStep(**params.ddpm.select(DenoisingStep)),
            on_device(train),
            on_device(validation),
            params.ddpm.training,
            name="ddpm",
            seed=params.seed,
            precision=params.precision,
            compile=params.compile,
            validate=measure,
            keep_at=math.ceil(params.ddpm.guide_share * params.ddpm.training.images),
            log=run,
        )
        with resumable(checkpoint_folder(), "ddpm", trainer.fingerprint) as checkpoint:
            denoiser, curves = trainer.train(checkpoint)
            if is_main():
                save_model(denoiser, MODEL)
                if trainer.early is not None:
                    save_model(trainer.early, MODEL / GUIDE)
                # With latents, the model keeps their VAE, so that it draws images by itself.
                copy_folder(folder / VAE_FOLDER, MODEL / VAE_FOLDER)
                parameters = sum(parameter.numel() for parameter in denoiser.parameters())
                report: dict[str, object] = {}
                if trainer.kept:  # its quarters are in the curves
                    report["validation"] = {"eps_mse": trainer.kept["validation_eps_mse"]}
                report["parameters"] = parameters
                if trainer.kept and params.ddpm.training.patience:
                    report["kept_at"] = trainer.kept["images"]
                write_json(METRICS, report)
                write_curves(PLOTS, curves)


if __name__ == "__main__":
    run_stage(main)
