"""Make a row's results again from what the row says, in a clone, and compare every hash and every number."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from rediffuse.commands.agreement import agreed_lock
from rediffuse.commands.clone import Stage, bring_inputs, cloned, hash_of, read_pipeline, run_dvc
from rediffuse.commands.revision import find_revision, read_recipe
from rediffuse.commands.rows import NotInStoreError, artifacts, download, find_row, read_artifact
from rediffuse.commands.verdict import compare_metrics, compare_outputs, first_diverging, judge, table
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.lock import Entries, hashes, lock_of
from rediffuse.tracking.results import legal, read_metrics
from rediffuse.tracking.store import repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


def rebuild(name: str, stage: str | None = None, *, keep: bool = False) -> str:
    """Rebuild the row of this id or name, or one stage of it; print what became of it; the verdict, which is also written to the row.

    keep: leave the clone and say where it is, also if a stage fails.  Raises UserError for a row that is not known, that is not
    complete, whose revision or raw data is nowhere to be had, or with which they do not agree, and if a stage fails.
    """
    client, row = find_row(name)
    checkout = repository_root()
    recipe, notes = read_recipe(client, row), list[str]()
    try:
        revision = find_revision(checkout, row, recipe, notes)
    finally:
        for note in notes:
            click.echo(f"note: {note}")
    click.echo(f"row {row.info.run_name} ({row.info.run_id}), rebuilt from {revision.origin}")
    with cloned(checkout, revision, keep=keep) as clone:
        if keep:
            click.echo(f"clone: {clone}")
        pipeline = read_pipeline(clone)
        stages = _chosen(pipeline, stage)
        lock = agreed_lock(checkout, clone, row, revision, recipe, pipeline, stages)
        if stage:
            _prepare_single(client, row, checkout, clone, stages[0], lock)
        else:
            (clone / "dvc.lock").unlink(missing_ok=True)  # so that it says afterwards what has run here, and nothing else
        _repro(clone, stages, stage, keep=keep)
        rebuilt = lock_of(clone)
        outputs = compare_outputs([each.name for each in stages], lock, rebuilt)
        numbers = _read_numbers(clone, stages)
    metrics = compare_metrics(row.data.metrics, numbers, _records(client, row))
    click.echo("\n".join(["", *table(outputs), ""]))
    if diverging := first_diverging(outputs):
        click.echo(f"first diverging stage: {diverging}")
    for metric in metrics:
        click.echo(f"metric {metric}")
    if not metrics:
        click.echo(f"metrics: all {len(numbers)} numbers are those of the row")
    same, digest = _compare_environment(client, row, stages)
    verdict = judge(outputs, metrics, same)
    _write_tags(client, row, stage, {"verdict": verdict, "environment": digest, "rev": revision.commit})
    click.echo(verdict)
    return verdict


def _chosen(pipeline: Sequence[Stage], name: str | None) -> list[Stage]:
    chosen = [stage for stage in pipeline if name in (None, stage.name)]
    if not chosen:
        raise UserError(f"--stage {name} is not in dvc.yaml of this row; its stages are {', '.join(stage.name for stage in pipeline)}")
    return chosen


# Running


def _prepare_single(client: MlflowClient, row: MlflowRun, checkout: Path, clone: Path, stage: Stage, lock: Entries) -> None:
    """Put the inputs of one stage into the clone as they were, from DVC or the row.  Raises UserError if one is missing."""
    others = {name: entry for name, entry in lock.items() if name != stage.name}
    (clone / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": others}, sort_keys=False))
    recorded = hashes(lock[stage.name].get("deps", ()))
    bring_inputs(checkout, clone, stage.inputs)
    for path in stage.inputs:  # what git tracks, DVC does not cache: the row may have it
        if hash_of(clone, stage.name, path) != recorded[path] and path in artifacts(client, row, path.rpartition("/")[0]):
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            (clone / path).write_bytes(read_artifact(client, row, path))
        if hash_of(clone, stage.name, path) != recorded[path]:
            raise UserError(
                f"{path} ({recorded[path]}), which stage {stage.name} reads, is neither in the checkout's DVC cache nor on its DVC remote:"
                f" bring it into the checkout with `dvc fetch`, or rebuild the whole row, without --stage {stage.name}"
            )


def _repro(clone: Path, stages: Sequence[Stage], single: str | None, *, keep: bool) -> None:
    """Run the stages, whether or not DVC holds them for up to date.  Raises UserError if one fails."""
    if not run_dvc(clone, "repro", "--force", *(["--single-item", single] if single else [])):
        return
    ended = lock_of(clone)
    failed = next((stage.name for stage in stages if stage.name not in ended), stages[-1].name)
    look = f"look into {clone}" if keep else "the clone is removed; keep it with --keep to look into it"
    raise UserError(f"stage {failed} failed in the clone: its last lines stand above; {look}")


# What came of it


def _read_numbers(clone: Path, stages: Sequence[Stage]) -> dict[str, float]:
    """The numbers in metrics/*.json that these stages have written, named as in the row."""
    files = [clone / path for stage in stages for path in stage.outs if Path(path).parent == Path("metrics") and path.endswith(".json")]
    return {legal(name): value for file in files for name, value in read_metrics(file).items()}


def _records(client: MlflowClient, row: MlflowRun) -> dict[str, Any]:
    """{model: full record of its evaluation}, as far as the row has them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = [path for path in artifacts(client, row, "metrics/evaluation") if path.endswith(".json")]
            files = [download(client, row, path, Path(folder)) for path in paths]
            return {file.stem: json.loads(file.read_bytes()) for file in files}
        except (NotInStoreError, ValueError) as error:
            click.echo(f"note: the recorded spread is not known ({error})")
            return {}


def _compare_environment(client: MlflowClient, row: MlflowRun, stages: Sequence[Stage]) -> tuple[bool | None, str]:
    """Print how this environment differs from the recorded ones; whether they are of one machine class (None: nothing is recorded),
    and the digest of this one."""
    from rediffuse.tracking.environment import describe_environment, differences, environment_digest, same_machine_class

    here = describe_environment()
    digest = environment_digest(here)
    by_digest: dict[str, list[str]] = {}
    for stage in stages:
        by_digest.setdefault(row.data.tags.get(legal(f"stage.{stage.name}.environment"), ""), []).append(stage.name)
    same = list[bool]()
    for key, names in by_digest.items():
        try:
            recorded = json.loads(read_artifact(client, row, f"recipe/environment/{key}.json")) if key else None
        except (UserError, ValueError):
            recorded = None
        if not recorded:
            click.echo(f"environment: not recorded for {', '.join(names)}")
            continue
        same.append(same_machine_class(recorded, here))
        if different := differences(recorded, here):
            click.echo("\n".join([f"environment of {', '.join(names)} differs:", *(f"  {text}" for text in different)]))
        else:
            click.echo(f"environment: the same as recorded for {', '.join(names)}")
    return (all(same) if same else None), digest


def _write_tags(client: MlflowClient, row: MlflowRun, stage: str | None, tags: dict[str, str]) -> None:
    """rebuild.verdict and the like; rebuild.<stage>.verdict for a stage alone, which says nothing of the others."""
    prefix = legal(f"rebuild.{stage}") if stage else "rebuild"
    tags = tags | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        for name, value in tags.items():
            client.set_tag(row.info.run_id, f"{prefix}.{name}", value)
    except Exception as error:  # the verdict may have taken hours: a server that is down by now must not lose it
        click.echo(f"note: the verdict could not be written to the row ({type(error).__name__}: {error})")
