"""A plain clone of the checkout at a revision, with a DVC cache of its own: the room in which a row is rebuilt.

A worktree would share the checkout's refs, and DVC's experiments fail in one.  The clone takes code from git and raw data from
the checkout; what stages make is never copied, except the inputs of a single stage that is asked for.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.commands.revision import Revision
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import FOREIGN, GitError, commit_of, git

if TYPE_CHECKING:
    from dvc.repo import Repo

RAW = "data/raw"  # git-ignored: where the stage prepare keeps the published files
CHECKOUT = "rediffuse-checkout"  # the name under which DVC sees the checkout's cache, while it brings data into a clone
PATIENCE = 60.0  # seconds that DVC and the running stage have to end after Ctrl-C


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml in a clone.

    sources: {dependency that no stage makes: its hash in the clone, None if it is missing}.  inputs: {dependency that a stage
    makes: that stage}.  outs: {output: whether DVC caches it}.
    """

    name: str
    cmd: Any
    sources: Mapping[str, str | None]
    inputs: Mapping[str, str]
    outs: Mapping[str, bool]


@contextmanager
def cloned(checkout: Path, revision: Revision, *, keep: bool = False) -> Iterator[Path]:
    """The root of a new clone with the revision checked out and the raw data in place.  It is removed in the end, unless kept.

    Raises UserError if the revision cannot be laid out, or raw data that a stage needs is nowhere to be had.
    """
    folder = Path(tempfile.mkdtemp(prefix="rediffuse-rebuild-")).resolve()
    try:
        try:
            root = _check_out(checkout, revision, folder)
        except GitError as error:
            raise UserError(f"{revision.origin} cannot be cloned: {error}") from None
        _bring_raw_data(checkout, root)
        yield root
    finally:
        if not keep:
            shutil.rmtree(folder)


def read_pipeline(root: Path, commit: str | None = None) -> list[Stage]:
    """The stages of dvc.yaml in a clone or checkout, or in a commit of it, each after those it depends on.

    In a commit, data that DVC tracks have the hash that their *.dvc file says, and what git ignores is missing.
    """
    from dvc.repo.brancher import switch

    with dvc(root) as repo, switch(repo, commit) if commit else nullcontext():
        stages = {stage.name: stage for stage in _pipeline_stages(repo)}
        makers = {Path(out.fs_path): stage.name for stage in stages.values() for out in stage.outs}
        tracked = {
            out.fs_path: str(out.hash_info.value) for stage in repo.index.stages for out in stage.outs if stage.path.endswith(".dvc")
        }
        described = {name: _describe(stage, makers, tracked if commit else {}) for name, stage in stages.items()}
    order = list[Stage]()
    while waiting := [stage for stage in described.values() if stage not in order]:
        done = {stage.name for stage in order}
        order.append(next(stage for stage in waiting if done.issuperset(stage.inputs.values())))  # DVC refuses circles
    return order


def bring_inputs(checkout: Path, root: Path, paths: Iterable[str]) -> None:
    """Bring outputs of stages, as dvc.lock in the clone names them, from the checkout's cache or its DVC remote, if they are there."""
    with dvc(root, remotes_of(checkout)) as repo:
        _pull(repo, [str(root / path) for path in paths])


def hash_of(root: Path, stage: str, path: str) -> str | None:
    """DVC's hash of a dependency of the stage as it lies there, None if it is missing."""
    with dvc(root) as repo:
        deps = [dep for each in _pipeline_stages(repo) if each.name == stage for dep in _files(each) if dep.def_path == path]
        return _hash(deps[0]) if deps else None


def run_dvc(root: Path, *arguments: str) -> int:
    """Run dvc in the clone, with its output on stderr and without tracking; the exit status.

    After Ctrl-C, which the terminal sends to DVC and the stage as well, waits until they have ended: a clone is about to go.
    """
    named = bool(git(root, "config", "--get", "--default", "", "user.email"))
    command = [sys.executable, "-m", "dvc", *arguments]
    process = subprocess.Popen(command, cwd=root, env=_environment(named), stdin=subprocess.DEVNULL, stdout=2)
    try:
        return process.wait()
    except BaseException:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _environment(named: bool) -> dict[str, str]:
    """The environment of a rebuild: as here, but no experiment, no tracking, and this interpreter first.

    named: whether git knows who commits.  Where it does not, as in a container, it would refuse to.
    """
    foreign = {"DVC_ROOT", "DVC_STAGE", *FOREIGN}
    kept = {name: value for name, value in os.environ.items() if name not in foreign and not name.startswith("DVC_EXP_")}
    person = {} if named else {"NAME": "rediffuse", "EMAIL": "rediffuse@localhost"}
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in person.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return who | kept | {"REDIFFUSE_TRACKING": "off", "DVC_NO_ANALYTICS": "1", "PATH": path}


# The clone


