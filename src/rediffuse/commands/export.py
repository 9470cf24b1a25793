"""Export a trained model as a folder that needs nothing else: our format, ONNX or diffusers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rediffuse.inference.card import CARD, COMMIT, USAGE
from rediffuse.inference.settings import SAMPLING, label_of, sampling_settings
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import read_config
from rediffuse.sampling.vae import PRIOR
from rediffuse.tracking.git import commit_of, file_at, try_git
from rediffuse.tracking.identity import PASSWORD
from rediffuse.tracking.lineage import MODELS
from rediffuse.tracking.lock import directory_md5
from rediffuse.tracking.models import card_of, model_files
from rediffuse.tracking.store import checkout_root


def export(output: str, *, model: str, form: str, label: str | None = None) -> Path:
    """Write the model as a new folder with a model card, atomically.  Returns where.

    model: vae or ddpm.  form: folder, onnx or diffusers.  label: name or index of the class that diffusers
    draws; None: no class.  Raises UserError if there is no such model, OUTPUT exists, or the format does not
    fit the model.
    """
    if label is not None and form != "diffusers":
        raise UserError(f"--label is for --format diffusers only, got --format {form}: leave it out")
    checkout = checkout_root()
    target, folder = Path(output).absolute(), checkout / MODELS / model
    if target.exists():
        raise UserError(f"OUTPUT {output} exists: give another name")
    config = read_config(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as incoming:
        ready = Path(incoming, "ready")
        usage = _write(config, folder, checkout, ready, form, label)
        card = card_of(config["kind"], folder, checkout, _origin(checkout, folder), usage)
        (ready / CARD).write_text(card)
        ready.rename(target)
    return Path(output)


def _write(
    config: dict[str, Any], folder: Path, checkout: Path, target: Path, form: str, label: str | None
) -> str:
    """Write the files of the format into a new folder.  Returns what the model card says under "Use"."""
    kind = config["kind"]
    if form == "diffusers":
        from rediffuse.inference.to_diffusers import diffusers_files, diffusers_usage

        number = None if label is None else label_of(label, kind, config.get("class_names", []))
        _write_files(target, diffusers_files(folder, config, number))
        return diffusers_usage(config, number)
    settings = sampling_settings(load_params(checkout / "params.yaml"), kind)
    try:
        files = model_files(kind, folder, settings, checkout)
    except FileNotFoundError as error:
        raise UserError(
            f"sample.vae.prior is mixture, but {error.filename} is missing: `dvc repro sample_vae` fits it"
        ) from None
    if form == "folder":
        _write_files(target, files)
        return USAGE
    from rediffuse.inference.to_onnx import write_onnx

    _write_files(target, {name: files[name] for name in (SAMPLING, PRIOR) if name in files})
    return write_onnx(folder, config, target)


def _write_files(target: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _origin(checkout: Path, folder: Path) -> dict[str, str]:
    """Return the current commit, if its dvc.lock has the model, and the address of its repository."""
    head = commit_of(checkout, "HEAD")
    if head is None or directory_md5(folder) not in (file_at(checkout, head, "dvc.lock") or b"").decode():
        return {}
    url = try_git(checkout, "config", "--get", "remote.origin.url")
    published = "://" in url and not url.startswith("file:")  # a path on this machine is of no use elsewhere
    return {COMMIT: head} | ({"repository": PASSWORD.sub("//", url)} if published else {})
