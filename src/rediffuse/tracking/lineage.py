"""What DVC knows of the results: which stages are up to date, what each depends on, and which files it has
written.

A stage that is up to date starts no process, so it logs nothing; and dvc.lock, which says what a result comes
from, is complete only when the last stage has ended.  Rows are completed from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.tracking.identity import digest_of
from rediffuse.tracking.lock import lock_of
from rediffuse.tracking.results import result_files

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage

PIXELS, MODELS, SAMPLES = "data/pixels", "data/models", "data/samples"
RECIPE = ("params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock")


@dataclass(frozen=True)
class Lineage:
    """What DVC knows of a state of the pipeline, in the files of the checkout or in a commit.

    folder: holds params.yaml, dvc.yaml, dvc.lock, metrics/ and data/models/ of the state.
    results: stage -> its files below metrics/, for stages that are up to date.
    keys: stage -> SHA-256 of its command, its dependencies with their hashes, and its parameters.
    stages: all stages of the pipeline.  hashes: DVC's hash of each output.
    missing: stages with results that are neither in the checkout nor in DVC's cache.
    why_none: where no stage of a commit is up to date, the first one and what of it differs.
    """

    folder: Path
    results: dict[str, list[Path]]
    keys: dict[str, str] = field(default_factory=dict)
    stages: frozenset[str] = frozenset()
    hashes: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    why_none: str = ""

    @property
    def digest(self) -> str:
        """One digest of all keys."""
        return digest_of(self.keys)

    @property
    def state(self) -> str | None:
        """The digest, or None unless every stage is up to date."""
        return self.digest if self.stages and self.stages == self.keys.keys() else None


def lineage_of_stage(root: Path, stage: str) -> Lineage:
    """Return what one stage that has just ended has written, by dvc.yaml alone, without importing DVC."""
    entry = lock_of(root, "dvc.yaml").get(stage, {})
    declared = chain.from_iterable(entry.get(key) or () for key in ("outs", "metrics", "plots"))
    paths = [path if isinstance(path, str) else next(iter(path)) for path in declared]
    return Lineage(root, {stage: result_files(root / path for path in paths if path.startswith("metrics/"))})


def lineage_of_checkout(root: Path, running: str | None = None) -> Lineage:
    """Return the state of the files.

    running: a stage that has just ended and that DVC has not written into dvc.lock yet.

    A stage counts as up to date only if all stages before it do: after `dvc repro --single-item` a stage may
    agree with its own inputs and yet not with the parameters in force.

    Asks for the status of each dependency and output, as `dvc status` does, but takes none of DVC's locks:
    the dvc process that runs this stage holds some.
    """
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        pipeline = _Pipeline(repo, root, running)
        current = pipeline.current
        outs = ((stage, out) for stage in current for out in stage.outs)
        made = [out for stage, out in outs if stage.name != running or not out.status()]
        return Lineage(
            root,
            {stage.name: _results(stage, root) for stage in current},
            {stage.name: _key(stage, ended=stage.name != running) for stage in current},
            frozenset(stage.name for stage in pipeline.stages),
            {out.def_path: out.hash_info.value for out in made},
        )


@contextmanager
def lineage_of_commit(root: Path, commit: str, folder: Path) -> Iterator[Lineage]:
    """Return the state in a commit.  Put its files into `folder`, pictures and models from DVC's cache."""
    from dvc.repo import Repo

    with Repo(str(root), rev=commit) as repo:
        pipeline = _Pipeline(repo, root, committed=True)
        results, missing = dict[str, list[Path]](), []
        for stage in pipeline.current:
            outs = (out.def_path for out in stage.outs)
            places = [path for path in outs if path.startswith(("metrics/", f"{MODELS}/"))]
            there = [place for place in places if _fetch(repo, place, folder / place)]
            if len(there) < len(places):
                missing.append(stage.name)
            written = (folder / place for place in there if place.startswith("metrics/"))
            results[stage.name] = result_files(written)
        for path in (*RECIPE, f"{PIXELS}/manifest.json", f"{SAMPLES}/vae/prior.safetensors"):
            _fetch(repo, path, folder / path)
        yield Lineage(
            folder,
            results,
            {stage.name: _key(stage, ended=True) for stage in pipeline.current},
            frozenset(stage.name for stage in pipeline.stages),
            {out.def_path: out.hash_info.value for stage in pipeline.current for out in stage.outs},
            missing,
            why_none="" if pipeline.current or not pipeline.stages else pipeline.why_none(),
        )


