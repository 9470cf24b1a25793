"""The row: one MLflow run per experiment, which every stage of it finds, resumes and adds to.

    with stage_run("train_ddpm", params) as run:
        run.log_curve(images, {"ddpm/loss": loss})              # while training
        ...                                                     # the stage writes its files, then
        run.log_results(Path("metrics/train_ddpm.json"), Path("metrics/plots/train_ddpm"))

Tracking changes no byte of an output and fails no stage.  On the first error (server down, disk full, read-only) it says so in
one line on stderr and is off for the rest of the stage; `rediffuse sync` adds afterwards what was missed.
REDIFFUSE_TRACKING=off switches it off altogether.

Importing MLflow takes as long as importing PyTorch, so the row is opened in a thread while the stage begins to work.  Only that:
everything else is sent from the thread of the stage.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from rediffuse.params import Params, flatten
from rediffuse.tracking.attempts import claim, place_of, stage_tag
from rediffuse.tracking.identity import Identity, identify, one_line
from rediffuse.tracking.lock import unchanged
from rediffuse.tracking.store import checkout_root, connect, experiment_id, import_mlflow, repository_root, row_lock, tracking_uri, warn
from rediffuse.tracking.views import update_view
from rediffuse.tracking.writer import RowWriter

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

P = ParamSpec("P")


@contextmanager
def stage_run(stage: str, params: Params, *, complete: bool = False) -> Iterator[Run]:
    """The row of this experiment, open for the stage (its name in dvc.yaml) while the block runs.

    The row says running meanwhile, then finished; failed if the block raises, is interrupted or is terminated (SIGTERM ends
    the process with status 143).  Then the results of stages that DVC did not need to run are added, by the last process that runs:
    that of the last stage (`complete`), or one whose outputs are those of dvc.lock already, after which DVC runs nothing as a rule.
    """
    run = Run(stage)
    with _terminable():
        run._start(flatten(params))
        run._began = time.perf_counter()
        try:
            yield run
        except SystemExit as exit_:
            run._end(None if exit_.code in (None, 0) else exit_)
            raise
        except BaseException as error:
            run._end(error)
            raise
        run._end(None)
        run._complete(complete)


def _never_fails(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Run a method of Run so that no error gets out.  Within another such method the outer one catches."""

    @functools.wraps(method)
    def guarded(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run._off:
            return
        if run._guarded:
            method(run, *args, **kwargs)
            return
        run._guarded = True
        try:
            method(run, *args, **kwargs)
        except Exception as error:
            run._give_up(error)
        finally:
            run._guarded = False

    return guarded


class Run:
    """What a stage adds to the row.  No method raises because of tracking; each may be called many times."""

    _row: RowWriter
    _system: SystemMetricsMonitor | None = None
    _opening: threading.Thread | None = None
    _failure: Exception | None = None  # of the thread

    def __init__(self, stage: str) -> None:
        self._stage = stage
        # Of the processes of a data-parallel stage the first one logs.
        self._off = os.environ.get("REDIFFUSE_TRACKING", "").lower() == "off" or os.environ.get("RANK", "0") != "0"
        self._guarded = False
        self._began = time.perf_counter()
        self._early: list[tuple[int, dict[str, float]]] = []  # points of curves from before the row was open

    @_never_fails
    def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
        """Points of curves named "model/quantity", such as ddpm/loss, at this number of images.  Sent in batches."""
        if self._opening and self._opening.is_alive():
            self._early.append((images_seen, values))
            return
        writer = self._open_row()
        writer.log_curve(images_seen, values)

    @_never_fails
    def log_results(self, *places: Path) -> None:
        """What the stage has written under metrics/, files or whole folders; names in the row are made by results.py."""
        self._open_row().log_results(*places)

    @_never_fails
    def _start(self, params: dict[str, Any]) -> None:
        root = repository_root()
        identity = identify(checkout_root(), params)  # now: the code may be edited while the stage runs
        self._opening = threading.Thread(target=self._open, args=(root, tracking_uri(root), identity, params), daemon=True)
        self._opening.start()

    def _open(self, root: Path, uri: str, identity: Identity, params: dict[str, Any]) -> None:
        try:
            self._find_row(root, uri, identity, params)
        except Exception as error:
            self._failure = error

    def _find_row(self, root: Path, uri: str, identity: Identity, params: dict[str, Any]) -> None:
        import_mlflow()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow makes a new database, an experiment and a run without a lock: two processes would collide or make two rows.
        with row_lock(root):
            client = connect(uri)
            row = RowWriter(client, claim(client, experiment_id(client, uri, root), identity, params, self._stage, place_of(root)))
            row.set_params(params)
            running = {stage_tag(self._stage, "status"): "running", "rediffuse.process": _this_process(root)}
            of_before = (stage_tag(self._stage, "error"), stage_tag(self._stage, "origin_run"))
            running |= {tag: "" for tag in of_before if tag in row.tags}
            row.set_tags(identity.tags | running)
            row.set_status("RUNNING")
        if identity.code_diff:
            row.log_content("recipe/code.diff", identity.code_diff)
        self._row, self._system = row, SystemMetricsMonitor(row.id, resume_logging=True, tracking_uri=uri)
        self._system.start()

    def _open_row(self) -> RowWriter:
        """The row, when it is open.  Raises what went wrong while it was opened."""
        if self._opening:
            waiting = time.perf_counter()
            self._opening.join()
            self._began += time.perf_counter() - waiting  # no work of the stage
            self._opening = None
            if self._failure:
                raise self._failure
            for images_seen, values in self._early:
                self._row.log_curve(images_seen, values)
        return self._row

    @_never_fails
    def _end(self, error: BaseException | None) -> None:
        from rediffuse.tracking.sync import log_environment, log_recipe

        row = self._open_row()
        if error is None:
            row.log_metrics({f"seconds/{self._stage}": time.perf_counter() - self._began})
            log_recipe(row, checkout_root())
        if "torch" in sys.modules:  # else the stage computes nothing that hangs on it, and importing it takes seconds
            log_environment(row, self._stage)
        row.close()
        if self._system:
            self._system.finish()  # after the row's own requests: a server that does not answer is then known, and waited for once
        row.set_tags({stage_tag(self._stage, "status"): "failed" if error else "finished"})
        if error:
            row.set_tags({stage_tag(self._stage, "error"): f"{type(error).__name__}: {error}"})
        row.set_status("FAILED" if error else "FINISHED")

    @_never_fails
    def _complete(self, last: bool) -> None:
        root = checkout_root()
        if not (last or unchanged(root, self._stage)):
            return
        from rediffuse.tracking.lineage import lineage_of_checkout
        from rediffuse.tracking.sync import complete

        row = self._open_row()
        complete(row, lineage_of_checkout(root, running=self._stage))
        update_view(row.client, row.row.info.experiment_id)

    def _give_up(self, error: Exception) -> None:
        self._off = True  # the monitor of system metrics ends by itself: its thread stops at the first request that fails
        off = f"tracking is off for the rest of stage {self._stage}, which goes on without (`rediffuse sync` adds the rest later)"
        warn(f"{off}: {one_line(error)}")


def _this_process(root: Path) -> str:
    """This process, so that `sync` can tell whether it still runs."""
    import psutil

    return f"{place_of(root)} {os.getpid()} {psutil.Process().create_time():.2f}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that blocks are left in order; Python would die at once."""

    def terminate(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
