"""Complete rows from the files of their experiments.

A stage calls `complete` at its end with its own files, the last process of a run with all that is up to date.
`rediffuse sync` calls it for the rest: cached stages, experiments of another machine, the final dvc.lock, an
experiment's commit, rows of a killed process, and what was missed while the store was away.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.params import flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS
from rediffuse.tracking.attempts import create, find, latest, place_of, same_params, stage_tag
from rediffuse.tracking.git import experiments, git, try_git
from rediffuse.tracking.identity import (
    PASSWORD,
    Identity,
    code_diff_between,
    identify,
    identify_experiment,
    one_line,
)
from rediffuse.tracking.lineage import MODELS, PIXELS, RECIPE, Lineage, lineage_of_checkout, lineage_of_commit
from rediffuse.tracking.lock import lock_of, output_hashes
from rediffuse.tracking.results import read_metrics
from rediffuse.tracking.store import (
    checkout_root,
    connect,
    experiment_id,
    import_mlflow,
    repository_root,
    row_lock,
    tracking_uri,
)
from rediffuse.tracking.views import update_experiment
from rediffuse.tracking.writer import RowWriter, read_artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Row

FINAL = "rediffuse.final"  # tag: the digest of the lineage of which nothing is left to add to the row


@dataclass(frozen=True)
class Outcome:
    """What happened to one row: `made`, `completed`, `unchanged`, `killed` (its process is gone), or
    `skipped`, with the reason.
    """

    name: str
    run_id: str
    what: str


@dataclass(frozen=True)
class _Store:
    client: MlflowClient
    experiment: str
    root: Path
    place: str


def sync(*, every: bool = False) -> list[Outcome]:
    """Complete the rows of the files and of the experiments on this commit, or of all (`every`).

    Raises UserError outside a repository, and if the store cannot be reached or written.
    """
    root, checkout = repository_root(), checkout_root()
    uri = tracking_uri(root)
    # No training waits here: a slow server may take its time.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    import_mlflow()
    try:
        with row_lock(root):
            client = connect(uri)
            experiment = experiment_id(client, uri, root)
        store = _Store(client, experiment, root, place_of(root))
        head = try_git(checkout, "rev-parse", "HEAD")
        outcomes = list(_close_stale(store))
        for (baseline, name), commit in experiments(root).items():
            if every or baseline == head:
                outcomes.append(_sync_experiment(store, baseline, name, commit))
        outcomes += _sync_checkout(store, checkout)
        update_experiment(client, experiment)
        return outcomes
    except UserError:
        raise
    except Exception as error:  # MLflow raises what its database, server or file system raise
        raise UserError(
            f"rows in {PASSWORD.sub('//', uri)} could not be completed ({one_line(error)});"
            " nothing is lost: mend it and run `rediffuse sync` again"
        ) from error


def complete(writer: RowWriter, lineage: Lineage) -> None:
    """Write what the lineage holds: results of stages that are up to date, recipe, models, a whole state."""
    tags = dict[str, str]()
    for stage, files in lineage.results.items():
        writer.log_results(files)
        status, error = stage_tag(stage, "status"), stage_tag(stage, "error")
        if stage in lineage.keys:
            tags[stage_tag(stage, "key")] = lineage.keys[stage]
        if writer.tags.get(status, "cached") == "cached":
            tags |= {status: "cached"} | _origin(writer, stage, lineage.keys[stage])
        elif writer.tags[status] != "finished":  # it failed or was killed, and later ended without tracking
            tags |= {status: "finished"} | ({error: ""} if error in writer.tags else {})
    dataset = log_recipe(writer, lineage)
    tags |= _log_models(writer, lineage, dataset)
    if lineage.state:
        tags["rediffuse.state"] = lineage.state
    writer.set_tags(tags)


def log_recipe(writer: RowWriter, lineage: Lineage) -> tuple[str, str] | None:
    """Write what the results were made from.  Return the name and digest of the data set if it is known."""
    folder = lineage.folder
    for name in RECIPE:
        if (folder / name).is_file():
            writer.log_file(folder / name, "recipe")
    pixels = lineage.hashes.get(PIXELS) or output_hashes(lock_of(folder)).get(PIXELS)
    manifest = folder / PIXELS / "manifest.json"
    if not pixels or not manifest.is_file():
        return None
    about = json.loads(manifest.read_text())
    commit, repository = (writer.tags.get(f"mlflow.source.git.{what}", "") for what in ("commit", "repoURL"))
    source = {"path": PIXELS, "md5": pixels, "rev": commit} | ({"repo": repository} if repository else {})
    name = str(about.get("set", PIXELS))
    writer.log_dataset(name, pixels, source, about)
    return name, pixels


def log_environment(writer: RowWriter, stage: str) -> None:
    """Write the environment that this process computes in, for the stage."""
    from rediffuse.tracking.environment import describe_environment, environment_digest

    environment = describe_environment()
    digest = environment_digest(environment)
    content = json.dumps(environment, indent=1, sort_keys=True).encode()
    writer.log_content(f"recipe/environment/{digest}.json", content)
    writer.set_tags({stage_tag(stage, "environment"): digest})


def _sync_experiment(store: _Store, baseline: str, name: str, commit: str) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        lineage_of_commit(store.root, commit, Path(folder)) as lineage,
    ):
        if not lineage.keys:
            return Outcome(name, "", f"skipped: {lineage.why_none or 'it has no stages'}")
        params = flatten(load_params(Path(folder, "params.yaml")))
        diff = code_diff_between(store.root, baseline, commit)
        identity = identify_experiment(store.root, baseline, name, params, diff)
        at = 1000 * int(git(store.root, "show", "-s", "--format=%ct", commit))
        with row_lock(store.root):
            row, made = _row_for(store, identity, params, at)
        writer = RowWriter(store.client, row)
        writer.set_tags({"dvc.exp_rev": commit})
        return _finish(writer, lineage, identity, made=made)


def _sync_checkout(store: _Store, checkout: Path) -> Iterator[Outcome]:
    lineage = lineage_of_checkout(checkout)
    if not lineage.keys:
        return
    identity = identify(checkout, flatten(load_params(checkout / "params.yaml")))
    with row_lock(store.root):
        row = latest(find(store.client, store.experiment, identity.key), store.place)
        if row is None and not lineage.state:
            return  # half a pipeline makes no row; a stage that runs makes one
        state = str(lineage.state)
        if row is None and (same := _with_tag(store.client, store.experiment, "rediffuse.state", state)):
            # The results of a row with another key: of an experiment that was applied, which its commit has
            # completed, or of a `dvc repro` that was committed, perhaps before its row was complete.
            plain = [row for row in same if "dvc.exp_name" not in row.data.tags]
            row = next((row for row in plain if row.data.tags.get(FINAL) != state), None)
            if row is None:
                return
            identity = replace(identity, tags={}, code_diff=b"")
        made = row is None
        row = row or create(store.client, store.experiment, identity, store.place)
    yield _finish(RowWriter(store.client, row), lineage, identity, made=made)


def _row_for(store: _Store, identity: Identity, params: dict[str, Any], at: int) -> tuple[Row, bool]:
    """Return the experiment's row, the attempt with its parameters, and whether it was made now."""
    rows = find(store.client, store.experiment, identity.key)
    fitting = [row for row in rows if same_params(row, params)]
    if fitting:
        return latest(fitting, store.place) or fitting[-1], False
    return create(store.client, store.experiment, identity, store.place, replaces=rows, at=at), True