class _Pipeline:
    """Which stages of a repository are up to date.

    root: of the checkout.  running: the stage that ends now, which counts whatever dvc.lock says of it.
    committed: the repository is opened at a commit.
    """

    def __init__(self, repo: Repo, root: Path, running: str | None = None, committed: bool = False) -> None:
        self.repo, self.root, self.running, self.committed = repo, root, running, committed
        self.stages = [stage for stage in repo.index.stages if _in_pipeline(stage)]
        self.made = {out.def_path: out for stage in repo.index.stages for out in stage.outs}
        self._known: dict[Stage, bool] = {}
        self.current = [stage for stage in self.stages if self._counts(stage)]

    def why_none(self) -> str:
        """Return the first stage that is not up to date, and what of it differs from dvc.lock."""
        stale = (stage for stage in self.stages if not self._known[stage])
        stage = next(stage for stage in stale if all(map(self._counts, self._before(stage))))
        differing = ", ".join(map(self._describe, self._differing(stage)))
        return f"stage {stage.name} does not agree with its dvc.lock: {differing}"

    def _counts(self, stage: Stage) -> bool:
        if stage not in self._known:
            ends_now = _in_pipeline(stage) and stage.name == self.running
            before = all(map(self._counts, self._before(stage)))
            self._known[stage] = before and (ends_now or next(self._differing(stage), None) is None)
        return self._known[stage]

    def _before(self, stage: Stage) -> Iterable[Stage]:
        # Edges lead to what a stage depends on.
        found: Iterable[Stage] = self.repo.index.graph.successors(stage)
        return found

    def _differing(self, stage: Stage) -> Iterator[Any]:
        """Yield what is not as in dvc.lock: dependencies, parameters, outputs; the definition as a text."""
        if stage.frozen or stage.always_changed or stage.is_callback or stage.changed_stage():
            yield "its definition"
        yield from (entry for entry in chain(stage.deps, stage.outs) if not self._agrees(entry))

    def _agrees(self, entry: Any) -> bool:
        if self.committed and entry.def_path in self.made:  # a commit holds no data, only their hashes
            return bool(entry.hash_info and entry.hash_info == self.made[entry.def_path].hash_info)
        return not entry.status()

    def _describe(self, entry: Any) -> str:
        """Name a dependency or output that differs, with the remedy where the commit lacks it."""
        if isinstance(entry, str):
            return entry
        path = str(entry.def_path)
        if not self.committed or path in self.made or entry.exists:
            return f"{path} differs"
        pointers = [f"{place}.dvc" for place in (Path(path), *Path(path).parents)]
        pointer = next((pointer for pointer in pointers if Path(self.root, pointer).is_file()), path)
        return f"{path} is in no commit (`git add {pointer}` and commit before `dvc exp run`)"


def _in_pipeline(stage: Stage) -> bool:
    """Return whether it is of dvc.yaml: data that DVC tracks (*.dvc) are stages without a name."""
    return bool(getattr(stage, "name", None))


def _key(stage: Stage, *, ended: bool) -> str:
    """Return the digest of what dvc.lock says of the stage's inputs, or will say when the stage has ended."""
    inputs = {dep.def_path: (dep.hash_info if ended else dep.get_hash()).value for dep in stage.deps}
    return digest_of([stage.cmd, inputs])


def _results(stage: Stage, root: Path) -> list[Path]:
    """Return the stage's files below metrics/."""
    files = result_files(Path(out.fs_path) for out in stage.outs)
    return [file for file in files if file.is_relative_to(root / "metrics")]


def _fetch(repo: Repo, path: str, to: Path) -> bool:
    """Copy what git tracks, or DVC's cache holds, of this path; return False if neither has it."""
    from dvc_data.index.index import DataIndexDirError

    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        repo.dvcfs.get(path, str(to), recursive=True)
    except (FileNotFoundError, DataIndexDirError):
        return False
    return True
