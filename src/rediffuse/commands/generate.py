"""Draw images from a trained model: one of the checkout, of a folder, or of MLflow's registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rediffuse.inference.settings import SAMPLING, pack_settings, packed_settings, sampling_settings
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS, read_config
from rediffuse.tracking.lineage import MODELS, SAMPLES
from rediffuse.tracking.store import checkout_root

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rediffuse.inference.model import ImageModel

COLUMNS = 10  # of a grid


def generate(
    model: str,
    output: str,
    *,
    n: int,
    seed: int,
    label: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> Path:
    """Draw n images and write them: OUTPUT.png as one grid, OUTPUT.npz as arrays, else a folder of PNGs.  Returns where they are.

    model: vae or ddpm, of the checkout; REVISION:vae or REVISION:ddpm, of a commit or an experiment; a folder with a model; or an address
    of MLflow's, models:/NAME@ALIAS or models:/NAME/VERSION.  label: a class by name or index; None: the classes in turn.
    sampler, steps, guidance_scale: of a DDPM; None: as the parameters of the checkout or revision say, or what the model in MLflow was
    registered with.
    Raises UserError for what does not exist or does not fit, before anything is drawn.
    """
    target = checked_target(output)
    overrides = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
    with image_model(model, {name: value for name, value in overrides.items() if value is not None}) as images_of:
        number = None if label is None else images_of.label(label)
        images, labels = images_of.draw(n, seed=seed, label=number)
    write_images(target, images, labels)
    return target


@contextmanager
def image_model(name: str, overrides: Mapping[str, Any]) -> Iterator[ImageModel]:
    """The model that the user means, loaded, for the length of the block.  Raises UserError if there is none."""
    from rediffuse.inference.model import load_image_model
    from rediffuse.sampling.vae import PRIOR

    with tempfile.TemporaryDirectory(prefix="rediffuse-") as temporary:
        prior = None
        if name in KINDS:
            folder = checkout_root() / MODELS / name
            prior = checkout_root() / SAMPLES / "vae" / PRIOR
        elif name.startswith("models:"):
            folder = _download(name, Path(temporary)) / "artifacts"
        elif name.endswith(tuple(f":{kind}" for kind in KINDS)):
            folder = _of_revision(name, Path(temporary))
        else:
            folder = _model_folder(Path(name))
        settings = packed_settings(folder) if (folder / SAMPLING).is_file() else _settings_of_checkout(folder)
        yield load_image_model(folder, _overridden(settings, overrides), prior=prior)


def _of_revision(name: str, folder: Path) -> Path:
    """The model of a commit or an experiment, from DVC's cache or remote, with the settings of its params.yaml."""
    from dvc.api import DVCFileSystem  # takes a second to import

    from rediffuse.commands.records import commit_called, split_name
    from rediffuse.sampling.vae import PRIOR

    revision, kind = split_name(name)
    commit, root = commit_called(revision), checkout_root()
    try:
        files = DVCFileSystem(str(root), rev=commit)
        params = yaml.safe_load(files.read_text("params.yaml"))
        settings = {"precision": params["precision"], **params["sample"][kind]}
        files.get(f"{MODELS}/{kind}", str(folder / "model"), recursive=True)
        if settings.get("prior") == "mixture":
            files.get(f"{SAMPLES}/vae/{PRIOR}", str(folder / "model" / PRIOR))
    except Exception as error:  # DVC raises what its caches and remotes raise
        raise UserError(
            f"--model {name} cannot be had ({' '.join(str(error).split())[:300]}): fetch it with `dvc pull`, or make it again with"
            " `dvc repro` in that revision"
        ) from None
    (folder / "model" / SAMPLING).write_bytes(pack_settings(read_config(folder / "model")["kind"], settings, ()))
    return folder / "model"


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(
            f"--model {path} is no folder; give vae or ddpm for a model of the checkout, HEAD:ddpm or EXPERIMENT:ddpm, a folder with"
            " model.safetensors and config.json, or an address of MLflow's such as models:/rediffuse-ddpm@champion"
        )
    return path / "artifacts" if (path / "MLmodel").is_file() else path


def _settings_of_checkout(folder: Path) -> dict[str, Any]:
    return sampling_settings(load_params(checkout_root() / "params.yaml"), read_config(folder)["kind"])


def _overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those from the command line in their places; another sampler than ddim has no eta."""
    if overrides and "sampler" not in settings:
        raise UserError(f"--{next(iter(overrides)).replace('_', '-')} belongs to the ddpm; a VAE decodes in one step: leave it out")
    changed = {**settings, **overrides}
    return changed if changed.get("sampler", "ddim") == "ddim" else {**changed, "eta": 0.0}


def _download(address: str, folder: Path) -> Path:
    """The MLflow model at this address, downloaded.  Raises UserError if the store does not have it or cannot be read."""
    from rediffuse.tracking.identity import PASSWORD
    from rediffuse.tracking.models import open_registry

    client, uri = open_registry()
    try:
        import mlflow.artifacts
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        # MLflow's own download asks the process's global store for a models: address; this asks ours.
        found = get_model_name_and_version(client, address)
        source = client.get_logged_model(*found).artifact_location if len(found) == 1 else client.get_model_version_download_uri(*found)
        return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
    except Exception as error:  # MLflow raises what its database, server or file system raise
        reason = PASSWORD.sub("//", " ".join(f"{error}".split()))
        raise UserError(
            f"--model {address} cannot be fetched from MLflow ({reason[:300]}): `make ui` shows the models that are registered;"
            " `rediffuse promote` gives one an alias"
        ) from None


def checked_target(output: str) -> Path:
    """Where the images go.  Raises UserError for an ending that names another form, and for a folder that holds something."""
    target = Path(output)
    suffix = target.suffix.lower()
    if suffix in (".png", ".npz"):
        if target.is_dir():
            raise UserError(f"OUTPUT {output} is a folder: give a file, or a folder without this ending")
        return target
    if suffix and not output.endswith("/") and not target.is_dir():
        raise UserError(f"OUTPUT must end in .png (one grid) or .npz (arrays), or be a folder (for one, end it in /), got {output}")
    if target.exists() and not target.is_dir():
        raise UserError(f"OUTPUT {output} is a file: for a folder of PNGs give another name")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"OUTPUT {output} is a folder that holds something: give a new one, so that its images are of one drawing")
    return target


def write_images(target: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None, *, columns: int = COLUMNS) -> None:
    """Write the images wholly or not at all."""
    from rediffuse.figures.grid import grid
    from rediffuse.images.files import encode_image, save_npz, save_png

    if target.suffix.lower() == ".png":
        save_png(grid(images, min(len(images), columns), scale=2), target)
        return
    if target.suffix.lower() == ".npz":
        save_npz(target, {"images": images} if labels is None else {"images": images, "labels": labels})
        return
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for i, image in enumerate(images):
            (incoming / f"{i:05d}.png").write_bytes(encode_image(image))
        incoming.chmod(0o755)  # mkdtemp's folders are for nobody else
        incoming.replace(target)  # takes the place of an empty folder, and of no other
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
