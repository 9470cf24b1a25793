"""Find the records of an evaluation (metrics/evaluation/{model}.json), and its parameters, by a name.

The first of these places that knows the name counts:

1. `workspace`: the files of the checkout;
2. images judged by `rediffuse judge --name NAME`: metrics/judged/NAME;
3. a git revision: branch, tag, commit, HEAD~1 (git tracks the records, so nothing is fetched or checked out);
4. a DVC experiment, as `dvc exp show` names it: git keeps it under refs/exps/<baseline>/<name>;
5. an MLflow run, by its id or its name; of several attempts, the one that is not superseded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rediffuse.commands.compare import Row
from rediffuse.commands.judge import JUDGED
from rediffuse.commands.rows import find_artifact, find_row
from rediffuse.params import flatten
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS
from rediffuse.tracking.git import commit_of, experiments, file_at
from rediffuse.tracking.store import checkout_root

RECORDS: dict[str, str] = {model: f"metrics/evaluation/{model}.json" for model in KINDS}
PATHS = [*RECORDS.values(), "params.yaml"]


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
            raise UserError(f"{where} has no {RECORDS[model]}: {remedy}")
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
    root, files = checkout_root(), dict[str, bytes | None]()
    judged = root / JUDGED / name
    if name == "workspace":
        origin = "files of the checkout"
        files = {path: (root / path).read_bytes() for path in PATHS if (root / path).is_file()}
        params = _parameters(files.get("params.yaml"))
    elif name and judged.is_dir():
        origin, params = "judged images", {}
        places = {path: judged / "evaluation" / Path(path).name for path in RECORDS.values()}
        files = {path: place.read_bytes() for path, place in places.items() if place.is_file()}
    elif found := _find_commit(name):
        origin, commit = found
        files = {path: file_at(root, commit, path) for path in PATHS}
        params = _parameters(files["params.yaml"])
    else:
        client, row = find_row(name, "revision, experiment or row")
        origin = f"MLflow run {row.info.run_id}"
        files = {path: find_artifact(client, row, path) for path in RECORDS.values()}
        params = row.data.params
    records = {model: content for model, path in RECORDS.items() if (content := files.get(path)) is not None}
    if not records:
        missing = " or ".join(RECORDS.values())
        raise UserError(f"{name} ({origin}) has no {missing}: make one with `dvc repro`")
    flat = {key: _number(value) for key, value in flatten(params).items()}
    return Source(text, model, origin, records, flat or None)


def split_name(text: str) -> tuple[str, str | None]:
    """Return ("HEAD", "ddpm") for "HEAD:ddpm"; a suffix that is no model belongs to the name."""
    name, colon, model = text.rpartition(":")
    return (name, model) if colon and model in KINDS else (text, None)


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
    left_out = {model: ", ".join(names) for model, names in lacking.items() if names}
    notes = [f"{model} is left out: no record of it in {names}" for model, names in left_out.items()]
    if len(notes) == len(KINDS):
        raise UserError(f"no model is in all of them: {'; '.join(notes)}: run `dvc repro` there")
    return [[source.row(model) for source in sources] for model in KINDS if not lacking[model]], notes


def commit_called(name: str) -> str:
    """Return the commit of a revision or an experiment.  Raises UserError if neither has this name."""
    if found := _find_commit(name):
        return found[1]
    remedy = "look it up with `git log` or `dvc exp show`"
    raise UserError(f"no revision and no experiment is called {name!r}: {remedy}")


def _find_commit(name: str) -> tuple[str, str] | None:
    """Return what the name of a revision or an experiment means, and its commit; None if it is unknown.

    As in DVC, an experiment on the commit that is checked out comes before one of the same name on another.
    """
    root = checkout_root()
    if commit := commit_of(root, name):
        return f"git revision {commit[:7]}", commit
    found = {baseline: commit for (baseline, known), commit in experiments(root).items() if known == name}
    if not found:
        return None
    head = commit_of(root, "HEAD")
    if len(found) > 1 and head not in found:
        commits = ", ".join(f"{commit[:7]} on {baseline[:7]}" for baseline, commit in found.items())
        raise UserError(f"several experiments are called {name!r}; give the commit of one: {commits}")
    baseline = head if head in found else next(iter(found))
    return f"experiment {found[baseline][:7]} on {baseline[:7]}", found[baseline]


def _parameters(content: bytes | None) -> dict[str, Any]:
    """Return the params.yaml, of any version of the schema; nothing if it is missing or damaged."""
    try:
        params = yaml.safe_load(content or b"")
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
