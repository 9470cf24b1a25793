"""Train the VAE on the prepared images.  Run by `dvc repro`; see dvc.yaml."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import on_device
from rediffuse.params import VAE as VAEParams  # noqa: N811  (ruff takes VAE for a constant)
from rediffuse.params import load_params
from rediffuse.runtime.device import make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.runtime.weights import save_model
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import resumable
from rediffuse.training.curves import write_curves
from rediffuse.training.loop import Trainer
from rediffuse.vae.model import VAE, Architecture
from rediffuse.vae.step import VAEStep, final_measures, measure
from stages import checkpoint_folder, run_stage

IMAGES, MODEL = Path("data/pixels"), Path("data/models/vae")
METRICS, PLOTS = Path("metrics/train_vae.json"), Path("metrics/plots/train_vae")


def make_vae(params: VAEParams, shape: Sequence[int], classes: Sequence[str] = ()) -> VAE:
    return VAE(shape, class_names=classes if params.conditional else (), **params.select(Architecture))


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    train, validation, test = (load_images(IMAGES, split) for split in ("train", "validation", "test"))
    images = on_device(train)
    torch.manual_seed(params.seed)
    with stage_run("train_vae", params) as run:
        trainer = Trainer(
            make_vae(params.vae, train.shape, train.classes),
            VAEStep(**params.vae.select(VAEStep)),
            images,
            on_device(validation),
            params.vae.training,
            name="vae",
            seed=params.seed,
            precision=params.precision,
            compile=params.compile,
            validate=partial(measure, seed=params.seed),
            log=run,
        )
        with resumable(checkpoint_folder(), "vae", trainer.fingerprint) as checkpoint:
            vae, curves = trainer.train(checkpoint)
            measured = final_measures(vae, images, on_device(test), seed=params.seed)
            if is_main():
                save_model(vae, MODEL)
                if params.vae.training.patience and trainer.kept:
                    measured["kept_at"] = trainer.kept["images"]
                write_json(METRICS, measured)
                write_curves(PLOTS, curves)


if __name__ == "__main__":
    run_stage(main)
