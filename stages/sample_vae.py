"""Draw new images from the VAE, and reconstruct test images.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

import torch

from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import ROUNDING, on_device
from rediffuse.images.sample_sets import RECONSTRUCTIONS, Samples, save_samples
from rediffuse.params import SampleVAE, load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import barrier, is_main, process_group
from rediffuse.runtime.shards import draw
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.sets import draw_sets
from rediffuse.sampling.vae import PRIOR, load_prior, reconstruct_shards, save_mixture, vae_shards
from rediffuse.tracking.row import stage_run
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import fit_mixture, posterior_means
from stages import run_stage

IMAGES, MODEL, FOLDER = Path("data/pixels"), Path("data/models/vae"), Path("data/samples/vae")


@process_group()
@torch.inference_mode()
def main() -> None:
    params = load_params()
    make_deterministic()
    with stage_run("sample_vae", params):
        vae, settings = load_model(VAE, MODEL, device()), params.sample.vae
        about = {"ema_half_life": params.vae.training.ema_half_life} | settings.model_dump()
        if settings.prior == "mixture" and is_main():
            about["components"] = fit_prior(vae, settings, params.sample.seeds[0])
        barrier()  # all processes read the mixture from its file
        draw_shard = vae_shards(vae, load_prior(vae, settings, FOLDER / PRIOR, MODEL), params.precision)
        draw_sets(draw_shard, params.sample, vae.classes, FOLDER)
        test = load_images(IMAGES, "test")
        reconstruct, n = reconstruct_shards(vae, test, params.precision), min(params.sample.n, len(test))
        reconstructions = draw(n, reconstruct, seed=0, title="reconstruct test images").numpy()
        if is_main():
            save_samples(FOLDER / RECONSTRUCTIONS, Samples(reconstructions))
            size = {"n": params.sample.n, "seeds": params.sample.seeds}
            write_json(FOLDER / "sampling.json", size | about | {"rounding": ROUNDING})


def fit_prior(vae: VAE, settings: SampleVAE, seed: int) -> int:
    """Fit and save the mixture; return its number of components."""
    means = posterior_means(vae, *on_device(load_images(IMAGES, "train"))).numpy()
    fitted = fit_mixture(means, components=settings.components, seed=seed)
    save_mixture(FOLDER / PRIOR, fitted, MODEL)
    return len(fitted["weights"])


if __name__ == "__main__":
    run_stage(main)
