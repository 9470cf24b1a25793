"""The typed schema of params.yaml.  Every stage loads its parameters here; nothing else parses YAML.

Units: durations and half-lives are counted in images, likelihoods in nats, learning rates per step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from rediffuse.runtime.errors import UserError


def _number(value: Any) -> Any:
    """Take `1e-05` for a number: YAML 1.1 (PyYAML) reads it as text, and `dvc exp run -S x=1e-5` writes it so."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


SIDES = 16, 128  # least and greatest side of an image, in pixels, that models and instruments are made for


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def select(self, fields_of: type) -> dict[str, Any]:
        """The parameters for which a dataclass or TypedDict has fields, by name: what a model or a training step takes of its group."""
        return self.model_dump(include=set(fields_of.__annotations__))


class Data(Group):
    """What the models learn from."""

    set: Literal["fashion-mnist", "mnist", "cifar10", "folder"]
    validation: Annotated[int, Field(ge=1, le=30_000)]
    path: str
    size: Annotated[int, Field(ge=0, le=SIDES[1])]
    channels: Literal["auto", 1, 3]
    validation_share: Annotated[Float, Field(gt=0, lt=1)]
    test_share: Annotated[Float, Field(gt=0, lt=1)]
    split_seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _possible(self) -> Data:
        if 0 < self.size < SIDES[0]:
            raise ValueError(f"size ({self.size}) must be {SIDES[0]} to {SIDES[1]} pixels, or 0: the images are all of one size")
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) and test_share ({self.test_share}) must leave images to learn from: together"
                " they must be below 1"
            )
        return self


Instrument = Literal["fashion-mnist-cnn-v1", "classifier", "random-conv-v1", "pixel-pca-v1", "inception-v3", "efficientnet-lite0"]

# Of the features.  Known here so that too few images are refused before hours of training, not after.
DIMENSIONS: dict[str, int] = {
    "fashion-mnist-cnn-v1": 64,
    "classifier": 64,
    "random-conv-v1": 64,
    "pixel-pca-v1": 64,
    "inception-v3": 2048,
    "efficientnet-lite0": 1280,
}


class Reference(Group):
    """The instruments that turn images into features; the first one's numbers are the headline.  Without any, no distance is measured."""

    instruments: list[Instrument]


class Training(Group):
    """One training run.  A step takes `batch` images; `images` are seen in all."""

    images: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1, le=65_536)]
    lr: Annotated[Float, Field(gt=0, le=1)]
    lr_warmup: Annotated[int, Field(ge=0)]
    lr_decay: Literal["cosine", "constant"]
    weight_decay: Annotated[Float, Field(ge=0, le=1)]
    clip_norm: Annotated[Float, Field(gt=0)]
    ema_half_life: Annotated[int, Field(ge=0)]
    log_every: Annotated[int, Field(ge=1)]
    validate_every: Annotated[int, Field(ge=1)]
    checkpoint_every: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _possible(self) -> Training:
        if self.batch > self.images:
            raise ValueError(f"batch ({self.batch}) must not exceed images ({self.images}): one step is the least that trains")
        if self.lr_warmup > self.images:
            raise ValueError(f"lr_warmup ({self.lr_warmup}) must not exceed images ({self.images})")
        return self


class VAE(Group):
    """The variational autoencoder."""

    latent_dim: Annotated[int, Field(ge=1, le=4096)]
    latent_channels: Annotated[int, Field(ge=0, le=256)]
    channels: Annotated[list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=1, max_length=5)]
    hidden: Annotated[int, Field(ge=1, le=65_536)]
    likelihood: Literal["bernoulli", "gaussian"]
    conditional: bool
    beta: Annotated[Float, Field(ge=0, le=1000)]
    kl_warmup: Annotated[int, Field(ge=0)]
    free_bits: Annotated[Float, Field(ge=0, le=10)]
    training: Training


class DDPM(Group):
    """The denoising diffusion model."""

    space: Literal["pixels", "latents"]
    T: Annotated[int, Field(ge=2, le=10_000)]
    schedule: Literal["linear", "cosine", "sigmoid"]
    predict: Literal["eps", "x0", "v"]
    loss_weight: Literal["simple", "min-snr"]
    min_snr_gamma: Annotated[Float, Field(gt=0)]
    conditional: bool
    label_drop: Annotated[Float, Field(ge=0, lt=1)]
    stratified: bool
    flip: bool
    fold: Literal[1, 2, 4]
    width: Annotated[int, Field(ge=8, le=1024, multiple_of=8)]
    multipliers: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1, max_length=5)]
    blocks: Annotated[int, Field(ge=1, le=8)]
    attention: Annotated[int, Field(ge=0, le=128)]
    dropout: Annotated[Float, Field(ge=0, lt=1)]
    training: Training


class SampleVAE(Group):
    prior: Literal["normal", "mixture"]
    components: Annotated[int, Field(ge=1, le=1000)]


