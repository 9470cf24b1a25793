"""What makes training fast does not change what is learnt: compiled networks, CUDA."""

import copy
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

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
SHAPE = (1, 28, 28)


def test_float32_is_not_rounded_to_tf32():
    make_deterministic()
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is False
    with torch.backends.cudnn.flags(enabled=False):  # libraries read the setting so; its parts must agree
        pass


@pytest.mark.parametrize(
    ("on", "wanted", "expected"),
    [("cpu", "auto", 0), ("cpu", "always", 3), ("cuda", "auto", 3), ("cuda", "never", 0)],
)
def test_networks_are_compiled_on_cuda_or_if_asked_for(monkeypatch, on, wanted, expected):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: compiled.append(module))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", compiled.append)
    model = nn.ModuleDict({"network": nn.Linear(2, 3), "head": nn.Linear(3, 1)})
    compile_parts(model, torch.device(on), wanted)
    assert len(compiled) == expected


def test_a_compiled_network_computes_the_same_under_the_same_names(monkeypatch):
    """Without the compiler of kernels, which takes half a minute; the GPU tests have it."""
    compile = nn.Module.compile
    eager = lambda module, **how: compile(module, backend="aot_eager", **how)  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", eager)
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": ResidualBlock(8, 16, 4, attention=True, dropout=0.0)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    compile_parts(model, torch.device("cpu"), "always")
    torch.testing.assert_close(output_and_gradients(plain["block"]), output_and_gradients(model["block"]))
    assert list(model.state_dict()) == names and model["block"]._compiled_call_impl is not None
    assert copy.deepcopy(model)["block"]._compiled_call_impl is None


def output_and_gradients(block: ResidualBlock) -> list[Tensor]:
    x, embedding = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2, 4)
    output = block(x, embedding)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in block.parameters())]


def trainer_on(on: str, group: str, *, compile: str = "never", precision: str = "auto") -> Trainer[Any]:
    """A trainer of the default model, made small, on random images."""
    make_deterministic()
    torch.manual_seed(0)
    data = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8).to(on), (torch.arange(64) % 2).to(on)
    if group == "vae":
        model: Any = make_vae(PARAMS.vae.model_copy(update={"channels": [4, 8], "hidden": 16}), SHAPE)
        step: Any = VAEStep(**PARAMS.vae.select(VAEStep))
    else:
        model = make_denoiser(PARAMS.ddpm.model_copy(update={"width": 16}), SHAPE, ["a", "b"])
        step = DenoisingStep(**PARAMS.ddpm.select(DenoisingStep))
    training = getattr(PARAMS, group).training.model_copy(update={"images": 640, "batch": 16})
    how: Any = {"precision": precision, "compile": compile, "validate": lambda *_: {}}
    return Trainer(model, step, data, data, training, name=group, seed=1, **how)


def weights_after(trainer: Trainer[Any], steps: int) -> Tensor:
    for _ in range(steps):
        trainer._step()
    return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.model.parameters()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("group", ["vae", "ddpm"])
def test_a_training_step_on_a_gpu_never_waits_for_it(group):
    trainer = trainer_on("cuda", group, compile="auto")
    weights_after(trainer, 3)  # the first steps compile, and make what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("group", ["vae", "ddpm"])
def test_a_gpu_compiled_or_not_trains_as_the_cpu_does_and_twice_the_same(group):
    ways = ("cpu", "never"), ("cuda", "never"), ("cuda", "auto"), ("cuda", "auto")
    cpu, eager, compiled, again = (
        weights_after(trainer_on(on, group, compile=compile, precision="float32"), 10) for on, compile in ways
    )
    torch.testing.assert_close(eager, cpu, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled, cpu, rtol=1e-3, atol=1e-4)
    assert torch.equal(compiled, again)
