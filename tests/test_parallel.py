"""Several processes as one: what they train, draw and measure is what one process does.

This file is also the program that torchrun starts here: `work` below, with one process or three.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_training import start, workspace

from rediffuse.diffusion.step import DenoisingStep, validate
from rediffuse.evaluation.shipped import load_shipped
from rediffuse.params import load_params
from rediffuse.runtime import processes
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import draw
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.training.checkpoint import Checkpoint
from rediffuse.training.loop import Trainer
from rediffuse.vae.step import VAEStep, measure
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

ROOT = Path(__file__).resolve().parents[1]
PARAMS = load_params(ROOT / "params.yaml")
# Three processes: the sum of two numbers does not depend on their order.
PROCESSES, SHAPE, BATCH, STEPS = 3, (1, 12, 12), 24, 30
TRAINING = {
    "images": BATCH * STEPS,
    "batch": BATCH,
    # Small: Muon makes the weakest directions of a gradient, so its rounding, up to 3.44^5 times as strong.
    "muon_lr": 1e-3,
    "lr_warmup": 100,
    "ema_half_life": 100,
    "log_every": BATCH,
    "validate_every": 400,
    "checkpoint_every": 10 * BATCH + 5 * BATCH // 2,  # also between two points of the curve
}


# The program


class KilledStep(DenoisingStep):
    """Kills the second of several processes, once, in the middle of a training; interrupts a single one."""

    def __call__(self, model, images, labels, noise, seen):
        if seen == 20 * BATCH:
            if processes.world_size() == 1:
                raise KeyboardInterrupt
            if processes.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, images, labels, noise, seen)


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images, brighter from class to class, and labels."""
    labels = torch.arange(count) % 3
    noise = torch.randint(100, (count, *SHAPE), generator=torch.Generator().manual_seed(0))
    return (noise + 70 * labels[:, None, None, None]).to(torch.uint8), labels


def trainer(name: str, step: type[DenoisingStep] = DenoisingStep) -> Trainer[Any]:
    train, held_out = pictures(500), pictures(1200)
    torch.manual_seed(1)
    if name == "ddpm":
        # Group normalisation over two channels: over one, the gradient of a bias before it is 0 by symmetry,
        # and Adam would make whole steps out of its rounding.
        changes = {"T": 20, "width": 16, "loss_weight": "min-snr", "label_drop": 0.3}
        params: Any = PARAMS.ddpm.model_copy(update=changes)
        training = params.training.model_copy(update=TRAINING | {"lr": 3e-4})
        model: Any = make_denoiser(params, SHAPE, ("a", "b", "c"))
        rest: Any = step(**params.select(DenoisingStep)), train, held_out
    else:
        # Free bits in the middle of what the dimensions have in the course of this training.
        changes = {"channels": [4, 8], "hidden": 16, "latent_dim": 6, "kl_warmup": 300, "free_bits": 0.018}
        params = PARAMS.vae.model_copy(update=changes)
        training = params.training.model_copy(update=TRAINING)
        model = make_vae(params, SHAPE)
        rest = VAEStep(**params.select(VAEStep)), (train[0], None), (held_out[0], None)
    measured = partial(validate if name == "ddpm" else measure, seed=1)
    how: Any = {"name": name, "seed": 1, "precision": "float32", "compile": "never", "validate": measured}
    return Trainer(model, *rest, training, **how)


def trained(trainer: Trainer[Any], checkpoint: Path) -> dict[str, Any]:
    """Train; return weights, averaged weights and curves."""
    average, curves = trainer.train(Checkpoint(checkpoint))
    models = {"model": trainer.model, "average": average}
    states = {f"{of}.{key}": value for of, net in models.items() for key, value in net.state_dict().items()}
    weights = {key: value.clone() for key, value in states.items()}
    return {"weights": weights, "curves": curves.training + curves.validation}


