"""The training loop: order, learning rate, average, curves, and that a killed run ends with the bytes of an undisturbed one."""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor, nn

from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.params import Training
from rediffuse.runtime import device as hardware
from rediffuse.runtime.device import autocast, computes_bfloat16, seed_for
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable, load_model, save_model
from rediffuse.training import loop
from rediffuse.training.checkpoint import Checkpoint, fingerprint, resumable
from rediffuse.training.curves import Curves
from rediffuse.training.loop import Trainer
from rediffuse.vae.model import VAE

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Net(Rebuildable):
    """A linear map with everything a resumed run could forget: dropout, a normalisation with buffers, an unused parameter."""

    kind: ClassVar[Kind] = "ddpm"

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.3)
        self.linear = nn.Linear(4, 3)
        self.fixed = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.linear(self.dropout(self.norm(images.float() / 255).flatten(1)))
        return output


class Step:
    """Regression to noise; notes which images it saw, at which rate, with which weights."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.images: list[Tensor] = []
        self.seen: list[int] = []
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"target": torch.randn(shape[0], 3, generator=generator)}

    def __call__(self, model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        assert model.training
        self.images.append(images[:, 0, 0, 0].clone())
        self.seen.append(seen)
        if self.trainer:
            self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])
            self.weights.append(copy.deepcopy(model.state_dict()))
        losses = (model(images) - noise["target"]).square().mean(1)
        return losses.mean(), {"loss": torch.stack([losses.detach().sum(), losses.new_tensor(len(images))])}


class Noiseless:
    """A step of this loss, in which nothing is random."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def __call__(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


class NoCheckpoint(Checkpoint):
    def __init__(self) -> None:
        pass

    def save(self, state: dict[str, Any]) -> None:
        pass

    def load(self) -> None:
        return None


def training(**changes: Any) -> Training:
    defaults = {
        "images": 60,
        "batch": 4,
        "lr": 0.01,
        "lr_warmup": 8,
        "lr_decay": "cosine",
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "ema_half_life": 10,
        "log_every": 7,
        "validate_every": 16,
        "checkpoint_every": 12,
    }
    return Training(**(defaults | changes))


