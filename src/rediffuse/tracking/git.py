"""git in a checkout or a clone, as the commands need it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")  # set inside a hook: they would point to another repository


class GitError(Exception):
    """git failed; the text is what it said."""


def git(folder: Path, *arguments: str, stdin: bytes | None = None) -> str:
    """What git prints in this folder, without the end of the line.  Raises GitError where it fails or cannot be run."""
    return git_bytes(folder, *arguments, stdin=stdin).decode(errors="replace").strip()


def git_bytes(folder: Path, *arguments: str, stdin: bytes | None = None) -> bytes:
    """What git prints in this folder.  Raises GitError where it fails or cannot be run."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=environment, input=stdin, capture_output=True, check=False)
    except OSError as error:
        raise GitError(f"git cannot be run ({error})") from None
    if done.returncode:
        raise GitError(done.stderr.decode(errors="replace").strip() or f"`git {arguments[0]}` ended with status {done.returncode}")
    return done.stdout


def commit_of(folder: Path, name: str) -> str | None:
    """The full hash of the commit that a revision or ref names, or None if this repository does not have it."""
    return object_of(folder, f"{name}^{{commit}}")


def object_of(folder: Path, name: str) -> str | None:
    """The full hash of what a name stands for, or None if this repository does not have it."""
    try:
        return git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", name) or None
    except GitError:
        return None


def file_at(folder: Path, commit: str, path: str) -> bytes | None:
    """A file of a commit, its path relative to the folder; None if it is not there."""
    try:
        return git_bytes(folder, "show", f"{commit}:./{path}")
    except GitError:
        return None


def remotes(folder: Path) -> list[str]:
    """The names of the git remotes, `origin` first."""
    return sorted(git(folder, "remote").split(), key=lambda name: (name != "origin", name))
