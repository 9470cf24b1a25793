"""The row: one MLflow run per experiment, which each stage of the experiment finds and adds to.

    with stage_run("train_ddpm", params) as run:
        run.log_curve(images_seen, {"ddpm/loss": loss})      # while training

The results are the files below metrics/ that dvc.yaml declares for the stage: they are written when the block
ends.

Tracking changes no byte of an output and fails no stage.  On the first error (server down, disk full) it says
so in one line on stderr and is off for the rest of the stage; `rediffuse sync` adds later what was missed.
REDIFFUSE_TRACKING=off switches it off.

Importing MLflow takes as long as importing PyTorch, so a thread opens the row while the stage begins to work.
Everything else is sent from the thread of the stage.
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
from rediffuse.tracking.store import (
    checkout_root,
    connect,
    experiment_id,
    import_mlflow,
    repository_root,
    row_lock,
    tracking_uri,
    warn,
)
from rediffuse.tracking.views import update_experiment
from rediffuse.tracking.writer import RowWriter

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

P = ParamSpec("P")


@contextmanager
def stage_run(stage: str, params: Params, *, complete: bool = False) -> Iterator[Run]:
    """Open the row of this experiment for a stage of dvc.yaml while the block runs.

    The row is RUNNING, then FINISHED; FAILED if the block raises, is interrupted or is terminated (SIGTERM
    ends the process with status 143).  The last process of `dvc repro` also adds the results of stages that
    did not have to run: that of the last stage (`complete`), or one whose outputs are those of dvc.lock
    already, after which DVC usually runs nothing.
    """
    run = Run(stage, params)
    with _terminable():
        run._start()
        try:
            yield run
        except SystemExit as exit_:
            run._end(None if exit_.code in (None, 0) else exit_)
            raise
        except BaseException as error:
            run._end(error)
            raise
        run._end(None, complete)


def _never_fails(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Let no error out of a method of Run: the first one switches tracking off."""

    @functools.wraps(method)
    def guarded(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run._off:
            return
        try:
            method(run, *args, **kwargs)
        except Exception as error:
            run._off = True  # the thread of the system metrics stops at its first request that fails
            warn(
                f"tracking is off for the rest of stage {run._stage}, which goes on without"
                f" (`rediffuse sync` adds the rest later): {one_line(error)}"
            )

    return guarded


class Run:
    """What a stage adds to the row.  No method raises because of tracking."""

    _row: RowWriter
    _system: SystemMetricsMonitor
    _opening: threading.Thread | None = None
    _failure: Exception | None = None  # of that thread

    def __init__(self, stage: str, params: Params) -> None:
        self._stage, self._params = stage, params
        # Of the processes of a data-parallel stage the first one logs.
        off = os.environ.get("REDIFFUSE_TRACKING", "").lower() == "off"
        self._off = off or os.environ.get("RANK", "0") != "0"
        self._began = time.perf_counter()
        self._early: list[tuple[int, dict[str, float]]] = []  # points of curves from before the row was open

    @_never_fails
    def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
        """Write points of curves named "model/quantity", such as ddpm/loss, at this number of images."""
        if self._opening and self._opening.is_alive():
            self._early.append((images_seen, values))
        else:
            self._open_row().log_curve(images_seen, values)

    @_never_fails
    def log_model(self, images_seen: int, model: Any) -> None:
        """Draw a few images from a model in training, each time from the same noise, as a picture."""
        from rediffuse.tracking.preview import draw_preview

        key, picture = draw_preview(model, self._params)
        self._open_row().log_image(key, images_seen, picture)

    @_never_fails
    def _start(self) -> None:
        root, params = repository_root(), flatten(self._params)
        identity = identify(checkout_root(), params)  # now: the code may be edited while the stage runs
        arguments = (root, tracking_uri(root), identity, params)
        self._opening = threading.Thread(target=self._open, args=arguments, daemon=True)
        self._opening.start()

    def _open(self, root: Path, uri: str, identity: Identity, params: dict[str, Any]) -> None:
        try:
            self._find_row(root, uri, identity, params)
        except Exception as error:
            self._failure = error

    def _find_row(self, root: Path, uri: str, identity: Identity, params: dict[str, Any]) -> None:
        import_mlflow()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow makes a database, an experiment and a run without a lock: two processes would collide or make
        # two rows.
        with row_lock(root):
            client = connect(uri)
            experiment = experiment_id(client, uri, root)
            found = claim(client, experiment, identity, params, self._stage, place_of(root))
            row = RowWriter(client, found)
            row.set_params(params)
            running = {stage_tag(self._stage, "status"): "running", "rediffuse.process": _this_process(root)}
            before = (stage_tag(self._stage, "error"), stage_tag(self._stage, "origin_run"))
            row.set_tags(identity.tags | running | {tag: "" for tag in before if tag in row.tags})
            row.set_status("RUNNING")
        if identity.code_diff:
            row.log_content("recipe/code.diff", identity.code_diff)
        self._row = row
        self._system = SystemMetricsMonitor(row.id, resume_logging=True, tracking_uri=uri)
        self._system.start()

    def _open_row(self) -> RowWriter:
        """Return the row when it is open.  Raises what went wrong while it was opened."""
        if self._opening:
            waiting = time.perf_counter()
            self._opening.join()
            self._began += time.perf_counter() - waiting  # this is no work of the stage
            self._opening = None
            if self._failure:
                raise self._failure
            for images_seen, values in self._early:
                self._row.log_curve(images_seen, values)
        return self._row

    @_never_fails
    def _end(self, error: BaseException | None, last: bool = False) -> None:
        from rediffuse.tracking.lineage import lineage_of_checkout, lineage_of_stage
        from rediffuse.tracking.sync import complete, log_environment

        row, root, seconds = self._open_row(), checkout_root(), time.perf_counter() - self._began
        if error is None:
            row.log_metrics({f"seconds/{self._stage}": seconds})
        else:
            failed = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            row.set_tags({stage_tag(self._stage, what): value for what, value in failed.items()})
        # A stage without torch does not depend on the environment, and importing torch takes seconds.
        if "torch" in sys.modules:
            log_environment(row, self._stage)
        row.flush()
        # After our own requests: a server that does not answer is then known, and waited for once.
        self._system.finish()
        row.set_status("FAILED" if error else "FINISHED")
        if error:
            return
        row.set_tags({stage_tag(self._stage, "status"): "finished"})
        all_of_it = last or unchanged(root, self._stage)
        lineage = lineage_of_checkout(root, running=self._stage) if all_of_it else None
        # After `dvc repro --single-item` on stale inputs the checkout's lineage leaves this stage out.
        if lineage is None or self._stage not in lineage.results:
            complete(row, lineage_of_stage(root, self._stage))
        if lineage:
            complete(row, lineage)
            update_experiment(row.client, row.row.info.experiment_id)


def _this_process(root: Path) -> str:
    """Name this process, so that `sync` can tell whether it still runs."""
    import psutil

    return f"{place_of(root)} {os.getpid()} {psutil.Process().create_time():.2f}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that blocks are left in order; Python would end at once."""

    def terminate(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
