"""Distances between two sets of features: torch-fidelity behind one strict door.

All the mathematics is torch-fidelity's; nothing else in the project may call it, because called plainly it gives silent wrong
numbers: it ignores misspelt arguments, fills a cache that is keyed by name and shared between projects, returns features in an
order that hangs on PYTHONHASHSEED, advances torch's global random state, gives a figure for fewer images than dimensions, and
calls every Fréchet distance "FID".  Here a distance is `fd` and belongs to the instrument that made the features; the name
`fid` is kept for Inception-v3 with the original weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from rediffuse.errors import UserError
from rediffuse.evaluation.features import Features, check_features
from rediffuse.params import Evaluate

SEED = 2020  # of the shuffle before the splits of IS, and of the subsets of KID: part of the ruler, not of an experiment
ROWS = 1000  # in one block of the distance matrices of precision and recall: 1000 x N float64
NAMES = {  # of torch-fidelity -> ours
    "inception_score_mean": "is",
    "inception_score_std": "is_std",
    "frechet_inception_distance": "fd",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


def fidelity(generated: Features, real: Features, settings: Evaluate) -> dict[str, float]:
    """How close generated images are to real ones, from the features of both.

    fd: Fréchet distance (Heusel et al. 2017), >= 0.  kid, kid_std: unbiased squared MMD with the cubic kernel (Binkowski et al. 2018), mean
    and spread over random subsets; around 0 for equal distributions, also slightly below.  is, is_std: inception score of the generated
    images (Salimans et al. 2016) over consecutive splits, 1 .. number of classes.  precision, recall: share of generated images inside the
    k-nearest-neighbour balls of real ones and the other way round (Kynkäänniemi et al. 2019), 0 .. 1.

    fd, precision and recall do not hang on the order of the images; is and kid are drawn from them with SEED.
    Raises UserError for too few images (see `check_enough`), features of different dimension, and numbers that are not finite.
    """
    _check_pair(generated, real)
    check_enough(len(generated), generated.dimension, settings, "generated images")
    check_enough(len(real), real.dimension, settings, "real images")
    found = _calculate(
        generated,
        real,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=settings.is_splits,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=settings.kid_subset_size,
        prc_neighborhood=settings.neighbours,
    )
    # Shares of whole images that went through float32: 0.87779998779 is 8778 of 10000.
    counted = {"precision": len(generated), "recall": len(real)}
    return found | {name: round(found[name] * n) / n for name, n in counted.items()}


def frechet_distance(generated: Features, real: Features) -> float:
    """The Fréchet distance alone, as in `fidelity`."""
    _check_pair(generated, real)
    _check_dimension(len(generated), generated.dimension, "generated images")
    _check_dimension(len(real), real.dimension, "real images")
    return _calculate(generated, real, fid=True)["fd"]


def inception_score(features: Features, splits: int) -> float:
    """The inception score alone, as in `fidelity`: of real images, the score that a perfect generator would get."""
    check_features(features, "images")
    _check_least(len(features), splits, f"evaluate.is_splits is {splits}", "images")
    return _calculate(features, None, isc=True, isc_splits=splits)["is"]


def check_enough(n: int, dimension: int, settings: Evaluate, title: str) -> None:
    """Raise UserError where n images are too few for the metrics: torch-fidelity gives a wrong number or NaN there, or breaks."""
    _check_dimension(n, dimension, title)
    _check_least(n, settings.is_splits, f"evaluate.is_splits is {settings.is_splits}", title)
    _check_least(n, settings.kid_subset_size, f"evaluate.kid_subset_size is {settings.kid_subset_size}", title)
    _check_least(n, settings.neighbours + 1, f"evaluate.neighbours is {settings.neighbours}", title)


def _check_dimension(n: int, dimension: int, title: str) -> None:
    # With fewer images than dimensions the covariance is singular, and the distance mostly its own bias.
    _check_least(n, 2 * dimension, f"a Fréchet distance in {dimension} dimensions needs twice as many", title)


def _check_least(n: int, least: int, reason: str, title: str) -> None:
    if n < least:
        raise UserError(f"too few {title}: at least {least} are needed, because {reason}, got {n}; raise sample.n (params.yaml)")


def _check_pair(generated: Features, real: Features) -> None:
    check_features(generated, "generated images")
    check_features(real, "real images")
    if generated.dimension != real.dimension:
        dimensions = f"{generated.dimension} and {real.dimension}"
        raise UserError(f"features of {dimensions} dimensions cannot be compared: measure both image sets with the same instrument")


class _Rows(Dataset[Tensor]):
    """What torch-fidelity takes from memory: a dataset that gives one tensor at a time, here [values, logits] of an image."""

    def __init__(self, features: Features) -> None:
        self.rows = torch.cat([features.values, features.logits], dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class _Ready(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
    """Takes features, gives features.  They are made once for each image set, outside, by an instrument."""

    def __init__(self, name: str, features_list: list[str], *, dimension: int, **settings: Any) -> None:
        super().__init__(name, features_list)
        self.dimension = dimension

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = {"values": rows[:, : self.dimension], "logits": rows[:, self.dimension :]}
        # In the order of features_list, whatever the base class says: torch-fidelity makes that list from a set, so its
        # order hangs on PYTHONHASHSEED, and the result is zipped with it.
        return tuple(parts[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "values", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "values"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


EXTRACTOR = "rediffuse-features"
if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises; a reloaded module comes here twice
    torch_fidelity.register_feature_extractor(EXTRACTOR, _Ready)


def _calculate(generated: Features, real: Features | None, **settings: Any) -> dict[str, float]:
    """Call torch-fidelity with every setting spelt out.  Generated first, real second: precision and recall swap otherwise.

    Raises TypeError for a setting it does not know, UserError for a result that is not finite.
    """
    if unknown := set(settings) - set(DEFAULTS):
        raise TypeError(f"torch-fidelity knows no setting {', '.join(sorted(unknown))}, and would ignore it without a word")
    with torch.random.fork_rng(devices=[]):  # its DataLoader advances the global state
        found = torch_fidelity.calculate_metrics(
            input1=_Rows(generated),
            input2=None if real is None else _Rows(real),
            feature_extractor=EXTRACTOR,
            dimension=generated.dimension,  # ours: handed on to _Ready
            cuda=False,  # float64 on the CPU, the same everywhere
            cache=False,  # keyed by names alone; DVC keeps the reference features
            save_cpu_ram=True,  # no worker processes, and distances in blocks
            batch_size=ROWS,
            prc_batch_size=ROWS,
            samples_shuffle=True,
            rng_seed=SEED,
            verbose=False,
            **settings,
        )
    result = {ours: float(found[theirs]) for theirs, ours in NAMES.items() if theirs in found}
    if broken := [name for name, value in result.items() if not torch.isfinite(torch.tensor(value))]:
        raise UserError(f"{', '.join(broken)} came out as not finite for {len(generated)} images: report this with the samples")
    return result
