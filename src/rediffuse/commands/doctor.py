"""`rediffuse doctor`: what would silently make results that are wrong or cannot be rebuilt, a line for each thing looked at.

The checks are in checks.py (of the checkout) and machine.py (of all around it); here they are put in order and run.  A check that
breaks says so in its line, and the others go on.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.commands import checks, machine
from rediffuse.commands.checks import Finding, counted
from rediffuse.commands.machine import Environment
from rediffuse.tracking.store import checkout_root, repository_root, tracking_uri

Check = tuple[str, Callable[[], list[Finding]]]  # what is looked at, for the line of a check that breaks


def doctor() -> dict[str, list[Finding]]:
    """The findings by group.  Raises UserError outside a checkout."""
    root = checkout_root()
    with machine.environment_of_stages(root, os.environ) as environment:
        return of_checkout(root, os.environ) | of_rows(root, environment) | of_machine(root, os.environ, environment)


def run(check: Check) -> list[Finding]:
    """What the check finds; if it breaks, a warning that says why."""
    title, look = check
    try:
        return look()
    except Exception as error:  # whatever git, DVC, MLflow or the file system raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding("warn", f"not checked: {title} ({reason[:200]})")]


def failed(groups: Mapping[str, Sequence[Finding]]) -> bool:
    """Whether anything is a FAIL."""
    return any(finding.level == "FAIL" for findings in groups.values() for finding in findings)


def to_text(groups: Mapping[str, Sequence[Finding]]) -> str:
    """A heading for each group, a line for each finding, and how many there are."""
    import click

    colours = {"ok": "green", "warn": "yellow", "FAIL": "red"}
    lines = list[str]()
    for group, findings in groups.items():
        lines.append(click.style(group, bold=True))
        for finding in findings:
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            lines.append(f"  {click.style(f'{finding.level:4}', fg=colours[finding.level])}  {finding.what}{remedy}")
    every = [finding.level for findings in groups.values() for finding in findings]
    lines.append(f"\n{every.count('ok')} ok, {counted(every.count('warn'), 'warning')}, {counted(every.count('FAIL'), 'failure')}")
    return "\n".join(lines)


def to_json(groups: Mapping[str, Sequence[Finding]]) -> dict[str, Any]:
    """{"ok": whether nothing is a FAIL, "findings": [{"group", "level", "what", "remedy"}]}."""
    rows = [{"group": group} | vars(finding) for group, findings in groups.items() for finding in findings]
    return {"ok": not failed(groups), "findings": rows}


# The checkout


def of_checkout(root: Path, variables: Mapping[str, str]) -> dict[str, list[Finding]]:
    """What checks.py finds, in groups."""
    from dvc.repo import Repo

    commit: Check = ("the commit", lambda: checks.code_is_committed(root))
    try:
        with Repo(str(root)) as repo:
            stages = list(repo.index.stages)
            groups: dict[str, list[Check]] = {
                "code": [
                    commit,
                    ("files unknown to git", lambda: checks.code_is_known_to_git(root, stages)),
                    ("data that stages read", lambda: checks.data_are_known(root, stages)),
                ],
                "pipeline": [
                    ("parameters", lambda: checks.parameters_are_listed(root, stages)),
                    ("stages", lambda: checks.stages_are_plain(stages)),
                    ("DVC's settings", lambda: checks.settings_of_dvc(repo.config, variables)),
                ],
                "results": [
                    ("dvc.lock", lambda: checks.results_are_current(root, stages)),
                    ("results not committed", lambda: checks.results_are_committed(root)),
                    ("DVC's cache", lambda: checks.results_are_kept(stages)),
                    ("space", lambda: checks.space_is_left(free(Path(repo.cache.local.path)), checks.size_of(stages))),
                ],
                "remotes": [
                    ("DVC's remote", lambda: checks.data_have_a_remote(repo.config)),
                    ("git's remote", lambda: checks.history_is_pushed(root)),
                ],
            }
            return {group: [finding for check in every for finding in run(check)] for group, every in groups.items()}
    except Exception as error:  # a dvc.yaml that DVC refuses: of many kinds
        what = f"DVC cannot read the pipeline: {' '.join(str(error).split())[:300]}"
        return {"code": run(commit), "pipeline": [Finding("FAIL", what, "mend dvc.yaml; `dvc status` says more")]}


def of_rows(root: Path, environment: Callable[[], Environment]) -> dict[str, list[Finding]]:
    """What is found of the rows and their store."""
    with contextlib.redirect_stderr(io.StringIO()) as said:  # tracking_uri warns of an address that it ignores
        uri = tracking_uri(repository_root())
    found = run(("variables of a stage", lambda: machine.no_stage_is_meant(os.environ)))
    found += run(("the store", lambda: machine.store_answers(uri, ignored=bool(said.getvalue()))))
    local = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else repository_root() / ".dvc"
    found += run(("the file system", lambda: machine.locks_hold(local, machine.mounts(), rows=uri.startswith("sqlite:"))))
    there = not any(finding.level == "FAIL" for finding in found) and not (uri.startswith("sqlite:") and not local.is_file())
    if there:
        found += run(("rows that say running", lambda: machine.rows_have_ended(uri)))
        found += run(
            ("the environment of the results", lambda: machine.environments_agree(machine.recorded_environments(root, uri), environment))
        )
    return {"rows": found}


def of_machine(root: Path, variables: Mapping[str, str], environment: Callable[[], Environment]) -> dict[str, list[Finding]]:
    """What is found of Python, its packages and the hardware."""
    lock = root / "requirements.lock"
    every: list[Check] = [
        ("python", lambda: machine.python_is_ours(shutil.which("python", path=variables.get("PATH")), sys.executable)),
        ("packages", lambda: machine.packages_are_locked(lock.read_text(), machine.installed())),
        (".venv", lambda: machine.venv_is_current(root / ".venv", lock) if Path(sys.prefix) == root / ".venv" else []),
        ("hardware", lambda: machine.hardware_is_deterministic(environment())),
    ]
    return {"machine": [finding for check in every for finding in run(check)]}


def free(path: Path) -> int:
    """Bytes left where the path lies, or will lie."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free
