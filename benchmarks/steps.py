"""Steps against quality: the Fréchet distance (FD) of images drawn with 5, 10, 20, 50 and T evaluations of the network, by each sampler
in each spacing of its steps that suits it.

The trained model of data/models/ddpm draws as the stage `sample_ddpm` does; each set is judged by the instruments of the stage `reference`
against the real test images, as the stage `evaluate` does.  What counts is the difference from the full ancestral chain (`ddpm` in all T
steps) of the same seed: sets of the same seed start from the same noise.  Over seeds a set of 2,500 images varies by some percent.

The full chain is long (2,500 images in 500 steps: 6 to 12 minutes on 2 cores), so every set that is finished is kept in `steps.json`
in the folder of the results, by the hash of the model, sampler, spacing, steps, N and seed: an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.made_up import TINY, image_set, save_models
from benchmarks.report import Settings, Table
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.evaluation.features import Features, load_features, save_features
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import Instrument, make_instrument, open_instrument
from rediffuse.params import Params, SampleDDPM, load_params
from rediffuse.runtime.device import Precision, device, make_deterministic
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import write_json
from rediffuse.runtime.shards import draw
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.ddpm import ddpm_shards

MODEL, REFERENCE = Path("data/models/ddpm"), Path("data/reference")
EVALUATIONS = 5, 10, 20, 50
N, SEEDS = 2_500, (1,)
# Samplers, and how their times lie; the ancestral chain is meant for even ones, and far off in few steps of any.
METHODS = (
    ("ddpm", "even"),
    ("ddim", "even"),
    ("dpm-solver++", "even"),
    ("dpm-solver++", "karras"),
    ("sde-dpm-solver++", "even"),
    ("sde-dpm-solver++", "karras"),
    ("heun", "even"),
    ("heun", "karras"),
)
CHAIN = METHODS[0]

Kept = dict[str, Any]  # of one set: seconds, and fd: {id of the instrument: FD}


@dataclass(frozen=True)
class Ruler:
    """An instrument, and what it sees in the real test images."""

    instrument: Instrument
    real: Features


@dataclass(frozen=True)
class Drawing:
    """How one set of images is drawn."""

    sampler: str
    spacing: str
    steps: int
    n: int
    seed: int

    @property
    def evaluations(self) -> int:
        """Of the network, for each image."""
        return max(1, 2 * self.steps - 2) if self.sampler == "heun" else self.steps

    @property
    def settings(self) -> SampleDDPM:
        plain = {"eta": 0.0, "guidance_scale": 1.0}
        return SampleDDPM.model_validate({"sampler": self.sampler, "spacing": self.spacing, "steps": self.steps, **plain})

    def key(self, model: str) -> str:
        """What the images depend on, with the hash of the model."""
        return f"{model} {' '.join(str(value) for value in asdict(self).values())}"


def steps_for(sampler: str, evaluations: int) -> int:
    """The steps in which a sampler makes about so many evaluations: of Heun's, which makes 2 steps - 2, at most as many."""
    return (evaluations + 2) // 2 if sampler == "heun" else evaluations


def drawings(T: int, *, n: int, seeds: Iterable[int], evaluations: Sequence[int]) -> list[Drawing]:
    """All sets, the short ones first, the full ancestral chain last."""
    counts = [(method, steps_for(method[0], count)) for count in evaluations for method in METHODS]
    return [Drawing(*method, steps, n, seed) for method, steps in [*counts, (CHAIN, T)] for seed in seeds if steps < T or method == CHAIN]


