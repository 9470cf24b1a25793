"""The files of a finished model: weights, and the kind and arguments that rebuild it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.runtime.kinds import CONFIG, WEIGHTS, Kind, read_config


class Rebuildable(nn.Module):
    """A model that its class and `config` rebuild: `type(model)(**model.config)`."""

    kind: ClassVar[Kind]
    config: dict[str, Any]


Model = TypeVar("Model", bound=Rebuildable)


def save_model(model: Rebuildable, folder: Path) -> None:
    """Write the weights, contiguous and on the CPU, and the kind and `model.config`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_file(folder / WEIGHTS, save(state))
    write_json(folder / CONFIG, {"kind": model.kind} | model.config)


def load_model(model_class: type[Model], folder: Path, device: torch.device) -> Model:
    """Return the saved model in evaluation mode.  Raises UserError if it is missing or of another kind."""
    arguments = read_config(folder)
    if (kind := arguments.pop("kind")) != model_class.kind:
        raise UserError(f"{folder} must hold a {model_class.kind}, but its {CONFIG} says {kind}")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing: `dvc repro` trains the model, `dvc pull` fetches one")
    model = model_class(**arguments)
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError:  # its message lists every tensor
        raise UserError(
            f"{weights} does not fit the layers of a {model_class.kind} here, so another version of rediffuse"
            " trained it: `dvc repro` trains it anew, or check out the commit that made it"
        ) from None
    return model.to(device).to(memory_format=torch.channels_last).eval()
