"""The typed schema of params.yaml.  Every stage loads its parameters here; nothing else parses YAML.

Units: durations and half-lives are counted in images, likelihoods in nats, learning rates per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from rediffuse.runtime.errors import UserError

SIDES = 16, 256  # the smallest and largest side of an image, in pixels

Instrument = Literal[
    "fashion-mnist-cnn-v1", "classifier", "random-conv-v1", "inception-v3", "efficientnet-lite0"
]
# Dimensions of the features: too few images are refused before hours of training, not after.
DIMENSIONS = {
    "fashion-mnist-cnn-v1": 64,
    "classifier": 64,
    "random-conv-v1": 64,
    "inception-v3": 2048,
    "efficientnet-lite0": 1280,
}


def _number(value: Any) -> Any:
    """Convert text such as `1e-05`: `dvc exp run -S x=1e-5` writes it, and YAML 1.1 reads it as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Float = Annotated[float, BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def select(self, fields_of: type) -> dict[str, Any]:
        """Return by name the parameters for which a dataclass or TypedDict has fields."""
        return self.model_dump(include=set(fields_of.__annotations__))


Side = Annotated[int, Field(ge=SIDES[0], le=SIDES[1])]


def _size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Data(Group):
    """What the models learn from."""

    set: Literal[
        "fashion-mnist",
        "mnist",
        "kmnist",
        "qmnist",
        "emnist-digits",
        "emnist-letters",
        "emnist-balanced",
        "usps",
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "folder",
    ]
    validation: int = Field(ge=0, le=30_000)
    path: str
    size: Annotated[int | tuple[Side, Side], BeforeValidator(_size)]
    fit: Literal["crop", "pad", "stretch"]
    channels: Literal["auto", 1, 3]
    background: Literal["auto", "white", "black"]
    split_folders: bool
    validation_share: Float = Field(gt=0, lt=1)
    test_share: Float = Field(gt=0, lt=1)
    split_seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Data:
        if isinstance(self.size, int) and self.size and not SIDES[0] <= self.size <= SIDES[1]:
            allowed = f"{SIDES[0]} to {SIDES[1]} pixels, or 0: all images have the same size"
            raise ValueError(f"size ({self.size}) must be {allowed}")
        if self.validation_share + self.test_share >= 1:
            shares = f"validation_share ({self.validation_share}) and test_share ({self.test_share})"
            raise ValueError(f"{shares} must be below 1 together, to leave images for training")
        return self


class Reference(Group):
    """The real images of the distances, and the instruments that turn images into features.

    The first instrument gives all scores, the others give distances.
    """

    split: Literal["test", "train"]
    instruments: list[Instrument]


class Training(Group):
    """One training run.  A step takes `batch` images; `images` are seen in all."""

    images: int = Field(ge=1)
    batch: int = Field(ge=1, le=65_536)
    optimizer: Literal["adamw", "muon"]
    lr: Float = Field(gt=0, le=1)
    muon_lr: Float = Field(gt=0, le=1)
    lr_warmup: int = Field(ge=0)
    lr_decay: Literal["cosine", "constant"]
    weight_decay: Float = Field(ge=0, le=1)
    clip_norm: Float = Field(gt=0)
    ema_half_life: int = Field(ge=0)
    patience: int = Field(ge=0)
    log_every: int = Field(ge=1)
    validate_every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Training:
        for name, value in (("batch", self.batch), ("lr_warmup", self.lr_warmup)):
            if value > self.images:
                raise ValueError(f"{name} ({value}) must not exceed images ({self.images})")
        return self


class VAE(Group):
    """The variational autoencoder."""

    latent_dim: int = Field(ge=1, le=4096)
    latent_channels: int = Field(ge=0, le=256)
    channels: list[Annotated[int, Field(ge=1, le=2048)]] = Field(min_length=1, max_length=5)
    hidden: int = Field(ge=1, le=65_536)
    likelihood: Literal["bernoulli", "gaussian"]
    conditional: bool
    beta: Float = Field(ge=0, le=1000)
    kl_warmup: int = Field(ge=0)
    free_bits: Float = Field(ge=0, le=10)
    training: Training


class DDPM(Group):
    """The denoising diffusion model."""

    space: Literal["pixels", "latents"]
    T: int = Field(ge=2, le=10_000)
    schedule: Literal["linear", "cosine", "sigmoid"]
    predict: Literal["eps", "x0", "v"]
    loss_weight: Literal["simple", "min-snr"]
    min_snr_gamma: Float = Field(gt=0)
    conditional: bool
    label_drop: Float = Field(ge=0, lt=1)
    t_density: Literal["uniform", "laplace"]
    log_snr_mean: Float = Field(ge=-20, le=20)
    log_snr_scale: Float = Field(gt=0, le=100)
    stratified: bool
    flip: bool
    augment: Float = Field(ge=0, lt=1)
    fold: Literal[1, 2, 4]
    width: int = Field(ge=8, le=1024, multiple_of=8)
    multipliers: list[Annotated[int, Field(ge=1, le=16)]] = Field(min_length=1, max_length=5)
    blocks: int = Field(ge=1, le=8)
    attention: int = Field(ge=0, le=128)
    dropout: Float = Field(ge=0, lt=1)
    guide_share: Float = Field(ge=0, lt=1)
    training: Training


class SampleVAE(Group):
    prior: Literal["normal", "mixture"]
    components: int = Field(ge=1, le=1000)


class SampleDDPM(Group):
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++", "heun"]
    steps: int = Field(ge=1, le=10_000)
    spacing: Literal["even", "karras"]
    eta: Float = Field(ge=0, le=1)
    guidance_scale: Float = Field(ge=0, le=100)
    autoguidance_scale: Float = Field(ge=0, le=100)
    guidance_interval: list[Annotated[Float, Field(ge=0, le=1)]] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _possible(self) -> SampleDDPM:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(
                f"guidance_interval ([{low}, {high}]) must rise: guidance is used from the smaller to"
                " the larger share of T; [0, 1] is all t"
            )
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta ({self.eta}) is for the sampler ddim; with {self.sampler} it must be 0")
        return self


class Sample(Group):
    """How images are drawn from each model: an independent set of `n` for each of the seeds."""

    n: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1, max_length=100)
    vae: SampleVAE
    ddpm: SampleDDPM


