"""The parts of the benchmarks measure what they say: the right number of evaluations, the same work for all, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    ablation,
    attention,
    checkout,
    convolutions,
    decoding,
    evaluation,
    gpu,
    growth,
    made_up,
    ours,
    startup,
    steps,
    tracking,
    training,
    vae,
)
from benchmarks.peers import SHAPE
from benchmarks.report import Settings, peak_mib
from rediffuse.params import flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.sampling.samplers import SAMPLERS
from rediffuse.vae.objective import elbo
from stages.train_ddpm import make_denoiser

QUICK = Settings(quick=True)
INSTRUMENT = "random-conv-v1"


def test_both_ways_of_attention_are_timed() -> None:
    (table,) = attention.measure(QUICK)
    assert [row[0] for row in table.rows] == list(attention.CONTENDERS)
    assert all(row[1] > 0 for row in table.rows)


def test_the_convolutions_have_the_flops_of_the_network() -> None:
    """But for the dense layers of time and label, which are a hundredth."""
    model = ours.denoiser(ours.parameters())
    found = convolutions.convolutions(model, ours.network_inputs(model, 2))
    flops = sum(count * shape.gflop * 1e9 for shape, count in found.items())
    assert 0.98 < flops / (2 * training.our_flops()) <= 1


# The ablation


def test_each_variant_changes_what_it_names_and_is_allowed() -> None:
    base = load_params().ddpm
    for name, changes in ablation.VARIANTS.items():
        found = flatten(ablation.settings(changes).ddpm)
        assert {key for key, value in flatten(base).items() if found[key] != value} == set(changes), name


def test_a_variants_value_is_written_as_dvc_takes_it() -> None:
    values = {0.012: "0.012", 30_000: "30000", False: "false", "x0": "x0"}
    assert {value: ablation.yaml_value(value) for value in values} == values
    assert ablation.yaml_value([1, 2, 4]) == "[1, 2, 4]"


# Steps against quality


def params() -> Any:
    chosen = load_params()
    return chosen.model_copy(update={"ddpm": chosen.ddpm.model_copy(update=made_up.TINY | {"T": 12})})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("evaluations", [1, 5, 10])
def test_evaluations_are_those_that_the_network_is_asked_for(sampler: str, evaluations: int) -> None:
    denoiser = make_denoiser(params().ddpm, SHAPE, ["a"]).eval()
    seen = list[int]()
    denoiser.register_forward_hook(lambda *_: seen.append(1))
    drawing = steps.Drawing(sampler, "even", steps.steps_for(sampler, evaluations), 2, 1)
    with torch.inference_mode():
        steps.ddpm_shards(denoiser, drawing.settings, "float32")(torch.arange(2), torch.Generator().manual_seed(0))
    assert len(seen) == drawing.evaluations
    assert evaluations - 1 <= len(seen) <= evaluations


def test_sets_that_were_measured_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.save_models(tmp_path, params())
    steps.make_reference(tmp_path / "reference", [INSTRUMENT])
    rulers = steps.open_rulers(tmp_path / "reference", [INSTRUMENT])
    drawn = list[tuple[int, int]]()
    real_draw = steps.draw

    def draw(n: int, shard: Any, *, seed: int, title: str) -> torch.Tensor:
        drawn.append((n, seed))
        return real_draw(n, shard, seed=seed, title=title)

    def run(seeds: tuple[int, ...]) -> Any:
        results = steps.Results(tmp_path / "steps.json")
        return steps.quality(tmp_path / "ddpm", rulers, results, precision="float32", n=128, seeds=seeds, evaluations=(2,))

    monkeypatch.setattr(steps, "draw", draw)
    (first,) = run((1,))
    sets = len(steps.METHODS) + 1  # each in 2 evaluations, and the full chain
    assert drawn == [(128, 1)] * sets
    assert run((1,)) == [first]
    assert len(drawn) == sets
    run((1, 2))
    assert drawn[sets:] == [(128, 2)] * sets
    fd = {(row[0], row[2]): row[4] for row in first.rows}
    differences = {(row[0], row[2]): row[5] for row in first.rows}
    assert differences["ddpm", 12] == 0
    assert differences["ddim", 2] == pytest.approx(100 * (fd["ddim", 2] - fd["ddpm", 12]) / fd["ddpm", 12])

    weights = tmp_path / "ddpm/config.json"
    weights.write_text(json.dumps(json.loads(weights.read_text()), indent=4))
    run((1,))
    assert len(drawn) == 3 * sets, "another model must be measured anew"


def test_without_a_trained_model_the_message_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_bytes((checkout.ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make repro"):
        steps.measure(Settings(out=tmp_path))


# The VAE


@pytest.mark.parametrize("make", [vae.rediffuse, vae.plain])
def test_contenders_of_the_vae_train(make: Callable[[int], Callable[[], float]]) -> None:
    assert make(256)() > 0


def test_flops_of_the_vae_are_those_of_its_layers() -> None:
    # Every weight of a dense layer is multiplied and added once forward and twice backward, per image; of a convolution, once a position.
    model = vae.make_vae(load_params())
    channels = load_params().vae.channels
    positions = {model.encoder[0][0]: 14 * 14, model.encoder[1][0]: 7 * 7, model.decoder[5][0]: 7 * 7, model.decoder[6][0]: 14 * 14}
    positions |= {model.decoder[7]: 28 * 28}
    assert len(channels) == 2
    layers = [layer for layer in model.modules() if hasattr(layer, "weight")]
    flops = sum(3 * 2 * layer.weight.numel() * positions.get(layer, 1) for layer in layers)
    flops -= 2 * model.encoder[0][0].weight.numel() * 14 * 14  # no gradient of the images
    assert vae.our_flops(load_params()) == pytest.approx(flops, rel=1e-6)


def test_pythae_has_our_layers_and_our_loss() -> None:
    pytest.importorskip("pythae", reason="pythae is a contender of the benchmarks only")
    ours = vae.make_vae(load_params())
    theirs = vae.pythae_model(ours)
    own = [parameter for name, parameter in ours.named_parameters() if name != "log_sigma"]
    assert {id(parameter) for parameter in theirs.parameters()} == {id(parameter) for parameter in own}
    assert vae.pythae_flops(load_params()) == vae.our_flops(load_params())
    x = torch.rand(5, *SHAPE)
    torch.manual_seed(3)
    loss = theirs({"data": x}).loss
    torch.manual_seed(3)
    expected = elbo(ours, x, torch.randn(5, ours.latent_dim)).total.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


# Evaluation


def test_contenders_that_score_differently_are_no_contenders() -> None:
    same = {"fd": 1.0, "is": 2.0, "kid": 3.0, "precision": 0.5, "recall": 0.5}
    evaluation.check_same({evaluation.OURS: same, "other": dict(same)})
    with pytest.raises(RuntimeError, match="kid"):
        evaluation.check_same({evaluation.OURS: same, "other": same | {"kid": 3.1}})


def test_the_parts_of_an_evaluation_add_up_to_the_whole() -> None:
    spent = evaluation.whole(quick=True)()
    *parts, whole = [seconds for name, seconds in spent.items() if not name.startswith("(")]
    assert len(parts) == 5
    assert sum(parts) == pytest.approx(whole, rel=0.05)


# Growth


def test_made_up_sets_have_the_size_asked_for(tmp_path: Path) -> None:
    images = np.load(growth.write_images(tmp_path, 25_001, (1, 4, 4)), mmap_mode="r")
    assert images.shape == (25_001, 1, 4, 4)
    assert np.array_equal(images[:10_000], images[10_000:20_000])
    assert np.array_equal(images[:5_001], images[20_000:])
    assert images[:10_000].std() > 70  # noise, not zeros


def test_training_reads_mapped_images_as_it_does_copied_ones(tmp_path: Path) -> None:
    path = growth.write_images(tmp_path, 300, SHAPE)
    for way in ("copied", "mapped"):
        assert growth.training(path, way, growth.parameters(quick=True), steps=2)()["ms"] > 0  # type: ignore[arg-type]


def test_a_point_of_growth_has_its_own_process_and_peak() -> None:
    held = torch.ones(600 * 2**18)  # 600 MiB that are this process's, not that one's
    point = growth.alone(partial(growth.sampling, growth.parameters(quick=True, T=100), 64, growth._sampler(2)))
    assert held.nbytes / 2**20 == 600
    assert point["kib"] == pytest.approx(5 * 101 * 8 / 1024)
    assert 100 < point["peak"] < peak_mib() - 300
    assert point["mib"] == pytest.approx(64 * 784 / 2**20)


# Start


def test_training_starts_with_nothing_heavy_but_torch() -> None:
    assert startup.import_seconds("import stages.train_vae, stages.train_ddpm, stages.sample_vae, stages.sample_ddpm")[1] == ["torch"]
    assert startup.import_seconds("import rediffuse.params")[1] == []


def test_a_repro_that_runs_nothing_is_measured() -> None:
    (row,) = startup.measure_repro(1).rows
    assert 0.1 < row[1] < 60


def test_the_start_of_a_stage_is_told_in_parts(tmp_path: Path) -> None:
    startup.copy_checkout(tmp_path)
    found = startup.start_once(tmp_path, "sample_vae")
    assert found["all"] == pytest.approx(found["imports"] + found["row"] + found["first"])
    assert min(found.values()) >= 0


def test_what_tracking_costs_is_reckoned_from_its_parts() -> None:
    on = {"start": 0.1, "wall": 11.0, "processor": 20.5, "points": 0.05, "end": 0.2}
    table = tracking._table([((10.0, 20.0), on)], {"start": 1.0, "end": 2.0}, images=100, whole=1000)
    found = {row[0]: row[1] for row in table.rows}
    assert found["on / off, wall-clock"] == pytest.approx(1.1)
    assert found["on / off, processor"] == pytest.approx(1.025)
    # 3 s for the row and 10 times 0.05 s of points, of 100 s
    assert found["a row's share of the default run, 1,000 images"] == pytest.approx(3 + 0.5)


def test_a_gpus_contenders_are_compared_by_their_work() -> None:
    flops = {gpu.OURS: {"training": 2e9, "parameters": 1}, "peer, best": {"training": 1e9, "parameters": 1}}
    turns = {name: [{"rate": rate, "mib": 1.0}] for name, rate in ((gpu.PEAK, 1000.0), (gpu.OURS, 100.0), ("peer, best, compiled", 50.0))}
    found = gpu.table(turns, flops, batch=8)
    ours, peer = (dict(zip(found.columns, row, strict=True)) for row in found.rows)
    assert (ours["TFLOP/s"], ours["of the conv peak"], ours["ratio"]) == (0.2, "20%", 1)
    assert (peer["images/s"], peer["of the conv peak"], peer["ratio"]) == (50, "5%", 4)


@pytest.mark.parametrize("name", decoding.CONTENDERS)
def test_all_make_an_image_set_of_the_same_folder(tmp_path: Path, name: str) -> None:
    decoding.make_photographs(tmp_path, 60)
    assert decoding.turn_of(name, tmp_path, 60)() > 0  # raises where images are missing
    with pytest.raises(ValueError, match="made 60 images of 61"):
        decoding.turn_of(name, tmp_path, 61)()
