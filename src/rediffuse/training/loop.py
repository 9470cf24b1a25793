"""The training loop of both models.

Everything random in a step is a function of (seed, step), and the order of the images of (seed, epoch), so that a resumed run
needs no saved generator to go on with the very same numbers.  Durations are counted in images.

Several processes share each batch (runtime/processes.py): all draw the random numbers of the whole batch, and each computes the loss of
its part, so that what is learnt is the same, up to rounding, whatever their number.  Only dropout has a stream for each process.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rediffuse.params import Training
from rediffuse.runtime import processes
from rediffuse.runtime.device import Compile, Precision, autocast, compile_parts, seed_for, upload
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import Rebuildable
from rediffuse.training.average import Average
from rediffuse.training.checkpoint import Checkpoint, fingerprint
from rediffuse.training.curves import Curves, Row

ORDER, NOISE, DROPOUT = 1, 2, 3  # independent streams of random numbers

Noise = Mapping[str, Tensor]
Labelled = tuple[Tensor, Tensor | None]  # images and their labels, if there are any
Model = TypeVar("Model", bound=Rebuildable)
Accepted = TypeVar("Accepted", bound=Rebuildable, contravariant=True)


class Step(Protocol[Accepted]):
    """The loss of one batch, in two parts: what is random in it, and the loss itself.

    A batch may be shared among processes: its noise is drawn as a whole, the loss is that of a slice.
    """

    def draw(self, model: Accepted, shape: Sequence[int], generator: torch.Generator, /) -> Noise:
        """For images (B, C, H, W) = shape: tensors with B rows, by name, on the CPU.  generator: on the CPU, seeded for this step."""
        ...

    def __call__(
        self, model: Accepted, images: Tensor, labels: Tensor | None, noise: Noise, seen: int, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and {name: (sum, count)}, each a tensor (2,); their means over log intervals are logged.

        images: uint8 (B, C, H, W); labels: int64 (B,) or None; seen: images before this batch.
        """
        ...


