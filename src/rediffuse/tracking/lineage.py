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

PIXELS, MODELS, SAMPLES = "data/pixels", "data/models", "data/samples"
RECIPE = ("params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock")


@dataclass(frozen=True)
class Lineage:
    """What DVC knows of a state of the pipeline, in the files of the checkout or in a commit.

    folder: where params.yaml, dvc.yaml, dvc.lock, metrics/ and data/models/ of the state are.
    keys: of every stage that is up to date, SHA-256 of its command, its dependencies with their hashes, and its parameters.
    results: the files below metrics/ of these stages.  hashes: DVC's hash of each of their outputs.
    missing: stages with results that are neither in the checkout nor in DVC's cache.
    why_none: where no stage of a commit is up to date, the first one and what of it differs.
    """

    folder: Path
    stages: list[str]
    keys: dict[str, str]
    results: dict[str, list[Path]]
    hashes: dict[str, str]
    missing: list[str] = field(default_factory=list)
    why_none: str = ""

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
        pipeline = _Pipeline(repo, root, running)
        locked = [out for stage in pipeline.current for out in stage.outs if stage.name != running or not out.status()]
        return Lineage(
            root,
            sorted(stage.name for stage in pipeline.stages),
            {stage.name: _key(stage, ended=stage.name != running) for stage in pipeline.current},
            {stage.name: _results(stage, root) for stage in pipeline.current},
            {out.def_path: out.hash_info.value for out in locked},
        )


@contextmanager
def lineage_of_commit(root: Path, commit: str, folder: Path) -> Iterator[Lineage]:
    """The state in a commit, such as an experiment's; its files are put into `folder`, pictures and models from DVC's cache."""
    from dvc.repo import Repo

    with Repo(str(root), rev=commit) as repo:
        pipeline = _Pipeline(repo, root, committed=True)
        for name in RECIPE:
            if repo.fs.exists(repo.fs.join(repo.root_dir, name)):
                (folder / name).write_bytes(repo.fs.read_bytes(repo.fs.join(repo.root_dir, name)))
        results, missing = dict[str, list[Path]](), []
        for stage in pipeline.current:
            places = [out.def_path for out in stage.outs if out.def_path.startswith(("metrics/", f"{MODELS}/"))]
            there = [place for place in places if _fetch(repo, place, folder / place)]
            if len(there) < len(places):
                missing.append(stage.name)
            results[stage.name] = result_files(folder / place for place in there if place.startswith("metrics/"))
        for path in (f"{PIXELS}/manifest.json", f"{SAMPLES}/vae/prior.safetensors"):
            _fetch(repo, path, folder / path)
        yield Lineage(
            folder,
            sorted(stage.name for stage in pipeline.stages),
            {stage.name: _key(stage, ended=True) for stage in pipeline.current},
            results,
            {out.def_path: out.hash_info.value for stage in pipeline.current for out in stage.outs},
            missing,
            why_none="" if pipeline.current or not pipeline.stages else pipeline.why_none(),
        )


class _Pipeline:
    """Which stages of a repository are up to date.  A stage counts only if all stages before it do.

    root: of the checkout.  running: the stage that ends now, which counts whatever dvc.lock says of it.  committed: the repository is
    opened at a commit.
    """

    def __init__(self, repo: Repo, root: Path, running: str | None = None, *, committed: bool = False) -> None:
        self.repo, self.root, self.running, self.committed = repo, root, running, committed
        self.stages = [stage for stage in repo.index.stages if _in_pipeline(stage)]
        self.made = {out.def_path: out for stage in repo.index.stages for out in stage.outs}
        self._known: dict[Stage, bool] = {}
        self.current = [stage for stage in self.stages if self._counts(stage)]

    def why_none(self) -> str:
        """The first stage that is not up to date, and what of it is another than in dvc.lock."""
        stage = next(stage for stage in self.stages if not self._known[stage] and all(map(self._counts, self._before(stage))))
        return f"stage {stage.name} does not agree with its dvc.lock: {', '.join(map(self._told, self._differing(stage)))}"

    def _counts(self, stage: Stage) -> bool:
        if stage not in self._known:
            ends_now = _in_pipeline(stage) and stage.name == self.running
            before = all(map(self._counts, self._before(stage)))
            self._known[stage] = before and (ends_now or next(self._differing(stage), None) is None)
        return self._known[stage]

    def _before(self, stage: Stage) -> Iterable[Stage]:
        found: Iterable[Stage] = self.repo.index.graph.successors(stage)  # an edge leads from a stage to one that it depends on
        return found

    def _differing(self, stage: Stage) -> Iterator[Any]:
        """The dependencies, parameters and outputs of the stage that are not what dvc.lock says; its command and settings as a text."""
        if stage.frozen or stage.always_changed or stage.is_callback or stage.changed_stage():
            yield "its definition"
        yield from (entry for entry in chain(stage.deps, stage.outs) if not self._agrees(entry))

    def _agrees(self, entry: Any) -> bool:
        if self.committed and entry.def_path in self.made:  # a commit holds no data: what is in DVC's cache has its hash for a name
            return bool(entry.hash_info and entry.hash_info == self.made[entry.def_path].hash_info)
        return not entry.status()

    def _told(self, entry: Any) -> str:
        """A dependency or output that differs, in words, with the remedy where the commit lacks it."""
        if isinstance(entry, str):
            return entry
        path = str(entry.def_path)
        if not self.committed or path in self.made or entry.exists:
            return f"{path} differs"
        pointers = [f"{place}.dvc" for place in (Path(path), *Path(path).parents)]
        pointer = next((pointer for pointer in pointers if Path(self.root, pointer).is_file()), path)
        return f"{path} is in no commit (`git add {pointer}` and commit before `dvc exp run`)"


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
