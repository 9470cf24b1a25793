"""Contenders in processes of their own, told to work one after the other: A B C A B C.

A machine has slower and faster minutes.  Contenders that are measured in turns share them, and the ratio of two turns of the same round
depends on them less than either time does.  In a process of its own, a contender's peak memory is its own too, and no contender finds the
caches, the threads or the memory pool that another left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.report import peak_mib

Result = float | dict[str, Any]
Turn = Callable[[], Result]
Factory = Callable[[], Turn]  # made in the worker: must be picklable, so a function of a module or a functools.partial of one

LEAVE = None
PATIENCE = 10  # seconds until a worker that was told to leave is ended


class WorkerError(RuntimeError):
    """A contender failed; the message holds its own traceback."""


class Workers:
    """One process for each contender, alive within `with`; they are set up one after the other, in the order given.

    Threads: as many as torch takes by itself, or as OMP_NUM_THREADS says.
    """

    def __init__(self, contenders: Mapping[str, Factory]) -> None:
        self.contenders = dict(contenders)
        self.processes: dict[str, tuple[multiprocessing.process.BaseProcess, Connection]] = {}

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        os.environ["TQDM_DISABLE"] = "1"  # in the workers, who read it at import: a contender's own bar would be in the way of the table
        try:
            for name, factory in self.contenders.items():
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(factory, theirs), name=f"contender {name}", daemon=False)
                process.start()
                theirs.close()
                self.processes[name] = process, ours
                self._receive(name)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def turns(self, n: int) -> dict[str, list[Result]]:
        """n rounds in which each contender has one turn; what the turns returned.

        Raises WorkerError, with the traceback of the contender, for one that failed or died (also when it was set up), and
        ModuleNotFoundError for a package that it lacks.
        """
        results: dict[str, list[Result]] = {name: [] for name in self.contenders}
        for _ in range(n):
            for name in self.contenders:
                results[name].append(self._ask(name, "turn"))
        return results

    def peaks(self) -> dict[str, float]:
        """The most resident memory that each worker has had, in MiB: interpreter, libraries and all."""
        return {name: self._ask(name, "peak") for name in self.contenders}

    def _ask(self, name: str, what: str) -> Any:
        try:
            self.processes[name][1].send(what)
        except OSError:
            raise self._died(name) from None
        return self._receive(name)

    def _receive(self, name: str) -> Any:
        try:
            answer, trace, missing = self.processes[name][1].recv()
        except (EOFError, OSError):
            raise self._died(name) from None
        if missing:
            raise ModuleNotFoundError(f"{name} failed:\n{trace}", name=missing)
        if trace:
            raise WorkerError(f"{name} failed:\n{trace}")
        return answer

    def _died(self, name: str) -> WorkerError:
        process, _ = self.processes[name]
        process.join(PATIENCE)
        return WorkerError(f"{name} died with exit code {process.exitcode} (-9: killed, perhaps for want of memory)")

    def _end(self) -> None:
        for process, connection in self.processes.values():
            with contextlib.suppress(OSError):
                connection.send(LEAVE)
            connection.close()
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes = {}


def _work(factory: Factory, connection: Connection) -> None:
    try:
        turn = factory()
        connection.send((None, None, None))
        while (asked := connection.recv()) is not LEAVE:
            connection.send((peak_mib() if asked == "peak" else turn(), None, None))
    except (EOFError, KeyboardInterrupt):  # the parent is gone, or the user ends both
        return
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        connection.send((None, traceback.format_exc(), missing))


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs, two turns of the same round each: of rates, how many times as fast ours is."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
