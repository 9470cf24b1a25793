"""Make what a row shows a branch, and bring it with its data to the remotes: it outlives `dvc exp remove`, `dvc gc` and the disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rediffuse.commands.agreement import differing_sources
from rediffuse.commands.clone import Stage, dvc, read_pipeline, remotes_of, run_dvc
from rediffuse.commands.revision import Recipe, find_experiment, other_recipe, read_recipe, ref_of
from rediffuse.commands.rows import find_row
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import GitError, commit_of, experiment_ref, file_at, git, object_of, remotes
from rediffuse.tracking.lock import read_lock
from rediffuse.tracking.store import repository_root

if TYPE_CHECKING:
    from dvc.repo import Repo
    from mlflow.entities import Run as MlflowRun

HISTORY = 2000  # commits that are looked through for the results of a plain `dvc repro`


def keep(name: str, branch: str | None = None, remote: str | None = None) -> str:
    """Keep the row of this id or name as a branch, kept/<name> unless another is given, and print what was done; the branch.

    remote: of git, `origin` or the first by name unless given.  The data go to DVC's default remote.  Where there is no remote,
    what can be done here is done, and what is missing is said; that is no error.

    Raises UserError if the row is not known, its results are in no commit and not in the checkout, the branch exists elsewhere, and,
    after everything else is done, if something could not be pushed.
    """
    client, row = find_row(name)
    root, recipe = repository_root(), read_recipe(client, row)
    commit = _commit_with_results(root, row, recipe)
    branch = _make_branch(root, branch or _default_branch(row), commit)
    ref = ref_of(row.data.tags)
    if ref and commit_of(root, ref) != commit:  # removed, or by now of another attempt
        ref = None
    problems = [*_push_to_git(root, branch, ref, remote), *_push_to_dvc(root, commit)]
    if problems:
        raise UserError("\n".join([f"branch {branch} is there, but not everything could be pushed:", *(f"  {text}" for text in problems)]))
    return branch


# The commit


def _commit_with_results(root: Path, row: MlflowRun, recipe: Recipe) -> str:
    """The commit that holds what the row shows; for a plain `dvc repro` whose results lie uncommitted in the checkout, a new one."""
    notes = list[str]()
    if found := find_experiment(root, row, recipe, notes):
        click.echo(f"row {row.info.run_name} ({row.info.run_id}): {found.origin}")
        return found.commit
    for note in notes:
        click.echo(f"note: {note}")
    if commit := _find_in_history(root, recipe):
        click.echo(f"row {row.info.run_name} ({row.info.run_id}): its results are in commit {commit[:7]}")
        return commit
    if not _holds(root, None, recipe):
        raise UserError(
            f"the results of row {row.info.run_name} are in no commit, and the checkout holds others by now: if the row is not complete"
            f" yet, run `rediffuse sync` first; else make them again (`rediffuse rebuild {row.info.run_id} --keep`), and keep them from the"
            " clone, or check the row's commit out, run `dvc repro`, and keep the row then"
        )
    commit = _save(root, _legal_name(row.info.run_name))
    if not _holds(root, commit, recipe):
        raise UserError(
            f"commit {commit[:7]}, made by `dvc exp save`, lacks part of what the row was made from: commit it by hand, then try again"
        )
    click.echo(f"row {row.info.run_name} ({row.info.run_id}): saved from the checkout as experiment commit {commit[:7]}")
    return commit


def _find_in_history(root: Path, recipe: Recipe) -> str | None:
    """The newest commit of branches, tags, remotes and experiments that holds what the row shows."""
    head = ["HEAD"] if commit_of(root, "HEAD") else []
    commits = git(root, "rev-list", f"--max-count={HISTORY}", "--branches", "--tags", "--remotes", "--glob=refs/exps", *head).split()
    seen: dict[str | None, bool] = {}  # many commits share a dvc.lock, which takes long to read
    for commit in commits:
        lock = object_of(root, f"{commit}:./dvc.lock")
        if lock not in seen:
            seen[lock] = _has_results(file_at(root, commit, "dvc.lock"), recipe)
        if seen[lock] and _holds(root, commit, recipe):
            return commit
    return None


def _has_results(lock: bytes | None, recipe: Recipe) -> bool:
    """Whether a dvc.lock says of every stage what the row's says."""
    try:
        stages = read_lock(lock, "dvc.lock")
    except UserError:  # an old commit with conflict marks in it is not the one
        return False
    return bool(stages) and all(stages.get(stage) == entry for stage, entry in recipe.lock.items())


def _holds(root: Path, commit: str | None, recipe: Recipe) -> bool:
    """Whether a commit, or the checkout (None), has the parameters, pipeline, code and results of the row."""

    def read(path: str) -> bytes | None:
        if commit:
            return file_at(root, commit, path)
        return (root / path).read_bytes() if (root / path).is_file() else None

    lock = read("dvc.lock")
    if not _has_results(lock, recipe) or other_recipe(read, recipe):
        return False
    stages, entries = read_pipeline(root, commit), read_lock(lock, "dvc.lock")
    if commit:
        stages = [_without_ignored(root, stage) for stage in stages]
    return all(stage.name in entries for stage in stages) and not differing_sources(stages, entries)


