"""How `make bench` measures: contenders in turns, the same work for all, ratios by work."""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
import toy_contenders
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import __main__ as command
from benchmarks import evaluation, gpu, ours, peers, steps, training, vae
from benchmarks.report import RATIO, peak_mib
from benchmarks.workers import Workers, ratio
from rediffuse.sampling.samplers import SAMPLERS


def test_a_part_that_cannot_run_says_why(tmp_path, monkeypatch):
    peers.sized.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = CliRunner().invoke(command.main, ["training", "gpu", "--out", str(tmp_path / "results.md")])
    assert found.exit_code == 1 and "needs diffusers, which `make bench` installs" in found.output
    assert "needs a GPU" in found.output and "not measured: training, gpu" in found.output
    assert not (tmp_path / "results.md").exists()


def test_contenders_take_turns_and_each_has_its_own_peak_memory(tmp_path):
    diary = tmp_path / "diary"
    make, sizes = toy_contenders.writes_its_name, {"a": 300, "b": 1}
    with Workers({name: functools.partial(make, diary, name, mib) for name, mib in sizes.items()}) as workers:
        results, peaks = workers.turns(3), workers.each(peak_mib)
    assert diary.read_text().split() == ["a", "b"] * 3
    assert results == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert 300 < peaks["a"] < 600
    assert 1 < peaks["b"] < 200  # not that of this process, which has torch loaded, nor that of the other


def test_an_error_in_a_contender_is_raised_here():
    with pytest.raises(BrokenProcessPool) as raised, Workers({"clumsy": toy_contenders.dies}) as workers:
        workers.turns(1)
    assert "clumsy" in raised.value.__notes__[0]


def test_ratios_are_taken_within_rounds_and_by_work():
    assert ratio([10.0, 20.0, 30.0], [5.0, 5.0, 10.0]) == 3  # the median of 2, 4, 3, not 20 / 5
    works = {"ours": training.Work("", 1, 0.7e9, 2e9), "peer": training.Work("", 1, 0.3e9, 1e9)}
    rates = {training.PEAK: [1000.0], "ours": [100.0], "peer": [50.0]}
    found = training.throughput("", rates, dict.fromkeys(works, 1.0), works)
    of_ours, of_peer = (dict(zip(found.columns, row, strict=True)) for row in found.rows)
    assert (of_ours["GFLOP/s"], of_ours["of the conv peak"], of_ours[RATIO]) == (200, "20%", 1)
    assert (of_peer["images/s"], of_peer["of the conv peak"], of_peer[RATIO]) == (50, "5%", 4)


def test_flops_are_those_of_the_formula():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert peers.flops(lambda: conv(torch.zeros(2, 3, 10, 6)), 2) == 2 * 9 * 3 * 8 * 10 * 6
    q = torch.zeros(1, 2, 7, 16)  # two heads of 7 positions
    assert peers.flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 7 * 7 * 16)
    linear, x = nn.Linear(5, 4), torch.zeros(3, 5, requires_grad=True)
    forward = 2 * 5 * 4  # backward: for weights and input
    assert peers.flops(lambda: linear(x), 3, backward=True) == 3 * forward


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_steps_make_the_evaluations_asked_for(sampler):
    denoiser, seen = steps.tiny_denoiser(T=12), list[int]()
    denoiser.register_forward_hook(lambda *_: seen.append(1))
    count = steps.steps_for(sampler, 5)
    ours.draw_images(denoiser, ours.parameters(), 2, sampler=sampler, steps=count, guidance_scale=1.0)
    assert 4 <= len(seen) == steps.evaluations_of(sampler, count) <= 5


def test_our_contenders_train():
    assert vae.rediffuse(256)() > 0 and ours.training_turn(2, gpu.parameters(quick=True))() > 0


def test_contenders_that_score_differently_are_refused():
    same = {"fd": 1.0, "is": 2.0, "kid": 3.0, "precision": 0.5, "recall": 0.5}
    evaluation.check_same({evaluation.OURS: same, "other": dict(same)})
    with pytest.raises(RuntimeError, match="kid"):
        evaluation.check_same({evaluation.OURS: same, "other": same | {"kid": 3.1}})


def test_training_starts_with_nothing_heavy_but_torch():
    heavy = {"torch._dynamo", "torchvision", "torch_fidelity", "mlflow", "matplotlib", "sklearn", "pandas"}
    code = f"import stages.train_vae, stages.train_ddpm, sys; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert not found.stdout.split()
