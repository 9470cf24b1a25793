"""Load a trained model from the checkout, a revision, a folder or MLflow, and draw images from it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rediffuse.inference.settings import SAMPLING, pack_settings, packed_settings, sampling_settings
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS, read_config
from rediffuse.tracking.identity import one_line
from rediffuse.tracking.lineage import MODELS, SAMPLES
from rediffuse.tracking.store import checkout_root

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rediffuse.inference.model import ImageModel

COLUMNS = 10  # of a grid


def generate(
    model: str, output: str, *, n: int, seed: int, label: str | None = None, **settings: Any
) -> Path:
    """Draw n images and write them as `write_images`.  Returns where they are.

    model: as in `load`.  label: a class by name or index; None: the classes in turn.  settings: as in `load`;
    those that are None stay as the model comes.  Raises UserError for what does not exist or does not fit,
    before drawing.
    """
    target = checked_target(output)
    chosen = {name: value for name, value in settings.items() if value is not None}
    loaded = load(model, **{name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items()})
    images, labels = loaded.draw(n, seed=seed, label=None if label is None else loaded.label(label))
    write_images(target, images, labels)
    return target


def load(model: str | Path = "ddpm", **settings: Any) -> ImageModel:
    """Return a trained model, on the GPU if there is one.  The process becomes deterministic.

    model: vae or ddpm, of the checkout; REVISION:vae or REVISION:ddpm, of a commit or an experiment; a folder
    with a model; or an address of MLflow, models:/NAME@ALIAS or models:/NAME/VERSION.  settings: of sampling,
    instead of those the model comes with: sampler, steps, spacing, eta, guidance_scale,
    autoguidance_scale, guidance_interval (see params.yaml).
    Raises UserError if there is no such model, or the settings do not fit it.
    """
    from rediffuse.inference.model import load_image_model
    from rediffuse.sampling.vae import PRIOR

    name, prior = str(model), None
    with tempfile.TemporaryDirectory(prefix="rediffuse-") as temporary:
        if name in KINDS:
            folder = checkout_root() / MODELS / name
            prior = checkout_root() / SAMPLES / "vae" / PRIOR
        elif name.startswith("models:"):
            folder = _from_mlflow(name, Path(temporary)) / "artifacts"
        elif name.endswith(tuple(f":{kind}" for kind in KINDS)):
            folder = _from_revision(name, Path(temporary, "model"))
        else:
            folder = _model_folder(Path(name))
        if (folder / SAMPLING).is_file():
            own = packed_settings(folder)
        else:
            params = load_params(checkout_root() / "params.yaml")
            own = sampling_settings(params, read_config(folder)["kind"])
        if settings and "sampler" not in own:
            option = next(iter(settings)).replace("_", "-")
            raise UserError(f"--{option} belongs to the ddpm; a VAE decodes in one step: leave it out")
        if settings.get("guidance_scale", 1) != 1 and not read_config(folder)["class_names"]:
            scale = settings["guidance_scale"]
            raise UserError(f"--guidance-scale must be 1 for a model trained without labels, got {scale:g}")
        own |= settings
        if own.get("sampler", "ddim") != "ddim":
            own["eta"] = 0.0  # only ddim has an eta
        return load_image_model(folder, own, prior=prior)


def _from_revision(name: str, folder: Path) -> Path:
    """Fetch the model of a commit or an experiment, with the settings of its params.yaml."""
    from dvc.api import DVCFileSystem  # takes a second to import

    from rediffuse.commands.records import commit_called, split_name
    from rediffuse.sampling.vae import PRIOR

    revision, kind = split_name(name)
    commit, root = commit_called(revision), checkout_root()
    try:
        files = DVCFileSystem(str(root), rev=commit)
        params = yaml.safe_load(files.read_text("params.yaml"))
        settings = {"precision": params["precision"], **params["sample"][kind]}
        files.get(f"{MODELS}/{kind}", str(folder), recursive=True)
        if settings.get("prior") == "mixture":
            files.get(f"{SAMPLES}/vae/{PRIOR}", str(folder / PRIOR))
    except Exception as error:  # DVC raises many kinds of its caches and remotes
        remedy = "fetch it with `dvc pull`, or make it again with `dvc repro` in that revision"
        raise UserError(
            f"--model {name} is not in DVC's cache or remote ({one_line(error)}): {remedy}"
        ) from None
    (folder / SAMPLING).write_bytes(pack_settings(read_config(folder)["kind"], settings, ()))
    return folder


def _from_mlflow(address: str, folder: Path) -> Path:
    """Download the model at this address.  Raises UserError if the store does not have it."""
    from rediffuse.tracking.models import open_registry

    client, uri = open_registry()
    try:
        import mlflow.artifacts
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        # MLflow's own download of a models: address asks the process's global store; this asks ours.
        found = get_model_name_and_version(client, address)
        if len(found) == 1:
            source = client.get_logged_model(*found).artifact_location
        else:
            source = client.get_model_version_download_uri(*found)
        return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
    except Exception as error:  # MLflow raises many kinds of its database, server and file system
        remedy = "`make ui` shows the registered models; `rediffuse promote` gives one an alias"
        raise UserError(
            f"--model {address} cannot be fetched from MLflow ({one_line(error)}): {remedy}"
        ) from None


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        known = "vae or ddpm (of the checkout), HEAD:ddpm or EXPERIMENT:ddpm, a folder with a model, or"
        raise UserError(
            f"--model {path} is no folder: give {known} models:/rediffuse-ddpm@champion (of MLflow)"
        )
    return path / "artifacts" if (path / "MLmodel").is_file() else path


def checked_target(output: str) -> Path:
    """Return where to write images; a .png or .npz is replaced.  Raises UserError for what does not fit."""
    target = Path(output)
    file, folder = target.suffix.lower() in (".png", ".npz"), target.is_dir()
    if target.exists() and (file == folder or (folder and any(target.iterdir()))):
        raise UserError(f"OUTPUT {output} exists: give another name")
    if target.suffix and not (file or folder or output.endswith("/")):
        endings = ".png (one grid) or .npz (arrays), or be a folder (end it in / if its name has a dot)"
        raise UserError(f"OUTPUT must end in {endings}, got {output}")
    return target


def write_images(target: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> None:
    """Write the images atomically: .png as one grid, .npz as arrays, any other name as a folder of PNGs."""
    from rediffuse.figures.grid import grid
    from rediffuse.images.files import encode_image, save_npz, save_png
    from rediffuse.images.image_set import replacing

    if target.suffix.lower() == ".png":
        save_png(grid(images, min(len(images), COLUMNS)), target)
    elif target.suffix.lower() == ".npz":
        save_npz(target, {"images": images} | ({} if labels is None else {"labels": labels}))
    else:
        with replacing(target.absolute()) as incoming:
            for i, image in enumerate(images):
                (incoming / f"{i:05d}.png").write_bytes(encode_image(image))
            if target.exists():
                target.rmdir()  # fails unless it is still empty
