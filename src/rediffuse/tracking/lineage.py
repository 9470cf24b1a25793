"""What DVC knows of the results: which stages are up to date, what each hangs on, and which files it has written.

A stage that DVC found up to date starts no process, so nobody logs for it; and dvc.lock, which says what a result comes from, is
complete only when the last stage has ended.  So rows are completed from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.tracking.identity import digest_of
from rediffuse.tracking.results import result_files

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage


PREPARED = "data/prepared"
RECIPE = ("params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock")


@dataclass(frozen=True)
class Lineage:
    """What DVC knows of a state of the pipeline, in the files of the checkout or in a commit.

    folder: where params.yaml, dvc.yaml, dvc.lock, metrics/ and data/models/ of the state are.
    keys: of every stage that is up to date, SHA-256 of its command, its dependencies with their hashes, and its parameters.
    results: the files below metrics/ of these stages.  hashes: DVC's hash of each of their outputs.
    missing: stages with results that are neither in the checkout nor in DVC's cache.
    """

    folder: Path
    stages: list[str]
    keys: dict[str, str]
    results: dict[str, list[Path]]
    hashes: dict[str, str]
    missing: list[str] = field(default_factory=list)

    @property
    def state(self) -> str | None:
        """One digest of all keys, or None unless every stage is up to date."""
        return digest_of(self.keys) if self.stages and set(self.stages) == set(self.keys) else None


def lineage_of_checkout(root: Path, running: str | None = None) -> Lineage:
    """The state of the files.  `running`: the stage that calls this at its end, which DVC has not yet written into dvc.lock.

    A stage counts as up to date only if all stages before it count: after `dvc repro --single-item`, the results of a stage may
    agree with their own inputs and yet not with the parameters in force.

    Asks the dependencies and outputs one by one, as `dvc status` does, but takes none of DVC's locks: the dvc process that
    runs this stage holds some.
    """
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        current = _up_to_date(repo, running, committed=False)
        return Lineage(
            root,
            sorted(stage.name for stage in repo.index.stages if _in_pipeline(stage)),
            {stage.name: _key(stage, ended=stage.name != running) for stage in current},
            {stage.name: _results(stage, root) for stage in current},
            {out.def_path: out.hash_info.value for stage in current for out in stage.outs if stage.name != running},
        )


@contextmanager
def lineage_of_commit(root: Path, commit: str, folder: Path) -> Iterator[Lineage]:
    """The state in a commit, such as an experiment's; its files are put into `folder`, pictures and models from DVC's cache."""
    from dvc.repo import Repo

    with Repo(str(root), rev=commit) as repo:
        current = _up_to_date(repo, None, committed=True)
        for name in RECIPE:
            if repo.fs.exists(repo.fs.join(repo.root_dir, name)):
                (folder / name).write_bytes(repo.fs.read_bytes(repo.fs.join(repo.root_dir, name)))
        results, missing = dict[str, list[Path]](), []
        for stage in current:
            places = [out.def_path for out in stage.outs if out.def_path.startswith(("metrics/", "data/models/"))]
            there = [place for place in places if _fetch(repo, place, folder / place)]
            if len(there) < len(places):
                missing.append(stage.name)
            results[stage.name] = result_files(folder / place for place in there if place.startswith("metrics/"))
        for path in ("data/prepared/manifest.json", "data/samples/vae/prior.safetensors"):
            _fetch(repo, path, folder / path)
        yield Lineage(
            folder,
            sorted(stage.name for stage in repo.index.stages if _in_pipeline(stage)),
            {stage.name: _key(stage, ended=True) for stage in current},
            results,
            {out.def_path: out.hash_info.value for stage in current for out in stage.outs},
            missing,
        )


def locked_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What dvc.lock in the folder says of every stage; nothing where there is none."""
    import yaml

    path = folder / "dvc.lock"
    if not path.is_file():
        return {}
    lock = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    return dict(lock.get("stages", {}))


def hashes_of(entries: Iterable[dict[str, Any]]) -> dict[str, str]:
    """{path: DVC's hash} of the `deps` or `outs` of a stage in dvc.lock."""
    return {entry["path"]: str(entry.get("md5", "")) for entry in entries}


def locked_hashes(folder: Path) -> dict[str, str]:
    """DVC's hash of every output that dvc.lock in the folder names; nothing where there is none."""
    return hashes_of(out for stage in locked_stages(folder).values() for out in stage.get("outs", []))


def _up_to_date(repo: Repo, running: str | None, *, committed: bool) -> list[Stage]:
    graph = repo.index.graph  # an edge leads from a stage to one that it depends on
    made = {out.def_path: out for stage in repo.index.stages for out in stage.outs}
    known: dict[Stage, bool] = {}

    def agrees(entry: Any) -> bool:
        """Whether a dependency or output is what dvc.lock says."""
        if committed and entry.def_path in made:  # a commit holds no data: what is in DVC's cache has its hash for a name
            return bool(entry.hash_info and entry.hash_info == made[entry.def_path].hash_info)
        return not entry.status()

    def same(stage: Stage) -> bool:
        """Whether the stage's command, dependencies, parameters and outputs are those in dvc.lock."""
        if stage.frozen or stage.always_changed or stage.is_callback or stage.changed_stage():
            return False
        return all(agrees(entry) for entry in chain(stage.deps, stage.outs))

    def current(stage: Stage) -> bool:
        if stage not in known:
            ends_now = _in_pipeline(stage) and stage.name == running
            known[stage] = all(current(before) for before in graph.successors(stage)) and (ends_now or same(stage))
        return known[stage]

    return [stage for stage in repo.index.stages if _in_pipeline(stage) and current(stage)]


def _in_pipeline(stage: Stage) -> bool:
    """Whether it is of dvc.yaml; raw data that DVC tracks (*.dvc) is a stage to DVC as well, without a name."""
    return bool(getattr(stage, "name", None))


def _key(stage: Stage, *, ended: bool) -> str:
    """What dvc.lock says of the stage, without its outputs; before the stage has ended, what it will say."""
    inputs = {dep.def_path: (dep.hash_info if ended else dep.get_hash()).value for dep in stage.deps}
    return digest_of([stage.cmd, inputs])


def _results(stage: Stage, root: Path) -> list[Path]:
    """The stage's files under metrics/, with folders opened, in a fixed order."""
    return [file for file in result_files(Path(out.fs_path) for out in stage.outs) if file.is_relative_to(root / "metrics")]


def _fetch(repo: Repo, path: str, to: Path) -> bool:
    """Copy what git tracks, or DVC's cache holds, of this path; False if neither has it."""
    from dvc_data.index.index import DataIndexDirError

    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        repo.dvcfs.get(path, str(to), recursive=True)
    except (FileNotFoundError, DataIndexDirError):
        return False
    return True
