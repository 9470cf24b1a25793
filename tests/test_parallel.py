"""Several processes as one: what they train, draw and measure is what one process does.

This file is also the program that torchrun starts here: `work` below, with one process or many, on the same tiny models.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_training import start, workspace
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.step import DenoisingStep, validate
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.shipped import load_shipped
from rediffuse.params import load_params
from rediffuse.runtime import processes as distributed
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import draw
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.training.checkpoint import Checkpoint
from rediffuse.training.loop import Labelled, Trainer
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import ELBO, training_loss
from rediffuse.vae.step import VAEStep, measure
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

ROOT = Path(__file__).resolve().parents[1]
PARAMS = load_params(ROOT / "params.yaml")
SHAPE, BATCH, STEPS = (1, 12, 12), 24, 50  # a batch that 2 and 3 processes can share
TRAINING = {
    "images": BATCH * STEPS,
    "batch": BATCH,
    "lr_warmup": 100,
    "ema_half_life": 100,
    "log_every": BATCH,
    "validate_every": 400,
    "checkpoint_every": 10 * BATCH + 5 * BATCH // 2,  # also between two points of the curve
}
FREE_BITS = 0.05  # in the middle of what the dimensions have in the course of these trainings


# The program


class Result:
    """What one training gave: weights, averaged weights, curves."""

    def __init__(self, trainer: Trainer[Any], checkpoint: Checkpoint) -> None:
        average, curves = trainer.train(checkpoint)
        models = {"model": trainer.model, "average": average}
        self.weights = {f"{of}.{name}": value.clone() for of, net in models.items() for name, value in net.state_dict().items()}
        self.curves = curves.training + curves.validation


def settings(group: Any, **changes: Any) -> Any:
    """The parameters of a model with a short training."""
    training = group.training.model_copy(update=TRAINING | changes.pop("training", {}))
    return group.model_copy(update={"training": training} | changes)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """uint8 images, brighter from class to class, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    noise = torch.randint(100, (count, *SHAPE), generator=generator)
    return (noise + 70 * labels[:, None, None, None]).to(torch.uint8), labels


