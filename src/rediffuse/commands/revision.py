"""Find the commit that a row was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import commit_of, file_at, git, remotes, try_git

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun


def find_commit(root: Path, row: MlflowRun, params: bytes, lock: bytes) -> tuple[str, str]:
    """Return the commit that holds what a row was made from, and in words where it was found.

    An experiment has its own commit (tag dvc.exp_rev).  A plain `dvc repro` has the commit it ran on, if
    code and params.yaml were committed.  Otherwise take a commit whose dvc.lock is the row's.

    params, lock: content of the row's params.yaml and dvc.lock.  Raises UserError if there is no such commit.
    """
    tags = row.data.tags
    experiment = "dvc.exp_name" in tags
    tag = "dvc.exp_rev" if experiment else "mlflow.source.git.commit"
    commit = tags.get(tag)
    if not commit:
        reason = f"the row has no tag {tag}. Complete it with `rediffuse sync --all` where it was computed"
    elif not _have(root, commit, tags.get("dvc.exp_ref")):
        names = " or ".join(remotes(root)) or "(there is none)"
        reason = f"commit {commit} (tag {tag}) is neither here nor on git remote {names}. Fetch it first"
    elif experiment or (tags.get("git.dirty") != "true" and _same_params(root, commit, params)):
        return commit, f"{'experiment ' if experiment else ''}commit {commit[:7]} (tag {tag})"
    else:
        reason = (
            f"its code or params.yaml differed from commit {commit[:7]}, and no commit has its dvc.lock."
            " Commit them and run `dvc repro`, or use `dvc exp run` or `dvc exp save`, which make a commit"
        )
    if found := _commit_with_lock(root, lock):
        return found, f"commit {found[:7]}, whose dvc.lock is the row's"
    raise UserError(f"row {row.info.run_name} cannot be rebuilt: {reason}")


def _have(root: Path, commit: str, ref: str | None) -> bool:
    """Return whether the repository has the commit.  If not, fetch it from the git remotes first.

    Not every server hands out a commit by its hash, so fetch the experiment's ref and the branches too.
    """
    for remote in remotes(root):
        for what in filter(None, (ref, commit, f"+refs/heads/*:refs/remotes/{remote}/*")):
            if commit_of(root, commit):
                return True
            try_git(root, "fetch", "--quiet", "--no-write-fetch-head", remote, what, timeout=None)
    return commit_of(root, commit) is not None


def _same_params(root: Path, commit: str, params: bytes) -> bool:
    return bool(yaml.safe_load(file_at(root, commit, "params.yaml") or b"") == yaml.safe_load(params))


def _commit_with_lock(root: Path, lock: bytes) -> str | None:
    """Return the latest commit, of all branches, tags and experiments, that brought this dvc.lock."""
    blob = git(root, "hash-object", "--stdin", stdin=lock)
    options = ("--all", "--full-history", "--format=%H", f"--find-object={blob}")
    commits = try_git(root, "log", *options, "--", "dvc.lock").split()
    return next((commit for commit in commits if file_at(root, commit, "dvc.lock") == lock), None)
