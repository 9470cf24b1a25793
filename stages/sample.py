"""Draw sets of new images from a trained model: `python -m stages.sample vae|ddpm`.  Run by `dvc repro`; see dvc.yaml.

What one model needs is imported by its function only, so that a change in the other's code does not run this stage again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rediffuse.figures.grid import annotate, class_rows, grid, strip
from rediffuse.images.files import save_npz, save_png
from rediffuse.images.pixels import ROUNDING, on_device
from rediffuse.params import Params, Sample, load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import barrier, is_main, process_group
from rediffuse.runtime.shards import SHARD, DrawShard, draw, shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.vae import PRIOR
from rediffuse.tracking.row import stage_run
from stages import run_stage

COLUMNS = 10  # of the pictures
ROWS = 50  # classes shown, at most
STAGES_SHOWN = 10  # columns of the denoising strip


@process_group()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vae", "ddpm"])
    model = parser.parse_args().model
    params = load_params()
    make_deterministic()
    with stage_run(f"sample_{model}", params) as run, torch.inference_mode():
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
    if sample.n < classes and is_main():
        print(
            f"warning: sample.n ({sample.n:,}) is less than the {classes:,} classes, so that only the first {sample.n:,} of them are drawn,"
            " and judged against all: raise sample.n (params.yaml)",
            file=sys.stderr,
        )
    for seed in reversed(sample.seeds):
        arrays = {"images": draw(sample.n, draw_shard, seed=seed, title=f"sample {folder.name}, seed {seed}").numpy()}
        if classes:
            arrays["labels"] = np.arange(sample.n, dtype=np.int64) % classes
        if is_main():
            save_npz(folder / f"{seed}.npz", arrays)
    return arrays


def draw_samples(drawn: dict[str, np.ndarray], class_names: Sequence[str], plots: Path) -> list[str]:
    """The picture of the first images, a row for each class where there are some; returns the names as they are shown."""
    names, images = [name.strip() for name in class_names], drawn["images"]
    if names:
        shown = names[:ROWS]
        rest = [f"the first {len(shown)} of {len(names):,} classes"] if len(names) > len(shown) else []
        picture = annotate(class_rows(images, drawn["labels"], len(shown), COLUMNS), shown, rest)
    else:
        picture = grid(images[: COLUMNS**2], COLUMNS, scale=2)
    save_png(picture, plots / "samples.png")
    return names


def draw_vae(params: Params, folder: Path, plots: Path) -> dict[str, Any]:
    """Decode latents from the prior, label after label in turn where the model has labels, and those of test images.

    Each image is the mean of p(x|z).  Returns the settings.
    """
    from rediffuse.images.image_set import load_images
    from rediffuse.images.pixels import from_unit, to_unit
    from rediffuse.sampling.vae import load_prior, save_mixture, vae_shards
    from rediffuse.vae.model import VAE
    from rediffuse.vae.prior import fit_mixture, posterior_means

    model = Path("data/models/vae")
    vae, settings = load_model(VAE, model, device()), params.sample.vae
    about = {"ema_half_life": params.vae.training.ema_half_life} | settings.model_dump()
    if settings.prior == "mixture" and is_main():
        means = posterior_means(vae, *on_device(load_images("data/prepared", "train"))).numpy()
        fitted = fit_mixture(means, components=settings.components, seed=params.sample.seeds[0])
        about["components"] = len(fitted["weights"])
        save_mixture(folder / PRIOR, fitted, model)

    barrier()  # all take the mixture from its file

    def reconstruct_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        images, labels = on_device(test.take(indices.numpy() % len(test)))
        with autocast(device(), params.precision):
            return from_unit(vae.decode(vae.encode(to_unit(images), labels)[0], labels))

    draw_shard = vae_shards(vae, load_prior(vae, settings, folder / PRIOR, model), params.precision)
    first = draw_sets(draw_shard, params.sample, vae.classes, folder)
    test = load_images("data/prepared", "test")
    n = min(params.sample.n, len(test))
    reconstructions = draw(n, reconstruct_shard, seed=0, title="reconstruct test images").numpy()
    if is_main():
        draw_samples(first, vae.class_names, plots)
        save_npz(folder / "reconstructions.npz", {"images": reconstructions})
    return about


def draw_ddpm(params: Params, folder: Path, plots: Path) -> dict[str, Any]:
    """Denoise Gaussian noise, label after label in turn where the model has labels.  Returns the settings."""
    from rediffuse.diffusion.denoiser import Denoiser
    from rediffuse.sampling.ddpm import ddpm_shards
    from rediffuse.sampling.space import open_space

    model = Path("data/models/ddpm")
    denoiser, settings = load_model(Denoiser, model, device()), params.sample.ddpm
    space = open_space(model, denoiser.shape, device())
    about = {"ema_half_life": params.ddpm.training.ema_half_life} | settings.model_dump()
    first = draw_sets(ddpm_shards(denoiser, settings, params.precision, space=space), params.sample, denoiser.classes, folder)
    if not is_main():
        return about
    names = draw_samples(first, denoiser.class_names, plots)
    seen: list[tuple[int, Tensor]] = []
    observed = ddpm_shards(denoiser, settings, params.precision, space=space, observe=lambda t, x_t, _: seen.append((t, x_t)))
    last = observed(torch.arange(SHARD), shard_generator(params.sample.seeds[0], 0))
    moments = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, STAGES_SHOWN).astype(int))]
    columns = [*(space.decode(x_t)[:COLUMNS].cpu() for _, x_t in moments), last[:COLUMNS].cpu()]
    denoising = strip(torch.stack(columns, 1).numpy())
    rows = [names[i % len(names)] for i in range(COLUMNS)] if names else []
    save_png(annotate(denoising, rows, [*(f"t={t}" for t, _ in moments), "t=0"]), plots / "denoising.png")
    return about


if __name__ == "__main__":
    run_stage(main)
