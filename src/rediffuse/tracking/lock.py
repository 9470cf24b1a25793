"""dvc.lock: what each stage was run with, and DVC's hashes of what it read and wrote.

Read without importing DVC.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rediffuse.runtime.errors import UserError

Entries = dict[str, dict[str, Any]]  # stage -> what dvc.lock, or dvc.yaml, says of it


def read_lock(content: bytes | None, name: str = "dvc.lock") -> Entries:
    """Return the stages of a dvc.lock or dvc.yaml; a missing one has none.

    Raises UserError for a damaged one.
    """
    import yaml

    try:
        lock = yaml.load(content or b"", Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        return {stage: dict(entry) for stage, entry in lock.get("stages", {}).items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{name} is damaged ({why}): take it from a backup, or run the experiment again"
        ) from None


def lock_of(folder: Path, name: str = "dvc.lock") -> Entries:
    """Return the stages of the dvc.lock in the folder, or of its dvc.yaml."""
    path = folder / name
    return read_lock(path.read_bytes() if path.is_file() else None, str(path))


def hashes(entries: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """Return {path: DVC's hash} of the `deps` or `outs` of a stage; None where dvc.lock has none."""
    return {entry["path"]: entry.get(entry.get("hash", "md5")) for entry in entries}


def output_hashes(lock: Entries) -> dict[str, str | None]:
    """Return DVC's hash of every output of every stage."""
    return hashes(out for stage in lock.values() for out in stage.get("outs", ()))


def unchanged(folder: Path, stage: str) -> bool:
    """Return whether the outputs of the stage, in the folder, are those that dvc.lock has for it already."""
    outs = lock_of(folder).get(stage, {}).get("outs", [])
    return bool(outs) and all(md5_of(folder / path) == md5 for path, md5 in hashes(outs).items())


def md5_of(path: Path) -> str:
    """Return DVC's hash of a file or folder, "" if it is missing."""
    if path.is_dir():
        return directory_md5(path)
    return _file_md5(path) if path.is_file() else ""


def directory_md5(folder: Path) -> str:
    """Return DVC's hash of a folder: the MD5 of a JSON list of its files and their MD5s, and ".dir"."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": _file_md5(folder / name), "relpath": name} for name in names]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
