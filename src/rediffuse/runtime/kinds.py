"""The kinds of model, and which kind a folder holds.  Does not import PyTorch, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import read_json

Kind = Literal["vae", "ddpm"]
KINDS: tuple[Kind, ...] = ("vae", "ddpm")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
REMEDY = (
    "`dvc repro` trains a model into data/models, `dvc pull` fetches a trained one;"
    f" another folder must hold {WEIGHTS} and {CONFIG}"
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the kind and the arguments of a saved model.  Raises UserError if missing or damaged."""
    path = folder / CONFIG
    config = read_json(path, REMEDY)
    if (kind := config.get("kind", "none")) not in KINDS:
        names = " or ".join(KINDS)
        raise UserError(
            f"{path} must name the kind of the model, {names}, got {kind}: train or export the model again"
        )
    return config
