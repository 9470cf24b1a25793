"""The kinds of model, and which kind a folder holds: read without PyTorch, which takes seconds to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rediffuse.runtime.errors import UserError

Kind = Literal["vae", "ddpm"]
KINDS: tuple[Kind, ...] = ("vae", "ddpm")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The kind and the arguments of the model in the folder.  Raises UserError if they are missing or damaged."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: `dvc repro` trains a model into data/models, `dvc pull` fetches a trained one; another folder"
            f" must hold {WEIGHTS} and {CONFIG}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(config, dict) or config.get("kind") not in KINDS:
        kind = config.get("kind", "none") if isinstance(config, dict) else "none"
        raise UserError(f"{path} must name the kind of the model, {' or '.join(KINDS)}, got {kind}: train or export the model again")
    return config
