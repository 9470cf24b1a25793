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
from rediffuse.runtime.device import seed_for
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable
from rediffuse.training.checkpoint import Checkpoint, fingerprint, resumable
from rediffuse.training.curves import Curves
from rediffuse.training.loop import Trainer

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
    """Regression to noise.  Notes the images, the learning rates and the weights it sees."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.images: list[int] = []
        self.seen: list[int] = []
        self.rates: list[float] = []
        self.weights: list[Tensor] = []

    def draw(self, model: Net, shape: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"target": torch.randn(shape[0], 3, generator=generator)}

    def __call__(self, model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        assert model.training
        self.images += images[:, 0, 0, 0].tolist()
        self.seen.append(seen)
        if self.trainer:
            self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])
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


class DyingStep(Step):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __call__(self, *arguments: Any) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().__call__(*arguments)


class SilentLog:
    """Where a training reports to in these tests."""

    def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
        pass

    def log_model(self, images_seen: int, model: nn.Module) -> None:
        pass


def training(**changes: Any) -> Training:
    defaults: dict[str, Any] = {"images": 60, "batch": 4, "clip_norm": 1.0, "ema_half_life": 10}
    defaults |= {"lr": 0.01, "lr_warmup": 8, "lr_decay": "cosine", "weight_decay": 0.1}
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
        "log": SilentLog(),
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


@pytest.mark.parametrize("kills", [[0], [2], [3], [4], [10], [14], [4, 4, 2, 5]])
def test_resume_is_bit_exact_wherever_the_run_was_killed(tmp_path, kills):
    expected = run(tmp_path / "undisturbed")
    for at in kills:
        with pytest.raises(Killed):
            run(tmp_path / "killed", DyingStep(at))
    resumed, again = Step(), Step()
    assert_same(run(tmp_path / "killed", resumed), expected)
    if len(kills) == 1:  # it went on from the last checkpoint: one each 12 images, 3 steps
        assert len(resumed.seen) == 15 - kills[0] // 3 * 3
    assert_same(run(tmp_path / "killed", again), expected)
    assert again.seen == []  # a finished run is not trained again


def test_random_numbers_drawn_by_others_change_nothing(tmp_path):
    class Careless(SilentLog):
        def log_curve(self, *_: Any) -> None:
            torch.rand(3)
            np.random.rand(3)
            random.random()

        log_model = log_curve

    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        torch.manual_seed(int(torch.rand(()).item() * 1000))
        return {"norm": net.linear.weight.norm().item()}

    expected = run(tmp_path / "careful")
    assert_same(run(tmp_path / "careless", log=Careless(), validate=validate), expected)
    assert_same(run(tmp_path / "without", log=None), expected)


def test_every_step_has_noise_and_dropout_of_its_own(tmp_path):
    """One image at a vanishing learning rate: the losses differ only by their random numbers."""
    settings = {"n": 1, "images": 20, "batch": 1, "lr": 1e-30, "lr_warmup": 0, "weight_decay": 0.0}
    _, curves, _ = run(tmp_path, log_every=1, **settings)
    assert len({row["loss"] for row in curves.training}) == 20


def test_another_seed_is_another_run(tmp_path):
    one, other = run(tmp_path / "1", seed=1)[0], run(tmp_path / "2", seed=2)[0]
    assert not torch.equal(one["model.linear.weight"], other["model.linear.weight"])


def test_seeds_of_different_parts_differ():
    parts = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (1, 2, 3), (3, 2, 1), (2**32 - 1, 1)]
    seeds = [seed_for(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)


# The order of the images


@pytest.mark.parametrize("batch", [1, 3, 4, 23, 50])
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


def test_labels_are_those_of_the_images(tmp_path):
    found: list[Tensor] = []

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        assert labels is not None
        found.append(labels - 2 * images[:, 0, 0, 0])
        return model(images).square().mean(), {}

    run(tmp_path, step, train=(numbered(10), 2 * torch.arange(10)))
    assert found and not torch.cat(found).any()


# The learning rate


def test_learning_rate_rises_linearly_and_falls_along_a_cosine_or_stays(tmp_path):
    long: dict[str, Any] = {"images": 400, "batch": 4, "lr": 0.2}
    cosine = trained(tmp_path, lr_warmup=0, **long).rates
    expected = [0.2 * math.cos(math.pi * done / 200) ** 2 for done in range(100)]
    assert cosine == pytest.approx(expected) and cosine[0] == 0.2
    warmed = trained(tmp_path, lr_warmup=40, **long).rates
    assert warmed == pytest.approx([rate * min(1, (i + 1) / 10) for i, rate in enumerate(cosine)])
    constant = trained(tmp_path, lr_warmup=40, lr_decay="constant", **long).rates
    assert constant == pytest.approx([0.2 * min(1, (i + 1) / 10) for i in range(100)])


def test_gradients_are_clipped(tmp_path):
    trainer, norms = make_trainer(clip_norm=1e-3), []

    def note(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    trainer.optimizer.register_step_pre_hook(note)
    trainer.train(Checkpoint(tmp_path / "run.pt"))
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


# The average


@pytest.mark.parametrize("half_life", [0, 1, 10, 10**6])
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
    validated, logged = [], []

    class Log(SilentLog):
        def log_model(self, images_seen: int, model: Any) -> None:
            assert not model.training and not torch.is_grad_enabled()
            logged.append((images_seen, model.linear.weight.clone()))

    def validate(net: Net, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert torch.equal(images, numbered(3)) and labels is None and not net.training
        validated.append(net.linear.weight.clone())
        return {"x": 0.0}

    state, _, trainer = run(tmp_path, validate=validate, log=Log())
    assert [seen for seen, _ in logged] == [16, 32, 48, 60]
    assert all(torch.equal(a, b) for a, (_, b) in zip(validated, logged, strict=True))
    assert torch.equal(validated[-1], state["average.linear.weight"])
    assert trainer.model.training and not trainer.average.model.training


# Curves


def test_curves_are_means_over_the_steps_since_the_last_point(tmp_path):
    logged = []

    class Log(SilentLog):
        def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
            logged.append((images_seen, values))

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        number = seen // len(images)  # of the step, counted twice; and a value that only the first step has
        rare = torch.tensor([5.0, 1.0]) if number == 0 else torch.zeros(2)
        return model(images).square().mean(), {"number": torch.tensor([2.0 * number, 2.0]), "rare": rare}

    settings: dict[str, Any] = {"images": 21, "batch": 3, "log_every": 10, "validate_every": 100}
    _, curves, _ = run(tmp_path, step, log=Log(), **settings)
    # A point after the step that passes a multiple of 10 images, and after the last: at 12 and at 21 images.
    assert curves.training == [{"images": 12, "number": 1.5, "rare": 5.0}, {"images": 21, "number": 5.0}]
    assert [row["images"] for row in curves.validation] == [21]
    assert logged[:2] == [(12, {"ddpm/number": 1.5, "ddpm/rare": 5.0}), (21, {"ddpm/number": 5.0})]
    assert logged[2] == (21, {"ddpm/validation_norm": curves.validation[0]["validation_norm"]})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("every", "what"), [(16, "loss"), (1000, "weights")])
def test_what_is_not_finite_is_named_and_never_kept(tmp_path, value, every, what):
    """Also between two points of the curve: a checkpoint of such weights would fail every restart."""

    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        loss = model(images).square().mean() * (value if seen >= 12 else 1)
        return loss, {"loss": torch.stack([loss.detach(), torch.ones(())])}

    with pytest.raises(UserError, match=rf"ddpm: .*{what}.*ddpm\.training\.lr \(0\.01\).*clip_norm \(1\.0\)"):
        run(tmp_path, step, log_every=every, validate_every=1000, checkpoint_every=12)
    kept = Checkpoint(tmp_path / "run.pt").load()
    assert kept is not None and kept["done"] == 3
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_one_weight_that_is_not_finite_is_enough(tmp_path):
    @Noiseless
    def step(model: Net, images: Tensor, labels: Tensor | None, noise: Any, seen: int) -> Any:
        loss = model(images).square().mean()
        if seen == 8:  # in the step before the checkpoint; backward does not read the bias
            model.linear.bias.data[0] = torch.inf
        return loss, {"loss": torch.stack([loss.detach(), torch.ones(())])}

    with pytest.raises(UserError, match="weights are not finite after 12 images"):
        run(tmp_path, step, log_every=1000, validate_every=1000, checkpoint_every=12)
    assert Checkpoint(tmp_path / "run.pt").load() is None


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


CODE_THAT_TRAINS = ["rediffuse.training.new", "rediffuse.vae", "stages.new", "__main__"]


@pytest.mark.parametrize("name", [*CODE_THAT_TRAINS, "rediffuse.tracking.new", "rediffuse.vaeish", "os.new"])
def test_a_fingerprint_changes_only_with_the_code_that_trains(tmp_path, monkeypatch, name):
    module = types.ModuleType(name)
    module.__file__ = str(tmp_path / "new.py")
    (tmp_path / "new.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, name, module)
    before = fingerprint({"a": 1}, [])
    assert before == fingerprint({"a": 1}, []) and before != fingerprint({"a": 2}, [])
    (tmp_path / "new.py").write_text("x = 2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert (fingerprint({"a": 1}, []) != before) == (name in CODE_THAT_TRAINS)


def test_a_fingerprint_depends_on_numbers_shape_and_type_of_tensors_and_not_on_their_layout(monkeypatch):
    numbers = torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4)
    found = fingerprint({}, [numbers])
    assert fingerprint({}, [numbers.clone(memory_format=torch.channels_last)]) == found
    others = [numbers + 1e-6, numbers.view(1, 2, 4, 3), numbers.view(torch.int32), numbers.flip(0, 3)]
    sets = [[], [numbers, numbers], *([other] for other in others)]
    assert len({found, *(fingerprint({}, tensors) for tensors in sets)}) == 7
    monkeypatch.setattr("rediffuse.training.checkpoint.BLOCK", 5)
    assert fingerprint({}, [numbers]) == found


def test_a_checkpoint_continued_with_other_threads_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    for threads in (3, 3, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(Killed):
            run(tmp_path, DyingStep(4))
    [said] = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line]
    assert "1 process with 3 threads" in said and "1 process with 4 threads" in said


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


def workspace(folder: Path) -> Path:
    """A checkout in small: params.yaml and data/pixels with rectangles of three classes."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    short = {"images": 5000, "batch": 16, "lr_warmup": 320, "lr_decay": "cosine", "log_every": 500}
    short |= {"validate_every": 2000, "checkpoint_every": 160, "ema_half_life": 500}
    params["vae"] |= {"latent_dim": 3, "channels": [4, 8], "hidden": 16, "kl_warmup": 1000}
    params["ddpm"] |= {"T": 20, "width": 8, "dropout": 0.1}
    params["vae"]["training"] |= short
    params["ddpm"]["training"] |= short | {"images": 2400, "validate_every": 1000}
    params["sample"]["ddpm"]["steps"] = 5
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
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for success; how many images had been seen when the progress bar first appeared."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    first = re.search(r"(\d+)/\d+ \[", errors)
    assert first, errors
    return int(first[1])


def outputs(folder: Path) -> dict[str, str]:
    """Every file that a stage wrote, by its hash."""
    files = [path for top in ("data/models", "metrics") for path in (folder / top).rglob("*.*")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_a_stage_killed_with_sigkill_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, model):
    stage = f"train_{model}"
    undisturbed, killed = workspace(tmp_path / "undisturbed"), workspace(tmp_path / "killed")
    assert finish(start(stage, undisturbed)) == 0
    expected = outputs(undisturbed)
    written = {f"data/models/{model}/model.safetensors", f"metrics/{stage}.json"}
    assert written | {f"metrics/plots/{stage}/training.csv"} <= expected.keys()

    checkpoints = killed / ".dvc/tmp/checkpoints"
    process = start(stage, killed)
    while not (found := list(checkpoints.glob("*.pt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and outputs(killed) == {}
    half = found[0].read_bytes()[:1000]
    found[0].with_suffix(".tmp").write_bytes(half)  # as if it had been killed while writing

    assert finish(start(stage, killed)) > 0  # it went on; it did not begin again
    assert outputs(killed) == expected
    for folder in (undisturbed, killed):
        assert [path.suffix for path in (folder / ".dvc/tmp/checkpoints").iterdir()] == [".lock"]
