"""Train the denoiser of the DDPM on the prepared images.  Run by `dvc repro`; see dvc.yaml."""

import shutil
from pathlib import Path

import numpy as np
import torch

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.diffusion.step import DenoisingStep, as_x_0, denoiser_config, validate
from rediffuse.figures.grid import annotate, strip
from rediffuse.images.files import save_png
from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import on_device
from rediffuse.params import load_params
from rediffuse.runtime.device import autocast, device, make_deterministic, seed_for, to_device
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.runtime.weights import save_model
from rediffuse.sampling.samplers import even_times
from rediffuse.sampling.space import Space, open_space
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import resumable
from rediffuse.training.curves import write_curves
from rediffuse.training.loop import Trainer
from rediffuse.vae.latents import VAE_FOLDER
from stages import checkpoint_configuration, checkpoint_folder, run_stage

MODEL, SPACES = Path("data/models/ddpm"), Path("data/spaces")
PLOTS = Path("metrics/plots/train_ddpm")
ROWS, COLUMNS = 3, 11  # of the noising strip


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    train, validation = load_images("data/prepared", "train"), load_images("data/prepared", "validation")
    on = device()
    images, labels = on_device(train)
    held_out, held_out_labels = on_device(validation)
    if params.ddpm.space == "latents":
        images, held_out = (
            to_device(np.load(SPACES / params.ddpm.space / f"{split}.npy", mmap_mode="r"), on) for split in ("train", "validation")
        )
    channels, height, width = images.shape[1:]
    config = denoiser_config(params.ddpm, (channels, height, width), train.classes)

    def validated(denoiser: Denoiser) -> dict[str, float]:
        with autocast(on, params.precision):
            return {f"validation_{k}": v for k, v in validate(denoiser, held_out, held_out_labels, seed=params.seed).items()}

    torch.manual_seed(params.seed)
    with (
        stage_run("train_ddpm", params) as run,
        resumable(checkpoint_folder(), "ddpm", checkpoint_configuration(params, "ddpm")) as checkpoint,
    ):
        trainer = Trainer(
            Denoiser(**config),
            DenoisingStep(params.ddpm),
            images,
            labels,
            params.ddpm.training,
            name="ddpm",
            seed=params.seed,
            precision=params.precision,
            compile=params.compile,
            validate=validated,
            log=lambda seen, values: run.log_curve(seen, {f"ddpm/{name}": value for name, value in values.items()}),
        )
        denoiser, curves = trainer.train(checkpoint)
        if not is_main():
            return
        save_model(denoiser, config, MODEL)
        if params.ddpm.space == "latents":  # so that the model draws images by itself
            shutil.copytree(SPACES / params.ddpm.space / VAE_FOLDER, MODEL / VAE_FOLDER, dirs_exist_ok=True)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        last = curves.validation[-1]["validation_eps_mse"]  # its quarters are in the curves
        write_json(Path("metrics/train_ddpm.json"), {"validation": {"eps_mse": last}, "parameters": parameters})
        write_curves(PLOTS / "training.csv", curves.training)
        write_curves(PLOTS / "validation.csv", curves.validation)
        draw_noising(denoiser.schedule, open_space(MODEL, denoiser.shape, on), held_out[:ROWS], seed=params.seed)
        run.log_results(Path("metrics/train_ddpm.json"), PLOTS)


@torch.no_grad()
def draw_noising(schedule: Schedule, space: Space, images: torch.Tensor, *, seed: int) -> None:
    """The forward process: images at evenly spaced t from 0 to T, the same noise in each column; latents are shown decoded."""
    generator = torch.Generator().manual_seed(seed_for(seed))
    eps = torch.randn(images.shape, generator=generator).to(images.device)
    times = even_times(schedule, min(COLUMNS - 1, schedule.T))[::-1]
    columns = [space.decode(schedule.q_sample(as_x_0(images), t, eps)).cpu() for t in times]
    picture = annotate(strip(torch.stack(columns, 1).numpy()), columns=[f"t={t}" for t in times])
    save_png(picture, PLOTS / "images/noising.png")


if __name__ == "__main__":
    run_stage(main)
