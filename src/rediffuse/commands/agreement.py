"""Is a clone what a row was made from?  Parameters, pipeline, code and raw data, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rediffuse.commands.clone import Stage
from rediffuse.commands.revision import Recipe, Revision
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import file_at
from rediffuse.tracking.lock import Entries, hashes, read_lock
from rediffuse.tracking.results import legal

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

LONG = 5000  # characters of a parameter beyond which MLflow's text may be a shortened one


def agreed_lock(
    checkout: Path, clone: Path, row: MlflowRun, revision: Revision, recipe: Recipe, pipeline: Sequence[Stage], stages: Sequence[Stage]
) -> Entries:
    """The dvc.lock to compare with, after it is clear that the clone is what the row was made from.

    The row's own, if it has all these stages as they ran; else the experiment's: before `rediffuse sync`, the row's lacks the last
    stage, for DVC writes a stage down when it has ended.  Raises UserError if neither has, and if anything in the clone differs.
    """
    differing = differing_parameters(clone, row, recipe) + differing_pipeline(clone, recipe)
    params = yaml.safe_load(recipe.params) or {}
    candidates = [recipe.lock]
    if revision.experiment:
        committed = read_lock(file_at(checkout, revision.commit, "dvc.lock"), f"dvc.lock of {revision.origin}")
        leads_on = {maker for stage in pipeline for maker in stage.inputs.values()}
        if all(committed.get(name) == entry for name, entry in recipe.lock.items() if name in leads_on):
            candidates.append(committed)
    lacking = [unrecorded(pipeline, stages, lock, params) for lock in candidates]
    sources = [differing_sources(stages, lock) for lock in candidates]
    for lock, lacks, differs in zip(candidates, lacking, sources, strict=True):
        if not lacks and not differs and not differing:
            return lock
    if differing or any(not lacks for lacks in lacking):
        differing += next((differs for lacks, differs in zip(lacking, sources, strict=True) if not lacks), [])
        listed = "".join(f"\n  {difference}" for difference in differing)
        raise UserError(
            f"{revision.origin} is not what row {row.info.run_name} was made from, so nothing was run:{listed}\n"
            "bring back what the row was made from; if the row is not complete yet, run `rediffuse sync` first"
        )
    raise UserError(
        f"row {row.info.run_name} does not record what came of {', '.join(lacking[0])} (recipe/dvc.lock), so there is nothing to compare"
        " with: run `rediffuse sync` in the checkout that has the results, or rebuild another stage alone with --stage"
    )


def differing_parameters(clone: Path, row: MlflowRun, recipe: Recipe) -> list[str]:
    """A text for each parameter of which the clone has another value than the row's params.yaml or its table."""
    recorded, here = _leaves(yaml.safe_load(recipe.params)), _leaves(yaml.safe_load((clone / "params.yaml").read_bytes()))
    missing = object()

    def text(value: Any) -> str:
        return "nothing" if value is missing else repr(value)

    found = {
        name: f"params.yaml: {name} is {text(recorded.get(name, missing))} in the row, {text(here.get(name, missing))} in the clone"
        for name in sorted({*recorded, *here})
        if recorded.get(name, missing) != here.get(name, missing)
    }
    for name, value in here.items():
        shown = row.data.params.get(legal(name))
        if shown is not None and len(shown) < LONG and shown != str(value) and yaml.safe_load(shown) != value:
            found.setdefault(name, f"params.yaml: {name} is {shown} in the row's table, {value!r} in the clone")
    return list(found.values())


def differing_pipeline(clone: Path, recipe: Recipe) -> list[str]:
    """A text for each part of dvc.yaml that is another in the clone."""
    recorded, here = yaml.safe_load(recipe.pipeline) or {}, yaml.safe_load((clone / "dvc.yaml").read_bytes()) or {}
    before, after = recorded.pop("stages", {}), here.pop("stages", {})
    names = [f"stage {name}" for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    names += [name for name in dict.fromkeys([*recorded, *here]) if recorded.get(name) != here.get(name)]
    return [f"dvc.yaml: {name} differs" for name in names]


def differing_sources(stages: Sequence[Stage], lock: Entries) -> list[str]:
    """A text for each file or folder that no stage makes, and that is another in the clone than when the stage ran."""
    found = dict[str, str]()
    for stage in stages:
        recorded = hashes(lock.get(stage.name, {}).get("deps", ()))
        for path, here in stage.sources.items():
            if recorded.get(path) != here:
                was, is_ = ((value or "missing").split(".")[0][:8] for value in (recorded.get(path), here))
                found.setdefault(path, f"{path} (stage {stage.name}): {was} in the row, {is_} in the clone")
    return list(found.values())


def unrecorded(pipeline: Sequence[Stage], stages: Sequence[Stage], lock: Entries, params: dict[str, Any]) -> list[str]:
    """Those of the stages that the lock lacks, or has only from an earlier run: with other inputs, parameters or command."""
    made: dict[str, str | None] = {}
    current = set[str]()
    for stage in pipeline:
        entry = lock.get(stage.name)
        if entry and set(stage.inputs.values()) <= current and _is_of_this_run(stage, entry, made, params):
            current.add(stage.name)
            made |= hashes(entry.get("outs", ()))
    return [stage.name for stage in stages if stage.name not in current]


def _is_of_this_run(stage: Stage, entry: dict[str, Any], made: dict[str, str | None], params: dict[str, Any]) -> bool:
    deps, outs = (hashes(entry.get(part, ())) for part in ("deps", "outs"))
    values = _leaves(params, groups=True)
    used = entry.get("params", {}).get("params.yaml", {})
    return (
        entry.get("cmd") == stage.cmd
        and set(outs) == set(stage.outs)
        and all(deps.get(path) == made.get(path, deps.get(path)) for path in stage.inputs)
        and all(values.get(key) == value for key, value in used.items())
    )


def _leaves(node: Any, prefix: str = "", *, groups: bool = False) -> dict[str, Any]:
    """Every leaf of a mapping by its dotted name; with `groups`, every mapping in it too."""
    flat: dict[str, Any] = {}
    for key, value in (node or {}).items():
        inner = isinstance(value, dict) and value
        if not inner or groups:
            flat[f"{prefix}{key}"] = value
        if inner:
            flat |= _leaves(value, f"{prefix}{key}.", groups=groups)
    return flat