def _without_ignored(root: Path, stage: Stage) -> Stage:
    """The stage without raw data that git is told to ignore, which are in no commit."""

    def ignored(path: str) -> bool:
        try:
            return bool(git(root, "check-ignore", path))
        except GitError:
            return False

    return replace(stage, sources={path: content for path, content in stage.sources.items() if content or not ignored(path)})


def _save(root: Path, name: str) -> str:
    """Save the checkout as an experiment, new code included; its commit."""
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    read = [path for stage in read_pipeline(root) for path in stage.sources]
    include = [path for path in new if any(Path(path).is_relative_to(place) for place in read)]
    options = [option for path in include for option in ("--include-untracked", path)]
    if run_dvc(root, "exp", "save", "--name", name, *options):
        raise UserError(f"`dvc exp save --name {name}` failed, as it says above: commit the results by hand (`git commit`), then try again")
    head = git(root, "rev-parse", "HEAD")
    commit = commit_of(root, experiment_ref(head, name))
    assert commit
    return commit


# The branch


def _default_branch(row: MlflowRun) -> str:
    return f"kept/{_legal_name(row.data.tags.get('dvc.exp_name') or row.info.run_name)}"


def _legal_name(name: str) -> str:
    """The name as git takes it for a part of a branch."""
    return re.sub(r"[^\w.-]+|\.\.+|^[.-]+|[.-]+$|\.lock$", "-", name, flags=re.ASCII).strip("-.") or "row"


def _make_branch(root: Path, branch: str, commit: str) -> str:
    try:
        git(root, "check-ref-format", "--branch", branch)
    except GitError:
        raise UserError(f"{branch!r} is no name for a branch of git: give another with --branch, as in --branch kept/better") from None
    there = commit_of(root, f"refs/heads/{branch}")
    if there and there != commit:
        raise UserError(f"branch {branch} exists and is {there[:7]}, not {commit[:7]}: give another name with --branch")
    if not there:
        try:
            git(root, "branch", "--no-track", branch, commit)
        except GitError as error:  # a branch called `kept` leaves no room for kept/...
            raise UserError(f"branch {branch} cannot be made ({error}): give another name with --branch") from None
    click.echo(f"branch {branch}: {'is there already' if there else 'made'}, {commit[:7]}")
    return branch


# The remotes


def _push_to_git(root: Path, branch: str, experiment: str | None, remote: str | None) -> list[str]:
    """Push the branch, and the experiment's ref if there is one; what could not be done."""
    if not remote and not (known := remotes(root)):
        click.echo("git remote: there is none, so the branch is only here: add one with `git remote add origin URL` and keep the row again")
        return []
    remote = remote or known[0]
    refs = [f"refs/heads/{branch}", *([experiment] if experiment else [])]
    try:
        said = git(root, "push", "--porcelain", remote, *(f"{ref}:{ref}" for ref in refs))
    except GitError as error:
        return [f"git remote {remote}: {' '.join(str(error).split())}"]
    done = "has them already" if all(line.startswith("=") for line in said.splitlines() if "\t" in line) else "pushed"
    click.echo(f"git remote {remote}: {done} ({', '.join(refs)})")
    return []


def _push_to_dvc(root: Path, commit: str) -> list[str]:
    """Push the data of the commit and the run cache; what could not be done."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import RunCacheNotSupported

    # The remotes are those of the checkout: the commit may be older than they are, and DVC would push nothing and say nothing.
    with dvc(root, remotes_of(root)) as repo:
        remote = repo.config["core"].get("remote")
        if not remote:
            click.echo(
                "DVC remote: there is none, so the data are only in this checkout's cache, which `dvc gc` empties:"
                " add one with `dvc remote add --default NAME URL` and keep the row again"
            )
            return []
        try:
            count = repo.push(revs=[commit], workspace=False, remote=remote)
            missing = _missing(repo, commit, remote)
            repo.stage_cache.push(remote)
        except RunCacheNotSupported:  # over plain HTTP: only a shortcut is lost
            pass
        except (DvcException, OSError) as error:
            return [f"DVC remote {remote}: {' '.join(f'{type(error).__name__}: {error}'.split())}"]
    if missing:
        return [f"DVC remote {remote}: neither it nor the cache here has {', '.join(missing)}: make them again with `rediffuse rebuild`"]
    click.echo(f"DVC remote {remote}: {f'{count} files pushed' if count else 'has the data already'}")
    return []


def _missing(repo: Repo, commit: str, remote: str) -> list[str]:
    """The outputs of the commit that are not wholly on the remote, of which DVC itself only warns."""
    from dvc.repo.brancher import switch

    with switch(repo, commit):
        outs = [out for out in repo.index.outs if out.use_cache and out.hash_info]
        lost = {out.def_path: repo.cloud.status(objs, remote=remote) for out in outs for objs in out.get_used_objs().values()}
        return [path for path, status in lost.items() if status.missing or status.new]
