"""Checkpoints that survive `kill -9`.

A checkpoint belongs to a fingerprint of all that the trainer was given (initial weights, images, labels, settings), the code and the kind
of machine.  A run finds only its own; another configuration or input never warm-starts from it.  The number of processes and threads,
which shows in the last bits alone, is no part of it, so that a training can go on with more or fewer; the trainer says so.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from rediffuse.runtime.processes import is_main

BLOCK = 2**24  # numbers that are hashed at a time
# Of the modules that are loaded, those that a training runs; tracking and what it imports change no byte of a model.
CODE = ("__main__", "stages", *(f"rediffuse.{room}" for room in ("runtime", "images", "vae", "diffusion", "training")))


def fingerprint(values: object, tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values (by their repr) and tensors that a training starts from, the code that is loaded, and the kind of machine."""
    machine: list[str | None] = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        machine += [torch.cuda.get_device_name(), torch.version.cuda]
    digest = hashlib.sha256(repr((values, machine)).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in torch.split(tensor.reshape(-1), BLOCK):
            digest.update(part.cpu().view(torch.uint8).numpy().tobytes())
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(f"{name}.".startswith(f"{part}.") for part in CODE):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


class Checkpoint:
    """One file, replaced atomically at each save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: dict[str, Any]) -> None:
        """Write the state; a kill at any moment leaves the last one or this one."""
        unfinished = self.path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def load(self) -> dict[str, Any] | None:
        """The last state, or None if there is none yet."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state


@contextmanager
def resumable(folder: Path, name: str, identity: str) -> Iterator[Checkpoint]:
    """The checkpoint of this fingerprint, for the length of a block that trains and then writes the finished model.

    It is deleted when the block succeeds and kept when it does not.  Two trainings with one fingerprint take turns.  Of several
    processes of one training the first has the file; the others need no file system in common with it.
    """
    if not is_main():
        yield Checkpoint(Path(os.devnull))
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{identity[:32]}.pt"
    with _acquire(FileLock(path.with_suffix(".lock")), name):
        checkpoint = Checkpoint(path)
        yield checkpoint
        path.unlink(missing_ok=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)


def _acquire(lock: FileLock, name: str) -> AcquireReturnProxy[FileLock]:
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that trains the same {name} (it holds {lock.lock_file})", file=sys.stderr, flush=True)
        return lock.acquire()