class Trainer(Generic[Model]):
    """One run: the model, its average, the optimizer, and how far it has come.

    train, held_out: images (N, C, H, W) and labels int64 (N,) or None, on the device to train on.  name: the parameters' group, for
    messages.  validate: measures the averaged model on held_out.  log: takes the images seen and what was measured.

    All that the weights and curves depend on is handed in here, so that `fingerprint`, to which a checkpoint belongs, lacks nothing.
    """

    def __init__(
        self,
        model: Model,
        step: Step[Model],
        train: Labelled,
        held_out: Labelled,
        config: Training,
        *,
        name: str,
        seed: int,
        precision: Precision,
        compile: Compile,
        validate: Callable[[Model, Tensor, Tensor | None], Row],
        log: Callable[[int, Row], None],
    ) -> None:
        (self.images, self.labels), self.held_out, self.config = train, held_out, config
        self.model = model.to(self.images.device).to(memory_format=torch.channels_last).train()
        settings = (name, model.config, type(step).__name__, vars(step), config, seed, precision, compile)
        data = [tensor for tensor in (*train, *held_out) if tensor is not None]
        self.fingerprint = fingerprint(settings, [*self.model.state_dict().values(), *data])
        self.step, self.loss = step, _shared(_Loss(self.model, step))
        self.mine = processes.share_of_batch(config.batch, f"{name}.training.batch")
        self.name, self.seed, self.precision = name, seed, precision
        self.validate, self.log = validate, log
        self.steps = config.images // config.batch
        self.average = Average(self.model, config.ema_half_life)
        compile_parts(self.model, self.images.device, compile)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.order = _Order(len(self.images), seed)
        self.stream = (processes.rank(),) if processes.world_size() > 1 else ()
        self.done = 0
        self.curves, self.sums = Curves(), dict[str, Tensor]()

    def train(self, checkpoint: Checkpoint) -> tuple[Model, Curves]:
        """Train from the beginning or from the checkpoint; return the averaged model, in evaluation mode, and the curves.

        Raises UserError if the loss stops being finite.
        """
        self._resume(checkpoint)
        batch = self.config.batch
        with tqdm(
            total=self.steps * batch,
            initial=self.done * batch,
            unit="img",
            desc=f"train {self.name}",
            mininterval=1.0,
            disable=not processes.is_main(),
        ) as bar:
            while self.done < self.steps:
                self._step()
                bar.update(batch)
                if self._due(self.config.log_every):
                    bar.set_postfix({key: f"{value:.4g}" for key, value in list(self._log().items())[:1]}, refresh=False)
                if self._due(self.config.validate_every):
                    self._validate()
                if self._due(self.config.checkpoint_every):
                    self._save(checkpoint)
        return self.average.model.eval(), self.curves

    def _step(self) -> None:
        seen, config = self.done * self.config.batch, self.config
        batch = upload(self.order.batch(seen, config.batch)[self.mine], self.images.device)
        labels = None if self.labels is None else self.labels[batch]
        generator = torch.Generator().manual_seed(seed_for(self.seed, NOISE, self.done))
        torch.manual_seed(seed_for(self.seed, DROPOUT, self.done, *self.stream))  # dropout draws from the global generator
        noise = self.step.draw(self.model, (config.batch, *self.images.shape[1:]), generator)
        noise = {key: upload(numbers[self.mine], self.images.device) for key, numbers in noise.items()}
        with autocast(self.images.device, self.precision):
            loss, measures = self.loss(self.images[batch], labels, noise, seen)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.rate.step()
        self.average.update(self.model, seen=seen + config.batch, batch=config.batch)
        self.done += 1
        for key, measure in measures.items():  # added up on the device: reading a value would wait for it
            self.sums[key] = self.sums[key] + measure if key in self.sums else measure

    def _rate(self, done: int) -> float:
        """The learning rate's share of its peak: a linear rise, then, unless it stays, a cosine down to 0."""
        warmup = self.config.lr_warmup / self.config.batch
        rise = min(1.0, (done + 1) / warmup) if warmup else 1.0
        if self.config.lr_decay == "constant":
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done / self.steps)))

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` images, or was the last of all."""
        batch = self.config.batch
        return self.done == self.steps or self.done * batch // every > (self.done - 1) * batch // every

    def _log(self) -> Row:
        seen = self.done * self.config.batch
        means = {key: (total / count) for key, (total, count) in ((k, s.tolist()) for k, s in self._totals().items()) if count}
        if not all(map(math.isfinite, means.values())):
            raise self._not_finite(f"the loss is not finite ({means})")
        self.curves.training.append({"images": seen, **means})
        self.sums = {}
        self.log(seen, means)
        return means

    def _validate(self) -> None:
        seen = self.done * self.config.batch
        measures = self.validate(self.average.model.eval(), *self.held_out)
        self.curves.validation.append({"images": seen, **measures})
        self.log(seen, measures)

    def _totals(self) -> dict[str, Tensor]:
        """The sums of all processes, on each of them."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, processes.total(torch.stack(list(self.sums.values()))), strict=True))

    def _save(self, checkpoint: Checkpoint) -> None:
        self._take_sums(self._totals())
        moments = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        weights = [*self.model.state_dict().values(), *self.average.model.state_dict().values(), *moments]
        if not torch.stack([tensor.isfinite().all().to(self.images.device) for tensor in weights]).all():
            raise self._not_finite("weights are not finite")  # a checkpoint of them would fail every restart
        if not processes.is_main():
            return
        state = {key: part.state_dict() for key, part in self._parts().items()}
        progress = {"done": self.done, "training": self.curves.training, "validation": self.curves.validation, "sums": self.sums}
        checkpoint.save(state | progress | _arithmetic())

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = processes.broadcast(checkpoint.load() if processes.is_main() else None)
        if state is None:
            return
        if processes.is_main() and (before := {key: state[key] for key in _arithmetic()}) != _arithmetic():
            print(
                f"{self.name}: the checkpoint was written by {_in_words(before)} and is continued by {_in_words(_arithmetic())}:"
                " the result will differ from that of an undisturbed run by rounding",
                file=sys.stderr,
                flush=True,
            )
        for key, part in self._parts().items():
            part.load_state_dict(state[key])
        self.done = state["done"]
        self._take_sums({key: measure.to(self.images.device) for key, measure in state["sums"].items()})
        self.curves = Curves(state["training"], state["validation"])

    def _not_finite(self, what: str) -> UserError:
        name, config = self.name, self.config
        return UserError(
            f"{name}: {what} after {self.done * config.batch} images: lower {name}.training.lr ({config.lr}) or"
            f" {name}.training.clip_norm ({config.clip_norm}), or set precision to float32"
        )

    def _take_sums(self, totals: dict[str, Tensor]) -> None:
        """Go on from the sums of all processes: the first has them, the others add to zeros."""
        self.sums = totals if processes.is_main() else {key: torch.zeros_like(measure) for key, measure in totals.items()}

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        return {"model": self.model, "average": self.average.model, "optimizer": self.optimizer, "rate": self.rate}


class _Loss(nn.Module):
    """A step as a module, whose forward DistributedDataParallel can watch."""

    def __init__(self, model: nn.Module, step: Step[Any]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, images: Tensor, labels: Tensor | None, noise: Noise, seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step(self.model, images, labels, noise, seen)


def _shared(loss: nn.Module) -> nn.Module:
    """The loss, of which backward leaves the mean gradient over all processes, if there are several."""
    if processes.world_size() == 1:
        return loss
    # With find_unused_parameters the buckets of gradients are never laid out anew after the first step, which would make a resumed
    # run of three processes round its sums differently from one that was never interrupted.
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return DistributedDataParallel(loss, find_unused_parameters=True, broadcast_buffers=False)


def _arithmetic() -> dict[str, int]:
    """What may change between a checkpoint and its continuation, and shows in the last bits."""
    return {"processes": processes.world_size(), "threads": torch.get_num_threads()}


def _in_words(arithmetic: dict[str, int]) -> str:
    processes, threads = arithmetic["processes"], arithmetic["threads"]
    return f"{processes} process{'es' if processes > 1 else ''} with {threads} thread{'s' if threads > 1 else ''}"


class _Order:
    """The stream of image indices: one seeded permutation after the other."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, seen: int, size: int) -> Tensor:
        """The `size` indices that follow the first `seen`; a batch may reach into the next epoch."""
        parts = []
        while size:
            epoch, begin = divmod(seen, self.count)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(seed_for(self.seed, ORDER, epoch))
                self.epoch, self.permutation = epoch, torch.randperm(self.count, generator=generator)
            part = self.permutation[begin : begin + size]
            parts.append(part)
            seen, size = seen + len(part), size - len(part)
        return torch.cat(parts)
