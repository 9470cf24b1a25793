"""Several processes as one: `torchrun --nproc-per-node=8 -m` in place of `python -m`.

Every process runs the same stage and takes its share of the work by rank; only the first, of rank 0, writes
files.  Torch's DistributedDataParallel averages the gradients (training/loop.py).  With one process, nothing
here does anything.  All processes must call `barrier`, `broadcast`, `gather`, `total` and `mean_of_processes`
in the same order.
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

# The others may wait for hours while the first process waits for a lock or trains a classifier.  That a
# process has died is noticed by torchrun, at once.
TIMEOUT = timedelta(days=1)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, for a block or, as a decorator, for a function.

    NCCL carries gradients between GPUs, Gloo everything on the CPU.  Raises UserError if there are fewer GPUs
    than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, processes = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun (torch 2.14) keeps one store over restarts, with the addresses of processes that died.
    prefix = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
    if torch.cuda.is_available():
        if (local_rank := int(os.environ["LOCAL_RANK"])) >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"launcher starts more processes on a machine than there are GPUs ({gpus}):"
                f" set --nproc-per-node to {gpus}"
            )
        torch.cuda.set_device(local_rank)
    yield
    dist.destroy_process_group()  # not after an error: the other processes may be gone


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def is_main() -> bool:
    """Whether this is the first process, the one that writes."""
    return rank() == 0


def share_of_batch(batch: int, name: str) -> slice:
    """Return this process's part of a global batch.  Raises UserError unless all parts have the same size.

    name: of the parameter, for the error.
    """
    processes = world_size()
    if batch % processes:
        fitting = sorted({max(1, batch // processes) * processes, -(-batch // processes) * processes})
        raise UserError(
            f"{name} ({batch}) is shared among all processes and must be a multiple of their number,"
            f" {processes}: set it to {' or '.join(map(str, fitting))}, or start another number (launcher)"
        )
    size = batch // processes
    return slice(rank() * size, (rank() + 1) * size)


def my_share(count: int) -> range:
    """Return this process's part of the numbers below `count`: each process takes every `world_size()`-th."""
    return range(rank(), count, world_size())


def total(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, to each of them, without gradient.  Adding zeros is exact."""
    if not _is_distributed():
        return tensor
    added = tensor.detach().clone()
    dist.all_reduce(added)
    return added


def mean_of_processes(tensor: Tensor) -> Tensor:
    """Return the mean over all processes, to each of them, without gradient."""
    return total(tensor) / world_size() if _is_distributed() else tensor


def broadcast(value: T) -> T:
    """Return the first process's value to all: anything that can be pickled, tensors on the CPU."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(parts: list[T]) -> list[T]:
    """Return to the first process the results of all shares (`my_share`) in order, to the others nothing."""
    if not _is_distributed():
        return parts
    everyone: list[list[T]] = [[]] * world_size()
    dist.gather_object(parts, everyone if is_main() else None)
    return [everyone[i % len(everyone)][i // len(everyone)] for i in range(sum(map(len, everyone)))]


def barrier() -> None:
    """Wait for all processes."""
    if _is_distributed():
        total(torch.zeros(()))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
