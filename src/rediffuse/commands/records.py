"""Find the records of an evaluation (metrics/evaluation/{model}.json), and its parameters, by a name.

The first of these places that knows the name counts:

1. `workspace`: the files of the checkout;
2. a git revision: branch, tag, commit, HEAD~1 (git tracks the records, so nothing is fetched or checked out);
3. a DVC experiment, as `dvc exp show` names it: git keeps it under refs/exps/<baseline>/<name>;
4. an MLflow run, by its id or its name; of several attempts, the one that is not superseded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rediffuse.commands.compare import Row
from rediffuse.commands.rows import NotInStoreError, artifacts, download, look_up
from rediffuse.params import flatten
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS
from rediffuse.tracking.git import GitError, commit_of, experiment_ref, experiments, file_at, git
from rediffuse.tracking.store import checkout_root

RECORDS: dict[str, str] = {model: f"metrics/evaluation/{model}.json" for model in KINDS}
PATHS = [*RECORDS.values(), "params.yaml"]
Found = tuple[str, dict[str, bytes], Mapping[str, Any]]  # origin, content of PATHS, parameters


class _UnknownNameError(Exception):
    """The place does not know the name; the text says what was tried."""


@dataclass(frozen=True)
class Source:
    """A name as the user gave it, the model it names, and what was found: records by model, parameters."""

    name: str
    model: str | None
    origin: str
    records: Mapping[str, bytes]
    params: Mapping[str, Any] | None

    def row(self, model: str) -> Row:
        """Return the evaluation of the model.  Raises UserError if its record is missing or damaged."""
        where, remedy = f"{self.name} ({self.origin})", f"make it there with `dvc repro evaluate_{model}`"
        if model not in self.records:
            raise UserError(f"{where} has no record of {model}, only of {', '.join(self.records)}: {remedy}")
        try:
            record = json.loads(self.records[model], parse_constant=lambda _: None)  # NaN is a missing number
            if not isinstance(record, dict):
                raise ValueError("it holds no mapping")
        except ValueError as error:
            raise UserError(f"{RECORDS[model]} of {where} is damaged ({error}): {remedy}") from None
        return Row(self.name, self.origin, record, self.params)


def find_source(text: str) -> Source:
    """Return what `NAME` or `NAME:MODEL` means.

    Raises UserError for a name that is unknown or ambiguous, for missing records, and outside a checkout.
    """
    name, model = split_name(text)
    tried = []
    for find in (_in_workspace, _in_git, _in_mlflow):
        try:
            origin, files, params = find(name)
        except _UnknownNameError as unknown:
            tried.append(str(unknown))
            continue
        records = {model: files[path] for model, path in RECORDS.items() if path in files}
        if not records:
            remedy = "run the pipeline there up to stage evaluate with `dvc repro`"
            raise UserError(f"{text} ({origin}) has no {' or '.join(RECORDS.values())}: {remedy}")
        flat = {key: _number(value) for key, value in flatten(params).items()}
        return Source(text, model, origin, records, flat or None)
    hint = f"; after a colon only {' or '.join(KINDS)} is a model" if ":" in name else ""
    reasons, remedy = "\n  ".join(tried), f"look it up with `dvc exp show` or `make ui`{hint}"
    raise UserError(f"nothing is called {name!r}; it was looked for in this order:\n  {reasons}\n{remedy}")


def split_name(text: str) -> tuple[str, str | None]:
    """Return ("HEAD", "ddpm") for "HEAD:ddpm"; a suffix that is no model belongs to the name."""
    name, colon, model = text.rpartition(":")
    if not colon or model not in KINDS:
        name, model = text, ""
    if not name or name.startswith("-"):
        example = "give one, as in HEAD, HEAD:ddpm or workspace:vae"
        raise UserError(f"{text!r} names no revision, experiment or run; {example}")
    return name, model or None


def by_model(sources: Sequence[Source]) -> tuple[list[list[Row]], list[str]]:
    """Return the rows of each comparison, and notes on what is left out.

    If models are named, there is one comparison, and a source without a model takes the named one.  Otherwise
    each model that all sources have is compared.  Raises UserError if it is unclear what to compare.
    """
    named = list(dict.fromkeys(source.model for source in sources if source.model))
    unclear = [source.name for source in sources if not source.model]
    if len(named) > 1 and unclear:
        remedy = " or ".join(f"{unclear[0]}:{model}" for model in named)
        raise UserError(f"{' and '.join(named)} are both named, so say which model of {unclear[0]}: {remedy}")
    if named:
        return [[source.row(source.model or named[0]) for source in sources]], []
    lacking = {model: [each.name for each in sources if model not in each.records] for model in KINDS}
    if all(lacking.values()):
        have = "; ".join(f"{each.name} ({each.origin}): {', '.join(each.records)}" for each in sources)
        remedy = "run `dvc repro` where one is missing, or name models, as in HEAD:vae HEAD:ddpm"
        raise UserError(f"no model is in all of them ({have}): {remedy}")
    shared = [model for model in KINDS if not lacking[model]]
    partly = [model for model in KINDS if 0 < len(lacking[model]) < len(sources)]
    notes = [f"{model} is left out: no record of it in {', '.join(lacking[model])}" for model in partly]
    return [[source.row(model) for source in sources] for model in shared], notes


def commit_called(name: str) -> str:
    """Return the commit of a revision or an experiment.  Raises UserError if neither has this name."""
    try:
        return _commit(name)[1]
    except _UnknownNameError as unknown:
        remedy = "look it up with `git log` or `dvc exp show`"
        raise UserError(f"no revision and no experiment is called {name!r}: {remedy}\n  {unknown}") from None


# The places


def _in_workspace(name: str) -> Found:
    root = checkout_root()
    if name != "workspace":
        raise _UnknownNameError("workspace: the checkout is meant by the word `workspace`")
    files = {path: (root / path).read_bytes() for path in PATHS if (root / path).is_file()}
    return "files of the checkout", files, _parameters(files)


def _in_git(name: str) -> Found:
    origin, commit = _commit(name)
    contents = {path: file_at(checkout_root(), commit, path) for path in PATHS}
    files = {path: content for path, content in contents.items() if content is not None}
    return origin, files, _parameters(files)


def _in_mlflow(name: str) -> Found:
    try:
        client, row = look_up(name)
        paths = set(artifacts(client, row, "metrics/evaluation")) & set(PATHS)
        with tempfile.TemporaryDirectory() as folder:
            files = {path: download(client, row, path, Path(folder)).read_bytes() for path in paths}
    except NotInStoreError as unknown:
        raise _UnknownNameError(f"MLflow: {unknown}") from None
    return f"MLflow run {row.info.run_id}", files, row.data.params


def _commit(name: str) -> tuple[str, str]:
    """Return what the name of a revision or an experiment means, and its commit.

    As in DVC, an experiment on the commit that is checked out comes before one of the same name on another.
    """
    root = checkout_root()
    try:
        commit = git(root, "rev-parse", "--verify", f"{name}^{{commit}}")
        return f"git revision {commit[:7]}", commit
    except GitError as error:
        unknown = f"git: no revision of this name ({error})"
    found = {baseline: commit for (baseline, known), commit in experiments(root).items() if known == name}
    if not found:
        raise _UnknownNameError(f"{unknown}\n  DVC: no experiment of this name")
    head = commit_of(root, "HEAD") or ""  # there is none before the first commit
    if len(found) > 1 and head not in found:
        refs = [f"{experiment_ref(base, name)}, which is {commit[:7]}" for base, commit in found.items()]
        listed = "\n  ".join(["give the commit of one:", *refs])
        raise UserError(f"several experiments are called {name!r}; {listed}")
    baseline = head if head in found else next(iter(found))
    return f"experiment {found[baseline][:7]} on {baseline[:7]}", found[baseline]


def _parameters(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the params.yaml, of any version of the schema; nothing if it is missing or damaged."""
    try:
        params = yaml.safe_load(files.get("params.yaml", b""))
    except yaml.YAMLError:
        return {}
    return params if isinstance(params, dict) else {}


def _number(value: Any) -> int | float | str:
    """Return the same for 1, 1.0 and "1": MLflow keeps texts, and YAML 1.1 takes 1e-05 for one."""
    try:
        number = float(str(value))
    except ValueError:
        return str(value)
    return int(number) if number.is_integer() else number
