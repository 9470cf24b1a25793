"""Where rows are kept: an MLflow tracking server, or SQLite below the root of the repository."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.views import TAG, view_of

if TYPE_CHECKING:
    from filelock import FileLock
    from mlflow import MlflowClient

EXPERIMENT = "rediffuse"  # MLflow's name for the table of rows
LOCK_SECONDS = 180.0  # making the store takes 5 s, once, and longer on a busy machine
DATABASE = ".mlflow/mlflow.db"
# Tables and columns in which MLflow 3.17 keeps absolute addresses of artifacts.
ADDRESSES = [
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
]


def repository_root() -> Path:
    """Return the root of the repository, also in the temporary workspace of `dvc exp run --temp` or
    `--queue`, where DVC names it in DVC_ROOT: the nearest .dvc is that of the workspace, which is deleted.
    """
    root = os.environ.get("DVC_ROOT")
    return Path(root).resolve() if root else checkout_root()


def checkout_root() -> Path:
    """Return the nearest folder at or above the working directory that holds .dvc.

    Raises UserError if there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(
        f"no .dvc in {here} or above it: not inside a DVC repository; change into the checkout of rediffuse"
    )


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI if it means the same in every working directory, else SQLite below root."""
    default = f"sqlite:///{root}/{DATABASE}"
    chosen = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not chosen:
        return default
    scheme, _, place = chosen.partition("://")
    if not place or (scheme == "sqlite" and not place.startswith("//")):
        warn(
            f"MLFLOW_TRACKING_URI={chosen} is relative to the working directory and ignored; give an address"
            f" (http://..., postgresql://...) or an absolute path (sqlite:////...). The row goes to {default}"
        )
        return default
    return chosen


def row_lock(root: Path) -> FileLock:
    """Return the lock of a repository, under which the store, the experiment and rows are made."""
    from filelock import FileLock

    path = root / ".dvc" / "tmp" / "rediffuse-row.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=LOCK_SECONDS)


def import_mlflow() -> None:
    """Import MLflow without telemetry, and so that it fails within seconds instead of minutes.

    Takes 1.4 s.
    """
    # A stage must not wait long for a server that is down: MLflow's own defaults are 7 retries of 120 s.
    for name, value in {"MAX_RETRIES": "1", "TIMEOUT": "4", "BACKOFF_FACTOR": "1"}.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read while MLflow is imported
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.store.db.utils

    # The default of 10 waits 101 s for a database that cannot be opened.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 3
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # They report each retry; we report the outcome.
    for noisy in ("mlflow.store.db.utils", "mlflow.system_metrics", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def connect(uri: str) -> MlflowClient:
    """Return a client of the store.  Opening one takes 0.5 s, creating one some seconds, once."""
    import_mlflow()
    from mlflow import MlflowClient

    _follow_checkout(uri)
    return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient, uri: str, root: Path) -> str:
    """Return the id of MLflow's experiment "rediffuse", made if it is missing.  Call it under the row lock.

    A server decides itself where artifacts go.  For a database the place is given: MLflow's default is
    ./mlruns of the first working directory, which may be a temporary workspace.
    """
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
        local = uri.startswith(("sqlite:", "postgresql", "mysql", "mssql"))
        location = (root / ".mlflow" / "artifacts").as_uri() if local else None
        # MLflow 3.17 opens its pages in the view of language models until "Model training" is chosen,
        # whatever the kind.
        tags = {TAG: view_of(), "mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
        except MlflowException:
            # Another checkout, which shares the store but not the lock, may just have made it.
            if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
                raise
    return str(found.experiment_id)


def _follow_checkout(uri: str) -> None:
    """Let the store of a checkout that was moved find its artifacts, whose addresses are absolute."""
    database = Path(uri.removeprefix("sqlite:///"))
    if not uri.endswith(f"/{DATABASE}") or not database.is_file():
        return
    new = (database.parent / "artifacts").as_uri()
    query = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection, connection:
            old = (connection.execute(query, [EXPERIMENT]).fetchone() or [new])[0]
            for table, name in ADDRESSES if old != new else ():
                starts = f"substr({name}, 1, ?) = ?"
                move = f"UPDATE {table} SET {name} = ? || substr({name}, ?) WHERE {starts}"
                connection.execute(move, [new, len(old) + 1, len(old), old])
    except sqlite3.Error:  # no tables yet, or a damaged file: MLflow makes them, or says what is wrong
        return


def warn(text: str) -> None:
    """Print one line on stderr, below a progress bar that may be there."""
    print(f"\nrediffuse: {text}", file=sys.stderr, flush=True)
