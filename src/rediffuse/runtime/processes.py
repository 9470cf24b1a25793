"""Several processes as one: `torchrun --nproc-per-node=8 -m stages.train_ddpm` instead of `python -m stages.train_ddpm`.

Every process runs the same stage.  Work that can be shared is dealt out by rank; the process of rank 0, the first, does what
only one may do, above all writing files.  Gradients are averaged by torch's
DistributedDataParallel (training/loop.py).  With one process, and without torchrun, nothing here does anything.  What calls
`barrier`, `broadcast`, `gather`, `total` or `mean_of_processes` must be called by all processes, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rediffuse.runtime.errors import UserError

T = TypeVar("T")

# The first process may do alone for hours what the others wait for: stand in line for a lock, train a classifier.  That a process
# has died is noticed by torchrun, at once, and not by this.
PATIENCE = timedelta(days=1)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started with this one, for the length of a block or, as a decorator, a function.

    Gradients go between GPUs by NCCL; everything on the CPU, by Gloo.  Raises UserError if this machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, processes = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun (torch 2.14) shares its store with the processes, and it outlives a restart, with the addresses of those that died.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    if torch.cuda.is_available():
        if (local_rank := int(os.environ["LOCAL_RANK"])) >= (found := torch.cuda.device_count()):
            raise UserError(f"launcher starts more processes on a machine than there are GPUs ({found}): set --nproc-per-node to {found}")
        torch.cuda.set_device(local_rank)
    yield
    dist.destroy_process_group()  # not after an error: the others may be gone, or about to be


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


def my_share(count: int) -> range:
    """Of the numbers below `count`, those whose work is this process's: one after the other is dealt to each in turn."""
    return range(rank(), count, world_size())


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
    """On the first process, what each process has made of `my_share`, in the order of the numbers; on the others, nothing."""
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
