"""Draw new images from a trained model: `python -m stages.sample vae|ddpm`.  Run by `dvc repro`; see dvc.yaml.

What one model needs is imported by its function only, so that a change in the other's code does not run this stage again.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rediffuse.figures.grid import annotate, class_rows, grid, save_png, strip
from rediffuse.files import replace_file
from rediffuse.params import Params, load_params
from rediffuse.shards import SHARD, draw, shard_generator
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import load_model
from rediffuse.training.hardware import autocast, device, make_deterministic
from stages import run_stage

COLUMNS = 10  # of the pictures
STAGES_SHOWN = 10  # columns of the denoising strip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vae", "ddpm"])
    model = parser.parse_args().model
    params = load_params()
    make_deterministic()
    with stage_run(f"sample@{model}", params) as run, torch.inference_mode():
        samples = {"vae": draw_vae, "ddpm": draw_ddpm}[model](params, plots := Path(f"metrics/plots/sample_{model}"))
        save_npz(Path(f"data/samples/{model}.npz"), samples)
        run.log_images_folder(plots)


def draw_vae(params: Params, plots: Path) -> dict[str, np.ndarray]:
    """Decode latents from the prior; each image is the mean of p(x|z)."""
    from rediffuse.data.images import load_images
    from rediffuse.data.pixels import from_unit
    from rediffuse.vae.model import VAE
    from rediffuse.vae.prior import gaussian_mixture, posterior_means, standard_normal

    vae, settings = load_model(VAE, Path("data/models/vae"), device()), params.sample.vae
    prior = standard_normal(vae.latent_dim)
    if settings.prior == "mixture":
        train = torch.tensor(load_images("data/prepared", "train").images, device=device())
        prior = gaussian_mixture(posterior_means(vae, train).numpy(), components=settings.components, seed=params.seed)

    def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        z = prior(len(indices), generator).to(device())
        with autocast(device(), params.precision):
            return from_unit(vae.decode(z))

    images = draw(params.sample.n, draw_shard, seed=params.seed, title="sample vae").numpy()
    save_png(grid(images[: COLUMNS**2], COLUMNS, scale=2), plots / "samples.png")
    return {"images": images}


def draw_ddpm(params: Params, plots: Path) -> dict[str, np.ndarray]:
    """Denoise Gaussian noise, label after label in turn where the model has labels."""
    from rediffuse.data.pixels import from_signed
    from rediffuse.diffusion.denoiser import Denoiser
    from rediffuse.diffusion.samplers import SAMPLERS, Observe

    denoiser, settings = load_model(Denoiser, Path("data/models/ddpm"), device()), params.sample.ddpm
    denoise = denoiser.denoise(guidance_scale=settings.guidance_scale)

    def labels_of(indices: Tensor) -> Tensor | None:
        return indices % denoiser.classes if denoiser.classes else None

    def draw_shard(indices: Tensor, generator: torch.Generator, observe: Observe | None = None) -> Tensor:
        def noise() -> Tensor:
            return torch.randn(len(indices), *denoiser.shape, generator=generator).to(device())

        labels = labels_of(indices)
        with autocast(device(), params.precision):
            x_0 = SAMPLERS[settings.sampler](
                denoise,
                denoiser.schedule,
                noise(),
                None if labels is None else labels.to(device()),
                steps=settings.steps,
                eta=settings.eta,
                noise=noise,
                observe=observe,
            )
        return from_signed(x_0)

    images = draw(params.sample.n, draw_shard, seed=params.seed, title="sample ddpm")
    seen: list[tuple[int, Tensor]] = []
    last = draw_shard(torch.arange(SHARD), shard_generator(params.seed, 0), lambda t, x_t, _: seen.append((t, x_t)))
    shown = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, STAGES_SHOWN).astype(int))]
    columns = [*(from_signed(x_t)[:COLUMNS].cpu() for _, x_t in shown), last[:COLUMNS].cpu()]
    names = [name.strip() for name in denoiser.class_names]
    denoising = strip(torch.stack(columns, 1).numpy())
    save_png(annotate(denoising, names[:COLUMNS], [*(f"t={t}" for t, _ in shown), "t=0"]), plots / "denoising.png")
    labels = labels_of(torch.arange(len(images)))
    if labels is None:
        save_png(grid(images[: COLUMNS**2].numpy(), COLUMNS, scale=2), plots / "samples.png")
        return {"images": images.numpy()}
    rows = class_rows(images.numpy(), labels.numpy(), denoiser.classes, COLUMNS)
    save_png(annotate(rows, names), plots / "samples.png")
    return {"images": images.numpy(), "labels": labels.numpy()}


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays; np.savez stamps every member with the same date, so that equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    replace_file(path, buffer.getvalue())


if __name__ == "__main__":
    run_stage(main)
