"""The row: one MLflow run per experiment, which every stage of it finds, resumes and adds to.

    with stage_run("train_ddpm", params) as run:
        run.log_curve(images, {"ddpm/loss": loss})              # while training
        ...                                                     # the stage writes its files, then
        run.log_results(Path("metrics/train_ddpm.json"), Path("metrics/plots/train_ddpm"))

Tracking changes no byte of an output and fails no stage.  On the first error (server down, disk full, read-only) it says so in
one line on stderr and is off for the rest of the stage.  REDIFFUSE_TRACKING=off switches it off altogether.

Everything may be logged again: parameters are written once, a number or point that stands there already is skipped, a picture
replaces the one of its name.  So a killed and resumed stage leaves no doubled points, and `dvc repro -f` on the same commit and
parameters goes over the same row, where the latest value of a metric counts.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from rediffuse.params import Params, flatten
from rediffuse.tracking.identity import Identity, identify
from rediffuse.tracking.results import image_name, is_record, legal, read_curve_points, read_metrics, result_files
from rediffuse.tracking.store import connect, experiment_id, repository_root, tracking_uri, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as Row

PARAM_LENGTH, TAG_LENGTH = 6000, 8000  # MLflow's limits
BATCH = 500  # points kept back at most; MLflow takes 1000 at once
FLUSH_SECONDS = 10.0  # points are kept back no longer, so that a curve can be watched while it grows
LOCK_SECONDS = 60.0  # as long as a row may take to be found or made by another process

P = ParamSpec("P")


@contextmanager
def stage_run(stage: str, params: Params, *, complete: bool = False) -> Iterator[Run]:
    """The row of this experiment, open for the stage (its name in dvc.yaml) while the block runs.

    The row says running meanwhile, then finished; failed if the block raises, is interrupted or is terminated (SIGTERM ends
    the process with status 143).  With `complete`, the results of stages that DVC did not need to run are then added.
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
        if complete:
            run.log_up_to_date_stages()


