"""The ruler of `make bench`: tables and their file, turns of contenders, equal FLOPs."""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_contenders
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import __main__ as command
from benchmarks import ours, peers, quality, training
from benchmarks.report import RATIO, Settings, Table, draw_overview, markdown, read_results, terminal, write_results
from benchmarks.workers import WorkerError, Workers, ratio, spread

TABLE = Table(
    "Speed", ["contender", "images/s", RATIO], [["ours", 123.4, 1], ["theirs | best", 30.85, 4.0], ["nobody", None, None]], "Two turns."
)


def test_a_part_measured_again_replaces_its_own_tables_only(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_results(file, "vae", [Table("old", ["a"], [[1]])], Settings())
    write_results(file, "machine", [TABLE], Settings(turns=7))
    write_results(file, "vae", [Table("new", ["a"], [[2]])], Settings(quick=True))
    kept = read_results(file)
    assert list(kept["parts"]) == ["machine", "vae"]  # in the order of the parts, whichever was first
    assert [table["title"] for table in kept["parts"]["vae"]["tables"]] == ["new"]
    assert [Table(**table) for table in kept["parts"]["machine"]["tables"]] == [TABLE]
    assert kept["parts"]["vae"]["about"]["quick"] and not kept["parts"]["machine"]["about"]["quick"]
    assert kept["parts"]["machine"]["about"]["turns"] == 7
    assert torch.__version__.startswith(kept["parts"]["machine"]["about"]["versions"]["torch"])


def test_markdown_has_a_row_for_each_row_and_says_where_it_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_results(file, "training", [TABLE], Settings())
    shown = CliRunner().invoke(command.main, ["--markdown", str(file)])
    assert shown.exit_code == 0
    assert shown.output.strip() == markdown(json.loads(file.read_text())).strip()
    rows = [line for line in shown.output.splitlines() if line.startswith("|")]
    assert rows == [
        "| contender | images/s | ratio |",
        "|---|---:|---:|",
        "| ours | 123 | 1 |",
        "| theirs \\| best | 30.9 | 4 |",
        "| nobody | – | – |",
    ]
    assert f"{torch.get_num_threads()} threads" in shown.output and "Two turns." in shown.output


def test_terminal_columns_are_aligned() -> None:
    title, *lines, note = terminal(TABLE).splitlines()
    assert (title, note) == ("Speed", "Two turns.")
    assert {len(line) for line in lines} == {len(lines[0])}  # all end at the right edge of the last column


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table("t", ["a", "b"], [[1]])


def test_the_overview_shows_ratios_where_there_are_any(tmp_path: Path) -> None:
    picture = tmp_path / "overview.png"
    assert not draw_overview({"parts": {}}, picture)
    assert not picture.exists()
    assert draw_overview(write_results(tmp_path / "results.json", "training", [TABLE], Settings()), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_contenders_take_turns_and_each_has_its_own_peak_memory(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    sizes = {"a": 300, "b": 1}
    contenders = {name: functools.partial(toy_contenders.writes_its_name, diary, name, mib) for name, mib in sizes.items()}
    with Workers(contenders) as workers:
        results, peaks = workers.turns(3), workers.peaks()
    assert diary.read_text().split() == ["a", "b"] * 3
    assert results == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert 300 < peaks["a"] < 600
    assert 1 < peaks["b"] < 200  # not that of this process, which has torch loaded, nor that of the other


@pytest.mark.parametrize(
    ("contender", "error", "message"),
    [
        (toy_contenders.fails, WorkerError, "(?s)clumsy failed:.*in this_very_turn.*ValueError: of all things"),
        (toy_contenders.dies, WorkerError, "clumsy died with exit code 7"),
        (functools.partial(toy_contenders.lacks, "no_such_package_anywhere"), ModuleNotFoundError, "no_such_package_anywhere"),
    ],
)
def test_what_goes_wrong_in_a_contender_is_raised_here(contender, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), Workers({"clumsy": contender}) as workers:
        workers.turns(1)


def test_ratios_are_taken_within_rounds() -> None:
    ours, theirs = [10.0, 20.0, 30.0], [5.0, 5.0, 10.0]
    assert ratio(ours, theirs) == 3  # the median of 2, 4, 3, not 20 / 5
    assert spread(ours) == 1


def test_flops_are_those_of_the_formula() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert peers.forward_flops(lambda: conv(torch.zeros(2, 3, 10, 6)), 2) == 2 * 9 * 3 * 8 * 10 * 6
    q = torch.zeros(1, 2, 7, 16)  # two heads of 7 positions
    assert peers.forward_flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 7 * 7 * 16)
    linear = nn.Linear(5, 4)  # backward: once for the weights, once for the input
    x = torch.zeros(3, 5, requires_grad=True)
    assert peers.training_flops(lambda: linear(x), 3) == 3 * (2 * 5 * 4)


@pytest.mark.parametrize("setting", ["documented", "best"])
@pytest.mark.parametrize("kind", ["diffusers", "denoising-diffusion-pytorch"])
def test_peers_do_as_much_work_as_ours(kind: peers.Kind, setting: peers.Setting) -> None:
    pytest.importorskip(kind.replace("-", "_"), reason="make bench installs it")
    pytest.importorskip("ema_pytorch", reason="make bench installs it")
    recipe = peers.recipes(training.our_flops(large=True), batch=2, steps=10)[f"{kind}, {setting}"]
    assert training.work_of(recipe)["forward"] == pytest.approx(training.our_flops(large=True), rel=peers.TOLERANCE)
    assert training.work_of(recipe)["training"] == pytest.approx(3 * training.our_flops(large=True), rel=2 * peers.TOLERANCE)
    peer = peers.contender(recipe)
    before = [parameter.clone() for parameter in peer.model.parameters()]
    images = torch.arange(2 * 28 * 28).reshape(2, 1, 28, 28).to(torch.uint8)
    assert math.isfinite(peer.step(images)) and math.isfinite(peer.step(images))
    assert any(not torch.equal(*pair) for pair in zip(before, peer.model.parameters(), strict=True))
    drawn = peer.sample(3, 2)
    assert drawn.shape == (3, 1, 28, 28) and drawn.dtype == torch.uint8


def test_a_turn_of_ours_leaves_its_setting_up_out() -> None:
    turn, begin = ours.training_turn(steps=2), time.perf_counter()
    rate = turn()
    assert 2 * training.our_batch() / rate < time.perf_counter() - begin < 60


def test_padding_is_cropped_again() -> None:
    images = torch.rand(2, 1, 28, 28)
    wide = peers.padded(images, 32, -1.0)
    assert wide.shape == (2, 1, 32, 32) and torch.equal(peers.cropped(wide), images)
    assert wide.sum().item() == pytest.approx(images.sum().item() - 2 * (32**2 - 28**2), rel=1e-4)
    assert peers.padded(images, 28, -1.0) is images


def test_a_missing_peer_is_named_with_its_remedy(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    peers.sized.cache_clear()
    assert not command.run("training", Settings(quick=True, out=tmp_path))
    assert "needs the package diffusers, which `make bench` installs" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_plan_has_another_key_for_whatever_changes_its_images() -> None:
    plan = quality.Plan("ours", 640, 100)
    structure = peers.Structure((1, 2), 2, 28, 2)
    recipe = peers.Recipe("diffusers", "best", structure, 8, batch=64, steps=10, lr=1e-3)
    plans = [plan, quality.Plan("ours", 704, 100), quality.Plan("ours", 640, 200)]
    plans += [quality.Plan("peer", 640, 100, recipe, 20), quality.documented(quality.Plan("peer", 640, 100, recipe, 20))]
    assert len({each.key for each in plans}) == len(plans)
    assert plan.key == quality.Plan("ours", 640, 100).key
