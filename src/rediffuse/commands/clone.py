"""A fresh clone of a commit, with raw data and a DVC cache of its own, in which a row is rebuilt.

Code comes from git, raw data from the checkout.  What stages make is never copied.  A git worktree would
share the checkout's refs, and DVC's experiments fail in one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import FOREIGN, GitError, git
from rediffuse.tracking.lock import read_lock

RAW = "data/raw"  # git-ignored: the stage prepare keeps published files there
CHECKOUT = "rediffuse-checkout"  # the name of the checkout's cache as a DVC remote


@contextmanager
def cloned(checkout: Path, commit: str, *, keep: bool = False) -> Iterator[Path]:
    """Yield the root of a new clone with the commit checked out and raw data in place.  Remove it at the end.

    keep: leave the clone.  Raises UserError if git cannot check the commit out.
    """
    folder = Path(tempfile.mkdtemp(prefix="rediffuse-rebuild-")).resolve()
    try:
        try:
            root = _check_out(checkout, commit, folder)
        except GitError as error:
            raise UserError(f"commit {commit} cannot be checked out in {folder}: {error}") from None
        if (checkout / RAW).is_dir():
            shutil.copytree(checkout / RAW, root / RAW, dirs_exist_ok=True)
        _pull_raw_data(checkout, root)
        yield root
    finally:
        if not keep:
            shutil.rmtree(folder)


def differences(root: Path, lock: bytes) -> list[str]:
    """Return a text for each parameter, command, module and raw file in a clone that is not the row's.

    Write the row's dvc.lock into the clone, because DVC compares with that.  lock: its content.
    """
    from dvc.repo import Repo

    recorded, found = read_lock(lock, "dvc.lock of the row"), list[str]()
    (root / "dvc.lock").write_bytes(lock)
    with Repo(str(root)) as repo:
        stages = [stage for stage in repo.index.stages if Path(stage.path) == root / "dvc.yaml"]
        made = {out.fs_path: out.hash_info for stage in stages for out in stage.outs}
        for stage in stages:
            if stage.name not in recorded:
                found.append(f"stage {stage.name}: not in dvc.lock of the row")
                continue
            if stage.changed_stage():
                found.append(f"stage {stage.name}: command modified in dvc.yaml")
            for dep in stage.deps:
                if dep.fs_path not in made:
                    # The status of params.yaml is {parameter: what}, that of a file is a text.
                    for what in dep.workspace_status().values():
                        words = what if isinstance(what, str) else f"{', '.join(what)} modified"
                        found.append(f"stage {stage.name}: {dep.def_path} {words}")
                elif dep.hash_info != made[dep.fs_path]:
                    found.append(f"stage {stage.name}: dvc.lock of the row is not complete")
    return found


def repro(root: Path) -> int:
    """Run all stages in the clone, without tracking and with DVC's output on stderr.  Return the exit status.

    The terminal sends Ctrl-C to DVC and the stage too.  Wait for them: the clone is removed next.
    """
    (root / "dvc.lock").unlink(missing_ok=True)  # afterwards it says what has run here, and nothing else
    command = [sys.executable, "-m", "dvc", "repro", "--force"]
    process = subprocess.Popen(command, cwd=root, env=_environment(), stdin=subprocess.DEVNULL, stdout=2)
    try:
        return process.wait()
    finally:
        process.wait()


def _environment() -> dict[str, str]:
    """Return the environment of a rebuild: as here, but no experiment, no tracking, and this Python first."""
    foreign = {"DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", *FOREIGN}
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"REDIFFUSE_TRACKING": "off", "DVC_NO_ANALYTICS": "1", "PATH": path}


def _check_out(checkout: Path, commit: str, folder: Path) -> Path:
    """Check the commit out below the folder, and give DVC a cache of its own.  Return the clone's root."""
    from dvc.config import Config

    top = Path(git(checkout, "rev-parse", "--show-toplevel"))
    clone = folder / top.name
    git(folder, "init", "--quiet", top.name)
    allow = "git -c uploadpack.allowAnySHA1InWant=true upload-pack"  # perhaps no branch leads to the commit
    git(clone, "fetch", "--quiet", "--depth=1", "--upload-pack", allow, str(top), commit)
    git(clone, "checkout", "--quiet", "--detach", commit)
    root = clone / checkout.resolve().relative_to(top.resolve())
    with Config(str(root / ".dvc")).edit("local") as config:
        config["cache"]["dir"] = str(root / ".dvc/cache")  # the user's configuration may name a shared one
        config["core"]["site_cache_dir"] = str(root / ".dvc/tmp/site")
    return root


def _pull_raw_data(checkout: Path, root: Path) -> None:
    """Pull the data that *.dvc files track from the checkout's DVC cache, or else from its default remote.

    Use the remotes of the checkout: the commit may be older than they are, and a relative path leads
    elsewhere from the clone.  Write none of it into the clone.  `differences` finds what is missing.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo(str(checkout)) as repo:
        remotes = {name: dict(remote) for name, remote in repo.config["remote"].items()}
        remotes[CHECKOUT] = {"url": str(repo.cache.legacy.path)}
        default = repo.config["core"].get("remote")
    logging.disable(logging.CRITICAL)  # DVC warns of each file that the first of the two places lacks
    try:
        with Repo(str(root), config={"remote": remotes}) as repo:
            files = [stage.path for stage in repo.index.stages if stage.path.endswith(".dvc")]
            for remote in filter(None, (CHECKOUT, default) if files else ()):
                try:
                    repo.pull(targets=files, remote=remote, force=True)
                except DvcException:
                    continue
                return
    finally:
        logging.disable(logging.NOTSET)
