"""The training loop of both models.

Everything random in a step is a function of (seed, step), and the order of the images of (seed, epoch).  So a
resumed run continues with the same numbers without a saved generator.  Durations are counted in images.

Several processes share each batch (runtime/processes.py).  Each draws the random numbers of the whole batch
and computes the loss of its part, so that the result is the same, up to rounding, for any number of
processes.  Only dropout has a stream for each process.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
from rediffuse.training.muon import Muon, matrices

ORDER, NOISE, DROPOUT = 1, 2, 3  # independent streams of random numbers

Noise = Mapping[str, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]  # the scalar to minimise; by name, (sum, count) of what is logged
Labelled = tuple[Tensor, Tensor | None]  # images, and labels if there are any
Model = TypeVar("Model", bound=Rebuildable)


class Step(Protocol):
    """The loss of one batch: the noise is drawn for all of it, the loss is that of a process's slice."""

    def draw(self, model: Any, shape: Sequence[int], generator: torch.Generator, /) -> Noise:
        """Draw tensors with B rows, by name, for images (B, C, H, W) = shape, from a CPU generator."""

    def __call__(self, model: Any, images: Tensor, labels: Tensor | None, noise: Noise, seen: int, /) -> Loss:
        """Return the loss of images (B, C, H, W), uint8 or latents, after `seen` images."""


class Log(Protocol):
    """Where a training reports to.  It cannot change the result."""

    def log_curve(self, images_seen: int, values: Row, /) -> None:
        """Log values named "model/quantity", such as vae/elbo, at this number of images."""

    def log_model(self, images_seen: int, model: Rebuildable, /) -> None:
        """Log a picture of what the averaged model draws at this number of images.

        Called at each validation, on the main process only, in evaluation mode and without gradients.
        """


