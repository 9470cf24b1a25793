"""A trained model with its settings, as the commands, `rediffuse.load` and a served model use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.inference.coders import Coder, DDPMCoder, VAECoder
from rediffuse.inference.settings import known_classes, label_of
from rediffuse.params import SampleDDPM, SampleVAE
from rediffuse.runtime.device import Precision, device, make_deterministic
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind, read_config
from rediffuse.runtime.shards import SHARD, DrawShard, draw, in_shards, shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.guidance import load_guide
from rediffuse.sampling.space import Pixels, load_space
from rediffuse.sampling.vae import PRIOR, load_prior, vae_shards
from rediffuse.vae.model import VAE

CODING_STEPS = 100  # of DDIM, by default, from an image to noise and back

Images = NDArray[np.uint8]
Label = str | int | None


@dataclass(frozen=True, eq=False)
class ImageModel:
    """A trained model.  Images are uint8 (n, C, H, W); a label is the name (in any case) or index of a class.

    class_names: of the labels 0, 1, ...; empty for a model without labels.  shards: label, or None for all in
    turn -> a function that draws.  coder: number of steps of a DDPM, or None for the default -> a coder.
    pixels: whether the model works on pixels, not on latents.  All methods raise UserError for arguments that
    do not fit the model.
    """

    kind: Kind
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: Callable[[int | None], DrawShard]
    coder: Callable[[int | None], Coder]
    pixels: bool = True

    def generate(self, n: int = 16, *, label: Label = None, seed: int = 1) -> Images:
        """Return the first n images of the seed, of one class, or of all classes in turn."""
        return self.draw(n, seed=seed, label=None if label is None else self.label(str(label)))[0]

    def reconstruct(self, images: Images, *, label: Label = None, steps: int | None = None) -> Images:
        """Return the images after coding and decoding: by the VAE, or by inverting DDIM."""
        coder, labels = self.coder(steps), self._labels_of_images(label)
        with torch.inference_mode():
            back = in_shards(self._checked(images), lambda x: coder.decode(coder.encode(x, labels), labels))
        return back.numpy()

    def interpolate(
        self, a: Images | int, b: Images | int, n: int = 10, *, label: Label = None, steps: int | None = None
    ) -> Images:
        """Return n images from a to b, each an image, uint8 (C, H, W), or a seed: its first image."""
        if n < 2:
            raise UserError(f"n, the number of images from a to b, must be at least 2, got {n}")
        coder, labels = self.coder(steps), self._labels_of_images(label)

        def code(end: Images | int) -> Tensor:
            if isinstance(end, int):
                return coder.draw(shard_generator(_checked_seed(end), 0))
            return in_shards(self._checked(end[None]), lambda part: coder.encode(part, labels))[0]

        with torch.inference_mode():
            codes = coder.interpolate(code(a), code(b), torch.linspace(0, 1, n))
            return in_shards(codes, lambda part: coder.decode(part, labels)).numpy()

    def inpaint(
        self,
        image: Images,
        mask: NDArray[np.bool_],
        n: int = 1,
        *,
        label: Label = None,
        seed: int = 1,
        steps: int | None = None,
        rounds: int = 10,
    ) -> Images:
        """Return n ways to fill in the image, uint8 (C, H, W), where the mask, bool (H, W), is true.

        The other pixels stay the same.  Only a DDPM of pixels can do this.
        """
        self._require_ddpm_of_pixels("inpaint")
        if rounds < 1:
            raise UserError(f"rounds must be at least 1, got {rounds}")
        [whole] = self._checked(image[None])
        if mask.shape != self.shape[1:] or mask.dtype != np.bool_ or not mask.any():
            raise UserError(
                f"the mask must be bool, of the model's {self.shape[1]} x {self.shape[2]} pixels, and true"
                f" (bright) somewhere, got {mask.dtype} {mask.shape} with {np.count_nonzero(mask)} true"
            )
        coder: Any = self.coder(steps)
        known, labels = torch.from_numpy(~mask), self._labels(label)

        def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
            filled: Tensor = coder.inpaint(whole, known, labels, generator, rounds)
            return filled

        return _draw(n, draw_shard, seed, "inpainting")

    def nll(
        self, images: Images, *, label: Label = None, seed: int = 1, evaluations: int | None = None
    ) -> NDArray[np.float64]:
        """Return an upper bound of -log p(x) for each image, in bits per dimension, (n,).

        evaluations: of the network for each image: times t of a DDPM (None: all), samples of q(z|x) of a VAE
        (None: 1).  A VAE with Bernoulli likelihood takes grey values for probabilities: its bits are
        comparable only with those of another such VAE.
        """
        if self.kind == "ddpm":
            self._require_ddpm_of_pixels("nll")
        coder, labels = self.coder(None), self._labels_of_images(label)
        if evaluations is not None and evaluations < 1:
            raise UserError(f"evaluations must be at least 1, got {evaluations}")
        parts = []
        with torch.inference_mode():
            for i, part in enumerate(torch.split(self._checked(images), SHARD)):
                generator = shard_generator(_checked_seed(seed), i)
                bits = partial(coder.bits, labels=labels, generator=generator, evaluations=evaluations)
                parts.append(in_shards(part, bits))
        return torch.cat(parts).double().numpy()

    def label(self, text: str) -> int:
        """Return the label of a class, by its name or its index.  Raises UserError if unknown."""
        return label_of(text, self.kind, self.class_names)

    def draw(self, n: int, *, seed: int, label: int | None = None) -> tuple[Images, NDArray[np.int64] | None]:
        """Return the first n images of the seed and their labels, int64 (n,), or None without classes.

        label: of all images; None: 0, 1, 2, ... in turn.  Image i has the same noise with every label, and is
        the same for every n.  Raises UserError if n or the seed is out of range.
        """
        images = _draw(n, self.shards(label), seed, f"{self.kind}, seed {seed}")
        if not self.class_names:
            return images, None
        return images, np.arange(n) % len(self.class_names) if label is None else np.full(n, label)

    def _require_ddpm_of_pixels(self, command: str) -> None:
        if self.kind == "vae" or not self.pixels:
            found = "a VAE" if self.kind == "vae" else "a DDPM of latents (ddpm.space)"
            raise UserError(f"{command} works with a DDPM of pixels only, got {found}: take a DDPM of pixels")

    def _checked(self, images: Images) -> Tensor:
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            wanted = f"uint8 (n, {', '.join(map(str, self.shape))}) for this model"
            raise UserError(f"images must be {wanted}, got {images.dtype} {images.shape}")
        return torch.from_numpy(np.ascontiguousarray(images))

    def _labels(self, label: Label) -> Tensor | None:
        """Return the label for one shard of images."""
        return None if label is None else torch.full((SHARD,), self.label(str(label)), device=device())

    def _labels_of_images(self, label: Label) -> Tensor | None:
        """Return `_labels`, which a conditional VAE needs: it has not learnt "no label", as a DDPM has."""
        if label is None and self.kind == "vae" and self.class_names:
            missing = "label is missing: this vae codes images of a class; give their label, by index or name"
            raise UserError(f"{missing}: {known_classes(self.class_names)}")
        return self._labels(label)


def load_image_model(folder: Path, settings: Mapping[str, Any], *, prior: Path | None = None) -> ImageModel:
    """Load the model in the folder, with these settings (see settings.py); the process becomes deterministic.

    prior: the file of the fitted mixture of a VAE; None: beside the weights.  Raises UserError if files are
    missing or damaged, or the settings do not fit the model.
    """
    make_deterministic()
    precision: Precision = settings["precision"]
    own = {name: value for name, value in settings.items() if name != "precision"}
    if read_config(folder)["kind"] == "vae":
        return _load_vae(folder, _validated(SampleVAE, own), precision, prior)
    # What models packed by earlier versions do not name.
    before = {"spacing": "even", "guidance_interval": [0.0, 1.0], "autoguidance_scale": 1.0}
    return _load_ddpm(folder, _validated(SampleDDPM, before | own), precision)


def _load_vae(folder: Path, settings: SampleVAE, precision: Precision, prior: Path | None) -> ImageModel:
    vae = load_model(VAE, folder, device())
    latents = load_prior(vae, settings, prior or folder / PRIOR, folder)
    return ImageModel(
        kind="vae",
        shape=vae.shape,
        class_names=tuple(name.strip() for name in vae.class_names),
        shards=lambda label: vae_shards(vae, latents, precision, label=label),
        coder=lambda steps: VAECoder(vae, latents, precision),
    )


def _load_ddpm(folder: Path, settings: SampleDDPM, precision: Precision) -> ImageModel:
    denoiser = load_model(Denoiser, folder, device())
    T, space = denoiser.schedule.T, load_space(folder, denoiser.shape, device())
    _check_steps(settings.steps, T)
    guide = load_guide(folder, settings.autoguidance_scale)

    def coder(steps: int | None) -> Coder:
        steps = min(CODING_STEPS, T) if steps is None else steps
        _check_steps(steps, T)
        return DDPMCoder(denoiser, space, precision, steps)

    return ImageModel(
        kind="ddpm",
        shape=space.shape,
        class_names=tuple(name.strip() for name in denoiser.class_names),
        shards=lambda label: ddpm_shards(
            denoiser, settings, precision, space=space, guide=guide, label=label
        ),
        coder=coder,
        pixels=isinstance(space, Pixels),
    )


def _draw(n: int, draw_shard: DrawShard, seed: int, title: str) -> Images:
    if n < 1:
        raise UserError(f"n, the number of images, must be at least 1, got {n}")
    with torch.inference_mode():
        return draw(n, draw_shard, seed=_checked_seed(seed), title=title).numpy()


def _check_steps(steps: int, T: int) -> None:
    if not 1 <= steps <= T:
        allowed = f"at least 1 and at most T, the {T} steps this model was trained on"
        raise UserError(f"steps must be {allowed}, got {steps}")


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed}")
    return seed


def _validated(group: Any, settings: Mapping[str, Any]) -> Any:
    try:
        return group.model_validate(dict(settings))
    except ValidationError as error:
        reasons = [" ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in error.errors()]
        raise UserError(f"the settings of sampling are wrong: {'; '.join(reasons)}") from None