class SampleDDPM(Group):
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++", "heun"]
    steps: Annotated[int, Field(ge=1, le=10_000)]
    spacing: Literal["even", "karras"]
    eta: Annotated[Float, Field(ge=0, le=1)]
    guidance_scale: Annotated[Float, Field(ge=0, le=100)]

    @model_validator(mode="after")
    def _possible(self) -> SampleDDPM:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta ({self.eta}) belongs to the sampler ddim; with {self.sampler} it must be 0")
        return self


class Sample(Group):
    """How many images are drawn from each model, and how: an independent set of `n` for each of the seeds."""

    n: Annotated[int, Field(ge=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=100)]
    vae: SampleVAE
    ddpm: SampleDDPM


class Evaluate(Group):
    """The settings of the metrics; part of what makes two numbers comparable."""

    is_splits: Annotated[int, Field(ge=1, le=100)]
    kid_subsets: Annotated[int, Field(ge=1, le=10_000)]
    kid_subset_size: Annotated[int, Field(ge=2, le=10_000)]
    neighbours: Annotated[int, Field(ge=1, le=100)]
    density_neighbours: Annotated[int, Field(ge=1, le=100)]
    accuracy_images: Annotated[int, Field(ge=0)]


class Params(Group):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
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
                f"launcher ({self.launcher!r}) must end with -m, because the name of a module follows: `python -m`, or"
                " `torchrun --nproc-per-node=8 -m` for 8 processes"
            )
        if self.ddpm.space == "latents":
            if not self.vae.latent_channels:
                raise ValueError(
                    "ddpm.space (latents) needs a VAE with a spatial latent, and vae.latent_channels is 0: set it to 4, for example"
                )
            if self.vae.conditional:
                raise ValueError(
                    "ddpm.space (latents) needs a VAE without labels, and vae.conditional is true: set it to false, and give the label to"
                    " the DDPM of the latents alone (ddpm.conditional)"
                )
            if self.ddpm.flip:
                raise ValueError("ddpm.flip (true) mirrors images, and cannot mirror latents: with ddpm.space latents set it to false")
        if self.sample.ddpm.steps > self.ddpm.T:
            raise ValueError(
                f"sample.ddpm.steps ({self.sample.ddpm.steps}) must not exceed ddpm.T ({self.ddpm.T}): lower the one or raise the other"
            )
        if self.sample.ddpm.guidance_scale != 1 and not (self.ddpm.conditional and self.ddpm.label_drop > 0):
            raise ValueError(
                f"sample.ddpm.guidance_scale ({self.sample.ddpm.guidance_scale}) other than 1 needs a model trained with and without"
                " labels: set ddpm.conditional to true and ddpm.label_drop above 0"
            )
        for name, values in (("sample.seeds", self.sample.seeds), ("reference.instruments", self.reference.instruments)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {', '.join(map(str, values))}")
        evaluate = self.evaluate
        least = dict[str, int]()
        if self.reference.instruments:
            least |= {
                "evaluate.is_splits": evaluate.is_splits,
                "evaluate.kid_subset_size": evaluate.kid_subset_size,
                "evaluate.neighbours": evaluate.neighbours + 1,
                "evaluate.density_neighbours": evaluate.density_neighbours + 1,
            }
        # With fewer images than dimensions the covariance is singular, and the distance mostly its own bias.
        least |= {f"{name} in reference.instruments": 2 * DIMENSIONS[name] for name in self.reference.instruments}
        for name, n in least.items():
            if self.sample.n < n:
                raise ValueError(
                    f"sample.n ({self.sample.n}) must be at least {n} for {name}: raise the one or change the other; of a set too small for"
                    " that no distances are measured with reference.instruments: []"
                )
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check the parameters.

    Raises UserError with one line for each thing wrong: the parameter, what is allowed, what was found, what to do.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the root of the checkout, where {path.name} lies") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping of the groups {', '.join(Params.model_fields)}, got {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_message(detail, path.name) for detail in error.errors())) from None


def flatten(params: BaseModel) -> dict[str, Any]:
    """Every leaf by its dotted name, as `-S` takes it: {"ddpm.T": 500, ...}."""

    def leaves(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    return leaves(params.model_dump(), "")


def _message(error: ErrorDetails, file: str) -> str:
    """One line: the parameter, what pydantic says is allowed, and what was found."""
    name, text = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {text} ({file})" if name else f"{text} ({file})"
    if error["type"] == "missing":
        return f"{name} is missing ({file})"
    if error["type"] == "extra_forbidden":
        return f"{name} is not a parameter ({file}); known here: {', '.join(_group_at(error['loc'][:-1]).model_fields)}"
    return f"{name}: {text[0].lower()}{text[1:]}, got {error['input']!r} ({file})"


def _group_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    group: Any = Params
    for name in loc:
        group = group.model_fields[str(name)].annotation
    return cast(type[BaseModel], group)