class Trainer(Generic[Model]):
    """One run: the model, its average, the optimizer, and the progress.

    train, held_out: images (N, C, H, W) and labels int64 (N,) or None, on the device to train on.  Without
    held-out images nothing is validated.
    name: the group of parameters, and the prefix of logged names.
    validate: measures the averaged model on held_out.  Its first value is what config.patience watches: lower
    is better.
    keep_at: images after which the average is kept as `early`; 0: it is not.

    All that the weights and curves depend on is an argument, so that the `fingerprint` is complete.
    """

    def __init__(
        self,
        model: Model,
        step: Step,
        train: Labelled,
        held_out: Labelled,
        config: Training,
        *,
        name: str,
        seed: int,
        precision: Precision,
        compile: Compile,
        validate: Callable[[Model, Tensor, Tensor | None], Row],
        keep_at: int = 0,
        log: Log | None = None,
    ) -> None:
        (self.images, self.labels), self.held_out, self.config = train, held_out, config
        self.model = model.to(self.images.device).to(memory_format=torch.channels_last).train()
        settings = (
            name,
            model.config,
            type(step).__name__,
            vars(step),
            config,
            seed,
            precision,
            compile,
            keep_at,
        )
        data = [tensor for tensor in (*train, *held_out) if tensor is not None]
        tensors = [*self.model.state_dict().values(), *data]
        self.fingerprint = fingerprint(settings, tensors) if processes.is_main() else ""
        self.step, self.loss = step, _data_parallel(_Loss(self.model, step))
        self.mine = processes.share_of_batch(config.batch, f"{name}.training.batch")
        self.name, self.seed, self.precision = name, seed, precision
        self.validate, self.log = validate, log
        self.steps = config.images // config.batch
        self.average = Average(self.model, config.ema_half_life)
        self.keep_at = keep_at
        self.early: Model | None = None
        self.best: Model | None = None  # at the best validation so far, if there is patience
        compile_parts(self.model, self.images.device, compile)
        self.optimizers = make_optimizers(self.model, config)
        self.rates = [torch.optim.lr_scheduler.LambdaLR(each, self._rate) for each in self.optimizers]
        self.stream = (processes.rank(),) if processes.world_size() > 1 else ()
        self.done = 0
        self.curves, self.sums = Curves(), dict[str, Tensor]()

    @property
    def seen(self) -> int:
        """Images trained on so far."""
        return self.done * self.config.batch

    def train(self, checkpoint: Checkpoint) -> tuple[Model, Curves]:
        """Train from the checkpoint or the beginning.  Return the averaged model, in eval mode, and curves.

        With patience, it is the model of the best validation.  Raises UserError if the loss or the weights
        stop being finite.
        """
        self._resume(checkpoint)
        title, total, off = f"train {self.name}", self.steps * self.config.batch, not processes.is_main()
        with tqdm(None, title, total, initial=self.seen, unit="img", mininterval=1.0, disable=off) as bar:
            while self.done < self.steps and not self._exhausted():
                self._step()
                bar.update(self.config.batch)
                if self._due(self.config.log_every):
                    first = list(self._log().items())[:1]
                    bar.set_postfix({key: f"{value:.4g}" for key, value in first}, refresh=False)
                if self._due(self.config.validate_every):
                    self._validate()
                if self._due(self.config.checkpoint_every):
                    self._save(checkpoint)
        return self.best or self.average.model.eval(), self.curves

    @property
    def kept(self) -> Row:
        """The last validation or, with patience, the best one: that of the model that `train` returns."""
        rows = self.curves.validation
        return rows[self._best() if self.config.patience else -1] if rows else {}

    def _exhausted(self) -> bool:
        """Return whether the last `patience` validations were no better than the one before them."""
        patience, since = self.config.patience, len(self.curves.validation) - 1 - self._best()
        return 0 < patience <= since

    def _best(self) -> int:
        """Return which validation was the best, the first of equals; -1 if there was none."""
        values = [
            list(row.values())[1] for row in self.curves.validation
        ]  # the first is the number of images
        return min(range(len(values)), key=values.__getitem__, default=-1)

    def _step(self) -> None:
        seen, config, device = self.seen, self.config, self.images.device
        batch = upload(_batch(seen, config.batch, len(self.images), self.seed)[self.mine], device)
        labels = None if self.labels is None else self.labels[batch]
        generator = torch.Generator().manual_seed(seed_for(self.seed, NOISE, self.done))
        torch.manual_seed(seed_for(self.seed, DROPOUT, self.done, *self.stream))  # which dropout draws from
        noise = self.step.draw(self.model, (config.batch, *self.images.shape[1:]), generator)
        noise = {key: upload(numbers[self.mine], device) for key, numbers in noise.items()}
        with autocast(device, self.precision):
            loss, measures = self.loss(self.images[batch], labels, noise, seen)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.step()
            rate.step()
        self.average.update(self.model, seen=seen + config.batch, batch=config.batch)
        if seen < self.keep_at <= seen + config.batch:
            self.early = self._averaged()
        self.done += 1
        for key, measure in measures.items():  # summed on the device: reading a value would wait for it
            self.sums[key] = self.sums[key] + measure if key in self.sums else measure

    def _rate(self, done: int) -> float:
        """Return the factor of the learning rate: a linear rise, then a cosine to 0 or, if constant, 1."""
        warmup = self.config.lr_warmup / self.config.batch
        rise = min(1.0, (done + 1) / warmup) if warmup else 1.0
        if self.config.lr_decay == "constant":
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done / self.steps)))

    def _due(self, every: int) -> bool:
        """Return whether the last step passed a multiple of `every` images, or was the last of all."""
        return self.done == self.steps or self.seen // every > (self.seen - self.config.batch) // every

    def _log(self) -> Row:
        totals = {key: total.tolist() for key, total in self._totals().items()}
        means = {key: total / count for key, (total, count) in totals.items() if count}
        if not all(map(math.isfinite, means.values())):
            raise self._not_finite(f"the loss is not finite ({means})")
        self.sums = {}
        self._add_to(self.curves.training, means)
        return means

    def _validate(self) -> None:
        model = self.average.model.eval()
        if len(self.held_out[0]):
            measured = self.validate(model, *self.held_out)
            named = {f"validation_{key}": value for key, value in measured.items()}
            self._add_to(self.curves.validation, named)
            if self.config.patience and self._best() == len(self.curves.validation) - 1:
                self.best = self._averaged()
        if self.log is not None and processes.is_main():
            with torch.no_grad():
                self.log.log_model(self.seen, model)

    def _averaged(self) -> Model:
        """Return a copy of the averaged model, in eval mode."""
        return copy.deepcopy(self.average.model).eval()

    def _add_to(self, curve: list[Row], values: Row) -> None:
        curve.append({"images": self.seen, **values})
        if self.log is not None:
            self.log.log_curve(self.seen, {f"{self.name}/{key}": value for key, value in values.items()})

    def _totals(self) -> dict[str, Tensor]:
        """Return the sums of all processes, on each of them."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, processes.total(torch.stack(list(self.sums.values()))), strict=True))

    def _save(self, checkpoint: Checkpoint) -> None:
        self._continue_sums(self._totals())
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        moments = [moment for state in states for moment in state.values()]
        weights = [*self.model.state_dict().values(), *self.average.model.state_dict().values(), *moments]
        if not torch.stack([tensor.isfinite().all().to(self.images.device) for tensor in weights]).all():
            raise self._not_finite("weights are not finite")  # a checkpoint of them would fail every restart
        if processes.is_main():
            state = {key: part.state_dict() for key, part in self._parts().items()}
            curves = {"training": self.curves.training, "validation": self.curves.validation}
            checkpoint.save(state | {"done": self.done, "sums": self.sums} | curves | _arithmetic())

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = processes.broadcast(checkpoint.load() if processes.is_main() else None)
        if state is None:
            return
        before, now = {key: state[key] for key in _arithmetic()}, _arithmetic()
        if processes.is_main() and before != now:
            message = (
                f"{self.name}: the checkpoint was written by {_in_words(**before)} and is continued by"
                f" {_in_words(**now)}: the result will differ from that of an undisturbed run by rounding"
            )
            print(message, file=sys.stderr, flush=True)
        self.early = self._averaged() if "early" in state else None
        self.best = self._averaged() if "best" in state else None
        for key, part in self._parts().items():
            part.load_state_dict(state[key])
        self.done = state["done"]
        self._continue_sums({key: measure.to(self.images.device) for key, measure in state["sums"].items()})
        self.curves = Curves(state["training"], state["validation"])

    def _continue_sums(self, totals: dict[str, Tensor]) -> None:
        """Continue from the sums of all processes: the main process has them, the others start from zeros."""
        zeros = {key: torch.zeros_like(measure) for key, measure in totals.items()}
        self.sums = totals if processes.is_main() else zeros

    def _not_finite(self, what: str) -> UserError:
        name, config = self.name, self.config
        return UserError(
            f"{name}: {what} after {self.seen} images: lower {name}.training.lr ({config.lr}) or"
            f" {name}.training.clip_norm ({config.clip_norm}), or set precision to float32"
        )

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        copies = {"average": self.average.model, "early": self.early, "best": self.best}
        models = {"model": self.model} | {name: model for name, model in copies.items() if model is not None}
        optimizers = {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {**models, **optimizers, **{f"rate {i}": rate for i, rate in enumerate(self.rates)}}


def make_optimizers(model: nn.Module, config: Training) -> list[torch.optim.Optimizer]:
    """Return AdamW; or Muon for the matrices and AdamW for the rest."""
    decay, chosen = config.weight_decay, matrices(model) if config.optimizer == "muon" else []
    rest = {id(parameter): parameter for parameter in model.parameters()}
    for parameter in chosen:
        del rest[id(parameter)]
    adamw = torch.optim.AdamW(rest.values(), lr=config.lr, weight_decay=decay, fused=True)
    if not chosen:
        return [adamw]
    return [adamw, Muon(chosen, config.muon_lr, weight_decay=decay)]


class _Loss(nn.Module):
    """A step as a module, as DistributedDataParallel needs it."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, images: Tensor, labels: Tensor | None, noise: Noise, seen: int) -> Loss:
        return self.step(self.model, images, labels, noise, seen)


