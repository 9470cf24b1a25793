"""Where the full record of an evaluation (metrics/evaluation/{model}.json) is found, for a name that the user gives.

A name is looked for in this order, and the first place that knows it counts:

1. `workspace`: the files of the checkout;
2. a git revision: branch, tag, commit, HEAD~1 (the records are tracked by git, so nothing is fetched or checked out);
3. a DVC experiment, as `dvc exp show` names it: kept by git under refs/exps/<baseline>/<name>;
4. an MLflow run, by its id or its name: the record is an artifact of it; of several attempts, of the one that is not superseded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rediffuse.commands.rows import NotInStoreError, artifacts, download, look_up
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS
from rediffuse.tracking.git import GitError, commit_of, experiment_ref, experiments, file_at, git
from rediffuse.tracking.store import checkout_root

FOLDER = "metrics/evaluation"

Record = dict[str, Any]


class _UnknownNameError(Exception):
    """The place does not know the name; the text says what was tried."""


@dataclass(frozen=True)
class Source:
    """A name as the user gave it, where it was found, the files of records there by model, and the one model that is meant, if any."""

    name: str
    origin: str
    files: Mapping[str, bytes]
    model: str | None


def find_source(text: str) -> Source:
    """What `NAME` or `NAME:MODEL` means.

    Raises UserError for a name that no place knows or that means several things there, for records that are missing, and for a
    working directory outside a DVC repository.
    """
    name, model = split_name(text)
    tried = []
    for look in (_in_workspace, _in_git, _in_experiments, _in_mlflow):
        try:
            origin, files = look(name)
        except _UnknownNameError as unknown:
            tried.append(str(unknown))
            continue
        return Source(text, origin, files, model)
    hint = f"; after a colon only {' or '.join(KINDS)} is a model" if ":" in name else ""
    reasons = "".join(f"\n  {reason}" for reason in dict.fromkeys(tried))
    raise UserError(
        f"nothing is called {name!r}; it was looked for in this order:{reasons}\nlook it up with `dvc exp show` or `make ui`{hint}"
    )


def commit_called(name: str) -> str:
    """The commit that git or DVC knows by this name, a revision or an experiment.  Raises UserError if neither does."""
    tried = []
    for look in (_commit_in_git, lambda name: _experiment(name)[1]):
        try:
            return look(name)
        except _UnknownNameError as unknown:
            tried.append(str(unknown))
    raise UserError(f"no revision and no experiment is called {name!r} ({'; '.join(tried)}): look it up with `git log` or `dvc exp show`")


def split_name(text: str) -> tuple[str, str | None]:
    """("HEAD", "ddpm") of "HEAD:ddpm"; a suffix that is no model belongs to the name."""
    name, colon, model = text.rpartition(":")
    if not colon or model not in KINDS:
        name, model = text, ""
    if not name or name.startswith("-"):
        raise UserError(f"{text!r} names no revision, experiment or run; give one, as in HEAD, HEAD:ddpm or workspace:vae")
    return name, model or None


def by_model(sources: Sequence[Source]) -> tuple[list[list[tuple[Source, Record]]], list[str]]:
    """The records to compare, a group for each comparison, and notes on what is left out.

    If models are named, one group: a source without a model takes the one that the others name.  Otherwise a group for each
    model that all sources have.  Raises UserError if a source lacks the model, if it is not clear which one is meant, and for a
    record that is damaged.
    """
    named = list(dict.fromkeys(source.model for source in sources if source.model))
    unclear = [source.name for source in sources if not source.model]
    if len(named) > 1 and unclear:
        remedy = " or ".join(f"{unclear[0]}:{model}" for model in named)
        raise UserError(f"{' and '.join(named)} are both named, so say which model of {unclear[0]} is meant: {remedy}")
    if named:
        return [[(source, _record_of(source, source.model or named[0])) for source in sources]], []
    shared = [model for model in KINDS if all(model in source.files for source in sources)]
    if not shared:
        have = "; ".join(f"{source.name} ({source.origin}): {', '.join(source.files)}" for source in sources)
        raise UserError(
            f"no model is in all of them ({have}): run `dvc repro` where one is missing, or name models, as in HEAD:vae HEAD:ddpm"
        )
    lacking = {model: [source.name for source in sources if model not in source.files] for model in KINDS if model not in shared}
    notes = [f"{model} is left out: no record of it in {', '.join(names)}" for model, names in lacking.items() if len(names) < len(sources)]
    return [[(source, _record_of(source, model)) for source in sources] for model in shared], notes


def _record_of(source: Source, model: str) -> Record:
    if model not in source.files:
        have = ", ".join(source.files)
        raise UserError(
            f"{source.name} ({source.origin}) has no record of {model}, only of {have}: make it there with `dvc repro evaluate_{model}`"
        )
    remedy = f"make it anew there with `dvc repro evaluate_{model}`"
    try:
        record = json.loads(source.files[model], parse_constant=lambda _: None)  # NaN is no JSON: a missing number
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{FOLDER}/{model}.json of {source.name} ({source.origin}) is damaged ({error}): {remedy}") from None
    if not isinstance(record, dict):
        raise UserError(f"{FOLDER}/{model}.json of {source.name} ({source.origin}) is damaged (it holds no mapping): {remedy}")
    return record


def _existing(files: dict[str, bytes], title: str, remedy: str) -> dict[str, bytes]:
    """The files.  Raises UserError if there are none."""
    if not files:
        raise UserError(f"{title} has no {' or '.join(f'{FOLDER}/{model}.json' for model in KINDS)}: {remedy}")
    return files


# The checkout


def _in_workspace(name: str) -> tuple[str, dict[str, bytes]]:
    root = checkout_root()
    if name != "workspace":
        raise _UnknownNameError("workspace: the checkout is meant by the word `workspace`")
    paths = {model: root / FOLDER / f"{model}.json" for model in KINDS}
    files: dict[str, bytes] = {model: path.read_bytes() for model, path in paths.items() if path.is_file()}
    return "files of the checkout", _existing(files, "the workspace", "make them with `dvc repro`")


# git


def _commit_in_git(name: str) -> str:
    try:
        return git(checkout_root(), "rev-parse", "--verify", f"{name}^{{commit}}")
    except GitError as error:
        raise _UnknownNameError(f"git: no revision of this name ({error})") from None


def _in_git(name: str) -> tuple[str, dict[str, bytes]]:
    commit = _commit_in_git(name)
    return f"git revision {commit[:7]}", _committed(commit, name)


def _in_experiments(name: str) -> tuple[str, dict[str, bytes]]:
    baseline, commit = _experiment(name)
    return f"experiment {commit[:7]} on {baseline[:7]}", _committed(commit, name)


def _experiment(name: str) -> tuple[str, str]:
    """The commit that the experiment was made on, and its own.

    As DVC does, an experiment on the commit that is checked out is preferred to one of the same name on another.
    """
    root = checkout_root()
    baselines = {baseline: commit for (baseline, known), commit in experiments(root).items() if known == name}
    if not baselines:
        raise _UnknownNameError("DVC: no experiment of this name")
    head = commit_of(root, "HEAD")  # None before the first commit
    if head in baselines:
        return head, baselines[head]
    if len(baselines) > 1:
        listed = "".join(f"\n  {experiment_ref(base, name)}, which is {commit[:7]}" for base, commit in baselines.items())
        raise UserError(f"several experiments are called {name!r}; give the commit of the one that is meant:{listed}")
    return next(iter(baselines.items()))


def _committed(commit: str, name: str) -> dict[str, bytes]:
    """The records in a commit."""
    root = checkout_root()
    files: dict[str, bytes] = {
        model: content for model in KINDS if (content := file_at(root, commit, f"{FOLDER}/{model}.json")) is not None
    }
    remedy = "it was made before full records existed, or without running the pipeline; check it out and run `dvc repro` there"
    return _existing(files, f"{name} ({commit[:7]})", remedy)


# MLflow


def _in_mlflow(name: str) -> tuple[str, dict[str, bytes]]:
    try:
        client, row = look_up(name)
        there = artifacts(client, row, FOLDER)
        with tempfile.TemporaryDirectory() as folder:
            paths = {model: f"{FOLDER}/{model}.json" for model in KINDS if f"{FOLDER}/{model}.json" in there}
            files: dict[str, bytes] = {model: download(client, row, path, Path(folder)).read_bytes() for model, path in paths.items()}
    except NotInStoreError as unknown:
        raise _UnknownNameError(f"MLflow: {unknown}") from None
    return f"MLflow run {row.info.run_id}", _existing(files, name, "the run did not get as far as stage evaluate")
