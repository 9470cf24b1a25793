"""The training loop; above all, a killed run ends with the bytes of an undisturbed one."""

import contextlib
import hashlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from tiny_checkout import CLASSES, SHAPE, write_params
from torch import Tensor, nn

from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.params import Training
from rediffuse.runtime import device as hardware
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable
from rediffuse.training.checkpoint import Checkpoint, fingerprint, resumable
from rediffuse.training.curves import Curves, write_curves
from rediffuse.training.loop import Trainer
from stages import train_ddpm

ROOT = Path(__file__).resolve().parents[1]


class Net(Rebuildable):
    """A linear map with all that a resumed run could forget: dropout, buffers, an unused parameter."""

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
    """Regression to noise.  Notes the images, the learning rates and the weights it sees.

    killed_after: this many steps.
    """

    def __init__(self, killed_after: int | None = None) -> None:
        self.killed_after = killed_after
        self.trainer: Any = None
        self.images: list[int] = []
        self.seen: list[int] = []
        self.rates: list[float] = []
        self.weights: list[Tensor] = []

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"target": torch.randn(shape[0], 3, generator=generator)}

    def __call__(self, model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        if len(self.seen) == self.killed_after:
            raise Killed
        assert model.training and labels is not None and labels.tolist() == images[:, 0, 0, 0].tolist()
        self.images += images[:, 0, 0, 0].tolist()
        self.seen.append(seen)
        if self.trainer:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.weights.append(model.linear.weight.detach().double())
        losses = (model(images) - noise["target"]).square().mean(1)
        return losses.mean(), {"loss": torch.stack([losses.detach().sum(), losses.new_tensor(len(images))])}


@dataclass(frozen=True)
class Noiseless:
    """A step of this loss, in which nothing is random."""

    loss: Any

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def __call__(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


class Killed(BaseException):
    """What kill -9 is to a test in one process."""


class Log:
    """Notes what a training reports.  It also draws random numbers, which must change nothing."""

    def __init__(self) -> None:
        self.curves: list[tuple[int, dict[str, float]]] = []
        self.models: list[tuple[int, Tensor]] = []

    def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
        np.random.rand(round(10 * random.random() + torch.rand(()).item()))
        self.curves.append((images_seen, values))

    def log_model(self, images_seen: int, model: Any) -> None:
        assert not model.training and not torch.is_grad_enabled()
        self.models.append((images_seen, model.linear.weight.clone()))


def training(**changes: Any) -> Training:
    defaults: dict[str, Any] = {"images": 60, "batch": 4, "clip_norm": 1.0, "ema_half_life": 10}
    defaults |= {"lr": 0.01, "lr_warmup": 8, "lr_decay": "cosine", "weight_decay": 0.1}
    defaults |= {"optimizer": "adamw", "muon_lr": 0.02, "patience": 0}
    defaults |= {"log_every": 7, "validate_every": 16, "checkpoint_every": 12}
    return Training(**(defaults | changes))


def numbered(n: int) -> Tensor:
    """uint8 (n, 1, 2, 2): the first pixel of image i is i."""
    images = torch.randint(256, (n, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    return images


def make_trainer(step: Any = None, *, n: int = 10, **changes: Any) -> Trainer[Net]:
    """A trainer of tiny things; changes: of its arguments, or of the settings of the training."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "model": Net(),
        "step": step or Step(),
        "train": (numbered(n), torch.arange(n)),
        "held_out": (numbered(3), None),
        "name": "ddpm",
        "seed": 1,
        "precision": "float32",
        "compile": "never",
        "validate": lambda net, images, labels: {"norm": net.linear.weight.norm().item()},
        "keep_at": 0,
        "log": None,
    }
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    trainer = Trainer(config=training(**changes), **arguments)
    if isinstance(step, Step):
        step.trainer = trainer
    return trainer


Found = tuple[dict[str, Tensor], Curves, Trainer[Net]]


def run(folder: Path, step: Any = None, **changes: Any) -> Found:
    """Weights of the average and the model, and curves, of a run with its checkpoint in the folder."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(step, **changes)
    average, curves = trainer.train(Checkpoint(folder / "run.pt"))
    models = {"average": average, "model": trainer.model}
    if trainer.early is not None:
        models["early"] = trainer.early
    weights = {f"{of}.{key}": value for of, net in models.items() for key, value in net.state_dict().items()}
    return weights, curves, trainer


def trained(tmp_path: Path, **changes: Any) -> Step:
    step = Step()
    run(tmp_path, step, **changes)
    (tmp_path / "run.pt").unlink()
    return step


def assert_same(found: Found, expected: Found) -> None:
    assert found[0].keys() == expected[0].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], expected[0][key])] == []
    assert found[1] == expected[1]


# Exact resume


@pytest.mark.parametrize(
    ("kills", "optimizer"), [([2], "adamw"), ([3], "adamw"), ([10], "muon"), ([4, 4, 2, 5], "muon")]
)
def test_resume_is_bit_exact_wherever_the_run_was_killed(tmp_path, kills, optimizer):
    settings = {"optimizer": optimizer, "keep_at": 20}
    expected = run(tmp_path / "undisturbed", **settings)
    for at in kills:
        with pytest.raises(Killed):
            run(tmp_path / "killed", Step(killed_after=at), **settings)
    resumed, again = Step(), Step()
    assert_same(run(tmp_path / "killed", resumed, **settings), expected)
    if len(kills) == 1:  # it went on from the last checkpoint: one each 12 images, 3 steps
        assert len(resumed.seen) == 15 - kills[0] // 3 * 3
    assert_same(run(tmp_path / "killed", again, **settings), expected)
    assert again.seen == []  # a finished run is not trained again


def test_each_optimizer_trains_its_own_parameters_once(tmp_path):
    trainer = make_trainer(optimizer="muon", lr=0.03, muon_lr=0.5)
    adamw, muon = (
        [id(p) for group in each.param_groups for p in group["params"]] for each in trainer.optimizers
    )
    net = trainer.model
    assert muon == [id(net.linear.weight)] and sorted(adamw + muon) == sorted(map(id, net.parameters()))
    assert [each.defaults["lr"] for each in trainer.optimizers] == [0.03, 0.5]
    assert len(make_trainer().optimizers) == 1
    weights = run(tmp_path / "muon", optimizer="muon")[0]["model.linear.weight"]
    assert not torch.equal(weights, run(tmp_path / "adamw")[0]["model.linear.weight"])


def test_the_average_is_kept_where_it_is_asked_for_and_changes_nothing(tmp_path):
    log = Log()
    weights, _, trainer = run(tmp_path / "kept", log=log, keep_at=14)  # reached by the batch that ends at 16
    [average] = [weight for seen, weight in log.models if seen == 16]
    assert torch.equal(weights.pop("early.linear.weight"), average) and not trainer.early.training
    plain = run(tmp_path / "plain")[0]
    assert all(torch.equal(weight, weights[key]) for key, weight in plain.items())
    assert make_trainer(keep_at=14).fingerprint != make_trainer().fingerprint


# Validated each 8 images: the second validation is the best, the fourth as good.
FALLS_AND_RISES = {"validate_every": 8, "images": 120, "patience": 3}


def falls_and_rises(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
    validation = int(net.norm.num_batches_tracked) // 2
    return {"error": [5.0, 2.0, 4.0, 2.0, 3.0, 1.0, *[9.0] * 9][validation - 1], "norm": 0.0}


@pytest.mark.parametrize(
    ("patience", "kept", "validations"), [(3, 16, 5), (4, 48, 10), (9, 48, 15), (0, 120, 15)]
)
def test_training_ends_when_its_patience_does_and_the_best_average_is_kept(
    tmp_path, patience, kept, validations
):
    log, settings = Log(), FALLS_AND_RISES | {"patience": patience}
    weights, curves, trainer = run(tmp_path / "run", validate=falls_and_rises, log=log, **settings)
    assert len(curves.validation) == len(log.models) == validations
    assert torch.equal(weights["average.linear.weight"], dict(log.models)[kept])
    assert trainer.kept["images"] == kept


@pytest.mark.parametrize("killed_after", [5, 8, 9])  # before and after the best validation, at 4 steps
def test_a_training_with_patience_resumes_exactly(tmp_path, killed_after):
    settings = FALLS_AND_RISES | {"validate": falls_and_rises}
    expected = run(tmp_path / "undisturbed", **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", Step(killed_after=killed_after), **settings)
    assert_same(run(tmp_path / "killed", **settings), expected)


def test_without_held_out_images_nothing_is_validated_and_training_is_the_same(tmp_path):
    none = numbered(3)[:0], None
    found, expected = run(tmp_path / "none", held_out=none), run(tmp_path / "some")
    assert found[1].validation == [] and found[1].training == expected[1].training
    assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])
    write_curves(tmp_path, found[1])
    assert (tmp_path / "validation.csv").read_text() == "images\n"


def test_random_numbers_drawn_by_others_change_nothing(tmp_path):
    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        torch.manual_seed(int(torch.rand(()).item() * 1000))
        return {"norm": net.linear.weight.norm().item()}

    expected = run(tmp_path / "careful")
    assert_same(run(tmp_path / "careless", log=Log(), validate=validate), expected)


def test_every_step_has_noise_and_dropout_of_its_own(tmp_path):
    """One image at a vanishing learning rate: the losses differ only by their random numbers."""
    settings = {"n": 1, "images": 20, "batch": 1, "lr": 1e-30, "lr_warmup": 0, "weight_decay": 0.0}
    _, curves, _ = run(tmp_path, log_every=1, **settings)
    assert len({row["loss"] for row in curves.training}) == 20


# The order of the images


@pytest.mark.parametrize("batch", [4, 23, 50])
def test_every_epoch_holds_each_image_once_and_batches_reach_across(tmp_path, batch):
    found = trained(tmp_path, n=23, images=230, batch=batch, lr_warmup=0).images
    epochs = [found[start : start + 23] for start in range(0, len(found) - 22, 23)]
    assert len(found) == 230 // batch * batch  # images that fill no batch are not trained on
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # a new order each time


def test_order_depends_on_the_seed_and_not_on_the_batch(tmp_path):
    changes: list[dict[str, Any]] = [{"batch": 3}, {"batch": 5}, {"seed": 2}]
    one, same, other = (trained(tmp_path, lr_warmup=0, **change).images for change in changes)
    assert one == same != other


# The learning rate


def test_learning_rate_rises_linearly_and_falls_along_a_cosine_or_stays(tmp_path):
    long: dict[str, Any] = {"images": 80, "batch": 4, "lr": 0.2}
    cosine = trained(tmp_path, lr_warmup=0, **long).rates
    expected = [0.2 * math.cos(math.pi * done / 40) ** 2 for done in range(20)]
    assert cosine == pytest.approx(expected) and cosine[0] == 0.2
    warmed = trained(tmp_path, lr_warmup=40, **long).rates
    assert warmed == pytest.approx([rate * min(1, (i + 1) / 10) for i, rate in enumerate(cosine)])
    constant = trained(tmp_path, lr_warmup=40, lr_decay="constant", **long).rates
    assert constant == pytest.approx([0.2 * min(1, (i + 1) / 10) for i in range(20)])


def test_gradients_are_clipped(tmp_path):
    trainer, norms = make_trainer(clip_norm=1e-3), []

    def note(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    trainer.optimizers[0].register_step_pre_hook(note)
    trainer.train(Checkpoint(tmp_path / "run.pt"))
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


# The average


@pytest.mark.parametrize("half_life", [0, 10, 10**6])
def test_average_follows_its_recursion(tmp_path, half_life):
    step = Step()
    state, _, trainer = run(tmp_path, step, ema_half_life=half_life)
    weights = [*step.weights[1:], trainer.model.linear.weight.detach().double()]  # after each step
    average = weights[0]
    for seen, weight in zip(range(8, 64, 4), weights[1:], strict=True):
        kept = 2 ** (-4 / min(half_life, seen / 10)) if half_life else 0  # of the average, after 4 images
        average = kept * average + (1 - kept) * weight
    torch.testing.assert_close(state["average.linear.weight"].double(), average, rtol=1e-6, atol=1e-7)
    for name in ("running_mean", "running_var", "num_batches_tracked"):  # buffers are copied
        assert torch.equal(state[f"average.norm.{name}"], state[f"model.norm.{name}"])
    assert state["model.norm.num_batches_tracked"] == 15


def test_validation_and_log_see_the_average_in_evaluation_mode(tmp_path):
    validated, log = [], Log()

    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert torch.equal(images, numbered(3)) and labels is None and not net.training
        validated.append(net.linear.weight.clone())
        return {"x": 0.0}

    state, _, trainer = run(tmp_path, validate=validate, log=log)
    assert [seen for seen, _ in log.models] == [16, 32, 48, 60]
    assert all(torch.equal(a, b) for a, (_, b) in zip(validated, log.models, strict=True))
    assert torch.equal(validated[-1], state["average.linear.weight"])
    assert trainer.model.training and not trainer.average.model.training


# Curves


def test_curves_are_means_over_the_steps_since_the_last_point(tmp_path):
    log = Log()

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        number = seen // len(images)  # of the step, counted twice; and a value that only the first step has
        rare = torch.tensor([5.0, 1.0]) if number == 0 else torch.zeros(2)
        return model(images).square().mean(), {"number": torch.tensor([2.0 * number, 2.0]), "rare": rare}

    settings: dict[str, Any] = {"images": 21, "batch": 3, "log_every": 10, "validate_every": 100}
    _, curves, _ = run(tmp_path, step, log=log, **settings)
    # A point after the step that passes a multiple of 10 images, and after the last: at 12 and at 21 images.
    assert curves.training == [{"images": 12, "number": 1.5, "rare": 5.0}, {"images": 21, "number": 5.0}]
    assert [row["images"] for row in curves.validation] == [21]
    assert log.curves[:2] == [(12, {"ddpm/number": 1.5, "ddpm/rare": 5.0}), (21, {"ddpm/number": 5.0})]
    assert log.curves[2] == (21, {"ddpm/validation_norm": curves.validation[0]["validation_norm"]})


@pytest.mark.parametrize(("every", "what"), [(8, "loss"), (1000, "weights")])
def test_what_is_not_finite_is_named_and_never_kept(tmp_path, every, what):
    """One weight is enough, also between two points of the curve: every restart from it would fail."""

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        loss = model(images).square().mean()
        if seen == 20 and what == "weights":  # in the step before the checkpoint
            model.linear.bias.data[0] = torch.inf  # which backward does not read
        elif seen == 20:
            loss = loss * torch.nan
        return loss, {"loss": torch.stack([loss.detach(), torch.ones(())])}

    with pytest.raises(UserError, match=rf"ddpm: .*{what}.*ddpm\.training\.lr \(0\.01\).*clip_norm \(1\.0\)"):
        run(tmp_path, step, log_every=every, validate_every=1000, checkpoint_every=12)
    kept = Checkpoint(tmp_path / "run.pt").load()
    assert kept is not None and kept["done"] == 3
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


@pytest.mark.parametrize(("precision", "half"), [("auto", True), ("auto", False), ("float32", True)])
def test_bfloat16_is_used_where_auto_finds_it_in_hardware(tmp_path, monkeypatch, precision, half):
    monkeypatch.setattr(hardware, "computes_bfloat16", lambda on: half)
    dtypes = set()

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        dtypes.add((output := model(images)).dtype)
        return output.float().square().mean(), {}

    _, _, trainer = run(tmp_path, step, precision=precision)
    assert dtypes == {torch.bfloat16 if half and precision == "auto" else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


# Checkpoints


def test_a_checkpoint_cut_off_in_the_middle_of_writing_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    assert checkpoint.load() is None
    checkpoint.save({"done": 1})

    def killed(state: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half of a checkpoint")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(Killed):
            checkpoint.save({"done": 2})
    assert (tmp_path / "run.tmp").exists() and checkpoint.load() == {"done": 1}
    checkpoint.save({"done": 3})
    assert checkpoint.load() == {"done": 3} and not (tmp_path / "run.tmp").exists()


def test_a_checkpoint_waits_for_its_own_training_and_goes_when_that_succeeds(tmp_path):
    with contextlib.suppress(Killed), resumable(tmp_path, "vae", "a" * 64) as checkpoint:
        checkpoint.save({"done": 1})
        raise Killed
    with resumable(tmp_path, "vae", "b" * 64) as checkpoint:
        assert checkpoint.load() is None
    with resumable(tmp_path, "vae", "a" * 64) as checkpoint:
        assert checkpoint.load() == {"done": 1}
        checkpoint.path.with_suffix(".tmp").write_bytes(b"left by a kill")
        with pytest.raises(Timeout):  # another process with this fingerprint waits
            FileLock(checkpoint.path.with_suffix(".lock")).acquire(timeout=0.01)
    assert list(tmp_path.glob("*.pt")) == list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("name", "trains"),
    [("rediffuse.vae", True), ("stages.new", True), ("rediffuse.tracking.new", False), ("os.new", False)],
)
def test_a_fingerprint_changes_only_with_the_code_that_trains(tmp_path, monkeypatch, name, trains):
    module = types.ModuleType(name)
    module.__file__ = str(tmp_path / "new.py")
    (tmp_path / "new.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, name, module)
    before = fingerprint({"a": 1}, [])
    (tmp_path / "new.py").write_text("x = 2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert (fingerprint({"a": 1}, []) != before) == trains


@dataclass(frozen=True)
class Weighted(Noiseless):
    weight: float = 1.0


class OtherStep(Weighted):
    """Another step with the same settings."""


def test_a_training_is_known_by_all_that_its_trainer_was_given():
    """A change of any of it must not go on from the checkpoint of another training; the same again must."""
    images, labels = numbered(10), torch.arange(10)
    weights, config = make_trainer().model, make_trainer().model
    with torch.no_grad():
        weights.linear.bias[0] += 1e-6
    config.config = {"clip": False}  # an argument of the model that shows in no weight
    brighter = images.clone()
    brighter[7, 0, 1, 1] += 1
    changes: list[dict[str, Any]] = [{}, {"model": weights}, {"model": config}]
    changes += [{"step": Weighted(None, 2.0)}, {"step": OtherStep(None)}]
    sets = (brighter, labels), (images, labels.flip(0)), (images, None), (images[:9], labels[:9])
    changes += [{"train": each} for each in sets]
    changes += [{"held_out": (numbered(3) + 1, None)}, {"held_out": (numbered(3), torch.arange(3))}]
    changes += [{"lr": 0.02}, {"name": "vae"}, {"seed": 2}, {"precision": "auto"}, {"compile": "auto"}]
    step = {"step": Weighted(None)}
    first, again = ([make_trainer(**step | change).fingerprint for change in changes] for _ in range(2))
    assert first == again and len(set(first)) == len(changes)


# kill -9, through the very stages that DVC runs


def workspace(folder: Path, leaves: Mapping[str, Any] | None = None) -> Path:
    """A checkout in small: params.yaml, with these leaves, and random images of three classes."""
    short = {"images": 960, "batch": 16, "lr_warmup": 320, "lr_decay": "cosine", "ema_half_life": 500}
    short |= {"log_every": 200, "validate_every": 400, "checkpoint_every": 160}
    changes = {f"{of}.training.{name}": value for of in ("vae", "ddpm") for name, value in short.items()}
    changes |= {"vae.kl_warmup": 400, "ddpm.dropout": 0.1}
    (folder / ".dvc").mkdir(parents=True)
    write_params(folder, changes | dict(leaves or {}))
    random, splits = np.random.RandomState(0), {}
    for name, n in {"train": 600, "validation": 100, "test": 100}.items():
        images = random.randint(0, 256, (n, *SHAPE)).astype(np.uint8)
        splits[name] = ImageSet(images, random.randint(3, size=n).astype(np.int64), CLASSES)
    save_images(folder / "data/pixels", splits, {"classes": CLASSES})
    return folder


def start(stage: str, folder: Path) -> subprocess.Popen[str]:
    """The stage's own process, as DVC starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "REDIFFUSE_TRACKING": "off"}
    environment.pop("DVC_ROOT", None)
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, **pipes)


def outputs(folder: Path) -> dict[str, str]:
    """Every file that a stage wrote, by its hash."""
    files = [path for top in ("data/models", "metrics") for path in (folder / top).rglob("*.*")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_stage_killed_with_sigkill_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, monkeypatch):
    undisturbed, killed = workspace(tmp_path / "undisturbed"), workspace(tmp_path / "killed")
    process = start("train_ddpm", killed)
    while not (found := list((killed / ".dvc/tmp/checkpoints").glob("*.pt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and outputs(killed) == {}
    half = found[0].read_bytes()[:1000]
    found[0].with_suffix(".tmp").write_bytes(half)  # as if it had been killed while writing

    process = start("train_ddpm", killed)
    _, errors = process.communicate(timeout=120)
    first = re.search(r"(\d+)/960 \[", errors)
    assert process.returncode == 0 and first, errors
    assert int(first[1]) > 0  # it went on; it did not begin again
    monkeypatch.chdir(undisturbed)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    train_ddpm.main()
    expected = outputs(undisturbed)
    written = {"data/models/ddpm/model.safetensors", "metrics/train_ddpm.json"}
    assert written | {"metrics/plots/train_ddpm/training.csv"} <= expected.keys()
    assert outputs(killed) == expected
    for folder in (undisturbed, killed):
        assert [path.suffix for path in (folder / ".dvc/tmp/checkpoints").iterdir()] == [".lock"]
