"""How a trained model is sampled, and the names of its classes.  Does not import PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.params import Params, SampleDDPM, SampleVAE
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind

SAMPLING = "sampling.json"  # beside the weights of a model that is packed with its settings
SHOWN = 30  # classes named in a message, at most


def sampling_settings(params: Params, kind: Kind) -> dict[str, Any]:
    """Return the settings of params.yaml for drawing from the model: its own group and the precision."""
    settings: SampleVAE | SampleDDPM = params.sample.vae if kind == "vae" else params.sample.ddpm
    return {"precision": params.precision, **settings.model_dump()}


def pack_settings(kind: Kind, settings: Mapping[str, Any], class_names: Sequence[str]) -> bytes:
    """Return the file `sampling.json` of a packed model; the names of the classes are only for the reader."""
    content = {"model": kind, "class_names": list(class_names), "settings": dict(settings)}
    return (json.dumps(content, indent=2) + "\n").encode()


def packed_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the `sampling.json` of the folder.  Raises UserError if missing or damaged."""
    path = folder / SAMPLING
    try:
        settings: dict[str, Any] = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, the settings of this model, cannot be read ({error!r})") from None
    return settings


def label_of(text: str, kind: Kind, class_names: Sequence[str]) -> int:
    """Return the label of a class, by its name, in any case, or its index.  Raises UserError if unknown."""
    if not class_names:
        why = f"this {kind} was trained without labels"
        raise UserError(f"{why}, so it draws no class {text!r}: leave the label out")
    wanted, names = text.strip(), [name.strip() for name in class_names]
    for case in (str, str.casefold):  # exact case first: there may be a cat and a Cat
        known = [case(name) for name in names]
        if case(wanted) in known:
            return known.index(case(wanted))
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    choice = f"known are, by index or name: {known_classes(names)}"
    raise UserError(f"label {text!r} is no class of this model; {choice}")


def known_classes(names: Sequence[str]) -> str:
    """Return the first SHOWN classes by index and name, and how many more there are."""
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:SHOWN]))
    return known + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
