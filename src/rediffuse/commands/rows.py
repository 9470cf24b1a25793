"""An MLflow row by the name that the user gives, and its artifacts.  MLflow is imported only when it is needed, which takes 1.4 s."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.identity import PASSWORD, one_line
from rediffuse.tracking.store import EXPERIMENT, connect, repository_root, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


class NotInStoreError(Exception):
    """There is no store, no row of this name in it, or it cannot be read; the text says which."""


def find_row(name: str) -> tuple[MlflowClient, MlflowRun]:
    """The row of this id or name; of several attempts with one name, the one that is not superseded.

    Raises UserError for an unknown or an ambiguous name, a store that cannot be read, and outside a checkout.
    """
    try:
        return look_up(name)
    except NotInStoreError as unknown:
        raise UserError(f"no row is called {name!r}: {unknown}; look its id or name up with `make ui`") from None


def look_up(name: str) -> tuple[MlflowClient, MlflowRun]:
    """As `find_row`, but raises NotInStoreError where the store does not know the name or cannot be read."""
    uri = tracking_uri(repository_root())
    shown = PASSWORD.sub("//", uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise NotInStoreError(f"there is no store yet ({shown})")  # opening it would make one
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with _reading(shown):
        client = connect(uri)
        return client, _row(client, name, shown)


def download(client: MlflowClient, row: MlflowRun, path: str, folder: Path) -> Path:
    """Copy an artifact, a file or a folder, below `folder`; its place there.  Raises NotInStoreError where that fails."""
    with _reading(f"artifact {path} of row {row.info.run_name}"):
        return Path(client.download_artifacts(row.info.run_id, path, str(folder)))


def artifacts(client: MlflowClient, row: MlflowRun, folder: str) -> list[str]:
    """The paths of the artifacts directly in a folder of the row.  Raises NotInStoreError where the store cannot be read."""
    with _reading(f"the artifacts of row {row.info.run_name}"):
        return [artifact.path for artifact in client.list_artifacts(row.info.run_id, folder)]


def read_artifact(client: MlflowClient, row: MlflowRun, path: str) -> bytes:
    """The content of an artifact.  Raises UserError if the row lacks it or it cannot be read."""
    try:
        if path in artifacts(client, row, path.rpartition("/")[0]):
            with tempfile.TemporaryDirectory() as folder:
                return download(client, row, path, Path(folder)).read_bytes()
    except NotInStoreError as error:
        raise UserError(f"{error}; mend the store, or set MLFLOW_TRACKING_URI to the one that has the row") from None
    raise UserError(f"row {row.info.run_name} has no artifact {path}: complete it with `rediffuse sync`, then try again")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever MLflow raises, which is what its database, server or file system raise, into NotInStoreError."""
    try:
        yield
    except (UserError, NotInStoreError):
        raise
    except Exception as error:
        raise NotInStoreError(f"{what} cannot be read ({one_line(error)})") from None


def _row(client: MlflowClient, name: str, shown: str) -> MlflowRun:
    """The row of this id or name in the project's experiment."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    ids = [experiment.experiment_id] if experiment else []
    quote = '"' if "'" in name else "'"  # MLflow's filters know no escape
    wanted = [f"attributes.{key} = {quote}{name}{quote}" for key in ("run_id", "run_name")] if quote not in name else []
    found = [row for query in wanted if ids for row in client.search_runs(ids, query)]
    if not found:
        raise NotInStoreError(f"no run of this id or name ({shown})")
    rows = [row for row in found if row.data.tags.get("rediffuse.superseded") != "true"] or found
    if len(rows) > 1:
        started = [f"{datetime.fromtimestamp(row.info.start_time / 1000, UTC):%Y-%m-%d %H:%M}" for row in rows]
        listed = "".join(f"\n  {row.info.run_id}, {row.info.status}, {when} UTC" for row, when in zip(rows, started, strict=True))
        raise UserError(f"several MLflow runs are called {name!r}; give the id of the one that is meant:{listed}")
    return rows[0]
