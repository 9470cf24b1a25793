"""Write to a row of MLflow.

Everything may be written twice: a parameter is written once, an equal number, point or tag is skipped, a file
replaces the one with its name.  So a stage that was killed and goes on leaves no doubled points.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.tracking.results import image_name, is_record, legal, read_curve_points, read_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as Row
    from PIL.Image import Image

PARAM_LENGTH, TAG_LENGTH, PROFILE_LENGTH = 6000, 8000, 16_000_000  # MLflow's limits
BATCH = 500  # points in a request at most; MLflow takes 1000
FLUSH_SECONDS = 10.0  # points wait no longer than this, so that a curve can be watched while it grows


class RowWriter:
    """Writes to one row.  The methods raise what MLflow raises."""

    def __init__(self, client: MlflowClient, row: Row) -> None:
        self.client, self.row = client, row
        self.id: str = row.info.run_id
        self.tags: dict[str, str] = dict(row.data.tags)
        self.status: str = row.info.status
        self._params: dict[str, str] = dict(row.data.params)
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()
        self._clock = 0
        self._points: dict[str, dict[int, float]] = {}  # curve -> step -> value, as far as the row has them

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Write the tags that differ.  Names and values are shortened to MLflow's limits."""
        from mlflow.entities import RunTag

        fitting = {legal(name): shorten(value, TAG_LENGTH) for name, value in tags.items()}
        new = {name: value for name, value in fitting.items() if self.tags.get(name) != value}
        if new:
            self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in new.items()])
            self.tags |= new

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Write the parameters that the row lacks."""
        from mlflow.entities import Param

        new = {name: text for name, text in param_texts(params).items() if name not in self._params}
        if new:
            self.client.log_batch(self.id, params=[Param(name, text) for name, text in new.items()])
            self._params |= new

    def set_status(self, status: str, *, at: int | None = None) -> None:
        """Set RUNNING, FINISHED, FAILED or KILLED.  at: the end, in milliseconds; None: now."""
        if status == self.status:
            return
        if status == "RUNNING":
            self.client.update_run(self.id, status=status)
        else:
            self.client.set_terminated(self.id, status, end_time=at)
        self.status = status

    def log_curve(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Write points of curves, such as ddpm/loss, at this number of images.  They are sent in batches."""
        for name, value in values.items():
            self._add_point(legal(name), images_seen, float(value))
        if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Write final numbers, at step 0.  Another value replaces the one of the row."""
        for name, value in values.items():
            self._add_point(legal(name), 0, float(value), at=self.row.info.start_time)
        self.flush()

    def log_model_metrics(self, values: Mapping[str, float], model_id: str, dataset: tuple[str, str]) -> None:
        """Link numbers to a logged model and a data set (name, digest), by which MLflow ranks models."""
        from mlflow.entities import Metric

        found = self.client.get_logged_model(model_id).metrics or []
        known = {(each.key, each.value) for each in found if each.run_id == self.id}
        new = [(legal(name), value) for name, value in values.items() if (legal(name), value) not in known]
        if new:
            at = self.row.info.start_time  # as in log_metrics: MLflow adds no equal point with an equal time
            self.client.log_batch(self.id, [Metric(*each, at, 0, model_id, *dataset) for each in new])

    def log_results(self, files: Iterable[Path]) -> None:
        """Write files below metrics/; results.py says under which names.

        JSON: the file, and its numbers unless it is a full record.  CSV: points of curves.  PNG: a picture.
        HTML: the file, which MLflow shows.
        """
        for path in files:
            if path.suffix == ".json":
                self.log_file(path, "metrics/evaluation" if is_record(path) else "metrics")
                if not is_record(path):
                    self.log_metrics(read_metrics(path))
            elif path.suffix == ".csv":
                for images, values in read_curve_points(path):
                    self.log_curve(images, values)
            elif path.suffix == ".html":
                self.log_file(path, "report")
            elif path.suffix == ".png":
                from PIL import Image

                with Image.open(path) as picture:
                    self.log_image(image_name(path), 0, picture)
        self.flush()

    def log_image(self, key: str, step: int, image: Image) -> None:
        """Write a picture, which MLflow shows in its image grid, with a slider over the steps of a key.

        MLflow's own log_image gives each file a random name, so that pictures pile up when a stage runs
        again.  These names have the form that its pages read, but depend on key and step only.  The pages
        show the file marked "compressed", in MLflow a blurred one of 256 pixels; here it is lossless.
        """
        key = legal(key)
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{self.row.info.start_time}"
        name += f"+{uuid.uuid5(uuid.NAMESPACE_URL, f'{key}/{step}')}"
        self._send(f"images/{name}.png", lambda path: image.save(path))
        self._send(f"images/{name}+compressed.webp", lambda path: image.save(path, lossless=True))
        self.set_tags({"mlflow.loggedImages": "True"})

    def log_file(self, path: Path, folder: str) -> None:
        """Write a file as an artifact below the folder."""
        self.log_content(f"{folder}/{path.name}", path.read_bytes())

    def log_content(self, artifact: str, content: bytes) -> None:
        """Write an artifact with this content."""
        self._send(artifact, lambda path: path.write_bytes(content))

    def log_dataset(
        self, name: str, digest: str, source: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> None:
        """Write what the models learn from, as an input of the row."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        if any(entry.dataset.digest == digest for entry in self.row.inputs.dataset_inputs):
            return
        profile = json.dumps(manifest, sort_keys=True)
        if len(profile) > PROFILE_LENGTH:  # a set with very many classes
            short = {key: value for key, value in manifest.items() if key not in ("classes", "splits")}
            profile = json.dumps(short, sort_keys=True)
        dataset = Dataset(name, digest, "dvc", json.dumps(source), profile=profile)
        tags = [InputTag("mlflow.data.context", "training")]
        inputs = [DatasetInput(dataset, tags)]
        try:
            self.client.log_inputs(self.id, inputs)
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            # MLflow looks for the data set and then adds it; between the two another row has added it.
            self.client.log_inputs(self.id, inputs)
        self.row = self.client.get_run(self.id)

    def flush(self) -> None:
        """Send the points that wait."""
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.client.log_batch(self.id, metrics=waiting)

    def _add_point(self, name: str, step: int, value: float, *, at: int | None = None) -> None:
        """Keep a point for the next batch, unless the row has it.  at: the time of the first of its name."""
        from mlflow.entities import Metric

        known = self._known_points(name)
        if known.get(step) == value:
            return
        # Each point is later than the last: of two values at one step MLflow shows the later, of two at one
        # time the larger.
        self._clock = max(self._clock + 1, time.time_ns() // 1_000_000)
        self._waiting.append(Metric(name, value, self._clock if known or at is None else at, step))
        known[step] = value

    def _known_points(self, name: str) -> dict[int, float]:
        if name not in self._points:
            known = self._points[name] = {}
            if name in self.row.data.metrics:  # else the row has none
                history = self.client.get_metric_history(self.id, name)
                history = sorted(history, key=lambda point: point.timestamp)
                known.update((point.step, point.value) for point in history)
        return self._points[name]

    def _send(self, artifact: str, write: Callable[[Path], object]) -> None:
        folder, _, name = artifact.rpartition("/")
        with tempfile.TemporaryDirectory() as local:
            write(Path(local, name))
            self.client.log_artifact(self.id, str(Path(local, name)), folder or None)


def read_artifact(client: MlflowClient, run_id: str, artifact: str) -> bytes | None:
    """Return an artifact's content, None if the row does not have it."""
    folder = artifact.rpartition("/")[0]
    if artifact not in {file.path for file in client.list_artifacts(run_id, folder or None)}:
        return None
    with tempfile.TemporaryDirectory() as local:
        return Path(client.download_artifacts(run_id, artifact, local)).read_bytes()


def param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters as MLflow takes them."""
    return {legal(name): shorten(str(value), PARAM_LENGTH) for name, value in params.items()}


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
