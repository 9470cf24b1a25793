"""git in a checkout or a clone.  The project calls git only here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Set inside a hook: they would point to another repository.
FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


class GitError(Exception):
    """git failed.  The text is what it printed."""


def git(folder: Path, *arguments: str, **how: Any) -> str:
    """Return what git prints in this folder, stripped.  Arguments and errors as of `git_bytes`."""
    return git_bytes(folder, *arguments, **how).decode(errors="replace").strip()


def git_bytes(
    folder: Path,
    *arguments: str,
    stdin: bytes | None = None,
    timeout: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> bytes:
    """Return what git prints in this folder, with these variables in its environment.

    Raises GitError where it fails, takes longer than timeout (seconds), or cannot be run.
    """
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    how: dict[str, Any] = {"cwd": folder, "env": kept | dict(variables or {}), "capture_output": True}
    try:
        done = subprocess.run(["git", *arguments], input=stdin, timeout=timeout, check=False, **how)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitError(f"git cannot be run ({error})") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise GitError(said or f"`git {arguments[0]}` ended with status {done.returncode}")
    return bytes(done.stdout)


def try_git(folder: Path, *arguments: str, **how: Any) -> str:
    """As `git`, but return "" where it fails: no git, no commit, no remote."""
    try:
        return git(folder, *arguments, **{"timeout": 30.0} | how)
    except GitError:
        return ""


def commit_of(folder: Path, name: str) -> str | None:
    """Return the full hash of the commit that a revision or ref names, None if it is unknown here."""
    options = ("--verify", "--quiet", "--end-of-options")
    return try_git(folder, "rev-parse", *options, f"{name}^{{commit}}") or None


def file_at(folder: Path, commit: str, path: str) -> bytes | None:
    """Return a file of a commit by its path relative to the folder, None if it is missing."""
    try:
        return git_bytes(folder, "show", f"{commit}:./{path}")
    except GitError:
        return None


def remotes(folder: Path) -> list[str]:
    """Return the names of the git remotes, `origin` first."""
    return sorted(try_git(folder, "remote").split(), key=lambda name: (name != "origin", name))


def experiment_ref(baseline: str, name: str) -> str:
    """Return the git ref of a DVC experiment."""
    return f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"


def experiments(folder: Path) -> dict[tuple[str, str], str]:
    """Return {(baseline, name): commit} of DVC's experiments in this repository.

    Other refs of DVC below refs/exps (exec, stash, ...) name no baseline.
    """
    refs = try_git(folder, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    pattern = r"^([0-9a-f]+)\s+refs/exps/([0-9a-f]{2})/([0-9a-f]{38,})/([^/\s]+)$"
    found = re.findall(pattern, refs, re.MULTILINE)
    return {(start + rest, name): commit for commit, start, rest, name in found}
