"""Contenders in processes of their own, which work in turns: A B C A B C.

A machine has slower and faster minutes.  Turns of one round share them, so ratios within a round vary less
than times do. In its own process a contender has its own peak of memory, and finds no caches or threads of
the others.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

Turn = Callable[[], Any]
Factory = Callable[[], Turn]  # called in the worker: a function of a module, or a functools.partial of one

_turn: Turn  # of this worker


class Workers:
    """One process for each contender, alive within `with`.  They are set up one after the other."""

    def __init__(self, contenders: Mapping[str, Factory]) -> None:
        os.environ["TQDM_DISABLE"] = "1"  # workers read it when they import tqdm: no bars between the tables
        context = multiprocessing.get_context("spawn")
        self.pools = {name: ProcessPoolExecutor(1, context) for name in contenders}
        self.contenders = dict(contenders)

    def __enter__(self) -> Workers:
        try:
            for name, factory in self.contenders.items():
                self._run(name, _set_up, factory)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def turns(self, n: int) -> dict[str, list[Any]]:
        """Return what n rounds returned, by contender.  Raises what a contender raised."""
        rounds = [self.each(_take_turn) for _ in range(n)]
        return {name: [results[name] for results in rounds] for name in self.contenders}

    def each(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Return call() of each worker, one after the other, for example its `peak_mib`."""
        return {name: self._run(name, call) for name in self.contenders}

    def _run(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.pools[name].submit(call, *arguments).result()
        except Exception as error:
            error.add_note(f"in the process of the contender: {name}")
            raise

    def _end(self) -> None:
        for pool in self.pools.values():
            pool.shutdown()


def _set_up(factory: Factory) -> None:
    global _turn
    _turn = factory()


def _take_turn() -> Any:
    return _turn()


def spread(values: Sequence[float]) -> str:
    """Return (max - min) / median, in percent."""
    return f"{(max(values) - min(values)) / statistics.median(values):.0%}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
