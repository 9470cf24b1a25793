"""Checkpoints that survive `kill -9`.

A checkpoint belongs to a fingerprint of what its bytes depend on: parameters, data, code, kind of machine.  A run finds only its
own; another configuration never warm-starts from it.  The number of processes and threads, which shows in the last bits alone, is
no part of it, so that a training can go on with more or fewer; the trainer says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from rediffuse.runtime.processes import is_main


def fingerprint(configuration: dict[str, Any]) -> str:
    """SHA-256 of the configuration (JSON values), the code that is loaded, and what of the machine and of torch the bits depend on."""
    machine: list[str | None] = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        machine += [torch.cuda.get_device_name(), torch.version.cuda]
    digest = hashlib.sha256(json.dumps([configuration, machine], sort_keys=True).encode())
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = name.partition(".")[0] in ("rediffuse", "stages", "__main__") and not name.startswith("rediffuse.tracking")  # no effect
        if file and ours:
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
def resumable(folder: Path, name: str, configuration: dict[str, Any]) -> Iterator[Checkpoint]:
    """The checkpoint of this configuration, for the length of a block that trains and then writes the finished model.

    It is deleted when the block succeeds and kept when it does not.  Two trainings with one configuration take turns.  Of several
    processes of one training the first has the file; the others need no file system in common with it.
    """
    if not is_main():
        yield Checkpoint(Path(os.devnull))
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{fingerprint(configuration)[:32]}.pt"
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