class Evaluate(Group):
    """The settings of the metrics; part of what makes two numbers comparable."""

    is_splits: int = Field(ge=1, le=100)
    kid_subsets: int = Field(ge=1, le=10_000)
    kid_subset_size: int = Field(ge=2, le=10_000)
    neighbours: int = Field(ge=1, le=100)
    density_neighbours: int = Field(ge=1, le=100)
    accuracy_images: int = Field(ge=0)


class Params(Group):
    """All of params.yaml."""

    seed: Seed
    precision: Literal["auto", "float32"]
    compile: Literal["auto", "always", "never"]
    launcher: str
    data: Data
    reference: Reference
    vae: VAE
    ddpm: DDPM
    sample: Sample
    evaluate: Evaluate

    @model_validator(mode="after")
    def _possible(self) -> Params:
        if self.launcher.split()[-1:] != ["-m"]:
            raise ValueError(
                f"launcher ({self.launcher!r}) must end with -m, because the name of a module follows:"
                " `python -m`, or `torchrun --nproc-per-node=8 -m` for 8 processes"
            )
        vae, ddpm, steps = self.vae, self.ddpm, self.sample.ddpm.steps
        if ddpm.space == "latents":
            if not vae.latent_channels:
                raise ValueError("ddpm.space latents needs vae.latent_channels above 0, for example 4, got 0")
            if vae.conditional:
                raise ValueError("ddpm.space latents needs vae.conditional false: set ddpm.conditional")
            if ddpm.flip:
                raise ValueError("ddpm.space latents needs ddpm.flip false: it cannot mirror latents")
            if ddpm.augment:
                raise ValueError("ddpm.space latents needs ddpm.augment 0: it cannot augment latents")
        if steps > ddpm.T:
            raise ValueError(f"sample.ddpm.steps ({steps}) must not exceed ddpm.T ({ddpm.T}): change either")
        if (scale := self.sample.ddpm.guidance_scale) != 1 and not (ddpm.conditional and ddpm.label_drop > 0):
            raise ValueError(
                f"sample.ddpm.guidance_scale ({scale}) other than 1 needs a model trained with and without"
                " labels: set it to 1, or ddpm.conditional to true and ddpm.label_drop above 0"
            )
        if (scale := self.sample.ddpm.autoguidance_scale) != 1 and not ddpm.guide_share:
            raise ValueError(
                f"sample.ddpm.autoguidance_scale ({scale}) other than 1 needs a guide: set it to 1, or"
                " ddpm.guide_share above 0"
            )
        for name, training in (("vae", vae.training), ("ddpm", ddpm.training)):
            if training.patience and self.data.set != "folder" and not self.data.validation:
                raise ValueError(
                    f"{name}.training.patience ({training.patience}) needs images to validate with: set it to"
                    " 0, or data.validation above 0"
                )
        if ddpm.training.patience and ddpm.guide_share:
            raise ValueError(
                f"ddpm.training.patience ({ddpm.training.patience}) needs ddpm.guide_share 0, because"
                f" training may end before the guide is kept: got {ddpm.guide_share}"
            )
        named = ("sample.seeds", self.sample.seeds), ("reference.instruments", self.reference.instruments)
        for name, values in named:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {', '.join(map(str, values))}")
        for name, n in self._least_images().items():
            if self.sample.n < n:
                raise ValueError(
                    f"sample.n ({self.sample.n}) must be at least {n} for {name}: raise one or change the"
                    " other, or set reference.instruments to [], which measures no distances"
                )
        return self

    def _least_images(self) -> dict[str, int]:
        """Return by parameter how many images a set must have.  None are needed without instruments."""
        if not self.reference.instruments:
            return {}
        # With fewer images than dimensions the covariance is singular, and the distance mostly its own bias.
        names, evaluate = self.reference.instruments, self.evaluate
        return {
            "evaluate.is_splits": evaluate.is_splits,
            "evaluate.kid_subset_size": evaluate.kid_subset_size,
            "evaluate.neighbours": evaluate.neighbours + 1,
            "evaluate.density_neighbours": evaluate.density_neighbours + 1,
        } | {f"{name} in reference.instruments": 2 * DIMENSIONS[name] for name in names}


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check the parameters.

    Raises UserError with a line for each error: the parameter, what is allowed, what was found, the remedy.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the root of the checkout, where it lies") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        groups = ", ".join(Params.model_fields)
        raise UserError(f"{path} must be a mapping of the groups {groups}, got {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_message(detail, path.name) for detail in error.errors())) from None


def flatten(params: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return every leaf by its dotted name, as `-S` takes it: {"ddpm.T": 500, ...}."""
    flat: dict[str, Any] = {}
    for name, value in dict(params).items():
        if isinstance(value, BaseModel | Mapping):
            flat |= {f"{name}.{leaf}": parameter for leaf, parameter in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _message(error: ErrorDetails, file: str) -> str:
    """Return one line: the parameter, what pydantic says is allowed, and what was found."""
    name, text = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {text} ({file})" if name else f"{text} ({file})"
    if error["type"] == "missing":
        return f"{name} is missing ({file})"
    if error["type"] == "extra_forbidden":
        known = ", ".join(_group_at(error["loc"][:-1]).model_fields)
        return f"{name} is not a parameter ({file}); known here: {known}"
    return f"{name}: {text[0].lower()}{text[1:]}, got {error['input']!r} ({file})"


def _group_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    group: Any = Params
    for name in loc:
        group = group.model_fields[str(name)].annotation
    return cast(type[BaseModel], group)