def _data_parallel(loss: nn.Module) -> nn.Module:
    """Let backward average the gradients over all processes, if there are several."""
    if processes.world_size() == 1:
        return loss
    # Without find_unused_parameters DDP lays out its buckets of gradients anew after the first step, and a
    # resumed run of three processes would round its sums differently from an undisturbed one.
    return DistributedDataParallel(loss, find_unused_parameters=True)


def _arithmetic() -> dict[str, int]:
    """Return what may change between a checkpoint and its continuation, and changes the last bits."""
    return {"processes": processes.world_size(), "threads": torch.get_num_threads()}


def _in_words(processes: int, threads: int) -> str:
    es, s = "es" if processes > 1 else "", "s" if threads > 1 else ""
    return f"{processes} process{es} with {threads} thread{s}"


def _batch(seen: int, size: int, count: int, seed: int) -> Tensor:
    """Return the `size` indices that follow the first `seen`; a batch may reach into the next epoch."""
    epochs = range(seen // count, (seen + size - 1) // count + 1)
    starts = [seen - epoch * count for epoch in epochs]  # of the batch, in each epoch
    orders = [_order(count, seed, epoch) for epoch in epochs]
    return torch.cat([order[max(0, at) : at + size] for order, at in zip(orders, starts, strict=True)])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the images in an epoch, a permutation, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_for(seed, ORDER, epoch)))
