"""Draw new images from the DDPM.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

import torch

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.images.pixels import ROUNDING
from rediffuse.params import load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.guidance import load_guide
from rediffuse.sampling.sets import draw_sets
from rediffuse.sampling.space import load_space
from rediffuse.tracking.row import stage_run
from stages import run_stage

MODEL, FOLDER = Path("data/models/ddpm"), Path("data/samples/ddpm")


@process_group()
@torch.inference_mode()
def main() -> None:
    params = load_params()
    make_deterministic()
    with stage_run("sample_ddpm", params):
        denoiser, settings = load_model(Denoiser, MODEL, device()), params.sample.ddpm
        space = load_space(MODEL, denoiser.shape, device())
        guide = load_guide(MODEL, settings.autoguidance_scale)
        draw_shard = ddpm_shards(denoiser, settings, params.precision, space=space, guide=guide)
        draw_sets(draw_shard, params.sample, denoiser.classes, FOLDER)
        about = {"ema_half_life": params.ddpm.training.ema_half_life} | settings.model_dump()
        if is_main():
            size = {"n": params.sample.n, "seeds": params.sample.seeds}
            write_json(FOLDER / "sampling.json", size | about | {"rounding": ROUNDING})


if __name__ == "__main__":
    run_stage(main)
