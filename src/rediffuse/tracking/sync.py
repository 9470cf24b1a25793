"""Rows completed from DVC's state alone: cached stages, experiments that ran without a process or on another machine, the final
dvc.lock, an experiment's commit, rows whose process was killed, and whatever was missed while the store could not be reached.

The last stage of a run calls `complete` as far as it can; `rediffuse sync` does the rest.  Doing it again changes nothing.
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
from rediffuse.tracking.attempts import create, find, latest, place_of, same_params, stage_tag
from rediffuse.tracking.git import experiments, git, try_git
from rediffuse.tracking.identity import PASSWORD, Identity, code_diff_between, identify, identify_experiment, one_line
from rediffuse.tracking.lineage import MODELS, PIXELS, RECIPE, Lineage, lineage_of_checkout, lineage_of_commit
from rediffuse.tracking.lock import lock_of, output_hashes
from rediffuse.tracking.store import checkout_root, connect, experiment_id, import_mlflow, repository_root, row_lock, tracking_uri
from rediffuse.tracking.views import update_view
from rediffuse.tracking.writer import RowWriter

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Row

FINAL = "rediffuse.final"  # the tag of a row that has the final dvc.lock


@dataclass(frozen=True)
class Outcome:
    """What happened to one row: `made`, `completed`, `unchanged`, `killed` (its process is gone), or `skipped`, with the reason."""

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
    """Complete the rows of the experiments on the commit that is checked out (with `every`: of all experiments), and that of the files.

    Raises UserError outside a repository, and if the store cannot be reached or written.
    """
    root, checkout = repository_root(), checkout_root()
    uri = tracking_uri(root)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # nobody's training waits: a model may take its time to a slow server
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
        update_view(client, experiment)
        return outcomes
    except UserError:
        raise
    except Exception as error:  # MLflow raises what its database, server or file system raise
        rows = f"rows in {PASSWORD.sub('//', uri)} could not be completed ({one_line(error)})"
        raise UserError(f"{rows}; nothing is lost: mend it and run `rediffuse sync` again") from error


def complete(writer: RowWriter, lineage: Lineage) -> None:
    """Add what DVC knows of the stages that are up to date; the others' results are of other code or parameters and are left out."""
    tags = dict[str, str]()
    for stage, files in lineage.results.items():
        writer.log_results(*files)
        status, error = stage_tag(stage, "status"), stage_tag(stage, "error")
        tags[stage_tag(stage, "key")] = lineage.keys[stage]
        if status not in writer.tags or writer.tags[status] == "cached":
            tags |= {status: "cached"} | _origin(writer, stage, lineage.keys[stage])
        elif writer.tags[status] != "finished":  # it failed or was killed, and was brought to its end without tracking
            tags |= {status: "finished"} | ({error: ""} if error in writer.tags else {})
    log_recipe(writer, lineage.folder, lineage.hashes.get(PIXELS))
    tags |= _log_models(writer, lineage)
    if lineage.state:
        tags["rediffuse.state"] = lineage.state
    writer.set_tags(tags)
    writer.close()


def log_recipe(writer: RowWriter, folder: Path, pixels: str | None = None) -> None:
    """What the results were made from: parameters, stages, hashes, packages, and the data set (by DVC's hash of data/pixels)."""
    for name in RECIPE:
        if (folder / name).is_file():
            writer.log_file(folder / name, "recipe")
    pixels = pixels or output_hashes(lock_of(folder)).get(PIXELS)
    manifest = folder / PIXELS / "manifest.json"
    if pixels and manifest.is_file():
        about = json.loads(manifest.read_text())
        tags = writer.tags
        source = {"path": PIXELS, "md5": pixels, "rev": tags.get("mlflow.source.git.commit", "")}
        source |= {"repo": tags["mlflow.source.git.repoURL"]} if "mlflow.source.git.repoURL" in tags else {}
        writer.log_dataset(str(about.get("set", PIXELS)), pixels, source, about)


def log_environment(writer: RowWriter, stage: str) -> None:
    """The environment that this process computes in, for the stage."""
    from rediffuse.tracking.environment import describe_environment, environment_digest

    environment = describe_environment()
    digest = environment_digest(environment)
    writer.log_content(f"recipe/environment/{digest}.json", json.dumps(environment, indent=1, sort_keys=True).encode())
    writer.set_tags({stage_tag(stage, "environment"): digest})


