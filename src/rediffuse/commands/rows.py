"""Find an MLflow row by its id or name, and read its artifacts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking import writer
from rediffuse.tracking.identity import PASSWORD, one_line
from rediffuse.tracking.store import EXPERIMENT, connect, repository_root, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


class NotInStoreError(Exception):
    """There is no store, no row of this name in it, or it cannot be read; the text says which."""


def find_row(name: str) -> tuple[MlflowClient, MlflowRun]:
    """Return the row of this id or name; of several attempts, the one that is not superseded.

    Raises UserError for an unknown or ambiguous name, a store that cannot be read, and outside a checkout.
    """
    try:
        return look_up(name)
    except NotInStoreError as unknown:
        raise UserError(
            f"no row is called {name!r}: {unknown}; look up its id or name with `make ui`"
        ) from None


def look_up(name: str) -> tuple[MlflowClient, MlflowRun]:
    """Do as `find_row`, but raise NotInStoreError if the name is unknown or the store cannot be read."""
    uri = tracking_uri(repository_root())
    shown = PASSWORD.sub("//", uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise NotInStoreError(f"there is no store yet ({shown})")  # to open it would make it
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with _reading(shown):
        client = connect(uri)
        return client, _row(client, name, shown)


def download(client: MlflowClient, row: MlflowRun, path: str, folder: Path) -> Path:
    """Copy an artifact, a file or a folder, below `folder`.  Return its path there.

    Raises NotInStoreError if it cannot be read.
    """
    with _reading(f"artifact {path} of row {row.info.run_name}"):
        return Path(client.download_artifacts(row.info.run_id, path, str(folder)))


def artifacts(client: MlflowClient, row: MlflowRun, folder: str) -> list[str]:
    """Return the paths of the artifacts in a folder of the row.  Raises NotInStoreError if that fails."""
    with _reading(f"the artifacts of row {row.info.run_name}"):
        return [artifact.path for artifact in client.list_artifacts(row.info.run_id, folder)]


def read_artifact(client: MlflowClient, row: MlflowRun, path: str) -> bytes:
    """Return the content of an artifact.  Raises UserError if the row lacks it or it cannot be read."""
    try:
        with _reading(f"artifact {path} of row {row.info.run_name}"):
            content = writer.read_artifact(client, row.info.run_id, path)
    except NotInStoreError as error:
        remedy = "mend the store, or set MLFLOW_TRACKING_URI to the one that has the row"
        raise UserError(f"{error}; {remedy}") from None
    if content is None:
        lacks = f"row {row.info.run_name} has no artifact {path}"
        raise UserError(f"{lacks}: complete it with `rediffuse sync`")
    return content


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn the errors of MLflow, which are those of its database, server or disk, into NotInStoreError."""
    try:
        yield
    except (UserError, NotInStoreError):
        raise
    except Exception as error:
        raise NotInStoreError(f"{what} cannot be read ({one_line(error)})") from None


def _row(client: MlflowClient, name: str, shown: str) -> MlflowRun:
    """Return the row of this id or name in the project's experiment."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    quote = '"' if "'" in name else "'"  # MLflow's filters have no escape
    found: list[MlflowRun] = []
    for key in ("run_id", "run_name") if experiment and quote not in name else ():
        found += client.search_runs([experiment.experiment_id], f"attributes.{key} = {quote}{name}{quote}")
    if not found:
        raise NotInStoreError(f"no run of this id or name ({shown})")
    rows = [row for row in found if row.data.tags.get("rediffuse.superseded") != "true"] or found
    if len(rows) > 1:
        lines = [f"several MLflow runs are called {name!r}; give the id of one of them:"]
        for row in rows:
            started = datetime.fromtimestamp(row.info.start_time / 1000, UTC)
            lines.append(f"{row.info.run_id}, {row.info.status}, {started:%Y-%m-%d %H:%M} UTC")
        raise UserError("\n  ".join(lines))
    return rows[0]
