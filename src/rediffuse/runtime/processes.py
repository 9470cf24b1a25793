"""Several processes as one: `torchrun --nproc-per-node=8 -m stages.train_ddpm` instead of `python -m stages.train_ddpm`.

Every process runs the same stage.  Work that can be shared is dealt out by rank; the process of rank 0, the first, does what
only one may do, above all writing files.  With one process, and without torchrun, nothing here does anything.  What calls
`barrier`, `broadcast`, `gather`, `total`, `mean_of_processes` or `Gradients.average` must be called by all processes, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from rediffuse.runtime.errors import UserError

T = TypeVar("T")

# The first process may do alone for hours what the others wait for: stand in line for a lock, train a classifier.  That a process
# has died is noticed by torchrun, at once, and not by this.
PATIENCE = timedelta(days=1)
# Gradients travel in pieces of an eighth of all, within these limits: below, two processes wait longer than they send.
PIECES, LEAST, MOST = 8, 2**20, 25 * 2**20


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started with this one, for the length of a block or, as a decorator, a function.

    Gradients go between GPUs by NCCL; everything on the CPU, by Gloo.  A UserError that all of them raise is raised by one, the
    others exit with status 1.  Raises UserError if this machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, processes = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun's store outlives a restart, and with it the addresses of processes that are dead.
    store = dist.PrefixStore(f"rediffuse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    try:
        if torch.cuda.is_available():
            _take_gpu(int(os.environ["LOCAL_RANK"]))
        yield
    except UserError:
        if store.add("errors", 1) > 1:
            raise SystemExit(1) from None
        raise
    else:  # after an error the others may be gone, or about to be
        dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    """Make the GPU of this number what "cuda" means in this process."""
    if local_rank >= (found := torch.cuda.device_count()):
        raise UserError(f"launcher starts more processes on a machine than there are GPUs ({found}): set --nproc-per-node to {found}")
    torch.cuda.set_device(local_rank)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the first process, the one that writes."""
    return rank() == 0


def share_of_batch(batch: int, name: str) -> slice:
    """This process's part of each global batch.  name: of the parameter.  Raises UserError unless all parts have the same size."""
    processes = world_size()
    if batch % processes:
        fitting = sorted({max(1, batch // processes) * processes, -(-batch // processes) * processes})
        raise UserError(
            f"{name} ({batch}) is shared among all processes and must be a multiple of their number, which is {processes}:"
            f" set it to {' or '.join(map(str, fitting))}, or start another number of processes (launcher)"
        )
    size = batch // processes
    return slice(rank() * size, (rank() + 1) * size)


def dealt(count: int) -> range:
    """Of the numbers below `count`, those whose work is this process's: one after the other is dealt to each in turn."""
    return range(rank(), count, world_size())


class Gradients:
    """The gradients of a model, averaged over the processes while backward still computes those of earlier layers.

    They travel in buckets, last layers first, as in DistributedDataParallel (Li et al. 2020, arXiv:2006.15704).  That one lays out its
    buckets anew after the first step, so that a sum over three processes would be rounded differently in a resumed run than in one
    that was never interrupted; and it imports the compiler, which takes longer than the rest of a stage's start.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.buckets: list[_Bucket] = []
        self.launched = 0
        if not _together():
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        limit = min(MOST, max(LEAST, sum(map(_bytes, trained)) // PIECES))
        for parameter in trained:
            if not self.buckets or self.buckets[-1].bytes + _bytes(parameter) > limit:
                self.buckets.append(_Bucket())
            self.buckets[-1].add(parameter)
            computed = partial(self._computed, self.buckets[-1])
            parameter.register_post_accumulate_grad_hook(computed)  # type: ignore[no-untyped-call]

    def average(self) -> None:
        """To be called after each backward: leaves the mean over all processes in every gradient."""
        for bucket in self.buckets[self.launched :]:  # those that wait for a parameter that the loss did not touch
            bucket.launch()
        for bucket in self.buckets:
            bucket.land()
        self.launched = 0

    def _computed(self, bucket: _Bucket, parameter: Tensor) -> None:
        bucket.missing -= 1
        while self.launched < len(self.buckets) and not self.buckets[self.launched].missing:  # in the same order everywhere
            self.buckets[self.launched].launch()
            self.launched += 1


class _Bucket:
    """Parameters whose gradients travel together."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.bytes = self.missing = 0

    def add(self, parameter: nn.Parameter) -> None:
        self.parameters.append(parameter)
        self.bytes += _bytes(parameter)
        self.missing += 1

    def launch(self) -> None:
        """Send what has been computed, and zeros for parameters that the loss does not touch, here and therefore anywhere."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.parameters]
        self.flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def land(self) -> None:
        self.work.wait()
        parts = torch.split(self.flat / world_size(), [one.numel() for one in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
        self.missing = len(self.parameters)


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, on each of them; carries no gradient.  Adding zeros is exact."""
    if not _together():
        return tensor
    added = tensor.detach().clone()
    dist.all_reduce(added)
    return added


def mean_of_processes(tensor: Tensor) -> Tensor:
    """The mean over all processes, on each of them; carries no gradient."""
    return total(tensor) / world_size() if _together() else tensor


def broadcast(value: T) -> T:
    """What the first process gives, on each of them: anything that can be pickled, tensors on the CPU."""
    if not _together():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(parts: list[T]) -> list[T]:
    """On the first process, what all have made of what was `dealt` to them, in the order of the numbers; on the others, nothing."""
    if not _together():
        return parts
    everyone: list[list[T]] = [[]] * world_size()
    dist.gather_object(parts, everyone if is_main() else None)
    return [everyone[i % len(everyone)][i // len(everyone)] for i in range(sum(map(len, everyone)))]


def barrier() -> None:
    """Wait until all processes are here."""
    if _together():
        total(torch.zeros(()))


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
