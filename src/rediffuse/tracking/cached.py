"""The results of stages that DVC did not run because nothing they depend on has changed.

Such stages start no process, so nobody logs for them; the stage that runs last does.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.tracking.results import result_files
from rediffuse.tracking.store import checkout_root

if TYPE_CHECKING:
    from dvc.stage import Stage


def up_to_date_results() -> dict[str, list[Path]]:
    """The result files (under metrics/) of every stage that `dvc status` calls up to date, by the stage's name.

    A stage counts only if all stages before it count: after `dvc repro --single-item`, the results of a stage may agree with
    their own inputs and yet not with the parameters in force.  DVC writes a stage into dvc.lock when it has ended, so the
    running stage and those after it count only if they are the same as the last time.

    Asks the dependencies and outputs one by one, as `dvc status` does, but takes none of DVC's locks: the dvc process that
    runs this stage holds some.
    """
    from dvc.repo import Repo

    root = checkout_root()
    with Repo(str(root)) as repo:
        graph = repo.index.graph  # an edge leads from a stage to one that it depends on
        known: dict[Stage, bool] = {}

        def current(stage: Stage) -> bool:
            if stage not in known:
                known[stage] = all(current(before) for before in graph.successors(stage)) and _agrees_with_lock(stage)
            return known[stage]

        return {stage.addressing: _results(stage, root) for stage in repo.index.stages if current(stage)}


def _agrees_with_lock(stage: Stage) -> bool:
    """Whether the stage's command, dependencies, parameters and outputs are those in dvc.lock."""
    if stage.frozen or stage.always_changed or stage.is_callback:
        return False
    return not stage.changed_stage() and not any(entry.status() for entry in chain(stage.deps, stage.outs))


def _results(stage: Stage, root: Path) -> list[Path]:
    """The stage's files under metrics/, with folders opened, in a fixed order."""
    return [file for file in result_files(Path(out.fs_path) for out in stage.outs) if file.is_relative_to(root / "metrics")]
