"""How `make bench` measures: contenders in turns, networks of equal FLOPs, ratios by work."""

from __future__ import annotations

import functools
import math
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import toy_contenders
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import __main__ as command
from benchmarks import peers, training
from benchmarks.report import RATIO, peak_mib
from benchmarks.workers import Workers, ratio


def test_a_part_that_cannot_run_says_why(tmp_path: Path, monkeypatch) -> None:
    peers.sized.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = CliRunner().invoke(command.main, ["training", "gpu", "--out", str(tmp_path / "results.md")])
    assert found.exit_code == 1 and "needs diffusers, which `make bench` installs" in found.output
    assert "needs a GPU" in found.output and "not measured: training, gpu" in found.output
    assert not (tmp_path / "results.md").exists()


def test_contenders_take_turns_and_each_has_its_own_peak_memory(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    make, sizes = toy_contenders.writes_its_name, {"a": 300, "b": 1}
    with Workers({name: functools.partial(make, diary, name, mib) for name, mib in sizes.items()}) as workers:
        results, peaks = workers.turns(3), workers.each(peak_mib)
    assert diary.read_text().split() == ["a", "b"] * 3
    assert results == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert 300 < peaks["a"] < 600
    assert 1 < peaks["b"] < 200  # not that of this process, which has torch loaded, nor that of the other


@pytest.mark.parametrize(
    ("contender", "error"),
    [
        (toy_contenders.fails, ValueError),
        (toy_contenders.dies, BrokenProcessPool),
        (functools.partial(toy_contenders.lacks, "no_such_package"), ModuleNotFoundError),
    ],
)
def test_an_error_in_a_contender_is_raised_here(contender, error: type[Exception]) -> None:
    with pytest.raises(error) as raised, Workers({"clumsy": contender}) as workers:
        workers.turns(1)
    assert "clumsy" in raised.value.__notes__[0]


def test_ratios_are_taken_within_rounds() -> None:
    assert ratio([10.0, 20.0, 30.0], [5.0, 5.0, 10.0]) == 3  # the median of 2, 4, 3, not 20 / 5


def test_contenders_are_compared_by_their_work() -> None:
    works = {"ours": training.Work("", 1, 0.7e9, 2e9), "peer": training.Work("", 1, 0.3e9, 1e9)}
    rates = {training.PEAK: [1000.0], "ours": [100.0], "peer": [50.0]}
    found = training.throughput("", rates, dict.fromkeys(works, 1.0), works)
    of_ours, of_peer = (dict(zip(found.columns, row, strict=True)) for row in found.rows)
    assert (of_ours["GFLOP/s"], of_ours["of the conv peak"], of_ours[RATIO]) == (200, "20%", 1)
    assert (of_peer["images/s"], of_peer["of the conv peak"], of_peer[RATIO]) == (50, "5%", 4)


def test_flops_are_those_of_the_formula() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert peers.flops(lambda: conv(torch.zeros(2, 3, 10, 6)), 2) == 2 * 9 * 3 * 8 * 10 * 6
    q = torch.zeros(1, 2, 7, 16)  # two heads of 7 positions
    assert peers.flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 7 * 7 * 16)
    linear, x = nn.Linear(5, 4), torch.zeros(3, 5, requires_grad=True)
    assert peers.flops(lambda: linear(x), 3, backward=True) == 3 * (
        2 * 5 * 4
    )  # backward: for weights and input


@pytest.mark.parametrize("setting", ["documented", "best"])
@pytest.mark.parametrize("kind", ["diffusers", "denoising-diffusion-pytorch"])
def test_peers_do_as_much_work_as_ours(kind: peers.Kind, setting: peers.Setting) -> None:
    for package in (kind.replace("-", "_"), "ema_pytorch"):
        pytest.importorskip(package, reason="make bench installs it")
    target = training.our_work(training.large()).forward
    recipe = peers.recipes(target, batch=2, steps=10)[f"{kind}, {setting}"]
    work = training.peer_work(recipe)
    assert work.forward == pytest.approx(target, rel=peers.TOLERANCE)
    assert work.training == pytest.approx(3 * target, rel=2 * peers.TOLERANCE)
    peer = peers.contender(recipe)
    before = [parameter.clone() for parameter in peer.model.parameters()]
    images = torch.arange(2 * 28 * 28).reshape(2, 1, 28, 28).to(torch.uint8)
    assert math.isfinite(peer.step(images)) and math.isfinite(peer.step(images))
    assert any(not torch.equal(*pair) for pair in zip(before, peer.model.parameters(), strict=True))
    drawn = peer.sample(3, 2)
    assert drawn.shape == (3, 1, 28, 28) and drawn.dtype == torch.uint8


def test_padding_is_cropped_again() -> None:
    images = torch.rand(2, 1, 28, 28)
    wide = peers.padded(images, 32, -1.0)
    assert wide.shape == (2, 1, 32, 32) and torch.equal(peers.cropped(wide), images)
    assert wide.sum().item() == pytest.approx(images.sum().item() - 2 * (32**2 - 28**2), rel=1e-4)
