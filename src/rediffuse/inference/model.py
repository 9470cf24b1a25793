"""A trained model that draws images of a class, with its settings: what `rediffuse generate` and a served model share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.inference.ddpm_coder import DDPMCoder
from rediffuse.inference.settings import known_classes, label_of
from rediffuse.inference.vae_coder import VAECoder
from rediffuse.params import SampleDDPM, SampleVAE
from rediffuse.runtime.device import Precision, device, make_deterministic
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind, read_config
from rediffuse.runtime.shards import SHARD, DrawShard, draw, in_shards, shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.space import Pixels, load_space
from rediffuse.sampling.vae import PRIOR, load_prior, vae_shards
from rediffuse.vae.model import VAE

CODING_STEPS = 100  # of DDIM, in which an image becomes noise and noise an image


class Coder(Protocol):
    """Images as points of a space where one can walk: latents of a VAE (`VAECoder`), noise of a DDPM (`DDPMCoder`).  label None: none."""

    steps: int  # in which a code becomes an image

    def encode(self, images: Tensor, label: int | None) -> Tensor: ...

    def decode(self, codes: Tensor, label: int | None) -> Tensor: ...

    def between(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor: ...

    def drawn(self, generator: torch.Generator) -> Tensor: ...

    def bits(self, images: Tensor, label: int | None, generator: torch.Generator, evaluations: int | None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ImageModel:
    """What one does with a trained model.  Images are uint8 (n, C, H, W), a label is a class by name, whatever its case, or by index.

    class_names: of the labels 0, 1, ..., none for a model without.  shards: label, or None for all in turn -> what draws.
    coder: number of steps of a DDPM (None: CODING_STEPS, or T if that is fewer) -> how images are coded.
    All methods raise UserError for what does not fit the model.
    """

    kind: Kind
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: Callable[[int | None], DrawShard]
    coder: Callable[[int | None], Coder]
    pixels: bool = True

    def generate(self, n: int = 16, *, label: str | int | None = None, seed: int = 1) -> NDArray[np.uint8]:
        """The first n images of the seed, of one class, or of all in turn."""
        return self.draw(n, seed=seed, label=self._number(label))[0]

    def reconstruct(self, images: NDArray[np.uint8], *, label: str | int | None = None, steps: int | None = None) -> NDArray[np.uint8]:
        """The images coded and decoded again: by the VAE, or by inverting DDIM."""
        coder, number = self.coder(steps), self._number_to_code_with(label)
        with torch.inference_mode():
            return in_shards(self._checked(images), lambda part: coder.decode(coder.encode(part, number), number)).numpy()

    def interpolate(
        self,
        a: NDArray[np.uint8] | int,
        b: NDArray[np.uint8] | int,
        n: int = 10,
        *,
        label: str | int | None = None,
        steps: int | None = None,
    ) -> NDArray[np.uint8]:
        """n images on the way from a to b, each an image, uint8 (C, H, W), or a seed, whose first image it stands for."""
        if n < 2:
            raise UserError(f"n, the number of images from a to b, must be at least 2, got {n}")
        coder, number = self.coder(steps), self._number_to_code_with(label)

        def code(end: NDArray[np.uint8] | int) -> Tensor:
            if isinstance(end, int):
                return coder.drawn(shard_generator(_checked_seed(end), 0))
            return in_shards(self._checked(end[None]), lambda part: coder.encode(part, number))[0]

        with torch.inference_mode():
            codes = coder.between(code(a), code(b), torch.linspace(0, 1, n))
            return in_shards(codes, lambda part: coder.decode(part, number)).numpy()

    def inpaint(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        n: int = 1,
        *,
        label: str | int | None = None,
        seed: int = 1,
        steps: int | None = None,
        rounds: int = 10,
    ) -> NDArray[np.uint8]:
        """n ways to fill in the image, uint8 (C, H, W), where the mask, (H, W), is true; the rest stays to the bit.  A DDPM only."""
        self._in_pixels("fills in nothing")
        if rounds < 1:
            raise UserError(f"rounds must be at least 1, got {rounds}")
        [whole] = self._checked(image[None])
        if mask.shape != self.shape[1:] or mask.dtype != np.bool_ or not mask.any():
            raise UserError(
                f"the mask must be an image of the model's {self.shape[1]} x {self.shape[2]} pixels that is true (or bright) somewhere,"
                f" got {mask.dtype} {mask.shape} with {int(mask.astype(bool).sum())} true"
            )
        coder: Any = self.coder(steps)
        known, number = torch.from_numpy(~mask), self._number(label)

        def shard(indices: Tensor, generator: torch.Generator) -> Tensor:
            filled: Tensor = coder.inpaint(whole, known, indices, generator, number, rounds)
            return filled

        with torch.inference_mode():
            return draw(_checked_n(n), shard, seed=_checked_seed(seed), title="inpainting").numpy()

    def nll(
        self, images: NDArray[np.uint8], *, label: str | int | None = None, seed: int = 1, evaluations: int | None = None
    ) -> NDArray[np.float64]:
        """An upper bound of -log p(x) for each image, in bits per dimension, (n,).

        evaluations: of the network for each image: times t of a DDPM (None: all), samples of q(z|x) of a VAE (None: 1).  The bits of a VAE
        with Bernoulli likelihood, which takes grey values for probabilities, are comparable with such a VAE's only.
        """
        if self.kind == "ddpm":
            self._in_pixels("knows no probability of an image")
        coder, number = self.coder(None), self._number_to_code_with(label)
        if evaluations is not None and evaluations < 1:
            raise UserError(f"evaluations must be at least 1, got {evaluations}")
        parts = []
        with torch.inference_mode():
            for i, part in enumerate(torch.split(self._checked(images), SHARD)):
                generator = shard_generator(_checked_seed(seed), i)
                parts.append(in_shards(part, partial(coder.bits, label=number, generator=generator, evaluations=evaluations)))
        return torch.cat(parts).double().numpy()

    def _in_pixels(self, what: str) -> None:
        if self.kind == "vae" or not self.pixels:
            raise UserError(f"a {'VAE' if self.kind == 'vae' else 'DDPM of latents'} {what}: take a DDPM of pixels")

    def _checked(self, images: NDArray[np.uint8]) -> Tensor:
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise UserError(
                f"images must be uint8 (n, {', '.join(map(str, self.shape))}) for this model, got {images.dtype} {images.shape}"
            )
        return torch.from_numpy(np.ascontiguousarray(images))

    def _number(self, label: str | int | None) -> int | None:
        return None if label is None else self.label(str(label))

    def _number_to_code_with(self, label: str | int | None) -> int | None:
        """As `_number`; a conditional VAE has learnt no "no label", as a DDPM has by label_drop."""
        if label is None and self.kind == "vae" and self.class_names:
            raise UserError(f"this vae codes images of a class; give their label, by index or name: {known_classes(self.class_names)}")
        return self._number(label)

    def label(self, text: str) -> int:
        """The label of a class, by its name, whatever its case, or its index.  Raises UserError if there is no such class."""
        return label_of(text, self.kind, self.class_names)

    def draw(self, n: int, *, seed: int, label: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """The first n images of the seed, uint8 (n, C, H, W), and their labels, int64 (n,), or None for a model without.

        label: of all images; None: 0, 1, 2, ... in turn.  Image i has the same noise with every label, and the same bits for
        every n.  Raises UserError for n below 1 and for a seed that numpy takes for none.
        """
        with torch.inference_mode():
            images = draw(_checked_n(n), self.shards(label), seed=_checked_seed(seed), title=f"{self.kind}, seed {seed}").numpy()
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
    if read_config(folder)["kind"] == "vae":
        return _load_vae(folder, _checked(SampleVAE, own), precision, prior)
    return _load_ddpm(folder, _checked(SampleDDPM, {"spacing": "even"} | own), precision)  # models packed before it could be chosen


def _load_vae(folder: Path, settings: SampleVAE, precision: Precision, prior: Path | None) -> ImageModel:
    vae = load_model(VAE, folder, device())
    latents = load_prior(vae, settings, prior or folder / PRIOR, folder)
    return ImageModel(
        "vae",
        vae.shape,
        tuple(name.strip() for name in vae.class_names),
        lambda label: vae_shards(vae, latents, precision, label=label),
        lambda _: VAECoder(vae, latents, precision),
    )


def _load_ddpm(folder: Path, settings: SampleDDPM, precision: Precision) -> ImageModel:
    denoiser = load_model(Denoiser, folder, device())
    if settings.steps > denoiser.schedule.T:
        raise UserError(f"steps must be at most T, the {denoiser.schedule.T} steps this model was trained on, got {settings.steps}")
    if settings.guidance_scale != 1 and not denoiser.classes:
        raise UserError(f"guidance_scale must be 1 for a model trained without labels, got {settings.guidance_scale:g}")
    names = tuple(name.strip() for name in denoiser.class_names)
    T, space = denoiser.schedule.T, load_space(folder, denoiser.shape, device())

    def coder(steps: int | None) -> Coder:
        if steps is not None and not 1 <= steps <= T:
            raise UserError(f"steps must be from 1 to T, the {T} steps this model was trained on, got {steps}")
        return DDPMCoder(denoiser, space, precision, min(CODING_STEPS, T) if steps is None else steps)

    return ImageModel(
        "ddpm",
        space.shape,
        names,
        lambda label: ddpm_shards(denoiser, settings, precision, space=space, label=label),
        coder,
        isinstance(space, Pixels),
    )


def _checked_n(n: int) -> int:
    if n < 1:
        raise UserError(f"n, the number of images, must be at least 1, got {n}")
    return n


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed}")
    return seed


def _checked(group: Any, settings: Mapping[str, Any]) -> Any:
    try:
        return group.model_validate(dict(settings))
    except ValidationError as error:
        reasons = [" ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in error.errors()]
        raise UserError(f"the settings of sampling are wrong: {'; '.join(reasons)}") from None
