"""Which MLflow run is the row of an experiment: found by its key, made once, and replaced visibly when
everything runs again.

A stage that has finished in a row and starts again (`dvc repro -f`, an edited module, `dvc exp run -f` of the
same name) begins another attempt: a new row, below which MLflow's table folds the old one.  A stage that
failed or was killed goes on in its row.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.tracking.identity import Identity
from rediffuse.tracking.results import legal
from rediffuse.tracking.writer import param_texts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Row

PARENT = "mlflow.parentRunId"


def stage_tag(stage: str, what: str) -> str:
    """Return the tag of a row that says this of a stage."""
    return legal(f"stage.{stage}.{what}")


def place_of(root: Path) -> str:
    """Return a name for this checkout on this machine that reveals neither."""
    return hashlib.sha256(f"{platform.node()}:{root}".encode()).hexdigest()[:12]


def claim(
    client: MlflowClient,
    experiment: str,
    identity: Identity,
    params: Mapping[str, Any],
    stage: str,
    place: str,
) -> Row:
    """Return the row in which this stage goes on, or a new one.  Call it under the row lock."""
    rows = find(client, experiment, identity.key)
    current = latest(rows, place)
    if current is None:
        return create(client, experiment, identity, place)
    elsewhere = current.data.tags.get("rediffuse.place") != place
    again = current.data.tags.get(stage_tag(stage, "status")) == "finished"
    if elsewhere or again or not same_params(current, params):
        # A row that another checkout is writing is not replaced.
        old = [] if elsewhere and current.info.status == "RUNNING" else rows
        return create(client, experiment, identity, place, replaces=old)
    return current


def find(client: MlflowClient, experiment: str, key: str) -> list[Row]:
    """Return all rows with this key, the oldest first."""
    query, order = f"tags.`rediffuse.key` = '{key}'", ["attributes.start_time ASC"]
    return list(client.search_runs([experiment], query, order_by=order, max_results=1000))


def latest(rows: Sequence[Row], place: str) -> Row | None:
    """Return the attempt that counts: of those not superseded the last of this checkout, else the last."""
    live = [row for row in rows if row.data.tags.get("rediffuse.superseded") != "true"]
    ours = [row for row in live if row.data.tags.get("rediffuse.place") == place]
    return (ours or live or [None])[-1]


def same_params(row: Row, params: Mapping[str, Any]) -> bool:
    """Return whether the row's parameters, which MLflow lets nobody change, agree with these."""
    texts = param_texts(params)
    return all(texts.get(name) == value for name, value in row.data.params.items())


def create(
    client: MlflowClient,
    experiment: str,
    identity: Identity,
    place: str,
    *,
    replaces: Sequence[Row] = (),
    at: int | None = None,
) -> Row:
    """Make a row that begins `at` (milliseconds).  Those that it replaces are marked and folded below it."""
    attempts = [int(row.data.tags.get("rediffuse.attempt", 1)) for row in replaces]
    attempt = max(attempts, default=0) + 1
    tags = identity.tags | {
        "rediffuse.key": identity.key,
        "rediffuse.attempt": str(attempt),
        "rediffuse.superseded": "false",
        "rediffuse.place": place,
    }
    row = client.create_run(experiment, start_time=at, tags=tags, run_name=identity.name)
    client.set_tag(row.info.run_id, "mlflow.note.content", _description(row.info.run_id, identity, attempt))
    for old, number in zip(replaces, attempts, strict=True):
        client.set_tag(old.info.run_id, "rediffuse.superseded", "true")
        client.set_tag(old.info.run_id, PARENT, row.info.run_id)
        client.update_run(old.info.run_id, name=f"{identity.name} (attempt {number})")
    return client.get_run(row.info.run_id)


def _description(run_id: str, identity: Identity, attempt: int) -> str:
    tags = identity.tags
    if "dvc.exp_name" in tags:
        origin = f"Experiment `{tags['dvc.exp_name']}` of DVC on commit `{tags['dvc.baseline'][:12]}`"
    else:
        origin = f"`dvc repro` on commit `{tags.get('mlflow.source.git.commit', 'none')[:12]}`"
    changed = ", with changed code (`recipe/code.diff`)" if identity.code_diff else ""
    again = f", attempt {attempt}" if attempt > 1 else ""
    remedy = f"Rebuild it and compare every hash:\n\n    rediffuse rebuild {run_id}\n"
    return f"{origin}{changed}{again}.\n\n{remedy}"