def _finish(writer: RowWriter, lineage: Lineage, identity: Identity, *, made: bool) -> Outcome:
    if writer.tags.get(FINAL) == lineage.digest:
        return Outcome(writer.row.info.run_name, writer.id, "unchanged")
    writer.set_params(flatten(load_params(lineage.folder / "params.yaml")))
    # A stage that ran knows the difference better: files that git does not track are in no commit.
    if identity.code_diff and made:
        writer.log_content("recipe/code.diff", identity.code_diff)
    complete(writer, lineage)
    # The row of another checkout knows better who ran it, and where.
    writer.set_tags({tag: value for tag, value in identity.tags.items() if tag not in writer.tags})
    if lineage.state:
        writer.set_status("FINISHED", at=writer.row.info.start_time if made else None)
    if not lineage.missing:
        writer.set_tags({FINAL: lineage.digest})
    what = "made" if made else "completed"
    if lineage.missing:
        what += f" (not in DVC's cache, so left out: files of {', '.join(lineage.missing)};"
        what += " fetch them with `dvc pull` or `dvc exp pull`)"
    return Outcome(writer.row.info.run_name, writer.id, what)


def _close_stale(store: _Store) -> Iterator[Outcome]:
    """Mark rows of this checkout that say running and whose process is gone."""
    running = "attributes.status = 'RUNNING'"
    for row in store.client.search_runs([store.experiment], running, max_results=1000):
        writer = RowWriter(store.client, row)
        place, _, process = writer.tags.get("rediffuse.process", "").partition(" ")
        if place == store.place and not process_runs(process):
            statuses = (tag for tag in writer.tags if re.fullmatch(r"stage\..*\.status", tag))
            writer.set_tags({tag: "killed" for tag in statuses if writer.tags[tag] == "running"})
            writer.set_status("KILLED")
            yield Outcome(row.info.run_name, writer.id, "killed")