def _sync_experiment(store: _Store, baseline: str, name: str, commit: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, lineage_of_commit(store.root, commit, Path(folder)) as lineage:
        if not lineage.keys:
            return Outcome(name, "", f"skipped: {lineage.why_none or 'it has no stages'}")
        params = flatten(load_params(Path(folder, "params.yaml")))
        identity = identify_experiment(store.root, baseline, name, params, code_diff_between(store.root, baseline, commit))
        at = 1000 * int(git(store.root, "show", "-s", "--format=%ct", commit))
        with row_lock(store.root):
            row, made = _row_for(store, identity, params, at)
        writer = RowWriter(store.client, row)
        return _finish(writer, lineage, identity, made=made, tags={"dvc.exp_rev": commit}, at=at)


def _sync_checkout(store: _Store, checkout: Path) -> Iterator[Outcome]:
    lineage = lineage_of_checkout(checkout)
    if not lineage.keys:
        return
    params = flatten(load_params(checkout / "params.yaml"))
    identity = identify(checkout, params)
    with row_lock(store.root):
        row = latest(find(store.client, store.experiment, identity.key), store.place)
        if row is None and not lineage.state:
            return  # half a pipeline makes no row; a stage that runs makes one
        if row is None and (same := _with_tag(store.client, store.experiment, "rediffuse.state", str(lineage.state))):
            # The very results of a row with another key: an experiment that was applied, which its commit has completed, or those of
            # a `dvc repro` that were committed, perhaps before its row was complete.
            row = next((each for each in same if "dvc.exp_name" not in each.data.tags and FINAL not in each.data.tags), None)
            if row is None:
                return
            identity = replace(identity, tags={}, code_diff=b"")
        row, made = (row, False) if row else (create(store.client, store.experiment, identity, store.place), True)
    yield _finish(RowWriter(store.client, row), lineage, identity, made=made, tags={}, at=None)


def _row_for(store: _Store, identity: Identity, params: dict[str, Any], at: int) -> tuple[Row, bool]:
    """The experiment's row, and whether it was made now.  Of several attempts the one with the experiment's own parameters."""
    rows = find(store.client, store.experiment, identity.key)
    fitting = [row for row in rows if same_params(row, params)]
    if row := latest(fitting, store.place):
        return row, False
    if fitting:
        return fitting[-1], False
    return create(store.client, store.experiment, identity, store.place, replaces=rows, at=at), True


def _finish(writer: RowWriter, lineage: Lineage, identity: Identity, *, made: bool, tags: dict[str, str], at: int | None) -> Outcome:
    writer.set_params(flatten(load_params(lineage.folder / "params.yaml")))
    if identity.code_diff and made:  # a stage that ran knows it better: new files that git does not track are in no commit
        writer.log_content("recipe/code.diff", identity.code_diff)
    complete(writer, lineage)
    # Who ran it, and where, is known to the row of another checkout better than here.
    writer.set_tags(tags | {tag: value for tag, value in identity.tags.items() if tag not in writer.tags})
    if lineage.state:
        writer.set_tags({FINAL: "true"})
        writer.set_status("FINISHED", at=at if made else None)
    what = "made" if made else "completed" if writer.writes else "unchanged"
    if lineage.missing:
        what += f" (not in DVC's cache, so left out: files of {', '.join(lineage.missing)}; fetch them with `dvc pull` or `dvc exp pull`)"
    return Outcome(writer.row.info.run_name, writer.id, what)


def _close_stale(store: _Store) -> Iterator[Outcome]:
    """Rows that say running, of this checkout, whose process is no longer there."""
    for row in store.client.search_runs([store.experiment], "attributes.status = 'RUNNING'", max_results=1000):
        writer = RowWriter(store.client, row)
        place, _, process = writer.tags.get("rediffuse.process", "").partition(" ")
        if place == store.place and not process_runs(process):
            stages = [tag for tag, value in writer.tags.items() if re.fullmatch(r"stage\..*\.status", tag) and value == "running"]
            writer.set_tags(dict.fromkeys(stages, "killed"))
            writer.set_status("KILLED")
            yield Outcome(row.info.run_name, writer.id, "killed")


def process_runs(process: str) -> bool:
    """Whether the process of this id and this time of birth is there."""
    import psutil

    pid, _, born = process.partition(" ")
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(born)) < 1.0)
    except (ValueError, psutil.Error):  # a row without a process, a process that is gone
        return False


def _origin(writer: RowWriter, stage: str, key: str) -> dict[str, str]:
    """Tags that name the row which computed the results of a cached stage, and the environment it had."""
    status = {stage_tag(stage, "status"): "finished"}
    rows = _with_tag(writer.client, writer.row.info.experiment_id, stage_tag(stage, "key"), key, **status)
    if not rows:
        return {}
    tags = {stage_tag(stage, "origin_run"): rows[0].info.run_id}
    if digest := rows[0].data.tags.get(stage_tag(stage, "environment")):
        artifact = f"recipe/environment/{digest}.json"
        if content := RowWriter(writer.client, rows[0]).artifact(artifact):
            writer.log_content(artifact, content)
        tags[stage_tag(stage, "environment")] = digest
    return tags


def _with_tag(client: MlflowClient, experiment: str, tag: str, value: str, **more: str) -> list[Row]:
    """The rows with these tags, the oldest first."""
    query = " and ".join(f"tags.`{name}` = '{wanted}'" for name, wanted in ({tag: value} | more).items())
    return list(client.search_runs([experiment], query, order_by=["attributes.start_time ASC"], max_results=100))


def _log_models(writer: RowWriter, lineage: Lineage) -> dict[str, str]:
    """Register the trained models of stages that are up to date; returns the tags that name their versions."""
    there = {path.removeprefix(f"{MODELS}/") for path in lineage.hashes if path.startswith(f"{MODELS}/")}
    if not any((lineage.folder / MODELS / model).is_dir() for model in there):
        return {}
    from rediffuse.tracking.models import log_models

    before = dict(writer.tags)
    versions = {f"model.{model}": uri for model, uri in log_models(writer.client, writer.row, lineage.folder).items() if model in there}
    writer.writes += sum(before.get(tag) != uri for tag, uri in versions.items())
    return versions
