"""Checkpoints that survive `kill -9`.

A checkpoint belongs to a fingerprint of everything that the trainer is given (initial weights, images,
labels, settings), the code and the kind of machine.  A run finds only its own checkpoint; another
configuration or input never starts from it.  The numbers of processes and threads change only the last bits,
so they are not part of it: a training can continue with more or fewer.
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
from filelock import FileLock, Timeout
from torch import Tensor

from rediffuse.runtime.processes import is_main

BLOCK = 2**24  # numbers hashed at a time
# The modules that a training runs, if they are loaded.  Tracking and what it imports change no byte of a
# model.
PACKAGES = ("runtime", "images", "vae", "diffusion", "training")
CODE = ("__main__", "stages", *(f"rediffuse.{package}" for package in PACKAGES))


def fingerprint(values: object, tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of values (by their repr), tensors, the loaded code, and the kind of machine."""
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
        """Write the state.  A kill at any moment leaves the last state or this one."""
        unfinished = self.path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def load(self) -> dict[str, Any] | None:
        """Return the last state, or None if there is none yet."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state


@contextmanager
def resumable(folder: Path, name: str, identity: str) -> Iterator[Checkpoint]:
    """Hold the checkpoint of this fingerprint during a block that trains and then writes the finished model.

    It is deleted if the block succeeds and kept if it fails.  Two trainings with one fingerprint take turns.
    Of several processes of a training only the main one has the file, which the others need not be able to
    read.
    """
    if not is_main():
        yield Checkpoint(Path(os.devnull))
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{identity[:32]}.pt"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        waiting = f"waiting for another process that trains the same {name} (it holds {lock.lock_file})"
        print(waiting, file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        yield Checkpoint(path)
        path.unlink(missing_ok=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)