def process_runs(process: str) -> bool:
    """Return whether the process with this "id time-of-creation" is there."""
    import psutil

    pid, _, born = process.partition(" ")
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(born)) < 1.0)
    except (ValueError, psutil.Error):  # a row without a process, a process that is gone
        return False


def _origin(writer: RowWriter, stage: str, key: str) -> dict[str, str]:
    """Return tags that name the row which computed the results of a cached stage, and its environment."""
    finished = {stage_tag(stage, "status"): "finished"}
    rows = _with_tag(writer.client, writer.row.info.experiment_id, stage_tag(stage, "key"), key, **finished)
    if not rows:
        return {}
    tags = {stage_tag(stage, "origin_run"): rows[0].info.run_id}
    if digest := rows[0].data.tags.get(stage_tag(stage, "environment")):
        artifact = f"recipe/environment/{digest}.json"
        if content := read_artifact(writer.client, rows[0].info.run_id, artifact):
            writer.log_content(artifact, content)
        tags[stage_tag(stage, "environment")] = digest
    return tags


def _with_tag(client: MlflowClient, experiment: str, tag: str, value: str, **more: str) -> list[Row]:
    """Return the rows with these tags, the oldest first."""
    query = " and ".join(f"tags.`{name}` = '{wanted}'" for name, wanted in ({tag: value} | more).items())
    order = ["attributes.start_time ASC"]
    return list(client.search_runs([experiment], query, order_by=order, max_results=100))


def _log_models(writer: RowWriter, lineage: Lineage, dataset: tuple[str, str] | None) -> dict[str, str]:
    """Register the models of stages that are up to date, with their numbers.  Return tags that name them."""
    kinds = [kind for kind in KINDS if f"{MODELS}/{kind}" in lineage.hashes]
    if not any((lineage.folder / MODELS / kind).is_dir() for kind in kinds):
        return {}
    from mlflow.entities import LoggedModelOutput

    from rediffuse.tracking.models import log_models

    found = log_models(writer.client, writer.row, lineage.folder)
    outputs = writer.client.get_run(writer.id).outputs
    known = {model.model_id for model in (outputs.model_outputs if outputs else [])}
    files = [file for files in lineage.results.values() for file in files if file.parent.name == "metrics"]
    for kind in kinds:
        if kind not in found or not found[kind].model_id:
            continue
        if found[kind].model_id not in known:
            writer.client.log_outputs(writer.id, [LoggedModelOutput(found[kind].model_id, step=0)])
        for file in files:
            if dataset and file.stem in (kind, f"train_{kind}"):
                writer.log_model_metrics(read_metrics(file), found[kind].model_id, dataset)
    return {f"model.{kind}": found[kind].address for kind in kinds if kind in found}
