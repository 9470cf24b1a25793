"""Steps against quality: the Fréchet distance (FD) of images drawn with 5, 10, 20, 50 and T evaluations.

The trained model of data/models/ddpm draws as the stage `sample_ddpm` does, by each sampler in the spacings
that suit it; each set is judged by the instruments of the stage `reference`.  What counts is the difference
from the full ancestral chain (`ddpm` in all T steps), which starts from the same noise.  Over seeds such sets
vary by some percent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.ours import TINY, denoiser, draw_images, image_set, parameters
from benchmarks.report import Settings, Table
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.evaluation.features import Features, load_features
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import Instrument, make_instrument, open_instrument
from rediffuse.params import Params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model

MODEL, REFERENCE = Path("data/models/ddpm"), Path("data/reference")
EVALUATIONS = 5, 10, 20, 50
N = 2_500
EVEN_AND_KARRAS = "dpm-solver++", "sde-dpm-solver++", "heun"
METHODS = [("ddpm", "even"), ("ddim", "even"), *((s, p) for s in EVEN_AND_KARRAS for p in ("even", "karras"))]

Ruler = tuple[Instrument, Features]  # and what it sees in the real test images


def steps_for(sampler: str, evaluations: int) -> int:
    """Return the steps with at most so many evaluations of the network."""
    return (evaluations + 2) // 2 if sampler == "heun" else evaluations


def evaluations_of(sampler: str, steps: int) -> int:
    """Return the evaluations for each image."""
    return max(1, 2 * steps - 2) if sampler == "heun" else steps


def methods(T: int, counts: tuple[int, ...]) -> Iterator[tuple[str, str, int]]:
    """Yield sampler, spacing and steps; first the full ancestral chain."""
    yield "ddpm", "even", T
    for count, (sampler, spacing) in product(counts, METHODS):
        if (steps := steps_for(sampler, count)) < T:
            yield sampler, spacing, steps


def measure_methods(
    model: Denoiser, params: Params, rulers: list[Ruler], n: int = N, counts: tuple[int, ...] = EVALUATIONS
) -> Table:
    """Draw a set by each method; return its distances, and how far they are from those of the full chain."""
    rows, chain = [], list[float]()
    for sampler, spacing, steps in methods(model.schedule.T, counts):
        settings = {"sampler": sampler, "spacing": spacing, "steps": steps, "eta": 0.0, "guidance_scale": 1.0}
        settings["guidance_interval"] = [0.0, 1.0]
        begin = time.perf_counter()
        images = draw_images(model, params, n, **settings).numpy()
        seconds = time.perf_counter() - begin
        found = [frechet_distance(instrument.measure(images), real) for instrument, real in rulers]
        chain = chain or found
        pairs = [pair for fd, full in zip(found, chain, strict=True) for pair in (fd, 100 * (fd / full - 1))]
        rows.append([sampler, spacing, evaluations_of(sampler, steps), steps, *pairs, seconds])
    columns = [name for instrument, _ in rulers for name in (f"FD, {instrument.id}", "% from the full chain")]
    note = f"{n:,} images, seed {params.sample.seeds[0]}; the first row is the full chain."
    title = "Steps against quality"
    return Table(title, ["sampler", "spacing", "evaluations", "steps", *columns, "seconds"], rows, note)


def measure(settings: Settings) -> list[Table]:
    """Raises UserError if there is no trained model."""
    make_deterministic()
    params = parameters()
    names = params.reference.instruments
    if settings.quick:  # an untrained model and images of noise: the distances mean nothing
        return [measure_methods(tiny_denoiser(), params, [made_up_ruler(name) for name in names], 128, (2,))]
    if not (MODEL / "model.safetensors").exists() or not REFERENCE.exists():
        raise UserError(
            f"{MODEL} or {REFERENCE} is missing: train the model and make the instruments with `make repro`"
        )
    rulers = []
    for folder in (REFERENCE / name for name in names):
        real = load_features(folder / "features.safetensors")["test"]
        rulers.append((open_instrument(folder, device=device()), real))
    return [measure_methods(load_model(Denoiser, MODEL, device()), params, rulers)]


def tiny_denoiser(T: int = 4) -> Denoiser:
    return denoiser(parameters(**TINY, T=T)).to(device()).eval()


def made_up_ruler(name: str) -> Ruler:
    with TemporaryDirectory() as folder:
        instrument = make_instrument(name, image_set(256), Path(folder))
    return instrument, instrument.measure(image_set(256, seed=2).images)
