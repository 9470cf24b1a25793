"""Which row results belong to: one per experiment of DVC, or per commit, parameters and changed code for a plain `dvc repro`."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What results hang on besides parameters and data; the pipeline writes nothing there.
CODE = ("src", "stages", "dvc.yaml")
# As `git apply` takes it, whatever the user's own settings of diff are.
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/")
PASSWORD = re.compile(r"//[^/@\s]*@")  # and the user's name, in an address


@dataclass(frozen=True)
class Identity:
    """`key` finds the row, `name` is what MLflow shows, `tags` is what the row says about its origin.

    code_diff: what the code differs from the commit in, as `git apply` takes it; empty if it does not.
    """

    key: str
    name: str
    tags: dict[str, str]
    code_diff: bytes = b""


def identify(root: Path, params: Mapping[str, Any]) -> Identity:
    """The row of the stage that runs in the checkout `root`, from DVC's environment, git, and the flattened parameters."""
    commit, diff = git(root, "rev-parse", "HEAD"), code_diff(root)
    baseline, experiment = os.environ.get("DVC_EXP_BASELINE_REV"), os.environ.get("DVC_EXP_NAME")
    if baseline and experiment:
        return identify_experiment(root, baseline, experiment, params, diff)
    digest, changed = digest_of(params), hashlib.sha256(diff).hexdigest() if diff else ""
    name = "-".join(part for part in ("repro", commit[:7] or "nocommit", digest[:8], changed[:7]) if part)
    tags = _origin(root, commit, diff) | {"mlflow.source.name": "dvc repro", "rediffuse.params": digest}
    return Identity(digest_of([commit, digest, changed]), name, _filled(tags), diff)


def identify_experiment(root: Path, baseline: str, name: str, params: Mapping[str, Any], diff: bytes) -> Identity:
    """The row of an experiment, found by (baseline revision, name): DVC keeps names apart only within a baseline."""
    tags = _origin(root, baseline, diff) | {
        "mlflow.source.name": "dvc exp run",
        "rediffuse.params": digest_of(params),
        "dvc.baseline": baseline,
        "dvc.exp_name": name,
        "dvc.exp_ref": f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}",
    }
    return Identity(digest_of([baseline, name]), name, _filled(tags), diff)


def digest_of(content: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def git(root: Path, *arguments: str, **environment: str) -> str:
    """What git prints in that folder, or nothing where there is no git or no commit."""
    return git_bytes(root, *arguments, **environment).decode(errors="replace").strip()


def git_bytes(root: Path, *arguments: str, **environment: str) -> bytes:
    """What git prints in that folder, as it is, or nothing where there is no git or no commit."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, env=os.environ | environment, capture_output=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def code_diff(root: Path) -> bytes:
    """What the code of the checkout, tracked or new, differs from the commit in."""
    there = [path for path in CODE if (root / path).exists()]
    with tempfile.TemporaryDirectory() as folder:  # an index of its own: the user's stays as it is
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git(root, "read-tree", "HEAD", **index)
        git(root, "rm", "-r", "-q", "--cached", "--ignore-unmatch", "--", *CODE, **index)
        if there:
            git(root, "add", "--", *there, **index)
        return git_bytes(root, *DIFF, "--cached", "HEAD", "--", *CODE, **index)


def code_diff_between(root: Path, commit: str, later: str) -> bytes:
    """What the code of one commit differs from an earlier one in."""
    return git_bytes(root, *DIFF, commit, later, "--", *CODE)


def experiments(root: Path) -> dict[tuple[str, str], str]:
    """{(baseline, name): commit} of DVC's experiments.  Its own refs below refs/exps (exec, stash, celery, ...) name no baseline."""
    found = {}
    for line in git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines():
        if match := re.fullmatch(r"([0-9a-f]+) refs/exps/([0-9a-f]{2})/([0-9a-f]{38,})/([^/]+)", line):
            commit, start, rest, name = match.groups()
            found[start + rest, name] = commit
    return found


def _origin(root: Path, commit: str, diff: bytes) -> dict[str, str]:
    branch = git(root, "rev-parse", "--abbrev-ref", "HEAD")
    return {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": "" if branch == "HEAD" else branch,
        "mlflow.source.git.repoURL": PASSWORD.sub("//", git(root, "config", "--get", "remote.origin.url")),
        "git.dirty": str(bool(diff)).lower(),
    }


def _filled(tags: dict[str, str]) -> dict[str, str]:
    return {tag: value for tag, value in tags.items() if value}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"
