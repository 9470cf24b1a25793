"""Where rows are kept: an MLflow tracking server, or SQLite under the root of the repository."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.views import TAG, view_of

if TYPE_CHECKING:
    from filelock import FileLock
    from mlflow import MlflowClient

EXPERIMENT = "rediffuse"  # MLflow's name for the table that all rows of this project stand in
LOCK_SECONDS = 180.0  # as long as others may take to make the store (5 s of work, once, on a machine that is perhaps busy) and rows


def repository_root() -> Path:
    """The root of the repository, also from the temporary workspace of `dvc exp run --temp` or `--queue`.

    There the nearest .dvc is that of the workspace, which is deleted afterwards: DVC names the parent in DVC_ROOT.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    return checkout_root()


def checkout_root() -> Path:
    """The nearest folder at or above the working directory that holds .dvc.  Raises UserError if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(f"no .dvc in {here} or above it: not inside a DVC repository; change into the checkout of rediffuse")


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if set to an address that means the same from every working directory, else SQLite under root."""
    default = f"sqlite:///{root}/.mlflow/mlflow.db"
    chosen = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not chosen:
        return default
    scheme, _, place = chosen.partition("://")
    if not place or (scheme == "sqlite" and not place.startswith("//")):
        warn(
            f"MLFLOW_TRACKING_URI={chosen} is relative to the working directory and ignored; give an address (http://...,"
            f" postgresql://...) or an absolute path (sqlite:////...). This row goes to {default}"
        )
        return default
    return chosen


def row_lock(root: Path) -> FileLock:
    """The lock under which the store, the experiment and a row are found or made, one for all processes of a repository."""
    from filelock import FileLock

    path = root / ".dvc" / "tmp" / "rediffuse-row.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=LOCK_SECONDS)


def import_mlflow() -> None:
    """Import MLflow, set to tell nobody what is run here and to fail within seconds where it would try for minutes.  Takes 1.4 s."""
    # A stage must not wait long for a server that is down: MLflow's own defaults are 7 retries of 120 s.
    for name, value in {"MAX_RETRIES": "1", "TIMEOUT": "4", "BACKOFF_FACTOR": "1"}.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read while MLflow is imported
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.store.db.utils

    mlflow.store.db.utils.MAX_RETRY_COUNT = 3  # the default of 10 waits 101 s for a database that cannot be opened
    for noisy in (
        "mlflow.store.db.utils",
        "mlflow.system_metrics",
        "urllib3.connectionpool",
    ):  # they tell each retry
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def connect(uri: str) -> MlflowClient:
    """A client of the store.  Opening one takes 0.5 s, creating one some seconds, once."""
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient, uri: str, root: Path) -> str:
    """The id of MLflow's experiment "rediffuse", made if it is missing.  Call it under the lock of the row.

    A server decides itself where artifacts go.  For a database the place is given: MLflow's default is ./mlruns of whichever
    working directory came first, which may be a temporary workspace.
    """
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
        local = uri.startswith(("sqlite:", "postgresql", "mysql", "mssql"))
        location = (root / ".mlflow" / "artifacts").as_uri() if local else None
        # MLflow's pages open in their view of language models, whatever kind the tag says, until "Model training" is chosen (3.17).
        tags = {TAG: view_of(), "mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
        except MlflowException:  # another checkout, which shares the store and not the lock, may just have made it
            if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
                raise
    return str(found.experiment_id)


def warn(text: str) -> None:
    """One line on stderr, below a progress bar that may stand there."""
    print(f"\nrediffuse: {text}", file=sys.stderr, flush=True)