def numbered(n: int) -> Tensor:
    """uint8 (n, 1, 2, 2): the first pixel of image i is i."""
    images = torch.randint(256, (n, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    return images


def make_trainer(step: Any = None, *, n: int = 10, seed: int = 1, validate: Any = None, log: Any = None, **changes: Any) -> Trainer[Net]:
    torch.manual_seed(0)
    trainer = Trainer(
        Net(),
        step or Step(),
        (numbered(n), None),
        (numbered(3), None),
        training(**changes),
        name="ddpm",
        seed=seed,
        precision="float32",
        compile="never",
        validate=validate or (lambda net, images, labels: {"norm": net.linear.weight.norm().item()}),
        log=log or (lambda seen, values: None),
    )
    if isinstance(step, Step):
        step.trainer = trainer
    return trainer


def run(folder: Path, step: Any = None, **changes: Any) -> tuple[dict[str, Tensor], Curves, Trainer[Net]]:
    """Weights of the average and the trained model, and curves, of a run with its checkpoint in the folder."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(step, **changes)
    average, curves = trainer.train(Checkpoint(folder / "run.pt"))
    state = {f"average.{key}": value for key, value in average.state_dict().items()}
    return state | {f"model.{key}": value for key, value in trainer.model.state_dict().items()}, curves, trainer


def assert_same(found: tuple[dict[str, Tensor], Curves, Any], expected: tuple[dict[str, Tensor], Curves, Any]) -> None:
    assert found[0].keys() == expected[0].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], expected[0][key])] == []
    assert found[1] == expected[1]


# Exact resume


class Killed(BaseException):
    """What kill -9 is to a test in one process."""


class DyingStep(Step):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __call__(self, *arguments: Any) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().__call__(*arguments)


@pytest.mark.parametrize("at", [0, 2, 3, 4, 10, 14])
def test_resume_is_bit_exact_wherever_the_run_was_killed(tmp_path, at):
    expected = run(tmp_path / "undisturbed")
    with pytest.raises(Killed):
        run(tmp_path / "killed", DyingStep(at))
    resumed = Step()
    assert_same(run(tmp_path / "killed", resumed), expected)
    assert len(resumed.seen) == 15 - at // 3 * 3  # it went on from the last checkpoint, one each 12 images, 3 steps


def test_resume_survives_being_killed_again_and_again(tmp_path):
    expected = run(tmp_path / "undisturbed")
    for at in (4, 4, 2, 5):
        with pytest.raises(Killed):
            run(tmp_path / "killed", DyingStep(at))
    assert_same(run(tmp_path / "killed"), expected)


def test_a_finished_run_is_not_trained_again(tmp_path):
    expected = run(tmp_path)
    again = Step()
    assert_same(run(tmp_path, again), expected)
    assert again.seen == []


def test_random_numbers_drawn_by_others_change_nothing(tmp_path):
    def careless(seen: int, values: dict[str, float]) -> None:
        torch.rand(seen)
        np.random.rand(seen)
        random.random()

    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        torch.manual_seed(int(torch.rand(()).item() * 1000))
        return {"norm": net.linear.weight.norm().item()}

    assert_same(run(tmp_path / "careless", log=careless, validate=validate), run(tmp_path / "careful"))


def test_every_step_has_noise_and_dropout_of_its_own(tmp_path):
    """The same single image again and again, at a vanishing learning rate: losses differ by their random numbers alone."""
    _, curves, _ = run(tmp_path, n=1, images=20, batch=1, lr=1e-30, lr_warmup=0, weight_decay=0.0, log_every=1)
    assert len({row["loss"] for row in curves.training}) == 20


def test_another_seed_is_another_run(tmp_path):
    one, other = run(tmp_path / "1", seed=1)[0], run(tmp_path / "2", seed=2)[0]
    assert not torch.equal(one["model.linear.weight"], other["model.linear.weight"])


# The order of the images


def stream(**changes: Any) -> list[int]:
    """Every image in the order in which training saw it."""
    step = Step()
    make_trainer(step, lr_warmup=0, **changes).train(NoCheckpoint())
    return [int(index) for batch in step.images for index in batch]


@pytest.mark.parametrize("batch", [1, 3, 4, 23, 50])
def test_every_epoch_holds_each_image_once_and_batches_reach_across(batch):
    found = stream(n=23, images=230, batch=batch)
    epochs = [found[start : start + 23] for start in range(0, len(found) - 22, 23)]
    assert len(found) == 230 // batch * batch
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # a new order each time


def test_order_depends_on_the_seed_and_not_on_the_batch():
    assert stream(batch=3) == stream(batch=5)
    assert stream(batch=3) != stream(batch=3, seed=2)


def test_images_that_fill_no_batch_are_not_trained_on():
    step = Step()
    make_trainer(step, images=63).train(NoCheckpoint())
    assert step.seen == list(range(0, 60, 4))


# The learning rate


def rates(**changes: Any) -> list[float]:
    step = Step()
    make_trainer(step, **changes).train(NoCheckpoint())
    return step.rates


def test_learning_rate_falls_along_a_cosine():
    found = rates(images=400, batch=4, lr=0.2, lr_warmup=0)
    assert len(found) == 100
    assert found[0] == 0.2 and found[50] == pytest.approx(0.1) and found[25] == pytest.approx(0.2 * math.cos(math.pi / 8) ** 2)
    assert 0 < found[99] < 1e-3 * 0.2
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_learning_rate_rises_linearly_and_reaches_the_peak_when_the_warmup_is_over():
    found, without = rates(images=400, batch=4, lr=0.2, lr_warmup=40), rates(images=400, batch=4, lr=0.2, lr_warmup=0)
    shares = [a / b for a, b in zip(found, without, strict=True)]
    assert shares[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert shares[10:] == pytest.approx([1] * 90)


def test_learning_rate_may_stay():
    found = rates(images=400, batch=4, lr=0.2, lr_warmup=40, lr_decay="constant")
    assert found[:10] == pytest.approx([0.02 * i for i in range(1, 11)]) and found[10:] == [0.2] * 90


# The average


def trained_weights(step: Step, trainer: Trainer[Net]) -> list[Tensor]:
    """The weights after each step, float64."""
    states = [*step.weights[1:], trainer.model.state_dict()]
    return [state["linear.weight"].double() for state in states]


@pytest.mark.parametrize("half_life", [1, 10, 10**6])
def test_average_follows_its_recursion(tmp_path, half_life):
    step = Step()
    state, _, trainer = run(tmp_path, step, ema_half_life=half_life)
    weights = trained_weights(step, trainer)
    average = weights[0]
    for seen, weight in zip(range(8, 64, 4), weights[1:], strict=True):
        kept = 2 ** (-4 / min(half_life, seen / 10))  # of the old average, after a batch of 4
        average = kept * average + (1 - kept) * weight
    torch.testing.assert_close(state["average.linear.weight"].double(), average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(state["average.linear.weight"], state["model.linear.weight"]) or half_life == 1


def test_half_life_of_zero_gives_the_trained_weights_themselves(tmp_path):
    state, _, _ = run(tmp_path, ema_half_life=0)
    assert torch.equal(state["average.linear.weight"], state["model.linear.weight"])


def test_buffers_are_copied_not_averaged(tmp_path):
    state, _, _ = run(tmp_path)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(state[f"average.{name}"], state[f"model.{name}"])
    assert state["model.norm.num_batches_tracked"] == 15


def test_validation_sees_the_average_in_evaluation_mode_and_the_held_out_images(tmp_path):
    seen = []

    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert torch.equal(images, numbered(3)) and labels is None
        seen.append((net.training, net.linear.weight.clone()))
        return {"x": 0.0}

    state, _, trainer = run(tmp_path, validate=validate)
    assert not any(mode for mode, _ in seen) and len(seen) == 4
    assert torch.equal(seen[-1][1], state["average.linear.weight"])
    assert trainer.model.training and not trainer.average.model.training  # Step has checked the former at each step


# Curves


class Counting:
    """A step whose logged value is known: the number of the step, counted twice; and one that only some steps have."""

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def __call__(self, model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        number = seen // len(images)
        measures = {"number": torch.tensor([2.0 * number, 2.0]), "rare": torch.tensor([5.0, 1.0]) if number == 0 else torch.zeros(2)}
        return model(images).square().mean(), measures


def test_curves_are_means_over_the_steps_since_the_last_point(tmp_path):
    logged = []
    settings: dict[str, Any] = {"images": 21, "batch": 3, "log_every": 10, "validate_every": 100}
    _, curves, _ = run(tmp_path, Counting(), log=lambda seen, values: logged.append((seen, values)), **settings)
    # A point after the step that passes a multiple of 10 images, and after the last: 12 = 4 steps, 21 = 3 more.
    assert curves.training == [{"images": 12, "number": 1.5, "rare": 5.0}, {"images": 21, "number": 5.0}]
    assert [row["images"] for row in curves.validation] == [21]
    assert logged[:2] == [(12, {"number": 1.5, "rare": 5.0}), (21, {"number": 5.0})]
    assert logged[2][0] == 21 and logged[2][1].keys() == {"norm"}


def test_labels_are_those_of_the_images():
    found: list[Tensor] = []

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        assert labels is not None
        found.append(labels - 2 * images[:, 0, 0, 0])
        return model(images).square().mean(), {}

    trainer = make_trainer(step)
    trainer.labels = 2 * torch.arange(10)
    trainer.train(NoCheckpoint())
    assert not torch.cat(found).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_what_to_change(tmp_path, value):
    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        loss = model(images).square().mean() * (value if seen >= 8 else 1)
        return loss, {"loss": torch.stack([loss.detach(), torch.ones(())])}

    with pytest.raises(UserError, match=r"ddpm: the loss is not finite \(.*\) after 16 images") as caught:
        run(tmp_path, step, log_every=16, checkpoint_every=16)
    assert all(word in str(caught.value) for word in ("ddpm.training.lr (0.01)", "ddpm.training.clip_norm (1.0)", "precision", "float32"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_kept(tmp_path, value):
    """Between two points of the curve, where nobody has looked at the loss yet: a restart would fail again and again."""

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        loss = model(images).square().mean()
        return loss * (value if seen == 16 else 1), {"loss": torch.stack([loss.detach(), torch.ones(())])}

    with pytest.raises(UserError, match=r"ddpm: weights are not finite after 24 images: lower ddpm\.training\.lr \(0\.01\)"):
        run(tmp_path, step, log_every=1000, validate_every=1000, checkpoint_every=12)
    kept = Checkpoint(tmp_path / "run.pt").load()
    assert kept is not None and kept["done"] == 3  # the last one before
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_gradients_are_clipped():
    step = Step()
    trainer = make_trainer(step, clip_norm=1e-3)
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item())
    )
    trainer.train(NoCheckpoint())
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


# Hardware


@pytest.mark.parametrize(("precision", "in_hardware", "half"), [("auto", True, True), ("auto", False, False), ("float32", True, False)])
def test_bfloat16_is_used_where_auto_finds_it_in_hardware(monkeypatch, precision, in_hardware, half):
    monkeypatch.setattr(hardware, "computes_bfloat16", lambda on: in_hardware)
    dtypes = []

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        output = model(images)
        dtypes.append(output.dtype)
        return output.float().square().mean(), {}

    trainer = make_trainer(step)
    trainer.precision = precision
    trainer.train(NoCheckpoint())
    assert set(dtypes) == {torch.bfloat16 if half else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_the_machine_answers_whether_it_computes_bfloat16():
    assert isinstance(computes_bfloat16(CPU), bool)
    with autocast(CPU, "float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_seeds_of_different_parts_differ():
    parts = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (1, 2, 3), (3, 2, 1), (2**32 - 1, 1)]
    seeds = [seed_for(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_for(*part) for part in parts]


# Checkpoints


def test_a_checkpoint_cut_off_in_the_middle_of_writing_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    assert checkpoint.load() is None
    checkpoint.save({"done": 1})

    def killed(state: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half of a checkpoint")
        raise Killed

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(Killed):
        checkpoint.save({"done": 2})
    monkeypatch.undo()
    assert (tmp_path / "run.tmp").exists() and checkpoint.load() == {"done": 1}
    checkpoint.save({"done": 3})
    assert checkpoint.load() == {"done": 3} and not (tmp_path / "run.tmp").exists()


def leave_a_checkpoint(folder: Path) -> None:
    """What a killed run leaves behind."""
    with contextlib.suppress(Killed), resumable(folder, "vae", "a" * 64) as checkpoint:
        checkpoint.save({"done": 1})
        raise Killed


def test_a_checkpoint_is_deleted_when_its_block_succeeds_and_kept_when_not(tmp_path):
    leave_a_checkpoint(tmp_path)
    with resumable(tmp_path, "vae", "a" * 64) as checkpoint:
        assert checkpoint.load() == {"done": 1}
        checkpoint.path.with_suffix(".tmp").write_bytes(b"left by a kill")
    assert list(tmp_path.glob("*.pt")) == list(tmp_path.glob("*.tmp")) == []


def test_a_checkpoint_of_another_fingerprint_is_not_found(tmp_path):
    leave_a_checkpoint(tmp_path)
    with resumable(tmp_path, "vae", "b" * 64) as checkpoint:
        assert checkpoint.load() is None
    with resumable(tmp_path, "vae", "a" * 64) as checkpoint:
        assert checkpoint.load() == {"done": 1}  # and the other's end did not delete it


def test_two_processes_with_one_fingerprint_take_turns(tmp_path):
    with resumable(tmp_path, "vae", "a" * 64) as checkpoint, pytest.raises(Timeout):
        FileLock(checkpoint.path.with_suffix(".lock")).acquire(timeout=0.01)


@pytest.mark.parametrize("name", ["rediffuse.training.new", "rediffuse.vae", "stages.new", "__main__"])
def test_a_fingerprint_changes_with_the_code_that_trains(tmp_path, monkeypatch, name):
    module = types.ModuleType(name)
    module.__file__ = str(tmp_path / "new.py")
    (tmp_path / "new.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, name, module)
    before = fingerprint({"a": 1}, [])
    assert before == fingerprint({"a": 1}, []) and before != fingerprint({"a": 2}, [])
    (tmp_path / "new.py").write_text("x = 2")
    assert fingerprint({"a": 1}, []) != before


@pytest.mark.parametrize("name", ["rediffuse.tracking.new", "rediffuse.vaeish", "os.new"])
def test_a_fingerprint_stays_whatever_else_is_loaded(tmp_path, monkeypatch, name):
    """DVC and MLflow load what they like; a training must find its checkpoint again."""
    before = fingerprint({}, [])
    module = types.ModuleType(name)
    module.__file__ = str(tmp_path / "new.py")
    (tmp_path / "new.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, name, module)
    assert fingerprint({}, []) == before


def test_a_fingerprint_is_the_same_for_any_number_of_threads(monkeypatch):
    before = fingerprint({}, [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert fingerprint({}, []) == before


def test_a_fingerprint_knows_numbers_shape_and_type_of_tensors_and_not_how_they_lie_in_memory(monkeypatch):
    numbers = torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4)
    found = fingerprint({}, [numbers])
    assert fingerprint({}, [numbers.clone(memory_format=torch.channels_last)]) == found
    others = [numbers + 1e-6, numbers.view(1, 2, 4, 3), numbers.view(torch.int32), numbers.flip(0, 3), numbers.bool()]
    assert len({found, fingerprint({}, []), fingerprint({}, [numbers, numbers]), *(fingerprint({}, [other]) for other in others)}) == 8
    monkeypatch.setattr("rediffuse.training.checkpoint.BLOCK", 5)  # however many are hashed at a time
    assert fingerprint({}, [numbers]) == found


def test_a_checkpoint_continued_with_other_threads_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    for threads in (3, 3, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(Killed):
            run(tmp_path, DyingStep(4))
    said = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line]
    assert len(said) == 1
    assert "ddpm: the checkpoint was written by 1 process with 3 threads and is continued by 1 process with 4 threads" in said[0]


@dataclass(frozen=True)
class Weighted:
    """A step with a setting."""

    weight: float = 1.0

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def __call__(self, model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        return self.weight * model(images).square().mean(), {}


class OtherStep(Weighted):
    """Another step with the same setting."""


def given(**changes: Any) -> dict[str, Any]:
    """All that a trainer of tiny things takes."""
    torch.manual_seed(0)
    return {
        "model": Net(),
        "step": Weighted(),
        "train": (numbered(10), torch.arange(10)),
        "held_out": (numbered(3), torch.arange(3)),
        "config": training(),
        "name": "ddpm",
        "seed": 1,
        "precision": "float32",
        "compile": "never",
        "validate": lambda net, images, labels: {},
        "log": lambda seen, values: None,
    } | changes


def test_a_training_is_known_by_all_that_its_trainer_was_given():
    """A change of any of it must not go on from the checkpoint of another training; the same again must."""
    reference = Trainer(**given()).fingerprint
    assert Trainer(**given()).fingerprint == reference
    images, labels = numbered(10), torch.arange(10)
    other_weights, other_config = Net(), Net()
    other_weights.load_state_dict(given()["model"].state_dict())
    other_config.load_state_dict(given()["model"].state_dict())
    with torch.no_grad():
        other_weights.linear.bias[0] += 1e-6
    other_config.config = {"clip": False}  # shows in no weight
    brighter = images.clone()
    brighter[7, 0, 1, 1] += 1
    changes: dict[str, dict[str, Any]] = {
        "a weight": {"model": other_weights},
        "an argument of the model": {"model": other_config},
        "a setting of the step": {"step": Weighted(2.0)},
        "another step": {"step": OtherStep()},
        "a pixel": {"train": (brighter, labels)},
        "a label": {"train": (images, labels.flip(0))},
        "no labels": {"train": (images, None)},
        "fewer images": {"train": (images[:9], labels[:9])},
        "a held-out pixel": {"held_out": (numbered(3) + 1, torch.arange(3))},
        "a held-out label": {"held_out": (numbered(3), torch.arange(3) + 1)},
        "a setting of the training": {"config": training(lr=0.02)},
        "the name": {"name": "vae"},
        "the seed": {"seed": 2},
        "the precision": {"precision": "auto"},
        "compilation": {"compile": "auto"},
    }
    found = {what: Trainer(**given(**change)).fingerprint for what, change in changes.items()}
    assert [what for what, value in found.items() if value == reference] == []
    assert len(set(found.values())) == len(found)


def test_a_saved_vae_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    config = {"shape": [1, 9, 9], "latent_dim": 2, "latent_channels": 0, "channels": [4], "hidden": 8, "likelihood": "gaussian"}
    vae = VAE(**config).to(memory_format=torch.channels_last).eval()
    vae.log_sigma.data.fill_(-1.0)
    save_model(vae, tmp_path / "model")
    loaded = load_model(VAE, tmp_path / "model", CPU)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.decode(z), vae.decode(z)) and torch.equal(loaded.sigma(), vae.sigma()) and not loaded.training
    assert json.loads((tmp_path / "model/config.json").read_text()) == {"kind": "vae"} | config | {"class_names": []}


def test_a_missing_model_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing: `dvc repro`"):
        load_model(VAE, tmp_path / "nowhere", CPU)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"kind": "ddpm"}', "must hold a vae, but its config.json says ddpm"),
        ('{"kind": "gan"}', "must name the kind of the model, vae or ddpm, got gan"),
        ('{"latent_dim": 2}', "must name the kind of the model, vae or ddpm, got none"),
        ("[]", "must name the kind of the model, vae or ddpm, got none"),
        ('{"kind": ', "cannot be read"),
    ],
)
def test_a_model_of_another_kind_or_of_none_is_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        load_model(VAE, tmp_path, CPU)


# kill -9, through the very stages that DVC runs


SMALL_TRAINING = {
    "images": 5000,
    "batch": 16,
    "lr_warmup": 320,
    "lr_decay": "cosine",
    "log_every": 500,
    "validate_every": 2000,
    "checkpoint_every": 160,
    "ema_half_life": 500,
}
SMALL = {
    "vae": {"latent_dim": 3, "channels": [4, 8], "hidden": 16, "kl_warmup": 1000, "training": SMALL_TRAINING},
    "ddpm": {"T": 20, "width": 8, "dropout": 0.1, "training": SMALL_TRAINING | {"images": 2400, "validate_every": 1000}},
    "sample": {"ddpm": {"steps": 5}},
}


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return tree | {key: merged(tree[key], value) if isinstance(value, dict) else value for key, value in changes.items()}


def workspace(folder: Path) -> Path:
    """A checkout in small: params.yaml and data/pixels with blurred rectangles of three classes."""
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), SMALL)
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    random = np.random.RandomState(0)
    classes = ("wide", "high", "square")
    splits = {}
    for name, count in {"train": 3000, "validation": 100, "test": 100}.items():
        labels = random.randint(3, size=count)
        images = np.zeros((count, 1, 12, 12), np.uint8)
        for image, label in zip(images, labels, strict=True):
            height, width = ((3, 8), (8, 3), (5, 5))[label]
            y, x = random.randint(12 - height), random.randint(12 - width)
            image[0, y : y + height, x : x + width] = random.randint(100, 256)
        splits[name] = ImageSet(images, labels.astype(np.int64), classes)
    save_images(folder / "data/pixels", splits, {"classes": classes, "sha256": "of a test"})
    return folder


def start(stage: str, folder: Path) -> subprocess.Popen[str]:
    """The stage's own process, as DVC starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "REDIFFUSE_TRACKING": "off"}
    environment.pop("DVC_ROOT", None)
    arguments = [sys.executable, "-m", f"stages.{stage}"]
    return subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for success; how many images had been seen when the progress bar first appeared."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    first = re.search(r"(\d+)/\d+ \[", errors)
    assert first, errors
    return int(first[1])


def outputs(folder: Path) -> dict[str, str]:
    """Every file that a stage wrote, by its hash."""
    files = [path for top in ("data/models", "metrics") for path in (folder / top).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_a_stage_killed_with_sigkill_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, model):
    stage = f"train_{model}"
    undisturbed, killed = workspace(tmp_path / "undisturbed"), workspace(tmp_path / "killed")
    assert finish(start(stage, undisturbed)) == 0
    expected = outputs(undisturbed)
    assert {f"data/models/{model}/model.safetensors", f"metrics/{stage}.json", f"metrics/plots/{stage}/training.csv"} <= expected.keys()

    checkpoints = killed / ".dvc/tmp/checkpoints"
    process = start(stage, killed)
    while not (found := list(checkpoints.glob("*.pt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and outputs(killed) == {}
    found[0].with_suffix(".tmp").write_bytes(found[0].read_bytes()[:1000])  # as if it had been killed while writing

    assert finish(start(stage, killed)) > 0  # it went on; it did not begin again
    assert outputs(killed) == expected
    for folder in (undisturbed, killed):
        assert [path.suffix for path in (folder / ".dvc/tmp/checkpoints").iterdir()] == [".lock"]


def test_the_loop_is_the_one_of_the_stages():
    """The tests above would be worth nothing if a stage had a loop of its own."""
    for stage in ("train_vae", "train_ddpm"):
        assert f"from {loop.__name__} import Trainer" in (ROOT / f"stages/{stage}.py").read_text()
