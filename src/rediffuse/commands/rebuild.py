"""Run the pipeline of a row again in a fresh clone, and compare every hash and every number."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rediffuse.commands.clone import cloned, differences, repro
from rediffuse.commands.revision import find_commit
from rediffuse.commands.rows import download, find_row, read_artifact
from rediffuse.commands.verdict import compare_metrics, compare_outputs, judge, table
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.attempts import stage_tag
from rediffuse.tracking.lock import Entries, hashes, lock_of, read_lock
from rediffuse.tracking.results import legal, read_metrics
from rediffuse.tracking.store import repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

REMEDY = """
Nothing was run.  If dvc.lock of the row is not complete, run `rediffuse sync --all`.  If raw data is missing,
fetch it with `dvc fetch --all-commits`; data that neither git nor DVC tracks cannot be rebuilt from."""


def rebuild(name: str, *, keep: bool = False) -> str:
    """Rebuild the row of this id or name and print the result.  Write the verdict to the row and return it.

    keep: leave the clone, also if a stage fails.  Raises UserError for a row that is unknown or incomplete,
    that was computed from code in no commit, or whose raw data is missing, and if a stage fails.
    """
    client, row = find_row(name)
    checkout = repository_root()
    params, lock = (read_artifact(client, row, f"recipe/{file}") for file in ("params.yaml", "dvc.lock"))
    commit, origin = find_commit(checkout, row, params, lock)
    click.echo(f"row {row.info.run_name} ({row.info.run_id}), rebuilt from {origin}")
    with cloned(checkout, commit, keep=keep) as clone:
        if keep:
            click.echo(f"clone: {clone}")
        if found := differences(clone, lock):
            raise UserError("\n  ".join([f"{origin} is not what the row was made from:", *found]) + REMEDY)
        if repro(clone):
            remedy = f"look into {clone}" if keep else "run `rediffuse rebuild --keep` to look into the clone"
            raise UserError(f"a stage failed in the clone, as DVC says above: {remedy}")
        rebuilt = lock_of(clone)
        numbers = _read_numbers(clone, rebuilt)
    outputs = compare_outputs(read_lock(lock), rebuilt)
    metrics = compare_metrics(row.data.metrics, numbers, _records(client, row))
    click.echo(f"\n{table(outputs)}\n")
    if diverging := [output.stage for output in outputs if not output.same]:
        click.echo(f"first diverging stage: {diverging[0]}")
    for metric in metrics:
        click.echo(f"metric {metric}")
    if not metrics:
        click.echo(f"metrics: all {len(numbers)} numbers are those of the row")
    same, digest = _compare_environment(client, row, rebuilt)
    verdict = judge(outputs, metrics, same)
    _write_tags(client, row, {"verdict": verdict, "environment": digest, "rev": commit})
    click.echo(verdict)
    return verdict


def _read_numbers(clone: Path, rebuilt: Entries) -> dict[str, float]:
    """Return the numbers in metrics/*.json that the stages have written, named as in the row."""
    paths = [path for entry in rebuilt.values() for path in hashes(entry.get("outs", ()))]
    files = [clone / path for path in paths if Path(path).match("metrics/*.json")]
    return {legal(name): value for file in files for name, value in read_metrics(file).items()}


def _records(client: MlflowClient, row: MlflowRun) -> dict[str, Any]:
    """Return {model: full record of its evaluation}; nothing if the row has none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = download(client, row, "metrics/evaluation", Path(folder)).glob("*.json")
            return {file.stem: json.loads(file.read_bytes()) for file in files}
        except (UserError, ValueError) as error:
            click.echo(f"note: the recorded spread is not known ({error})")
            return {}


def _compare_environment(client: MlflowClient, row: MlflowRun, stages: Iterable[str]) -> tuple[bool, str]:
    """Print how this environment differs from those recorded for the stages.

    Return whether those that are recorded are of this machine class, and the digest of this environment.
    """
    from rediffuse.tracking import environment

    here, same = environment.describe_environment(), True
    by_digest: dict[str, list[str]] = {}
    for stage in stages:
        by_digest.setdefault(row.data.tags.get(stage_tag(stage, "environment"), ""), []).append(stage)
    for digest, names in by_digest.items():
        try:
            recorded = json.loads(read_artifact(client, row, f"recipe/environment/{digest}.json"))
        except (UserError, ValueError):
            click.echo(f"environment of {', '.join(names)}: not recorded")
            continue
        same = same and environment.same_machine_class(recorded, here)
        different = environment.differences(recorded, here) or ["no difference"]
        click.echo("\n  ".join([f"environment of {', '.join(names)}:", *different]))
    return same, environment.environment_digest(here)


def _write_tags(client: MlflowClient, row: MlflowRun, tags: dict[str, str]) -> None:
    tags = tags | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        for name, value in tags.items():
            client.set_tag(row.info.run_id, f"rebuild.{name}", value)
    except Exception as error:  # the verdict may have taken hours: print it even if the server is down by now
        click.echo(f"note: the verdict could not be written to the row ({type(error).__name__}: {error})")