class Results:
    """The finished sets, in one file that is replaced after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, Kept] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, key: str, instruments: Iterable[str]) -> Kept | None:
        """What was kept of a set, if all these instruments have judged it."""
        kept = self.kept.get(key)
        return kept if kept and set(instruments) <= set(kept["fd"]) else None

    def keep(self, key: str, found: Kept) -> None:
        self.kept[key] = found
        write_json(self.path, self.kept)


def model_hash(folder: Path, precision: Precision) -> str:
    """Of weights and configuration, with the arithmetic asked for."""
    parts = [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]
    return f"{hashlib.sha256(b''.join(parts)).hexdigest()[:16]} {precision}"


def judge(denoiser: Denoiser, drawing: Drawing, rulers: Sequence[Ruler], precision: Precision) -> Kept:
    """Draw one set, and measure it."""
    title = f"{drawing.sampler}, {drawing.evaluations} evaluations, seed {drawing.seed}"
    begin = time.perf_counter()
    with torch.inference_mode():
        images = draw(drawing.n, ddpm_shards(denoiser, drawing.settings, precision), seed=drawing.seed, title=title).numpy()
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "fd": {ruler.instrument.id: frechet_distance(ruler.instrument.measure(images), ruler.real) for ruler in rulers},
    }


def quality(
    model: Path,
    rulers: Sequence[Ruler],
    results: Results,
    *,
    precision: Precision,
    n: int = N,
    seeds: Sequence[int] = SEEDS,
    evaluations: Sequence[int] = EVALUATIONS,
) -> list[Table]:
    """A table for each instrument; sets that `results` holds are not drawn again."""
    denoiser, hashed = load_model(Denoiser, model, device()), model_hash(model, precision)
    T = denoiser.schedule.T
    found = dict[Drawing, Kept]()
    for drawing in drawings(T, n=n, seeds=seeds, evaluations=evaluations):
        key = drawing.key(hashed)
        if (kept := results.of(key, [ruler.instrument.id for ruler in rulers])) is None:
            kept = judge(denoiser, drawing, rulers, precision)
            results.keep(key, kept)
            print(f"{drawing}: {kept['seconds']:.0f} s", file=sys.stderr, flush=True)
        found[drawing] = kept
    return [_table(ruler.instrument.id, found, T, seeds) for ruler in rulers]


def _table(id: str, found: dict[Drawing, Kept], T: int, seeds: Sequence[int]) -> Table:
    n = next(iter(found)).n
    chain = {seed: found[Drawing(*CHAIN, T, n, seed)]["fd"][id] for seed in seeds}
    rows = []
    for name, spacing, steps in dict.fromkeys((drawing.sampler, drawing.spacing, drawing.steps) for drawing in found):
        sets = [Drawing(name, spacing, steps, n, seed) for seed in seeds]
        distances = [found[drawing]["fd"][id] for drawing in sets]
        differences = [100 * (distance / chain[seed] - 1) for seed, distance in zip(seeds, distances, strict=True)]
        seconds = statistics.mean(found[drawing]["seconds"] for drawing in sets)
        of_seeds = " ".join(f"{value:+.1f}" for value in differences)
        rows.append(
            [name, spacing, sets[0].evaluations, steps, statistics.mean(distances), statistics.mean(differences), of_seeds, seconds]
        )
    columns = ["sampler", "spacing", "evaluations", "steps", "FD", "% from the full chain", "of each seed", "s for a set"]
    note = (
        f"sets of {n:,} images, seeds {', '.join(map(str, seeds))}, which vary by some percent over seeds; the full chain is ddpm in {T}"
        " steps from the same noise"
    )
    return Table(f"steps against quality, FD by {id}", columns, rows, note)


def open_rulers(folder: Path, names: Iterable[str]) -> list[Ruler]:
    """The instruments of these names, as the stage `reference` has left them."""
    return [
        Ruler(open_instrument(folder / name, device=device()), load_features(folder / name / "features.safetensors")["test"])
        for name in names
    ]


def measure(settings: Settings) -> list[Table]:
    """Raises UserError if there is no trained model."""
    make_deterministic()
    params = load_params()
    if settings.quick:
        return _quick(params)
    if not (MODEL / "model.safetensors").exists() or not REFERENCE.exists():
        raise UserError(f"{MODEL} or {REFERENCE} is missing: train the model and make the instruments first, with `make repro`")
    rulers, results = open_rulers(REFERENCE, params.reference.instruments), Results(settings.out / "steps.json")
    return quality(MODEL, rulers, results, precision=params.precision)


def _quick(params: Params) -> list[Table]:
    """The same with a tiny, untrained model and images of noise: the distances mean nothing."""
    ddpm = params.ddpm.model_copy(update=TINY | {"T": 4})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_models(root, params.model_copy(update={"ddpm": ddpm}))
        make_reference(root / "reference", params.reference.instruments)
        rulers = open_rulers(root / "reference", params.reference.instruments)
        return quality(root / "ddpm", rulers, Results(root / "steps.json"), precision=params.precision, n=128, evaluations=(2,))


def make_reference(folder: Path, names: Iterable[str]) -> None:
    """Instruments and features as the stage `reference` leaves them, for made-up images."""
    train, test = image_set(256), image_set(256, seed=1)
    for name in names:
        instrument = make_instrument(name, train, folder / name)
        save_features(folder / name / "features.safetensors", {"test": instrument.measure(test.images)})
