"""How a trained model is sampled, and which kind it is: read without loading it, and without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.params import Params, SampleDDPM, SampleVAE
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind

SAMPLING = "sampling.json"  # beside model.safetensors and config.json, where a model is packed with its settings
SHOWN = 30  # classes named in a message, at most


def sampling_settings(params: Params, kind: Kind) -> dict[str, Any]:
    """How params.yaml has images drawn from the model: precision and its own group."""
    settings: SampleVAE | SampleDDPM = params.sample.vae if kind == "vae" else params.sample.ddpm
    return {"precision": params.precision, **settings.model_dump()}


def pack_settings(kind: Kind, settings: Mapping[str, Any], class_names: Sequence[str]) -> bytes:
    """The file `sampling.json` of a model that is packed with its settings; for the reader, it also names the classes."""
    return (json.dumps({"model": kind, "class_names": list(class_names), "settings": dict(settings)}, indent=2) + "\n").encode()


def packed_settings(folder: Path) -> dict[str, Any]:
    """The settings that the model in the folder is packed with.  Raises UserError if they are missing or damaged."""
    path = folder / SAMPLING
    try:
        settings: dict[str, Any] = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, how this model is sampled, cannot be read ({error!r})") from None
    return settings


def label_of(text: str, kind: Kind, class_names: Sequence[str]) -> int:
    """The label of a class, by its name, whatever its case, or its index.  Raises UserError if the model knows no such class."""
    if not class_names:
        raise UserError(f"this {kind} was trained without labels, so it draws no class {text!r}: leave the label out")
    wanted, names = text.strip(), [name.strip() for name in class_names]
    if wanted in names:  # before its case is passed over: there may be a cat and a Cat
        return names.index(wanted)
    folded = [name.casefold() for name in names]
    if wanted.casefold() in folded:
        return folded.index(wanted.casefold())
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(f"label {text!r} is no class of this model; known are, by index or name: {known_classes(names)}")


def known_classes(names: Sequence[str]) -> str:
    """The first SHOWN by index and name, and how many more there are."""
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:SHOWN]))
    return known + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