def work(folder: Path) -> dict[str, Any]:
    """Everything that is shared among processes."""
    from rediffuse.evaluation.instruments import Instrument  # takes seconds to import

    found: dict[str, Any] = {}
    if processes.world_size() > 1:
        found["killed"] = trained(trainer("ddpm", KilledStep), folder / "killed.pt")
        found["resumed"] = trained(trainer("ddpm"), folder / "interrupted.pt")
    ddpm = trainer("ddpm")
    found["ddpm"] = trained(ddpm, folder / "ddpm.pt")
    with pytest.MonkeyPatch.context() as patch:  # one bucket of gradients for the DDPM, two for the VAE
        patch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 2**10)
        found["vae"] = trained(trainer("vae"), folder / "vae.pt")
    torch.manual_seed(2)
    for parameter in ddpm.model.parameters():  # weights that no training has rounded
        torch.nn.init.normal_(parameter, std=0.2)
    settings = PARAMS.sample.ddpm.model_copy(update={"steps": 3})
    with torch.inference_mode():
        shards = ddpm_shards(ddpm.model.eval(), settings, "float32")
        found["samples"] = draw(5 * 64 + 7, shards, seed=3, title="samples")
    images = torch.randint(256, (1103, 1, 28, 28), generator=torch.Generator().manual_seed(5))
    instrument = Instrument(*load_shipped("fashion-mnist-cnn-v1"))
    features = instrument.measure(images.to(torch.uint8).numpy())
    return found | {"values": features.values, "logits": features.logits}


@processes.process_group()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = work(folder)
    if processes.is_main():
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# The tests


def launch(count: int, *arguments: str, cwd: Path = ROOT, restarts: int = 0) -> subprocess.Popen[str]:
    """Start torchrun, reachable from this machine only."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests"))),
        "REDIFFUSE_TRACKING": "off",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment.pop("DVC_ROOT", None)
    options = f"--standalone --local-addr=127.0.0.1 --nproc-per-node={count} --max-restarts={restarts}"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), *arguments]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; return stderr."""
    _, text = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and three found, and the stderr of the three, of which one was killed on the way."""
    one, three = (tmp_path_factory.mktemp(name) for name in ("one", "three"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        trained(trainer("ddpm", KilledStep), three / "interrupted.pt")
    job = launch(PROCESSES, __file__, str(three), restarts=1)
    found = work(one)
    text = finish(job)
    torch.set_num_threads(threads)
    return found, torch.load(three / "found.pt", weights_only=False), text


@pytest.mark.parametrize("name", ["ddpm", "vae", "resumed"])
def test_losses_and_weights_of_30_steps_are_those_of_one_process(results, name):
    """Also if one process made the first 13 steps, and several continue its checkpoint."""
    one, three, _ = results
    found, expected = three[name], one["ddpm" if name == "resumed" else name]
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
    assert len(found["curves"]) == len(expected["curves"]) == STEPS + 2
    for row, other in zip(found["curves"], expected["curves"], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["samples", "values", "logits"])
def test_samples_and_features_are_the_same_to_the_last_bit(results, name):
    one, three, _ = results
    assert len(one[name]) in (5 * 64 + 7, 1103) and torch.equal(three[name], one[name])


# Processes that die


def test_a_killed_process_ends_the_job_and_a_restart_continues_from_the_checkpoint(results):
    """kill -9 of the second process: torchrun restarts all; the bytes are those of an undisturbed run."""
    _, found, text = results
    assert "exitcode: -9" in text or "SIGKILL" in text, text
    assert found["killed"]["curves"] == found["ddpm"]["curves"]
    torch.testing.assert_close(found["killed"]["weights"], found["ddpm"]["weights"], rtol=0, atol=0)
    assert text.count("the checkpoint was written by 1 process") == 1  # of "resumed"


@pytest.mark.slow
def test_a_stage_whose_process_is_killed_fails_and_continues_with_one_process(tmp_path):
    """Through the stage that DVC runs.  One process finds the checkpoint of two by its name."""
    folder = workspace(tmp_path / "checkout")
    job = launch(2, "-m", "stages.train_vae", cwd=folder)
    while not list((folder / ".dvc/tmp/checkpoints").glob("*.pt")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    children = psutil.Process(job.pid).children(recursive=True)
    [child for child in children if "stages.train_vae" in child.cmdline()][-1].kill()
    _, text = job.communicate(timeout=200)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in text, text
    assert not (folder / "data/models").exists()
    text = finish(start("train_vae", folder))
    assert text.count("the checkpoint was written by 2 processes with 1 thread") == 1
    assert (folder / "data/models/vae/model.safetensors").is_file()


@pytest.mark.parametrize(("batch", "count", "advice"), [(64, 3, "63 or 66"), (2, 8, "8")])
def test_a_batch_that_cannot_be_shared_is_refused_with_those_that_fit(monkeypatch, batch, count, advice):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    words = rf"vae.training.batch \({batch}\) .* {count}: set it to {advice}, or .*launcher"
    with pytest.raises(UserError, match=words):
        processes.share_of_batch(batch, "vae.training.batch")