def _check_out(checkout: Path, revision: Revision, folder: Path) -> Path:
    """Clone, check the commit out, lay the row's changes over it, and give DVC a cache of its own; the root of the clone."""
    top = Path(git(checkout, "rev-parse", "--show-toplevel"))
    clone = folder / top.name
    git(folder, "clone", "--quiet", "--no-checkout", str(top), str(clone))
    if not commit_of(clone, revision.commit):  # no branch leads to it
        allow = "git -c uploadpack.allowAnySHA1InWant=true upload-pack"
        git(clone, "fetch", "--quiet", "--no-tags", "--upload-pack", allow, "origin", revision.commit)
    git(clone, "checkout", "--quiet", "--detach", revision.commit)
    root = clone / checkout.resolve().relative_to(top.resolve())
    if revision.diff:
        git(clone, "apply", "--binary", "--whitespace=nowarn", stdin=revision.diff)
    if revision.params is not None:
        (root / "params.yaml").write_bytes(revision.params)
    if not (root / ".dvc").is_dir():
        raise UserError(f"{revision.origin} holds no .dvc: git must track .dvc/config for a clone to be a DVC repository")
    from dvc.config import Config

    with Config(str(root / ".dvc")).edit("local") as config:
        config["cache"]["dir"] = str(root / ".dvc" / "cache")  # also where the user's own configuration names a shared one
        config["core"] |= {"analytics": False, "autostage": False, "site_cache_dir": str(root / ".dvc" / "tmp" / "site")}
    return root


def _bring_raw_data(checkout: Path, root: Path) -> None:
    """What no stage makes and git does not hold: data that DVC tracks by *.dvc files, data/raw, and other files that stages name."""
    with dvc(root, remotes_of(checkout)) as repo:
        tracked = [stage for stage in repo.index.stages if stage.path.endswith(".dvc")]
        _pull(repo, [stage.path for stage in tracked])
        for out in (out for stage in tracked for out in stage.outs):
            if _hash(out) != out.hash_info.value:
                raise UserError(
                    f"raw data {out.fs_path.removeprefix(f'{root}/')} ({out.hash_info.value}) is neither in the checkout's DVC cache nor"
                    " on its DVC remote: bring it into the checkout with `dvc pull`, then try again"
                )
        stages = _pipeline_stages(repo)
        makers = {Path(out.fs_path): stage.name for stage in stages for out in stage.outs}
        named = {Path(dep.fs_path): stage.name for stage in stages for dep in _files(stage) if not _maker(dep, makers)}
    if (checkout / RAW).is_dir():
        shutil.copytree(checkout / RAW, root / RAW, dirs_exist_ok=True, copy_function=_copy_missing)
    for path, stage in named.items():
        if path.exists() or not path.is_relative_to(root):
            continue
        original = checkout / path.relative_to(root)
        if not original.exists():
            raise UserError(
                f"{path.relative_to(root)}, on which stage {stage} depends, is neither in the commit nor in the checkout: put it there,"
                " then try again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _ = shutil.copytree(original, path) if original.is_dir() else shutil.copy2(original, path)


def _copy_missing(original: str, copy: str) -> None:
    """Copy a file, unless the commit holds it.  Not a hard link: a stage that wrote into it would change the checkout's."""
    if not Path(copy).exists():
        shutil.copy2(original, copy)


# DVC


@contextmanager
def dvc(root: Path, config: dict[str, Any] | None = None) -> Iterator[Repo]:
    """DVC's view of a checkout or clone, with more configuration.  It is silent meanwhile: what matters is told by errors of ours."""
    from dvc.repo import Repo

    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with Repo(str(root), config=config) as repo:
            yield repo
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def remotes_of(checkout: Path) -> dict[str, Any]:
    """The remotes of the checkout, as it sees them, and its cache as one more.

    Not those of the clone: the commit may be older than the remote, a relative path leads elsewhere from there, and what only
    .dvc/config.local knows must not be written into the clone.
    """
    with dvc(checkout) as repo:
        remotes = {name: dict(remote) for name, remote in repo.config["remote"].items()}
        cache = {CHECKOUT: {"url": str(repo.cache.legacy.path)}}
        default = repo.config["core"].get("remote")
    return {"remote": remotes | cache, "core": {"remote": default} if default else {}}


def _pipeline_stages(repo: Repo) -> list[Any]:
    """The stages of dvc.yaml at the root."""
    return [stage for stage in repo.index.stages if Path(stage.path) == Path(repo.root_dir, "dvc.yaml")]


def _files(stage: Any) -> list[Any]:
    """The dependencies that are files or folders."""
    from dvc.dependency import ParamsDependency

    return [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]


def _maker(dep: Any, makers: Mapping[Path, str]) -> str | None:
    """The stage that makes this dependency, or the folder that it is in."""
    path = Path(dep.fs_path)
    return next((makers[place] for place in (path, *path.parents) if place in makers), None)


def _describe(stage: Any, makers: Mapping[Path, str], known: Mapping[str, str]) -> Stage:
    found = {dep: _maker(dep, makers) for dep in _files(stage)}
    return Stage(
        stage.name,
        stage.cmd,
        {dep.def_path: known.get(dep.fs_path) or _hash(dep) for dep, maker in found.items() if maker is None},
        {dep.def_path: maker for dep, maker in found.items() if maker},
        {out.def_path: out.use_cache for out in stage.outs},
    )


def _hash(entry: Any) -> str | None:
    return str(entry.get_hash().value) if entry.exists else None


def _pull(repo: Repo, targets: list[str]) -> None:
    """Pull from the checkout's cache, and what that lacks from the default remote.  The caller looks at what has come."""
    from dvc.exceptions import DvcException

    for remote in (CHECKOUT, repo.config["core"].get("remote")):
        if targets and remote:
            try:
                repo.pull(targets=targets, remote=remote, force=True)
            except DvcException:
                continue
            return
