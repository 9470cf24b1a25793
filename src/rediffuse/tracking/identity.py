"""Which row a stage belongs to: one per experiment of DVC, or per commit and parameters for a plain `dvc repro`."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What the pipeline itself writes, and what the row records apart, does not make a checkout dirty.
OWN_FILES = ("params.yaml", "dvc.lock", "metrics")


@dataclass(frozen=True)
class Identity:
    """`key` finds the row, `name` is what MLflow shows, `tags` is what the row says about its origin."""

    key: str
    name: str
    tags: dict[str, str]


def identify(params: Mapping[str, Any]) -> Identity:
    """The row of the running stage, from DVC's environment, git, and the flattened parameters.

    Inside an experiment the key is (baseline revision, experiment name), since DVC keeps names apart only within a baseline;
    otherwise it is the commit.  The parameters belong to the key as well: they are written once into a row, so an experiment
    that is tried again under the same name with others gets a row of its own.
    """
    commit = _git("rev-parse", "HEAD")
    digest = _digest(params)
    baseline, experiment = os.environ.get("DVC_EXP_BASELINE_REV"), os.environ.get("DVC_EXP_NAME")
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "dvc exp run" if baseline else "dvc repro",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "git.dirty": str(_dirty()).lower(),
    }
    if baseline and experiment:
        name = experiment
        tags |= {"dvc.baseline": baseline, "dvc.exp_name": experiment}
    else:
        name = f"repro-{commit[:7] or 'nocommit'}-{digest[:8]}"
    key = _digest([baseline or commit, name, digest])
    tags |= {"rediffuse.key": key, "rediffuse.params": digest}
    return Identity(key, name, {tag: value for tag, value in tags.items() if value})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _git(*arguments: str) -> str:
    """What git prints, or nothing where there is no git or no commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _dirty() -> bool:
    """Whether a file of the checkout, tracked or new, differs from the commit."""
    return bool(_git("--no-optional-locks", "status", "--porcelain", "--", ":/", *(f":(top,exclude){name}" for name in OWN_FILES)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"