def _never_fails(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Run a method of Run so that neither an error nor a drawn random number gets out.  Within another such method the outer
    one catches."""

    @functools.wraps(method)
    def guarded(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run._off:
            return
        if run._guarded:
            method(run, *args, **kwargs)
            return
        run._guarded = True
        state = random.getstate()  # MLflow and urllib3 draw pauses between retries from the global generator
        try:
            method(run, *args, **kwargs)
        except Exception as error:
            run._give_up(error)
        finally:
            run._guarded = False
            random.setstate(state)

    return guarded


class Run:
    """What a stage adds to the row.  No method raises because of tracking; each may be called many times."""

    _client: MlflowClient
    _row: Row
    _tags: dict[str, str]

    def __init__(self, stage: str) -> None:
        self._stage = stage
        # Of the processes of a data-parallel stage the first one logs.
        self._off = os.environ.get("REDIFFUSE_TRACKING", "").lower() == "off" or os.environ.get("RANK", "0") != "0"
        self._guarded = False
        self._began = time.perf_counter()
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()
        self._clock = 0
        self._points: dict[str, dict[int, float]] = {}  # curve -> images seen -> value, as far as the row has them

    @_never_fails
    def log_curve(self, images_seen: int, values: dict[str, float]) -> None:
        """Points of curves named "model/quantity", such as ddpm/loss, at this number of images.  Sent in batches."""
        for name, value in values.items():
            self._add_point(legal(name), images_seen, float(value))
        if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    @_never_fails
    def log_metrics(self, values: dict[str, float]) -> None:
        """Final numbers, without a step.  A value that differs from the row's replaces it."""
        for name, value in values.items():
            self._add_point(legal(name), 0, float(value))
        self._flush()

    @_never_fails
    def log_results(self, *places: Path) -> None:
        """What the stage has written under metrics/, files or whole folders; names in the row are made by results.py.

        metrics/NAME.json: its numbers, and the file.  metrics/evaluation/NAME.json: the file alone, it is the full record behind the
        numbers.  Curves (CSV): their points, those already logged while training are skipped.  PNG: as pictures.
        """
        for path in result_files(places):
            if is_record(path):
                self.log_file(path, "metrics/evaluation")
            elif path.suffix == ".json":
                self.log_metrics(read_metrics(path))
                self.log_file(path, "metrics")
            elif path.suffix == ".csv":
                for images, values in read_curve_points(path):
                    self.log_curve(images, values)
            elif path.suffix == ".png":
                self.log_image(*image_name(path), path)
        self._flush()

    @_never_fails
    def log_image(self, key: str, step: int, image: Path) -> None:
        """A PNG, shown by MLflow in an image grid: rows side by side for the same key and step.

        MLflow's own log_image gives each picture a random name, so that pictures pile up when a stage runs again.  The names
        here are of the same form, which its UI parses, but come from key and step.  The UI shows the file marked "compressed",
        by MLflow a blurred one of 256 pixels; here it is as sharp as the PNG.
        """
        from PIL import Image

        key = legal(key)
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{self._row.info.start_time}"
        name += f"+{uuid.uuid5(uuid.NAMESPACE_URL, f'{key}/{step}')}"
        with tempfile.TemporaryDirectory() as folder:
            full, shown = Path(folder, f"{name}.png"), Path(folder, f"{name}+compressed.webp")
            shutil.copyfile(image, full)
            with Image.open(image) as picture:
                picture.save(shown, lossless=True)
            for path in (full, shown):
                self._client.log_artifact(self._row.info.run_id, str(path), "images")
        self._set_tags({"mlflow.loggedImages": "True"})

    @_never_fails
    def log_file(self, path: Path, folder: str) -> None:
        """A file as an artifact of the row, under the folder."""
        self._client.log_artifact(self._row.info.run_id, str(path), folder)

    @_never_fails
    def log_up_to_date_stages(self) -> None:
        """Add numbers, curves and pictures of the stages that DVC finds up to date, as those that started no process.

        A stage that has not run in this row is tagged as cached.  Stages that are not up to date are left out: what lies in
        metrics/ is then of other parameters.
        """
        from rediffuse.tracking.cached import up_to_date_results

        for stage, files in up_to_date_results().items():
            self.log_results(*files)
            if self._tags.get(_stage_tag(stage, "status")) != "finished":
                self._set_tags({_stage_tag(stage, "status"): "cached"})
        self._log_recipe()

    @_never_fails
    def _start(self, params: dict[str, Any]) -> None:
        from filelock import FileLock

        root = repository_root()
        uri = tracking_uri(root)
        lock = root / ".dvc" / "tmp" / "rediffuse-row.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        # MLflow makes a new database, an experiment and a run without a lock: two processes would collide or make two rows.
        with FileLock(lock, timeout=LOCK_SECONDS):
            self._client = connect(uri)
            self._row = _find_or_create(self._client, experiment_id(self._client, uri, root), identify(params))
            self._tags = dict(self._row.data.tags)
            self._write_params(params)
        tags = {_stage_tag(self._stage, "status"): "running"}
        if (error := _stage_tag(self._stage, "error")) in self._tags:
            tags[error] = ""
        self._set_tags(tags)
        self._client.update_run(self._row.info.run_id, status="RUNNING")

    @_never_fails
    def _end(self, error: BaseException | None) -> None:
        self._flush()
        tags = {_stage_tag(self._stage, "status"): "failed" if error else "finished"}
        if error:
            tags[_stage_tag(self._stage, "error")] = f"{type(error).__name__}: {error}"
        else:
            self.log_metrics({f"seconds/{self._stage}": time.perf_counter() - self._began})
            self._log_recipe()
        self._set_tags(tags)
        self._client.set_terminated(self._row.info.run_id, "FAILED" if error else "FINISHED")

    def _write_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        there = self._row.data.params
        new = [Param(legal(name), _shorten(str(value), PARAM_LENGTH)) for name, value in params.items() if legal(name) not in there]
        self._client.log_batch(self._row.info.run_id, params=new)

    def _log_recipe(self) -> None:
        for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
            if Path(name).is_file():
                self.log_file(Path(name), "recipe")

    def _set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = {legal(name): _shorten(value, TAG_LENGTH) for name, value in tags.items()}
        self._client.log_batch(self._row.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self._tags |= tags

    def _add_point(self, name: str, step: int, value: float) -> None:
        """Keep a point for the next batch, unless the row has it."""
        from mlflow.entities import Metric

        known = self._known_points(name)
        if known.get(step) == value:
            return
        known[step] = value
        # Strictly later than the last, because of two values for a step MLflow shows the later, and of two at a time the larger.
        self._clock = max(self._clock + 1, time.time_ns() // 1_000_000)
        self._waiting.append(Metric(name, value, self._clock, step))

    def _known_points(self, name: str) -> dict[int, float]:
        if name not in self._points:
            known = self._points[name] = {}
            if name in self._row.data.metrics:  # else the row was found without it
                history = self._client.get_metric_history(self._row.info.run_id, name)
                for point in sorted(history, key=lambda point: point.timestamp):
                    known[point.step] = point.value
        return self._points[name]

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        self._client.log_batch(self._row.info.run_id, metrics=waiting)

    def _give_up(self, error: Exception) -> None:
        self._off = True
        self._waiting.clear()
        reason = _shorten(" ".join(f"{type(error).__name__}: {error}".split()), 400)
        warn(f"tracking is off for the rest of stage {self._stage}, which goes on without: {reason}")


def _find_or_create(client: MlflowClient, experiment: str, identity: Identity) -> Row:
    """The row with this key; the oldest, should machines that share a server have made two."""
    query = f"tags.`rediffuse.key` = '{identity.key}'"
    if found := client.search_runs([experiment], query, order_by=["attributes.start_time ASC"], max_results=1):
        return found[0]
    return client.create_run(experiment, tags=identity.tags, run_name=identity.name)


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


def _stage_tag(stage: str, what: str) -> str:
    return legal(f"stage.{stage}.{what}")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
