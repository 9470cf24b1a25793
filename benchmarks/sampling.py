"""Images drawn in a second at equal evaluations of networks of equal FLOPs, with random weights.

Ours, in a size of the peers' FLOPs and as in params.yaml, draws as the stage sample_ddpm does, in shards of
64; diffusers with DDIMScheduler; denoising-diffusion-pytorch with its `ddim_sample`; both in batches as in
training.  All without guidance.
"""

from __future__ import annotations

from functools import partial
from statistics import median

from benchmarks import ours, peers
from benchmarks.report import RATIO, Settings, Table, peak_mib
from benchmarks.training import OURS, peer_recipes, variants
from benchmarks.workers import Factory, Workers, ratio, spread

EVALUATIONS, IMAGES, MANY = 20, 128, 10_000


def measure(settings: Settings) -> list[Table]:
    n, steps = (64, 2) if settings.quick else (IMAGES, EVALUATIONS)
    contenders: dict[str, Factory] = {}
    for name, params in variants().items():
        contenders[name] = partial(ours.sampling_turn, n, steps, params)
    for name, recipe in peer_recipes().items():
        contenders[name] = partial(peers.sampling_turn, recipe, n, steps)
    with Workers(contenders) as workers:
        workers.turns(1)  # first use of each kernel
        rates, memory = workers.turns(settings.turns), workers.each(peak_mib)
    rows = []
    for name, each in rates.items():
        of_ours = ratio(rates[OURS], each)
        rows.append([name, median(each), spread(each), MANY / median(each), memory[name], of_ours])
    note = f"Medians of {settings.turns} turns of {n} images.  Ratio: images/s of {OURS} to these."
    columns = ["contender", "images/s", "spread", f"seconds for {MANY:,}", "peak MiB", RATIO]
    return [Table(f"Sampling with {steps} evaluations of the network", columns, rows, note)]
