"""What a row says it was made from, and the commit that has it.

The revision is looked for in this order; the first that has the row's parameters and pipeline is taken:

1. the experiment's commit (tag dvc.exp_rev), if git still has it;
2. the experiment's ref, refs/exps/<baseline>/<name>;
3. this ref on a git remote, from which it is fetched;
4. the commit that the experiment or `dvc repro` started from, with the row's code.diff and params.yaml laid over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rediffuse.commands.rows import read_artifact
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import GitError, commit_of, experiment_ref, file_at, git, remotes
from rediffuse.tracking.lock import Entries, read_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


@dataclass(frozen=True)
class Recipe:
    """What the row holds to be made from, as it was uploaded.  diff: None unless the code differed from the commit."""

    params: bytes
    pipeline: bytes
    lock: Entries
    diff: bytes | None


@dataclass(frozen=True)
class Revision:
    """A commit, and in words where it comes from.

    experiment: whether the commit holds results too.  diff, params: what has to be laid over it.
    """

    commit: str
    origin: str
    experiment: bool
    diff: bytes | None = None
    params: bytes | None = None


def read_recipe(client: MlflowClient, row: MlflowRun) -> Recipe:
    """The recipe of the row.  Raises UserError if a part of it is missing or damaged."""
    dirty = row.data.tags.get("git.dirty") == "true"
    params, pipeline, lock = (read_artifact(client, row, f"recipe/{name}") for name in ("params.yaml", "dvc.yaml", "dvc.lock"))
    diff = read_artifact(client, row, "recipe/code.diff") if dirty else None
    return Recipe(params, pipeline, read_lock(lock, f"recipe/dvc.lock of row {row.info.run_name}"), diff)


def find_revision(root: Path, row: MlflowRun, recipe: Recipe, notes: list[str]) -> Revision:
    """The revision that the row was made from.

    notes: takes a line for each place that was looked at in vain.  Raises UserError if no place has it.
    """
    if found := find_experiment(root, row, recipe, notes):
        return found
    tags = row.data.tags
    commit = tags.get("dvc.baseline") or tags.get("mlflow.source.git.commit")
    if not commit:
        raise UserError(
            f"row {row.info.run_name} names no commit (tag mlflow.source.git.commit), so it cannot be rebuilt: it ran without git"
        )
    if not _fetched(root, commit):
        raise UserError(
            f"commit {commit} (tag mlflow.source.git.commit of row {row.info.run_name}) is neither in this repository nor on"
            f" {_named(remotes(root))}: fetch it from a clone that has it, then try again"
        )
    laid_over = "the row's code.diff and params.yaml" if recipe.diff else "the row's params.yaml"
    return Revision(commit, f"commit {commit[:7]} with {laid_over}", False, recipe.diff, recipe.params)


def find_experiment(root: Path, row: MlflowRun, recipe: Recipe, notes: list[str]) -> Revision | None:
    """The commit of the row's experiment, fetched if it is only on a remote; None if there is none, or only of another experiment."""
    recorded = row.data.tags.get("dvc.exp_rev")
    for commit, origin in _experiment_commits(root, row.data.tags, notes):
        # A ref moves when an experiment of this name runs again; the tag does not, so there a difference is one to be told.
        if commit == recorded or not (other := other_recipe(partial(file_at, root, commit), recipe)):
            return Revision(commit, origin, True)
        notes.append(f"{origin} is another experiment now, its {other}")
    return None


def ref_of(tags: Mapping[str, str]) -> str | None:
    """refs/exps/<baseline>/<name>; None for a row that is no experiment."""
    baseline, name = tags.get("dvc.baseline"), tags.get("dvc.exp_name")
    return tags.get("dvc.exp_ref") or (experiment_ref(baseline, name) if baseline and name else None)


def other_recipe(read: Callable[[str], bytes | None], recipe: Recipe) -> str:
    """ "params.yaml differs" or "dvc.yaml differs" if another one than the row's is read, else nothing."""
    for name, content in (("params.yaml", recipe.params), ("dvc.yaml", recipe.pipeline)):
        if yaml.safe_load(read(name) or b"") != yaml.safe_load(content):
            return f"{name} differs"
    return ""


def _experiment_commits(root: Path, tags: Mapping[str, str], notes: list[str]) -> Iterator[tuple[str, str]]:
    """(commit, where it comes from in words); remotes are asked only if the places before were not good enough."""
    recorded, ref = tags.get("dvc.exp_rev"), ref_of(tags)
    if recorded and commit_of(root, recorded):
        yield recorded, f"experiment commit {recorded[:7]} (tag dvc.exp_rev)"
    if not ref:
        return
    if commit := commit_of(root, ref):
        yield commit, f"experiment commit {commit[:7]} ({ref})"
    for remote in remotes(root):
        try:
            commit = git(root, "ls-remote", "--exit-code", remote, ref).partition("\t")[0]
            if not commit_of(root, commit):
                git(root, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", remote, ref)
        except GitError as error:
            notes.append(f"{ref} was not found on git remote {remote} ({' '.join(str(error).split())})")
            continue
        yield commit, f"experiment commit {commit[:7]}, fetched from git remote {remote} ({ref})"


def _fetched(root: Path, commit: str) -> bool:
    """Whether the repository has the commit, after asking the git remotes for it where it has not."""
    for remote in remotes(root):
        for what in ([commit], []):  # not every server hands out a commit that no ref points to
            if commit_of(root, commit):
                return True
            try:
                git(root, "fetch", "--quiet", "--no-write-fetch-head", remote, *what)
            except GitError:
                continue
    return commit_of(root, commit) is not None


def _named(names: list[str]) -> str:
    return f"git remote {' or '.join(names)}" if names else "a git remote (there is none)"
