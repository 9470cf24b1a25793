"""What is written into a row, by a stage while it runs and by `sync` afterwards.

Everything may be written again: parameters are written once, a number, point, tag or file that stands there already is skipped, a
picture replaces the one of its name.  So a killed and resumed stage leaves no doubled points, and a second `sync` changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.tracking.results import image_name, is_record, legal, read_curve_points, read_metrics, result_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as Row

PARAM_LENGTH, TAG_LENGTH, PROFILE_LENGTH = 6000, 8000, 16_000_000  # MLflow's limits
BATCH = 500  # points kept back at most; MLflow takes 1000 at once
FLUSH_SECONDS = 10.0  # points are kept back no longer, so that a curve can be watched while it grows
FILES = "recipe/files.json"  # {artifact: SHA-256} of what has been uploaded


class RowWriter:
    """Adds to one row.  The methods raise what MLflow raises."""

    def __init__(self, client: MlflowClient, row: Row) -> None:
        self.client, self.row = client, row
        self.id: str = row.info.run_id
        self.tags: dict[str, str] = dict(row.data.tags)
        self.status: str = row.info.status
        self.writes = 0  # how often something was sent
        self._params: dict[str, str] = dict(row.data.params)
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()
        self._clock = 0
        self._points: dict[str, dict[int, float]] = {}  # curve -> step -> value, as far as the row has them
        self._files: dict[str, str] | None = None  # artifact -> SHA-256, read when first needed
        self._new_files = False

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Write those that differ; names and values are made to fit."""
        from mlflow.entities import RunTag

        fitting = {legal(name): shorten(value, TAG_LENGTH) for name, value in tags.items()}
        new = {name: value for name, value in fitting.items() if self.tags.get(name) != value}
        if new:
            self.writes += 1
            self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in new.items()])
            self.tags |= new

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Write the parameters that the row lacks."""
        from mlflow.entities import Param

        texts = param_texts(params)
        if new := {name: text for name, text in texts.items() if name not in self._params}:
            self.writes += 1
            self.client.log_batch(self.id, params=[Param(name, text) for name, text in new.items()])
            self._params |= new

    def set_status(self, status: str, *, at: int | None = None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; the end is now, or `at`, in milliseconds since the epoch."""
        if status == self.status:
            return
        self.writes += 1
        if status == "RUNNING":
            self.client.update_run(self.id, status=status)
        else:
            self.client.set_terminated(self.id, status, end_time=at)
        self.status = status

    def log_curve(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Points of curves named "model/quantity", such as ddpm/loss, at this number of images.  Sent in batches."""
        for name, value in values.items():
            self.add_point(legal(name), images_seen, float(value))
        if self.due():
            self.flush()

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Final numbers, without a step.  A value that differs from the row's replaces it."""
        for name, value in values.items():
            self.add_point(legal(name), 0, float(value))
        self.flush()

    def log_results(self, *places: Path) -> None:
        """Files below metrics/, or whole folders of them; names in the row are made by results.py.

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
        self.flush()

    def log_image(self, key: str, step: int, image: Path) -> None:
        """A PNG, shown by MLflow in an image grid: rows side by side for the same key and step.

        MLflow's own log_image gives each picture a random name, so that pictures pile up when a stage runs again.  The names
        here are of the same form, which its UI parses, but come from key and step.  The UI shows the file marked "compressed",
        by MLflow a blurred one of 256 pixels; here it is as sharp as the PNG.
        """
        from PIL import Image

        key = legal(key)
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{self.row.info.start_time}"
        name += f"+{uuid.uuid5(uuid.NAMESPACE_URL, f'{key}/{step}')}"

        def as_webp(path: Path) -> None:
            with Image.open(image) as picture:
                picture.save(path, lossless=True)

        content = image.read_bytes()
        self._upload(f"images/{name}.png", _sha256(content), lambda path: path.write_bytes(content))
        self._upload(f"images/{name}+compressed.webp", _sha256(content), as_webp)
        self.set_tags({"mlflow.loggedImages": "True"})

    def log_file(self, path: Path, folder: str) -> None:
        """A file as an artifact of the row, under the folder."""
        self.log_content(f"{folder}/{path.name}", path.read_bytes())

    def log_content(self, artifact: str, content: bytes) -> None:
        """An artifact with this content."""
        self._upload(artifact, _sha256(content), lambda path: path.write_bytes(content))

    def log_dataset(self, name: str, digest: str, source: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
        """What the models learn from, as an input of the row, unless the row has it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if any(entry.dataset.digest == digest for entry in self.row.inputs.dataset_inputs):
            return
        profile = json.dumps(manifest, sort_keys=True)
        if len(profile) > PROFILE_LENGTH:  # of very many classes; what there is of each split is in the data themselves
            profile = json.dumps({key: value for key, value in manifest.items() if key not in ("classes", "splits")}, sort_keys=True)
        dataset = Dataset(name, digest, "dvc", json.dumps(source), profile=profile)
        self.writes += 1
        self.client.log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        self.row = self.client.get_run(self.id)

    def artifact(self, path: str) -> bytes | None:
        """An artifact's content, or None if the row has none of this path."""
        folder, _, _ = path.rpartition("/")
        if path not in {file.path for file in self.client.list_artifacts(self.id, folder or None)}:
            return None
        with tempfile.TemporaryDirectory() as local:
            return Path(self.client.download_artifacts(self.id, path, local)).read_bytes()

    def due(self) -> bool:
        """Whether points have been kept back for long enough."""
        return len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS

    def flush(self) -> None:
        """Send the points that were kept back."""
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.writes += 1
            self.client.log_batch(self.id, metrics=waiting)

    def close(self) -> None:
        """Send what was kept back, and the list of files, if it has changed."""
        self.flush()
        if self._new_files:
            content = json.dumps(self._files, indent=1, sort_keys=True).encode()
            self._send(FILES, lambda path: path.write_bytes(content))
            self._new_files = False

    def add_point(self, name: str, step: int, value: float) -> None:
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
            if name in self.row.data.metrics:  # else the row was found without it
                history = self.client.get_metric_history(self.id, name)
                for point in sorted(history, key=lambda point: point.timestamp):
                    known[point.step] = point.value
        return self._points[name]

    def _upload(self, artifact: str, sha256: str, write: Callable[[Path], object]) -> None:
        """Send what `write` makes, unless the row has it; sha256: of what it is made from."""
        if self._files is None:
            self._files = json.loads(self.artifact(FILES) or b"{}")
        if self._files.get(artifact) != sha256:
            self._send(artifact, write)
            self._files[artifact] = sha256
            self._new_files = True

    def _send(self, artifact: str, write: Callable[[Path], object]) -> None:
        self.writes += 1
        folder, _, name = artifact.rpartition("/")
        with tempfile.TemporaryDirectory() as local:
            write(Path(local, name))
            self.client.log_artifact(self.id, str(Path(local, name)), folder or None)


def param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow takes them."""
    return {legal(name): shorten(str(value), PARAM_LENGTH) for name, value in params.items()}


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
