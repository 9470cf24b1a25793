"""A trained model that draws images of a class, with its settings: what `rediffuse generate` and a served model share.

Which kind of model it is shows only when it is loaded; the module of the other kind is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from rediffuse.errors import UserError
from rediffuse.generation.formats import PRIOR
from rediffuse.generation.settings import Kind, kind_of
from rediffuse.params import SampleDDPM, SampleVAE
from rediffuse.shards import DrawShard, draw
from rediffuse.training.checkpoint import load_model
from rediffuse.training.hardware import Precision, device, make_deterministic


@dataclass(frozen=True, eq=False)
class ImageModel:
    """class_names: of the labels 0, 1, ..., none for a model without.  shards: label, or None for all in turn -> what draws."""

    kind: Kind
    class_names: tuple[str, ...]
    shards: Callable[[int | None], DrawShard]

    def label(self, text: str) -> int:
        """The label of a class, by its name, whatever its case, or its index.  Raises UserError if there is no such class."""
        if not self.class_names:
            raise UserError(f"this {self.kind} was trained without labels, so it draws no class {text!r}: leave the label out")
        wanted = text.strip().casefold()
        names = [name.casefold() for name in self.class_names]
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        known = ", ".join(f"{i} {name}" for i, name in enumerate(self.class_names))
        raise UserError(f"label {text!r} is no class of this model; known are, by index or name: {known}")

    def draw(self, n: int, *, seed: int, label: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """The first n images of the seed, uint8 (n, C, H, W), and their labels, int64 (n,), or None for a model without.

        label: of all images; None: 0, 1, 2, ... in turn.  Image i has the same noise with every label, and the same bits for
        every n.  Raises UserError for n below 1 and for a seed that numpy takes for none.
        """
        if n < 1:
            raise UserError(f"n, the number of images, must be at least 1, got {n}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed}")
        with torch.inference_mode():
            images = draw(n, self.shards(label), seed=seed, title=f"{self.kind}, seed {seed}").numpy()
        if not self.class_names:
            return images, None
        return images, np.arange(n, dtype=np.int64) % len(self.class_names) if label is None else np.full(n, label, np.int64)


def load_image_model(folder: Path, settings: Mapping[str, Any], *, prior: Path | None = None) -> ImageModel:
    """The model in the folder, on the device, with these settings (see settings.py); the process becomes deterministic.

    prior: the file of the fitted mixture, where the settings of a VAE name it; as a rule it lies beside the weights.
    Raises UserError if files are missing or damaged, and for settings that the model cannot be sampled with.
    """
    make_deterministic()
    precision: Precision = settings["precision"]
    own = {name: value for name, value in settings.items() if name != "precision"}
    if kind_of(folder) == "vae":
        return _load_vae(folder, _checked(SampleVAE, own), precision, prior)
    return _load_ddpm(folder, _checked(SampleDDPM, {"spacing": "even"} | own), precision)  # models packed before it could be chosen


def _load_vae(folder: Path, settings: SampleVAE, precision: Precision, prior: Path | None) -> ImageModel:
    from rediffuse.generation.vae import load_prior, vae_shards
    from rediffuse.vae.model import VAE

    vae = load_model(VAE, folder, device())
    draw_shard = vae_shards(vae, load_prior(vae, settings, prior or folder / PRIOR, folder), precision)
    return ImageModel("vae", (), lambda _: draw_shard)


def _load_ddpm(folder: Path, settings: SampleDDPM, precision: Precision) -> ImageModel:
    from rediffuse.diffusion.denoiser import Denoiser
    from rediffuse.generation.ddpm import ddpm_shards

    denoiser = load_model(Denoiser, folder, device())
    if settings.steps > denoiser.schedule.T:
        raise UserError(f"steps must be at most T, the {denoiser.schedule.T} steps this model was trained on, got {settings.steps}")
    if settings.guidance_scale != 1 and not denoiser.classes:
        raise UserError(f"guidance_scale must be 1 for a model trained without labels, got {settings.guidance_scale:g}")
    names = tuple(name.strip() for name in denoiser.class_names)
    return ImageModel("ddpm", names, lambda label: ddpm_shards(denoiser, settings, precision, label=label))


def _checked(group: Any, settings: Mapping[str, Any]) -> Any:
    try:
        return group.model_validate(dict(settings))
    except ValidationError as error:
        reasons = [" ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in error.errors()]
        raise UserError(f"the settings of sampling are wrong: {'; '.join(reasons)}") from None
