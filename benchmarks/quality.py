"""Quality at equal wall-clock: the Fréchet distance of what each contender draws after `--seconds` (600) of training, by two instruments.

A shared machine has slower minutes, so time is counted in images: each contender is trained on exactly as many as it handles in that
time at its throughput in the part `training`, measured in the same invocation or kept in results.json from the same machine (where there
is none, a few steps are measured here).  Its learning rate's schedule ends there.  Then it draws 5,000 images from its averaged weights,
with a few-step sampler of its own: ours as params.yaml says; diffusers, as its DDIMPipeline, and denoising-diffusion-pytorch with DDIM
in 50 steps.  Distances are to the 10,000 test images.  The floor is what 5,000 real training images get (three disjoint sets);
what counts is the excess over it.  Ratio: excess of the contender / excess of ours, both of this run.

Ours is the default recipe, labels and all.  The peers are in their best setting (benchmarks/peers.py), unconditional, as their scripts
are, with a learning rate of 1e-3: the documented 1e-4 and 8e-5 are meant for days of training.  `--documented-lr` adds contenders with
those.  All train on the images that our stage trains on, 55,000.

A contender that is finished is kept below the folder of the results (quality/), under a hash of its configuration, its number of images
and its code, and is not trained again; ours goes on from its last checkpoint.  After an interruption name this part alone: measuring
`training` again gives other numbers of images.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import ours, peers, training
from benchmarks.report import RATIO, Cell, Settings, Table, about, read_results
from benchmarks.workers import Workers
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import Instrument, make_instrument
from rediffuse.evaluation.record import real_sets
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.files import replace_file, write_json
from rediffuse.sources.fashion_mnist import load_fashion_mnist
from rediffuse.sources.splits import hold_out
from rediffuse.training.checkpoint import Checkpoint

INSTRUMENTS = "fashion-mnist-cnn-v1", "random-conv-v1"
N, N_QUICK = 5000, 256  # images drawn; a distance needs twice as many as its instrument has dimensions
SETS = 3  # of real images, for the floor
LR = 1e-3  # of the peers
EVALUATIONS: dict[peers.Kind, int] = {"diffusers": 50, "denoising-diffusion-pytorch": 50}
QUICK_STEPS = 10
SAME = ("cpu", "cores", "threads", "capability", "quick")  # of two measurements on one machine

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """What a contender does.  recipe None: ours.  images: trained on; n: drawn; evaluations None: as params.yaml says."""

    name: str
    images: int
    n: int
    recipe: peers.Recipe | None = None
    evaluations: int | None = None

    @property
    def key(self) -> str:
        """A hash of all that its images depend on, but for the machine."""
        configuration: dict[str, Any] = {"images": self.images, "n": self.n, "code": _code(self.recipe is None)}
        if self.recipe:
            configuration |= {"recipe": asdict(self.recipe), "evaluations": self.evaluations}
        else:
            params = ours.parameters().model_dump()
            configuration |= {"ddpm": params["ddpm"], "sample": params["sample"]} | {key: params[key] for key in ("seed", "precision")}
        return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def measure(settings: Settings) -> list[Table]:
    rates, source = throughput(settings)
    plans = [plan(name, rate, settings) for name, rate in rates.items()]
    if settings.documented_lr:
        plans += [documented(each) for each in plans if each.recipe]
    cache = settings.out / "quality"
    finished = {each.name: finish(each, cache) for each in plans}
    splits = load_fashion_mnist()
    names = INSTRUMENTS[1:] if settings.quick else INSTRUMENTS
    return [distances(name, splits, plans, finished, rates, cache, settings, source) for name in names]


def throughput(settings: Settings) -> tuple[dict[str, float], str]:
    """Images a second of ours and of each peer at its best, and where they were measured."""
    names = [training.DEFAULT, *(f"{kind}, best" for kind in peers.KINDS)]
    part = read_results(settings.out / "results.json")["parts"].get("training")
    here = about(settings)
    if part and all(part["about"][key] == here[key] for key in SAME):
        table = next(Table(**table) for table in part["tables"] if table["title"] == training.TITLE)
        column = table.columns.index("images/s")
        kept = {str(row[0]): cast("float", row[column]) for row in table.rows}
        return {name: kept[name] for name in names}, f"the part `training` of {part['about']['date']}, commit {part['about']['commit']}"
    steps = 2 if settings.quick else training.STEPS
    recipes = peers.recipes(training.our_flops(large=True), training.our_batch(), 1_000_000)
    contenders = {training.DEFAULT: functools.partial(ours.training_turn, steps)} | {
        name: functools.partial(peers.training_turn, recipes[name], steps) for name in names[1:]
    }
    with Workers(contenders) as workers:
        turns = cast("dict[str, list[float]]", workers.turns(settings.turns))
    return {name: statistics.median(turns[name]) for name in names}, f"{settings.turns} turns of {steps} steps before"


def plan(name: str, rate: float, settings: Settings) -> Plan:
    """As many whole steps as fit into the seconds."""
    batch = training.our_batch()
    steps = QUICK_STEPS if settings.quick else max(1, round(rate * settings.seconds / batch))
    n = N_QUICK if settings.quick else N
    if name == training.DEFAULT:
        return Plan(name, steps * batch, n)
    recipe = replace(peers.recipes(training.our_flops(large=True), batch, steps)[name], lr=LR)
    return Plan(f"{recipe.kind}, lr {LR:g}", steps * batch, n, recipe, 2 if settings.quick else EVALUATIONS[recipe.kind])


def documented(each: Plan) -> Plan:
    """The same with the documented learning rate."""
    assert each.recipe
    return replace(each, name=f"{each.recipe.kind}, documented lr", recipe=replace(each.recipe, lr=None))


def finish(each: Plan, cache: Path) -> dict[str, Any]:
    """Train and draw, in a process of its own, unless that was done before; what it took, and the images under `samples`."""
    folder = cache / each.key
    if not (folder / "done.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with Workers({each.name: functools.partial(contender, each, folder)}) as workers:
            taken = cast("dict[str, Any]", workers.turns(1)[each.name][0]) | {"peak_mib": workers.peaks()[each.name]}
        write_json(folder / "done.json", {"name": each.name, "images": each.images, **taken})
    done: dict[str, Any] = json.loads((folder / "done.json").read_text())
    return done | {"samples": np.load(folder / "samples.npy")}


def contender(each: Plan, folder: Path) -> Callable[[], dict[str, Any]]:
    """A turn that trains and draws."""

    def turn() -> dict[str, Any]:
        params = ours.parameters()
        train, _ = hold_out(load_fashion_mnist()["train"], params.data.validation, params.seed)
        begin = time.perf_counter()
        draw = train_peer(each, train) if each.recipe else train_ours(each, train, folder)
        trained = time.perf_counter()
        samples = draw()
        seconds = {"train_seconds": trained - begin, "sample_seconds": time.perf_counter() - trained}
        _save(folder / "samples.npy", samples.numpy())
        return seconds

    return turn


def train_ours(each: Plan, train: ImageSet, folder: Path) -> Callable[[], torch.Tensor]:
    params = ours.parameters()
    labels = None if train.labels is None else torch.tensor(train.labels)
    checkpoint, every = Checkpoint(folder / "checkpoint.pt"), params.ddpm.training.log_every
    run = ours.trainer(
        params, torch.tensor(train.images), labels, seen=each.images, log=lambda *_: None, log_every=every, save_every=20_000
    )
    model, _ = run.train(checkpoint)
    checkpoint.path.unlink(missing_ok=True)
    return lambda: ours.draw_images(model, params, each.n)


def train_peer(each: Plan, train: ImageSet) -> Callable[[], torch.Tensor]:
    assert each.recipe and each.evaluations
    recipe, evaluations = each.recipe, each.evaluations
    peer, stream = peers.contender(recipe), peers.batches(torch.tensor(train.images), recipe.batch)
    for _ in range(recipe.steps):
        peer.step(next(stream))
    return lambda: peer.sample(each.n, evaluations)


def distances(
    name: str,
    splits: Mapping[str, ImageSet],
    plans: list[Plan],
    finished: Mapping[str, dict[str, Any]],
    rates: Mapping[str, float],
    cache: Path,
    settings: Settings,
    source: str,
) -> Table:
    """The table of one instrument."""
    train, test, n = splits["train"], splits["test"], plans[0].n
    instrument = make_instrument(name, train, cache / "instruments" / name)
    real = instrument.measure(test.images[: 2 * n], title="test images")

    def distance(images: Images) -> float:
        return frechet_distance(instrument.measure(images), real)

    floors = [distance(train.take(indices).images) for indices in real_sets(n, len(train), SETS)]
    floor = statistics.mean(floors)
    found = {each.name: distance(finished[each.name]["samples"]) for each in plans}
    rows: list[list[Cell]] = [["real training images", None, None, None, None, floor, 0.0, None]]
    for each in plans:
        done, excess, own = finished[each.name], found[each.name] - floor, found[plans[0].name] - floor
        ratio = excess / own if own > 0 else None
        nfe = each.evaluations or ours.parameters().sample.ddpm.steps
        rows.append([each.name, each.images, done["train_seconds"], nfe, done["sample_seconds"], found[each.name], excess, ratio])
    columns = ["contender", "images trained on", "seconds it took", "sampling steps", "seconds to draw", "FD", "excess over real", RATIO]
    length = f"{QUICK_STEPS} steps" if settings.quick else f"{settings.seconds:.0f} s"
    return Table(f"Quality after {length} of training, {name}", columns, rows, _note(instrument, floors, n, rates, source))


def _note(instrument: Instrument, floors: list[float], n: int, rates: Mapping[str, float], source: str) -> str:
    speeds = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return (
        f"{n:,} images against the test images, instrument {instrument.id} (SHA-256 {instrument.sha256[:12]}); one training each.  Floor:"
        f" {SETS} sets of real images, {min(floors):.3g} to {max(floors):.3g}.  Images trained on: images/s of {source} ({speeds}) times"
        " the seconds; `seconds it took` was measured at another time, beside other load.  Ratio: excess of this / excess of ours."
    )


def _code(is_ours: bool) -> str:
    """A hash of the code that a contender runs, its package's version included."""
    here = Path(__file__).parent
    source = here.parent / "src" / "rediffuse"
    files = [here / "peers.py"]
    if is_ours:
        files = [here / "ours.py", source / "runtime/shards.py"]
        files += [file for room in ("runtime", "images", "diffusion", "training", "sampling") for file in (source / room).glob("*.py")]
    digest = hashlib.sha256(json.dumps(about(Settings())["versions"]).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _save(path: Path, samples: Images) -> None:
    unfinished = path.with_suffix(".tmp.npy")
    np.save(unfinished, samples)
    replace_file(path, unfinished.read_bytes())
    unfinished.unlink()