def ddpm_trainer(step: type[DenoisingStep] = DenoisingStep) -> Trainer[Denoiser]:
    # Normalised in groups of two channels: in groups of one, the gradient of a bias before them is 0 by symmetry, and Adam would make
    # whole steps out of its rounding.
    params = settings(PARAMS.ddpm, T=20, width=16, loss_weight="min-snr", label_drop=0.3, training={"lr": 3e-4})
    data = pictures(500)
    torch.manual_seed(1)
    model = make_denoiser(params, SHAPE, ("a", "b", "c"))

    def validated(net: Denoiser, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        return validate(net, images, labels, seed=1)

    return trainer_of("ddpm", model, step(**params.select(DenoisingStep)), data, data, params, validated)


def vae_trainer(**changes: Any) -> Trainer[VAE]:
    params = settings(PARAMS.vae, channels=[4, 8], hidden=16, latent_dim=6, kl_warmup=300, **changes)
    train, held_out = (pictures(500)[0], None), (pictures(1200)[0], None)
    torch.manual_seed(1)

    def measured(vae: VAE, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        return measure(vae, images, labels, seed=1)

    return trainer_of("vae", make_vae(params, SHAPE), VAEStep(**params.select(VAEStep)), train, held_out, params, measured)


def trainer_of(name: str, model: Any, step: Any, train: Labelled, held_out: Labelled, params: Any, measured: Any) -> Trainer[Any]:
    return Trainer(
        model,
        step,
        train,
        held_out,
        params.training,
        name=name,
        seed=1,
        precision="float32",
        compile="never",
        validate=measured,
        log=lambda seen, values: None,
    )


class DyingStep(DenoisingStep):
    """Once, the second process is killed in the middle of the training."""

    def __call__(self, model: Denoiser, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        if seen == 30 * BATCH and distributed.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, images, labels, noise, seen)


class Forgetful(Checkpoint):
    """Nothing is kept."""

    def save(self, state: dict[str, Any]) -> None:
        pass

    def load(self) -> None:
        return None


def drawn(denoiser: Denoiser) -> Tensor:
    with torch.inference_mode():
        shards = ddpm_shards(denoiser, PARAMS.sample.ddpm.model_copy(update={"steps": 3}), "float32")
        return draw(5 * 64 + 7, shards, seed=3, title="samples")


def seen() -> Features:
    from rediffuse.evaluation.instruments import Instrument  # takes seconds to import

    record, network = load_shipped("fashion-mnist-cnn-v1")
    images = torch.randint(256, (1103, 1, 28, 28), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return Instrument(record, network).measure(images.numpy())


def work(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Everything that is shared among processes."""
    torch.set_num_threads(1)
    ddpm = ddpm_trainer()
    found = {"ddpm": Result(ddpm, Forgetful(folder))}
    with pytest.MonkeyPatch.context() as patch:  # one bucket of gradients for a model as tiny as the DDPM, two for the VAE
        patch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 2**10)
        found |= {f"vae {bits}": Result(vae_trainer(free_bits=bits), Forgetful(folder)) for bits in (0.0, FREE_BITS)}
    if resume:
        found["resumed"] = Result(ddpm_trainer(), Checkpoint(folder / "one.pt"))
    torch.manual_seed(2)
    for parameter in ddpm.model.parameters():  # weights that no training has rounded
        torch.nn.init.normal_(parameter, std=0.2)
    plain: dict[str, Any] = {name: vars(result) for name, result in found.items()} | {"samples": drawn(ddpm.model.eval())}
    if distributed.world_size() < 3:
        plain["values"], plain["logits"] = vars(seen()).values()
    return plain


@distributed.process_group()
def main(task: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if task == "work":
        found: Any = work(folder, resume=True)
    else:
        found = {"ddpm": vars(Result(ddpm_trainer(DyingStep), Checkpoint(folder / "dying.pt")))}
    if distributed.is_main():
        torch.save(found, folder / "found.pt")
    else:
        assert all(len(found[name]) == 0 for name in ("samples", "values") if name in found)
        (folder / f"curves-{distributed.rank()}").write_text(repr(found["ddpm"]["curves"]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))


# The tests


def launch(processes: int, *arguments: str, cwd: Path = ROOT, restarts: int = 0) -> subprocess.Popen[str]:
    """Start torchrun, on this machine and heard by nobody else."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests"))),
        "REDIFFUSE_TRACKING": "off",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment.pop("DVC_ROOT", None)
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; what was said."""
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    with one_thread():
        return work(Path(os.devnull))


class Interrupted(BaseException):
    pass


def interrupted_by_one_process(folder: Path) -> None:
    """What a training in one process leaves behind that was killed after 30 steps."""

    class Stopping(DenoisingStep):
        def __call__(self, model: Denoiser, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
            if seen == 30 * BATCH:
                raise Interrupted
            return super().__call__(model, images, labels, noise, seen)

    with one_thread(), pytest.raises(Interrupted):
        ddpm_trainer(Stopping).train(Checkpoint(folder / "one.pt"))


Found = tuple[int, dict[str, Any], str, Path]  # how many processes, what they found, what they said, and where


def found_by(processes: int, folder: Path) -> Found:
    interrupted_by_one_process(folder)
    said = finish(launch(processes, __file__, "work", str(folder)))
    return processes, torch.load(folder / "found.pt", weights_only=False), said, folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=["two", "three"])
def several(request: pytest.FixtureRequest) -> Found:
    found: Found = request.getfixturevalue(request.param)
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert len(found["curves"]) == len(expected["curves"]) == STEPS + 3
    for row, other in zip(found["curves"], expected["curves"], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("training", ["ddpm", "vae 0.0", f"vae {FREE_BITS}", "resumed"])
def test_losses_and_weights_of_50_steps_are_those_of_one_process(one, several, training):
    """Also where the first 25 of the steps were made by one process: its checkpoint is continued by several."""
    _, found, _, _ = several
    assert_close(found[training], one["ddpm" if training == "resumed" else training])


def test_every_process_knows_the_same_curves(several):
    processes, found, _, folder = several
    others = [(folder / f"curves-{rank}").read_text() for rank in range(1, processes)]
    assert others == [repr(found["ddpm"]["curves"])] * (processes - 1)


def test_free_bits_make_a_difference_here(one):
    """Else the test above would say nothing of them: some dimensions below the limit, some above."""
    weights = [one[f"vae {bits}"]["weights"]["model.mean.weight"] for bits in (0.0, FREE_BITS)]
    assert not torch.allclose(*weights, atol=1e-3)


def test_samples_and_features_are_the_same_to_the_last_bit(one, several):
    processes, found, _, _ = several
    assert one["samples"].shape == (5 * 64 + 7, *SHAPE) and len(one["values"]) == len(one["logits"]) == 1103
    assert torch.equal(found["samples"], one["samples"])
    if processes == 2:  # of 3 the third would have nothing to tell that is not told by the samples
        assert torch.equal(found["values"], one["values"]) and torch.equal(found["logits"], one["logits"])


def test_continuing_with_another_number_of_processes_is_said_once(several):
    processes, _, said, _ = several
    words = f"the checkpoint was written by 1 process with 1 thread and is continued by {processes} processes with 1 thread"
    assert said.count(words) == 1


def test_the_first_process_alone_shows_its_progress(several):
    _, _, said, _ = several
    assert said.count("train ddpm:   0%") == 1 and said.count("600/1200 [00:00<?") == 1  # the whole training, and the resumed one


# Processes that die


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_a_restart_continues_from_the_checkpoint(several, tmp_path):
    """kill -9 of the second process: torchrun starts all again, and the bytes are those of an undisturbed run of as many.

    Of 3, because the sum of 2 numbers does not depend on their order, and so would not tell where in a bucket a gradient lies.
    """
    processes, undisturbed, _, _ = several
    said = finish(launch(processes, __file__, "dying", str(tmp_path), restarts=1))
    found = torch.load(tmp_path / "found.pt", weights_only=False)["ddpm"]
    assert "exitcode: -9" in said or "SIGKILL" in said, said
    assert found["curves"] == undisturbed["ddpm"]["curves"]
    assert [name for name, value in undisturbed["ddpm"]["weights"].items() if not torch.equal(found["weights"][name], value)] == []


def small_workspace(folder: Path, *, images: str = "images: 5000\n", batch: str = "batch: 16\n") -> Path:
    """That of test_training.py with these lines in params.yaml."""
    file = workspace(folder) / "params.yaml"
    file.write_text(file.read_text().replace("images: 5000\n", images).replace("batch: 16\n", batch))
    return folder


def trainer_processes(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(job.pid).children(recursive=True) if "stages.train_vae" in child.cmdline()]


@pytest.mark.slow
def test_a_stage_whose_process_is_killed_says_so_and_goes_on_with_one_process(tmp_path):
    """Through the very stage that DVC runs.  One process finds the checkpoint of two by its name."""
    folder = small_workspace(tmp_path / "checkout", images="images: 960\n")
    job = launch(2, "-m", "stages.train_vae", cwd=folder)
    while not list((folder / ".dvc/tmp/checkpoints").glob("*.pt")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    trainer_processes(job)[-1].kill()
    _, said = job.communicate(timeout=200)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in said, said
    assert not (folder / "data/models").exists()

    said = finish(start("train_vae", folder))
    assert said.count("the checkpoint was written by 2 processes with 1 thread and is continued by 1 process with") == 1
    assert (folder / "data/models/vae/model.safetensors").is_file() and (folder / "metrics/train_vae.json").is_file()


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    folder = small_workspace(tmp_path / "checkout", batch="batch: 15\n")
    job = launch(2, "-m", "stages.train_vae", cwd=folder)
    _, said = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "error: vae.training.batch (15) is shared among all processes" in said
    assert "must be a multiple of their number, which is 2: set it to 14 or 16, or start another number of processes (launcher)" in said


# The parts, with several processes played by one


@pytest.mark.parametrize(("batch", "processes", "advice"), [(64, 3, "63 or 66"), (2, 8, "8"), (7, 2, "6 or 8")])
def test_the_refusal_of_a_batch_names_batches_that_fit(monkeypatch, batch, processes, advice):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    with pytest.raises(UserError, match=f"set it to {advice}, or start") as caught:
        distributed.share_of_batch(batch, "vae.training.batch")
    for number in map(int, advice.split(" or ")):
        assert number % processes == 0 and str(number) in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_and_deals_cover_everything_once(monkeypatch, processes):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    rows, numbers = [], []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows += list(range(48))[distributed.share_of_batch(48, "batch")]
        numbers += distributed.my_share(10)
    assert rows == list(range(48)) and sorted(numbers) == list(range(10))


def test_free_bits_look_at_the_whole_batch():
    """Halves whose own means lie on either side of the limit: gradients are those of the whole batch, not of each half alone."""
    kl = torch.tensor([[0.1, 0.4], [0.1, 0.4], [0.6, 0.2], [0.6, 0.2]])  # means 0.35 and 0.3; of the halves 0.1, 0.4 and 0.6, 0.2
    whole = kl.clone().requires_grad_()
    training_loss(ELBO(torch.zeros(4), whole), kl_weight=2.0, free_bits=0.32).backward()  # type: ignore[no-untyped-call]
    gradients, losses = [], []
    for half in kl.split(2):
        part = half.clone().requires_grad_()
        loss = training_loss(ELBO(torch.zeros(2), part), kl_weight=2.0, free_bits=0.32, mean_of_all=lambda _: kl.mean(0))
        loss.backward()
        gradients.append(part.grad / 2)  # the mean over two processes
        losses.append(loss.item())
    torch.testing.assert_close(torch.cat(gradients), whole.grad)
    assert sum(losses) / 2 == pytest.approx(2 * (0.35 + 0.32))
