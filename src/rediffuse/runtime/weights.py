"""The files of a finished model: weights, and the arguments that rebuild it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json

Model = TypeVar("Model", bound=nn.Module)


def save_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write weights (model.safetensors, contiguous, on the CPU) and the arguments that rebuild the model (config.json)."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_file(folder / "model.safetensors", save(state))
    write_json(folder / "config.json", config)


def load_model(kind: type[Model], folder: Path, device: torch.device) -> Model:
    """The model that save_model wrote, in evaluation mode."""
    try:
        config = json.loads((folder / "config.json").read_text())
        model = kind(**config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder} is missing: `dvc repro` trains the model, `dvc pull` fetches a trained one") from None
    return model.to(device).to(memory_format=torch.channels_last).eval()
