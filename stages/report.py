"""Make every picture from the models, the samples and the records.  Run by `dvc repro`; see dvc.yaml."""

import json
from pathlib import Path

import torch

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.figures.ddpm import draw_denoising, draw_noising
from rediffuse.figures.films import Painter
from rediffuse.figures.neighbours import draw_neighbours
from rediffuse.figures.page import draw_page
from rediffuse.figures.samples import draw_samples
from rediffuse.figures.scores import draw_scores
from rediffuse.figures.vae import draw_vae
from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import on_device
from rediffuse.images.sample_sets import load_sets
from rediffuse.params import load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.kinds import KINDS
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.guidance import load_guide
from rediffuse.sampling.space import load_space
from rediffuse.tracking.row import stage_run
from rediffuse.vae.model import VAE
from stages import run_stage

IMAGES, MODELS, SAMPLES = Path("data/pixels"), Path("data/models"), Path("data/samples")
RECORDS, REPORT, CURVES = Path("metrics/evaluation"), Path("metrics/report"), Path("metrics/plots")


@torch.inference_mode()
def main() -> None:
    params = load_params()
    make_deterministic()
    with stage_run("report", params, complete=True):
        train, validation, test = (load_images(IMAGES, split) for split in ("train", "validation", "test"))
        records = {name: json.loads((RECORDS / f"{name}.json").read_text()) for name in ("reference", *KINDS)}
        for model in KINDS:
            folder, samples = REPORT / model, load_sets(SAMPLES / model, test.shape, len(test.classes))
            draw_samples(samples.sets[0], test.classes, folder)
            draw_scores(records[model], records["reference"], folder)
            draw_neighbours(records[model], records["reference"], samples.images, train, test, folder)
        vae = load_model(VAE, MODELS / "vae", device())
        draw_vae(vae, test, REPORT / "vae")
        denoiser = load_model(Denoiser, MODELS / "ddpm", device())
        space = load_space(MODELS / "ddpm", denoiser.shape, device())
        images, _ = on_device(validation if len(validation) else train)
        draw_noising(denoiser.schedule, space, images, seed=params.seed, folder=REPORT / "ddpm")
        sampling = records["ddpm"]["sampling"]
        guide = load_guide(MODELS / "ddpm", sampling["autoguidance_scale"])
        painter = Painter(denoiser, guide, space, sampling, params.precision)
        draw_denoising(painter, REPORT / "ddpm")
        draw_page(
            REPORT, records, painter, vae, images, test, seed=params.seed, trained=len(train), curves=CURVES
        )


if __name__ == "__main__":
    run_stage(main)
