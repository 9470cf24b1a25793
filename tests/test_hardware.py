"""What makes training fast: compiled networks, CUDA, an optimizer without detours; and that none changes what is learnt."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rediffuse.diffusion.step import DenoisingStep
from rediffuse.diffusion.unet import ResidualBlock
from rediffuse.params import load_params
from rediffuse.runtime.device import compile_parts, make_deterministic
from rediffuse.training.loop import Trainer
from rediffuse.vae.step import VAEStep
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

ROOT = Path(__file__).resolve().parents[1]
PARAMS = load_params(ROOT / "params.yaml")
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_float32_is_not_rounded_to_tf32() -> None:
    make_deterministic()
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is False
    with torch.backends.cudnn.flags(enabled=False):  # libraries read the setting so, which torch refuses where its parts differ
        pass


class Parts(nn.Module):
    """A model whose networks count how often they are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.head = nn.Linear(2, 3), nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("on", "wanted", "expected"), [("cpu", "auto", 0), ("cpu", "always", 2), ("cuda", "auto", 2), ("cuda", "never", 0)]
)
def test_networks_are_compiled_where_it_pays_or_is_asked_for(monkeypatch, on, wanted, expected):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: compiled.append(mode))
    model = Parts()
    compile_parts(model, torch.device(on), wanted)
    assert compiled == ([True, (model.network, {"dynamic": False}), (model.head, {"dynamic": False})] if expected else [])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which torch.compile needs on a CPU")
def test_a_compiled_network_computes_the_same_under_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # the shared one may hold what a killed process left half written
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": ResidualBlock(8, 16, 4, attention=True, dropout=0.0)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    compile_parts(model, CPU, "always")
    found = [learn(each["block"]) for each in (plain, model)]
    torch.testing.assert_close(found[0], found[1])
    assert list(model.state_dict()) == names and model["block"]._compiled_call_impl is not None
    assert copy.deepcopy(model)["block"]._compiled_call_impl is None


def learn(block: ResidualBlock) -> list[Tensor]:
    """Output and gradients."""
    x, embedding = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2, 4)
    output = block(x, embedding)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in block.parameters())]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("group", ["vae", "ddpm"])
def test_a_training_step_on_a_gpu_never_waits_for_it(group):
    trainer = trainer_on(torch.device("cuda"), group, compile="auto")
    for _ in range(3):  # the first steps compile, and make what is made once
        trainer._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("group", ["vae", "ddpm"])
def test_a_gpu_compiled_or_not_trains_as_the_cpu_does_and_twice_the_same(group):
    def trained(on: str, compile: str) -> Tensor:
        trainer = trainer_on(torch.device(on), group, compile=compile, precision="float32")
        for _ in range(10):
            trainer._step()
        return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.model.parameters()])

    cpu, eager, compiled, again = (trained(*how) for how in (("cpu", "never"), ("cuda", "never"), ("cuda", "auto"), ("cuda", "auto")))
    torch.testing.assert_close(eager, cpu, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled, cpu, rtol=1e-3, atol=1e-4)
    assert torch.equal(compiled, again)


@pytest.mark.parametrize("group", ["vae", "ddpm"])
def test_the_models_of_the_gpu_tests_train(group):
    trainer = trainer_on(CPU, group)
    before = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    trainer._step()
    assert not torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))


def trainer_on(on: torch.device, group: str, *, compile: str = "never", precision: str = "auto") -> Trainer[Any]:
    """A trainer of the default model, made small, on random images."""
    make_deterministic()
    torch.manual_seed(0)
    data = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8).to(on), (torch.arange(64) % 2).to(on)
    if group == "vae":
        model, step = (
            make_vae(PARAMS.vae.model_copy(update={"channels": [4, 8], "hidden": 16}), (1, 28, 28)),
            VAEStep(**PARAMS.vae.select(VAEStep)),
        )
    else:
        model = make_denoiser(PARAMS.ddpm.model_copy(update={"width": 16}), (1, 28, 28), ["a", "b"])
        step = DenoisingStep(**PARAMS.ddpm.select(DenoisingStep))
    return Trainer(
        model,
        step,
        data,
        data,
        getattr(PARAMS, group).training.model_copy(update={"images": 640, "batch": 16}),
        name=group,
        seed=1,
        precision=precision,
        compile=compile,
        validate=lambda *_: {},
        log=lambda *_: None,
    )
