"""The parts of the benchmarks measure what they say: so many evaluations, the same work for all."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import evaluation, gpu, growth, ours, startup, steps, vae
from benchmarks.peers import SHAPE
from benchmarks.report import Settings, peak_mib
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.sampling.samplers import SAMPLERS
from rediffuse.vae.objective import elbo


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_steps_make_the_evaluations_asked_for(sampler: str) -> None:
    denoiser, seen = steps.tiny_denoiser(T=12), list[int]()
    denoiser.register_forward_hook(lambda *_: seen.append(1))
    for evaluations in (1, 5, 10):
        seen.clear()
        count = steps.steps_for(sampler, evaluations)
        ours.draw_images(denoiser, ours.parameters(), 2, sampler=sampler, steps=count, guidance_scale=1.0)
        assert len(seen) == steps.evaluations_of(sampler, count)
        assert evaluations - 1 <= len(seen) <= evaluations


def test_distances_stand_beside_those_of_the_full_chain() -> None:
    rulers = [steps.made_up_ruler("random-conv-v1")]
    found = steps.measure_methods(steps.tiny_denoiser(T=12), ours.parameters(), rulers, n=128, counts=(2,))
    fd, percent = ({(row[0], row[3]): row[column] for row in found.rows} for column in (4, 5))
    assert len(fd) == 6 and percent["ddpm", 12] == 0  # karras and even share a key
    expected = 100 * (fd["ddim", 2] - fd["ddpm", 12]) / fd["ddpm", 12]
    assert percent["ddim", 2] == pytest.approx(expected)


def test_without_a_trained_model_the_remedy_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "params.yaml").write_bytes((startup.ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make repro"):
        steps.measure(Settings())


def test_our_contenders_train() -> None:
    assert vae.rediffuse(256)() > 0 and vae.plain(256)() > 0
    assert ours.training_turn(2, gpu.parameters(quick=True))() > 0


def test_flops_of_the_vae_are_those_of_its_layers() -> None:
    # Every weight is multiplied and added once forward and twice backward, at each position of a convolution.
    model = ours.vae(load_params())
    (first, *_), (second, *_), decoder = model.encoder[0], model.encoder[1], model.decoder
    positions = {first: 14**2, second: 7**2, decoder[5][0]: 7**2, decoder[6][0]: 14**2, decoder[7]: 28**2}
    layers = [layer for layer in model.modules() if hasattr(layer, "weight")]
    flops = sum(3 * 2 * layer.weight.numel() * positions.get(layer, 1) for layer in layers)
    flops -= 2 * first.weight.numel() * 14**2  # no gradient of the images
    assert vae.our_flops(load_params()) == pytest.approx(flops, rel=1e-6)


def test_pythae_has_our_layers_and_our_loss() -> None:
    pytest.importorskip("pythae", reason="make bench installs it")
    model = ours.vae(load_params())
    theirs = vae.pythae_model(model)
    own = [parameter for name, parameter in model.named_parameters() if name != "log_sigma"]
    assert {id(parameter) for parameter in theirs.parameters()} == {id(parameter) for parameter in own}
    assert vae.pythae_flops(load_params()) == vae.our_flops(load_params())
    x = torch.rand(5, *SHAPE)
    torch.manual_seed(3)
    loss = theirs({"data": x}).loss
    torch.manual_seed(3)
    expected = elbo(model, x, torch.randn(5, model.latent_dim)).total.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_contenders_that_score_differently_are_refused() -> None:
    same = {"fd": 1.0, "is": 2.0, "kid": 3.0, "precision": 0.5, "recall": 0.5}
    evaluation.check_same({evaluation.OURS: same, "other": dict(same)})
    with pytest.raises(RuntimeError, match="kid"):
        evaluation.check_same({evaluation.OURS: same, "other": same | {"kid": 3.1}})


def test_growth_trains_on_files_of_the_size_asked_for(tmp_path: Path) -> None:
    path = growth.write_images(tmp_path / "images.npy", 25_001, (1, 4, 4))
    images = np.load(path, mmap_mode="r")
    assert images.shape == (25_001, 1, 4, 4)
    assert np.array_equal(images[:5_001], images[20_000:])
    assert images[:10_000].std() > 70  # noise, not zeros
    held = torch.ones(600 * 2**18)  # 600 MiB of this process, not of that one
    path = growth.write_images(tmp_path / "images.npy", 300, SHAPE)
    ms, peak = growth.alone(partial(growth.training, path, growth.settings_of(quick=True), steps=2))
    assert ms > 0 and 100 < peak < peak_mib() - 300 and held.sum() > 0


def test_training_starts_with_nothing_heavy_but_torch() -> None:
    heavy = {"torch._dynamo", "torchvision", "torch_fidelity", "mlflow", "matplotlib", "sklearn", "pandas"}
    for names, expected in (("rediffuse.params", set()), ("stages.train_vae, stages.train_ddpm", {"torch"})):
        code = f"import {names}, sys; print(*({heavy | {'torch'}} & set(sys.modules)))"
        found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        assert set(found.stdout.split()) == expected


def test_the_start_of_a_stage_is_measured_up_to_its_first_work(tmp_path: Path) -> None:
    startup.make_repository(tmp_path)
    startup.make_inputs(tmp_path)
    for stage in ("train_vae", "sample_vae"):
        whole, imports, rest, processor = startup.start(tmp_path, stage)
        assert whole == pytest.approx(imports + rest) and min(imports, rest, processor) > 0
