"""Draw sets of new images from a trained model: `python -m stages.sample vae|ddpm`.  Run by `dvc repro`; see dvc.yaml.

What one model needs is imported by its function only, so that a change in the other's code does not run this stage again.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rediffuse.data.pixels import ROUNDING
from rediffuse.figures.grid import annotate, class_rows, grid, save_png, strip
from rediffuse.files import write_json
from rediffuse.generation.formats import PRIOR, save_npz
from rediffuse.params import Params, Sample, load_params
from rediffuse.shards import SHARD, DrawShard, draw, shard_generator
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import load_model
from rediffuse.training.distributed import barrier, is_main, process_group
from rediffuse.training.hardware import autocast, device, make_deterministic
from stages import run_stage

COLUMNS = 10  # of the pictures
STAGES_SHOWN = 10  # columns of the denoising strip


@process_group()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vae", "ddpm"])
    model = parser.parse_args().model
    params = load_params()
    make_deterministic()
    with stage_run(f"sample@{model}", params) as run, torch.inference_mode():
        folder, plots = Path(f"data/samples/{model}"), Path(f"metrics/plots/sample_{model}")
        settings = {"vae": draw_vae, "ddpm": draw_ddpm}[model](params, folder, plots)
        if not is_main():
            return
        about = {"n": params.sample.n, "seeds": params.sample.seeds, **settings, "rounding": ROUNDING}
        write_json(folder / "sampling.json", about)
        run.log_results(plots)


def draw_sets(draw_shard: DrawShard, sample: Sample, classes: int, folder: Path) -> dict[str, np.ndarray]:
    """Draw and save the set of each seed, with labels 0, 1, 2, ... in turn where there are classes; the first set is returned.

    All processes draw, the first one saves.
    """
    for seed in reversed(sample.seeds):
        arrays = {"images": draw(sample.n, draw_shard, seed=seed, title=f"sample {folder.name}, seed {seed}").numpy()}
        if classes:
            arrays["labels"] = np.arange(sample.n, dtype=np.int64) % classes
        if is_main():
            save_npz(folder / f"{seed}.npz", arrays)
    return arrays


def draw_vae(params: Params, folder: Path, plots: Path) -> dict[str, Any]:
    """Decode latents from the prior, and those of test images; each image is the mean of p(x|z).  Returns the settings."""
    from rediffuse.data.images import load_images
    from rediffuse.data.pixels import from_unit, to_unit
    from rediffuse.generation.vae import load_prior, save_mixture, vae_shards
    from rediffuse.vae.model import VAE
    from rediffuse.vae.prior import fit_mixture, posterior_means

    model = Path("data/models/vae")
    vae, settings = load_model(VAE, model, device()), params.sample.vae
    about = {"ema_half_life": params.vae.training.ema_half_life} | settings.model_dump()
    if settings.prior == "mixture" and is_main():
        train = torch.tensor(load_images("data/prepared", "train").images, device=device())
        means = posterior_means(vae, train).numpy()
        save_mixture(folder / PRIOR, fit_mixture(means, components=settings.components, seed=params.sample.seeds[0]), model)

    barrier()  # all take the mixture from its file

    def reconstruct_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        images = torch.from_numpy(test.take(indices.numpy() % len(test)).images).to(device())
        with autocast(device(), params.precision):
            return from_unit(vae.decode(vae.encode(to_unit(images))[0]))

    draw_shard = vae_shards(vae, load_prior(vae, settings, folder / PRIOR, model), params.precision)
    first = draw_sets(draw_shard, params.sample, 0, folder)
    test = load_images("data/prepared", "test")
    n = min(params.sample.n, len(test))
    reconstructions = draw(n, reconstruct_shard, seed=0, title="reconstruct test images").numpy()
    if is_main():
        save_png(grid(first["images"][: COLUMNS**2], COLUMNS, scale=2), plots / "samples.png")
        save_npz(folder / "reconstructions.npz", {"images": reconstructions})
    return about


def draw_ddpm(params: Params, folder: Path, plots: Path) -> dict[str, Any]:
    """Denoise Gaussian noise, label after label in turn where the model has labels.  Returns the settings."""
    from rediffuse.data.pixels import from_signed
    from rediffuse.diffusion.denoiser import Denoiser
    from rediffuse.generation.ddpm import ddpm_shards

    denoiser, settings = load_model(Denoiser, Path("data/models/ddpm"), device()), params.sample.ddpm
    about = {"ema_half_life": params.ddpm.training.ema_half_life} | settings.model_dump()
    first = draw_sets(ddpm_shards(denoiser, settings, params.precision), params.sample, denoiser.classes, folder)
    if not is_main():
        return about
    names = [name.strip() for name in denoiser.class_names]
    if names:
        save_png(annotate(class_rows(first["images"], first["labels"], len(names), COLUMNS), names), plots / "samples.png")
    else:
        save_png(grid(first["images"][: COLUMNS**2], COLUMNS, scale=2), plots / "samples.png")
    seen: list[tuple[int, Tensor]] = []
    observed = ddpm_shards(denoiser, settings, params.precision, observe=lambda t, x_t, _: seen.append((t, x_t)))
    last = observed(torch.arange(SHARD), shard_generator(params.sample.seeds[0], 0))
    shown = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, STAGES_SHOWN).astype(int))]
    columns = [*(from_signed(x_t)[:COLUMNS].cpu() for _, x_t in shown), last[:COLUMNS].cpu()]
    denoising = strip(torch.stack(columns, 1).numpy())
    save_png(annotate(denoising, names[:COLUMNS], [*(f"t={t}" for t, _ in shown), "t=0"]), plots / "denoising.png")
    return about


if __name__ == "__main__":
    run_stage(main)
