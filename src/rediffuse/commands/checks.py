"""What `rediffuse doctor` looks at in the checkout: its code, its parameters and stages, the results, and whether others can get them.

Each check asks git or DVC one thing and returns what it found, at least one finding.  It takes none of DVC's locks, so that it can
be asked while the pipeline runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rediffuse.params import flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import GitError, experiments, experiments_in, git, remotes, try_git
from rediffuse.tracking.identity import CODE

if TYPE_CHECKING:
    from dvc.stage import Stage

FOLDERS = ("src/", "stages/")  # of code
RESULTS = ("dvc.lock", "metrics")
RECIPE = ("dvc.yaml", "dvc.lock", "params.yaml", "requirements.lock")
FETCHED = ("data/raw",)  # kept out of git and DVC on purpose: stage `prepare` fetches it and checks the hash of its content
GIGABYTE = 10**9


@dataclass(frozen=True)
class Finding:
    """ok: as it should be.  warn: may cost a result or its proof.  FAIL: results come out wrong, or cannot be rebuilt."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    remedy: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few of the names."""
    every = sorted(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# The code


def code_is_committed(root: Path) -> list[Finding]:
    """What git tracks and stages read, against the commit."""
    commit = try_git(root, "rev-parse", "HEAD")
    if not commit:
        return [Finding("FAIL", "there is no git commit that a result could name", "git init; git add .; git commit")]
    if changed := _changed(root, *CODE, "params.yaml"):
        what = f"{listed(changed)} {'differs' if len(changed) == 1 else 'differ'} from the commit {commit[:7]}"
        return [Finding("warn", what, "git commit; parameters rather with `dvc exp run -S`")]
    return [ok(f"the code and params.yaml are those of the commit {commit[:7]}")]


def code_is_known_to_git(root: Path, stages: Sequence[Stage]) -> list[Finding]:
    """Files of the code and the recipe that git does not track, ignored ones too: clones and temporary workspaces lack them."""
    read = {path for path in _needed(root, stages) if path.startswith(FOLDERS)}
    found = {path for path in _lines(root, "ls-files", "--others", "--", *FOLDERS) if path.endswith(".py") or _within(path, read)}
    found = {path for path in found if "__pycache__" not in path}
    found |= {name for name in RECIPE if (root / name).is_file() and not try_git(root, "ls-files", "--", name)}
    if found:
        force = " -f" if try_git(root, "check-ignore", "--", *found) else ""
        what = f"git does not track {listed(found)}: a clone, `dvc exp run --temp` and `--queue` run without"
        return [Finding("FAIL", what, f"git add{force} {' '.join(sorted(found)[:3])}, or delete what no stage needs")]
    return [ok("git tracks every module and the recipe")]


def data_are_known(root: Path, stages: Sequence[Stage]) -> list[Finding]:
    """Files that stages depend on, or that the code names as "data/...", and that nobody makes or tracks."""
    made = {_path(root, out) for stage in stages for out in stage.outs}
    needed = {path: name for path, name in _needed(root, stages).items() if not path.startswith(FOLDERS)}
    for file in (file for place in FOLDERS for file in sorted((root / place).rglob("*.py"))):
        for path in re.findall(r"""["'](data/[\w./-]*\w)""", file.read_text(errors="replace")):
            needed.setdefault(path, str(file.relative_to(root)))
    unknown = {path for path in needed if not (_within(path, made) or any(_within(other, {path}) for other in made))}
    unknown = {path for path in unknown if not _within(path, FETCHED) and not _in_git(root, path)}
    if unknown:
        readers = listed({needed[path] for path in unknown})
        what = f"{listed(unknown)}, read by {readers}, is made by no stage and tracked by nobody"
        return [Finding("FAIL", what, "dvc add it, or git add it if it is small; list it in the deps of the stage")]
    return [ok("whatever stages read is made by a stage or tracked")]


def _in_git(root: Path, path: str) -> bool:
    """Whether git has the file, or all files of the folder, also of those that it was told to ignore (images in data/own)."""
    return bool(try_git(root, "ls-files", "--", path)) and not try_git(root, "ls-files", "--others", "--", path)


# Parameters and stages


def parameters_are_listed(root: Path, stages: Sequence[Stage]) -> list[Finding]:
    """Each parameter must belong to a stage, and each one that a stage lists must exist."""
    try:
        leaves = set(flatten(load_params(root / "params.yaml")))
    except UserError as error:
        return [Finding("FAIL", " ".join(str(error).split()), "mend params.yaml")]
    keys = {stage.addressing: {key for dep in stage.deps for key in getattr(dep, "params", ())} for stage in stages}
    every = {key for of_stage in keys.values() for key in of_stage}
    found = list[Finding]()
    if unlisted := {leaf for leaf in leaves if not _within(leaf, every, ".")}:
        what = f"no stage lists {listed(unlisted)}: another value would run nothing"
        found.append(Finding("FAIL", what, "name it under params of a stage in dvc.yaml"))
    for stage, of_stage in keys.items():
        if unknown := {key for key in of_stage if not any(_within(leaf, {key}, ".") for leaf in leaves)}:
            what = f"stage {stage} lists {listed(unknown)}, which params.yaml does not have"
            found.append(Finding("FAIL", what, "correct the name under params in dvc.yaml"))
    return found or [ok(f"each of {len(leaves)} parameters belongs to a stage")]


def stages_are_plain(stages: Sequence[Stage]) -> list[Finding]:
    """Nothing in dvc.yaml that lets old results stand for new ones."""
    run = [stage for stage in stages if stage.cmd]
    odd = {f"{stage.addressing} is frozen" for stage in run if stage.frozen}
    odd |= {f"{stage.addressing} always runs" for stage in run if stage.always_changed}
    odd |= {f"{out.def_path} persists" for stage in run for out in stage.outs if out.persist}
    if odd:
        what = f"{listed(odd)}: results may be of other code or parameters than those beside them"
        return [Finding("warn", what, "remove frozen, always_changed and persist from dvc.yaml")]
    return [ok(f"none of {counted(len(run), 'stage')} is frozen or keeps old outputs")]


def settings_of_dvc(config: Mapping[str, Any], variables: Mapping[str, str]) -> list[Finding]:
    """DVC's settings that change what is run, or tell others of it."""
    found = list[Finding]()
    if config.get("hydra", {}).get("enabled"):
        found.append(Finding("FAIL", "DVC's hydra.enabled is on: each experiment rewrites params.yaml", "dvc config hydra.enabled false"))
    if config["core"].get("no_scm"):
        found.append(Finding("FAIL", "DVC works without git here, so there are no experiments", "dvc config core.no_scm false"))
    if config["core"].get("analytics", True) and not variables.get("DVC_NO_ANALYTICS"):
        found.append(Finding("warn", "DVC reports each command to its makers", "dvc config core.analytics false"))
    return found or [ok("DVC runs params.yaml as it is, and reports to nobody")]


# Results


def results_are_current(root: Path, stages: Sequence[Stage]) -> list[Finding]:
    """dvc.lock against the code, parameters and data of the checkout; data that are missing are another check's."""
    made = {_path(root, out) for stage in stages for out in stage.outs}
    stale = {stage.addressing: reasons for stage in stages if (reasons := _reasons(root, stage, made))}
    if stale:
        what = "; ".join(f"{name} ({listed(reasons)})" for name, reasons in list(stale.items())[:3])
        more = f"; {len(stale) - 3} more" if len(stale) > 3 else ""
        return [Finding("warn", f"dvc.lock and metrics/ are older than the checkout: {what}{more}", "dvc repro")]
    return [ok("dvc.lock is that of the code, parameters and data here")]


def results_are_committed(root: Path) -> list[Finding]:
    """dvc.lock and what git tracks below metrics/, against the commit."""
    if changed := _changed(root, *RESULTS):
        return [Finding("warn", f"results are not committed: {listed(changed)}", "git add dvc.lock metrics; git commit")]
    return [ok("the results are committed")]


def results_are_kept(stages: Sequence[Stage]) -> list[Finding]:
    """What dvc.lock names must lie in DVC's cache, or `dvc checkout` of this commit brings nothing."""
    outs = [out for stage in stages for out in stage.outs if out.use_cache and out.hash_info]
    if missing := {out.def_path for out in outs if out.changed_cache()}:
        return [Finding("warn", f"DVC's cache lacks {listed(missing)} of dvc.lock", "`dvc pull` fetches, `dvc repro` makes it")]
    if absent := {out.def_path for out in outs if not out.exists}:
        return [Finding("warn", f"{listed(absent)} of dvc.lock is in DVC's cache but not in the checkout", "dvc checkout")]
    return [ok(f"DVC's cache holds the {counted(len(outs), 'output')} of dvc.lock")]


def space_is_left(free: int, outputs: int) -> list[Finding]:
    """free: bytes where DVC's cache lies.  outputs: bytes of one set of outputs; each experiment may make another."""
    needed = GIGABYTE + 2 * outputs
    if free < needed:
        what = f"{free / GIGABYTE:.1f} GB are left for DVC's cache, less than the {needed / GIGABYTE:.1f} GB to start an experiment with"
        return [Finding("warn", what, "`dvc gc -w --all-experiments`, or another place with `dvc cache dir`")]
    return [ok(f"{free / GIGABYTE:.0f} GB are left for DVC's cache")]


def size_of(stages: Sequence[Stage]) -> int:
    """Bytes of all outputs, as dvc.lock says."""
    return sum(out.meta.size or 0 for stage in stages for out in stage.outs if out.meta)


# Others


def data_have_a_remote(config: Mapping[str, Any]) -> list[Finding]:
    """DVC's remote, where others and the next machine get data and models."""
    if name := config["core"].get("remote"):
        return [ok(f"DVC's remote is {name}")]
    if config.get("remote"):
        return [Finding("warn", f"none of DVC's remotes ({listed(config['remote'])}) is the default", "dvc remote default NAME")]
    return [Finding("warn", "DVC has no remote: data and models exist on this machine only", "dvc remote add -d NAME URL; dvc push")]


def history_is_pushed(root: Path, patience: float = 4.0) -> list[Finding]:
    """HEAD and DVC's experiments, which rows name, against git's remote.  patience: seconds that it has to answer."""
    if not (known := remotes(root)):
        return [Finding("warn", "git has no remote: the commits that rows name exist on this machine only", "git remote add origin URL")]
    remote, found = known[0], list[Finding]()
    if not try_git(root, "branch", "-r", "--contains", "HEAD"):
        found.append(Finding("warn", "HEAD is on no branch of a remote, as far as git knows", f"git push {remote} HEAD"))
    here = experiments(root)
    there = _remote_experiments(root, remote, patience) if here else {}
    if there is None:
        found.append(Finding("warn", f"git's remote {remote} does not say which experiments it has", "try again when it answers"))
    elif unpushed := {name for (baseline, name), commit in here.items() if there.get((baseline, name)) != commit}:
        found.append(Finding("warn", f"experiments exist on this machine only: {listed(unpushed)}", f"dvc exp push {remote} NAME"))
    return found or [ok(f"HEAD and {counted(len(here), 'experiment')} are on git's remote {remote}")]


# What git and DVC say


def _lines(root: Path, *arguments: str) -> list[str]:
    """The paths that git lists."""
    command, *others = arguments
    return [path for path in try_git(root, "--no-optional-locks", command, "-z", *others).split("\0") if path]


def _changed(root: Path, *places: str) -> list[str]:
    """Tracked files in these places that differ from the commit, in the checkout or the index."""
    return _lines(root, "diff", "--name-only", "--relative", "HEAD", "--", *places)


def _remote_experiments(root: Path, remote: str, patience: float) -> dict[tuple[str, str], str] | None:
    """{(baseline, name): commit} of the remote, or None if it does not answer; git asks nobody for a password."""
    silent = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh") + " -o BatchMode=yes"}
    try:
        return experiments_in(git(root, "ls-remote", remote, "refs/exps/*", timeout=patience, variables=silent))
    except GitError:
        return None


def _path(root: Path, entry: Any) -> str:
    """Where a dependency or output lies, from the root; another place is given as it is."""
    return Path(os.path.relpath(entry.fs_path, root)).as_posix() if entry.protocol == "local" else str(entry)


def _needed(root: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """{dependency: a stage that has it}, without parameters and what lies elsewhere."""
    local = [(dep, stage) for stage in stages for dep in stage.deps if dep.protocol == "local" and not hasattr(dep, "params")]
    return {_path(root, dep): stage.addressing for dep, stage in local}


def _within(name: str, others: Iterable[str], separator: str = "/") -> bool:
    """Whether the name is one of the others or lies in one."""
    return any(name == other or name.startswith(f"{other}{separator}") for other in others)


def _reasons(root: Path, stage: Stage, made: set[str]) -> set[str]:
    """What has changed since dvc.lock was written."""
    reasons = {"its command"} if stage.changed_stage() else set[str]()
    for entry in [*stage.deps, *stage.outs]:
        path = _path(root, entry)
        for change in entry.workspace_status().values():
            if isinstance(change, dict):  # parameters
                reasons |= set(change)
            elif change != "deleted" or path not in made:
                reasons.add(path)
    return reasons
