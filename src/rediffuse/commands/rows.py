"""Find an MLflow row by its id or name, and read its artifacts."""

from __future__ import annotations

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


def find_row(name: str, what: str = "row") -> tuple[MlflowClient, MlflowRun]:
    """Return the row of this id or name; of several attempts, the one that is not superseded.

    what: is sought, for the error.  Raises UserError for an unknown or ambiguous name, a store that cannot be
    read, and outside a checkout.
    """
    uri = tracking_uri(repository_root())
    shown = PASSWORD.sub("//", uri)
    unknown = f"no {what} is called {name!r}; look it up with `dvc exp show` or `make ui`"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"{unknown} (there is no store yet: {shown})")  # to open it would make it
    with _reading(f"{unknown}: {shown}"):
        client = connect(uri)
        rows = _rows(client, name)
    if not rows:
        raise UserError(f"{unknown} ({shown} has no such row)")
    if len(rows) > 1:
        started = [datetime.fromtimestamp(row.info.start_time / 1000, UTC) for row in rows]
        listed = [
            f"\n  {row.info.run_id}, {at:%Y-%m-%d %H:%M} UTC" for row, at in zip(rows, started, strict=True)
        ]
        raise UserError(f"several rows are called {name!r}; give the id of one of them:{''.join(listed)}")
    return client, rows[0]


def download(client: MlflowClient, row: MlflowRun, path: str, folder: Path) -> Path:
    """Copy an artifact, a file or a folder, below `folder`.  Return its path there.

    Raises UserError if it cannot be read.
    """
    with _reading(f"artifact {path} of row {row.info.run_name}"):
        return Path(client.download_artifacts(row.info.run_id, path, str(folder)))


def find_artifact(client: MlflowClient, row: MlflowRun, path: str) -> bytes | None:
    """Return the content of an artifact, None if the row lacks it.  Raises UserError if it cannot be read."""
    with _reading(f"artifact {path} of row {row.info.run_name}"):
        return writer.read_artifact(client, row.info.run_id, path)


def read_artifact(client: MlflowClient, row: MlflowRun, path: str) -> bytes:
    """Return the content of an artifact.  Raises UserError if the row lacks it or it cannot be read."""
    if (content := find_artifact(client, row, path)) is None:
        lacks = f"row {row.info.run_name} has no artifact {path}"
        raise UserError(f"{lacks}: complete it with `rediffuse sync`")
    return content


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn the errors of MLflow, which are those of its database, server or disk, into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        remedy = "mend the store, or set MLFLOW_TRACKING_URI to the one that has the row"
        raise UserError(f"{what} cannot be read ({one_line(error)}): {remedy}") from None


def _rows(client: MlflowClient, name: str) -> list[MlflowRun]:
    """Return the rows of this id or name in the project's experiment, without those that are superseded."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    quote = '"' if "'" in name else "'"  # MLflow's filters have no escape
    found: list[MlflowRun] = []
    for key in ("run_id", "run_name") if experiment and quote not in name else ():
        found += client.search_runs([experiment.experiment_id], f"attributes.{key} = {quote}{name}{quote}")
    return [row for row in found if row.data.tags.get("rediffuse.superseded") != "true"] or found
