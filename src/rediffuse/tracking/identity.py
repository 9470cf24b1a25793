"""Which row results belong to: one per DVC experiment, or per commit, parameters and changed code for a plain
`dvc repro`.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rediffuse.tracking.git import GitError, experiment_ref, git_bytes, try_git

# What results depend on besides parameters and data.  The pipeline writes nothing there.
CODE = ("src", "stages", "dvc.yaml")
# As `git apply` takes it, for any settings of the user's.
DIFF = (
    *("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)
PASSWORD = re.compile(r"//[^/@\s]*@")  # and the user's name, in an address


@dataclass(frozen=True)
class Identity:
    """key: finds the row.  name: what MLflow shows.  tags: the origin.

    code_diff: the difference of the code to the commit, as `git apply` takes it.
    """

    key: str
    name: str
    tags: dict[str, str]
    code_diff: bytes = b""


def identify(root: Path, params: Mapping[str, Any]) -> Identity:
    """Return the row of the stage that runs in the checkout.  params: flattened."""
    commit, diff = try_git(root, "rev-parse", "HEAD"), code_diff(root)
    baseline, experiment = os.environ.get("DVC_EXP_BASELINE_REV"), os.environ.get("DVC_EXP_NAME")
    if baseline and experiment:
        return identify_experiment(root, baseline, experiment, params, diff)
    digest, changed = digest_of(params), hashlib.sha256(diff).hexdigest() if diff else ""
    name = "-".join(part for part in ("repro", commit[:7] or "nocommit", digest[:8], changed[:7]) if part)
    tags = _origin(root, commit, diff) | {"mlflow.source.name": "dvc repro", "rediffuse.params": digest}
    return Identity(digest_of([commit, digest, changed]), name, _filled(tags), diff)


def identify_experiment(
    root: Path, baseline: str, name: str, params: Mapping[str, Any], diff: bytes
) -> Identity:
    """Return the row of an experiment, by (baseline, name): DVC keeps names unique only within a baseline."""
    tags = _origin(root, baseline, diff) | {
        "mlflow.source.name": "dvc exp run",
        "rediffuse.params": digest_of(params),
        "dvc.baseline": baseline,
        "dvc.exp_name": name,
        "dvc.exp_ref": experiment_ref(baseline, name),
    }
    return Identity(digest_of([baseline, name]), name, _filled(tags), diff)


def one_line(error: Exception) -> str:
    """Return an error in one line of at most 400 characters, without passwords."""
    return PASSWORD.sub("//", " ".join(f"{type(error).__name__}: {error}".split()))[:400]


def digest_of(content: Any) -> str:
    """Return the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def code_diff(root: Path) -> bytes:
    """Return the difference of the code, tracked or new, to the commit; empty where there is no commit."""
    there = [path for path in CODE if (root / path).exists()]
    with tempfile.TemporaryDirectory() as folder:  # a separate index: the user's stays as it is
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        try_git(root, "read-tree", "HEAD", variables=index)
        try_git(root, "rm", "-r", "-q", "--cached", "--ignore-unmatch", "--", *CODE, variables=index)
        if there:
            try_git(root, "add", "--", *there, variables=index)
        return _diff(root, "--cached", "HEAD", variables=index)


def code_diff_between(root: Path, commit: str, later: str) -> bytes:
    """Return the difference of the code between two commits."""
    return _diff(root, commit, later)


def _diff(root: Path, *what: str, variables: Mapping[str, str] | None = None) -> bytes:
    try:
        return git_bytes(root, *DIFF, *what, "--", *CODE, timeout=30.0, variables=variables)
    except GitError:
        return b""


def _origin(root: Path, commit: str, diff: bytes) -> dict[str, str]:
    branch = try_git(root, "rev-parse", "--abbrev-ref", "HEAD")
    url = try_git(root, "config", "--get", "remote.origin.url")
    return {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": "" if branch == "HEAD" else branch,
        "mlflow.source.git.repoURL": PASSWORD.sub("//", url),
        "git.dirty": str(bool(diff)).lower(),
    }


def _filled(tags: dict[str, str]) -> dict[str, str]:
    return {tag: value for tag, value in tags.items() if value}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"
