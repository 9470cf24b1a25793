"""Train the VAE on the prepared images.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

import torch

from rediffuse.figures.grid import annotate, grid, reconstructions, strip
from rediffuse.figures.latent import latent_map
from rediffuse.images.files import save_png
from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.params import load_params
from rediffuse.runtime.device import make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import is_main, process_group
from rediffuse.runtime.weights import save_model
from rediffuse.tracking.row import stage_run
from rediffuse.training.checkpoint import resumable
from rediffuse.training.curves import write_curves
from rediffuse.training.loop import Trainer
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import posterior_means
from rediffuse.vae.step import VAEStep, final_measures, measure, vae_config
from stages import checkpoint_configuration, checkpoint_folder, run_stage

PLOTS = Path("metrics/plots/train_vae")
ROWS, COLUMNS = 3, 10  # of the pictures


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    train, validation, test = (load_images("data/prepared", split) for split in ("train", "validation", "test"))
    (images, labels), held_out, unseen = (on_device(split) for split in (train, validation, test))
    config = vae_config(params.vae, train.shape, train.classes)
    torch.manual_seed(params.seed)
    with (
        stage_run("train_vae", params) as run,
        resumable(checkpoint_folder(), "vae", checkpoint_configuration(params, "vae")) as checkpoint,
    ):
        trainer = Trainer(
            VAE(**config),
            VAEStep(params.vae),
            images,
            labels,
            params.vae.training,
            name="vae",
            seed=params.seed,
            precision=params.precision,
            compile=params.compile,
            validate=lambda vae: {f"validation_{name}": value for name, value in measure(vae, *held_out, seed=params.seed).items()},
            log=lambda seen, values: run.log_curve(seen, {f"vae/{name}": value for name, value in values.items()}),
        )
        vae, curves = trainer.train(checkpoint)
        measured = final_measures(vae, (images, labels), unseen, seed=params.seed)
        if not is_main():
            return
        save_model(vae, config, Path("data/models/vae"))
        write_json(Path("metrics/train_vae.json"), measured)
        write_curves(PLOTS / "training.csv", curves.training)
        write_curves(PLOTS / "validation.csv", curves.validation)
        draw(vae, *unseen)
        means = posterior_means(vae, *unseen).numpy()
        save_png(latent_map(means, test.labels, test.classes), PLOTS / "images/latent.png")
        run.log_results(Path("metrics/train_vae.json"), PLOTS)


@torch.no_grad()
def draw(vae: VAE, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Reconstructions of the first images, and walks through the latent space between pairs of them.

    A conditional VAE keeps the label of the image that a walk begins at, and shows the same latents with each label: what of an image is
    not its class (the analogies of Kingma et al. 2014, figure 1).
    """
    columns = min(COLUMNS, len(images))
    rows = min(ROWS, len(images) // columns)
    first, given = images[: rows * columns], None if labels is None else labels[: rows * columns]
    z = vae.encode(to_unit(first), given)[0]
    decoded = from_unit(vae.decode(z, given))
    picture = reconstructions(first.cpu().numpy(), decoded.cpu().numpy(), columns)
    save_png(annotate(picture, rows=["image", "VAE"] * rows), PLOTS / "images/reconstructions.png")
    a, b = z[:columns, None], (z[columns : 2 * columns] if rows > 1 else z.roll(1, 0))[:, None]  # (columns, 1, latent_dim)
    share = torch.linspace(0, 1, COLUMNS, device=z.device)[None, :, None]
    kept = None if given is None else given[:columns].repeat_interleave(COLUMNS)
    walk = from_unit(vae.decode(torch.lerp(a, b, share).flatten(0, 1), kept))
    save_png(grid(walk.cpu().numpy(), COLUMNS, scale=2), PLOTS / "images/interpolation.png")
    if vae.classes:
        names, shown = [name.strip() for name in vae.class_names[:COLUMNS]], first[:columns]
        each = torch.arange(len(names), device=z.device).repeat_interleave(len(shown))
        pictures = torch.cat([shown, from_unit(vae.decode(z[:columns].repeat(len(names), 1), each))])
        picture = strip(pictures.view(-1, *shown.shape).cpu().numpy())
        save_png(annotate(picture, rows=["image", *names]), PLOTS / "images/analogies.png")


if __name__ == "__main__":
    run_stage(main)
