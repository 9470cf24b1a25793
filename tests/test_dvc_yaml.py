"""dvc.yaml against the code: each stage depends on the packages that it runs, and on its own parameters.

A package too few: a change in it runs no stage, and a number no longer belongs to the code.  One too many: hours of work for nothing.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rediffuse.params import flatten, load_params

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    *("prepare", "reference", "train_vae", "encode", "train_ddpm", "sample_vae", "sample_ddpm"),
    *("evaluate_vae", "evaluate_ddpm", "report"),
]
# From what knows nobody to what knows everybody: imports go to the left only.
ORDER = [
    *("runtime", "params", "images", "sources", "vae", "diffusion", "training", "sampling", "evaluation", "figures", "inference"),
    *("tracking", "commands", "cli"),
]
# params only checks, and DVC knows each parameter by itself; tracking writes MLflow's rows and changes no output (tests/test_pipeline.py).
NOT_LISTED = {"src/rediffuse/params.py", "src/rediffuse/tracking"}

every_stage = pytest.mark.parametrize("name", NAMES)


@cache
def stages() -> dict[str, Any]:
    """Every stage as DVC itself resolves it."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in the code that can run, wherever it stands: not what is there for types only."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not child.orelse):
            yield from nodes(child)


def imported(code: str) -> set[str]:
    """The modules that the code names in its imports; of `from a import b` both a and a.b, whatever b is."""
    found = set[str]()
    for node in nodes(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "this walk knows no relative imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit_of(module: str) -> str | None:
    """What a stage can list: a script of stages/ or a package of src/rediffuse; None for other modules."""
    top, _, rest = module.partition(".")
    folder = {"stages": "stages", "rediffuse": "src/rediffuse"}.get(top)
    path = f"{folder}/{rest.partition('.')[0]}"
    return None if not folder or not rest else next((unit for unit in (path, f"{path}.py") if (ROOT / unit).exists()), None)


@cache
def imports(unit: str) -> set[str]:
    """The modules that the unit names in its imports."""
    return set().union(*(imported(file.read_text()) for file in [ROOT / unit, *(ROOT / unit).rglob("*.py")] if file.is_file()))


def reached(script: str) -> set[str]:
    """The units that the script imports, directly or through others, and the script itself."""
    found, waiting = set[str](), {script}
    while waiting:
        found.add(unit := waiting.pop())
        waiting |= {other for other in map(unit_of, imports(unit)) if other} - found - NOT_LISTED
    return found


def test_the_walk_finds_imports_wherever_they_stand() -> None:
    code = "import rediffuse.vae.model\nif TYPE_CHECKING:\n    import rediffuse.figures\n"
    code += "class A:\n    def f(self):\n        if self:\n            from rediffuse.images import pixels\n"
    assert imported(code) == {"rediffuse.vae.model", "rediffuse.images", "rediffuse.images.pixels"}
    modules = ("rediffuse.vae.model", "rediffuse.params", "stages.encode", "stages.run_stage", "torch.nn")
    assert [*map(unit_of, modules)] == ["src/rediffuse/vae", "src/rediffuse/params.py", "stages/encode.py", None, None]


def test_a_stage_lists_the_packages_that_it_reaches() -> None:
    assert sorted(stages()) == sorted(NAMES)
    for name, stage in stages().items():
        listed = {dep.def_path for dep in stage.deps if dep.def_path.startswith(("src/", "stages/"))}
        [script] = [path for path in listed if path.startswith("stages/")]
        assert reached(script) == listed, name


def test_no_arrow_runs_up() -> None:
    units = [unit for unit in (ROOT / "src/rediffuse").iterdir() if not unit.name.startswith("__") and unit.suffix in ("", ".py")]
    assert sorted(unit.stem for unit in units) == sorted(ORDER)
    targets = {unit.stem: map(unit_of, imports(str(unit.relative_to(ROOT)))) for unit in units}
    arrows = {(name, Path(other).stem) for name, found in targets.items() for other in found if other and "src/" in other}
    assert sorted(arrow for arrow in arrows if ORDER.index(arrow[1]) > ORDER.index(arrow[0])) == []


def test_models_know_neither_settings_nor_tracking() -> None:
    names = [tuple(module.split(".")[:2]) for package in ("vae", "diffusion") for module in imports(f"src/rediffuse/{package}")]
    assert not {first for first, *_ in names} & {"dvc", "mlflow", "yaml"}
    assert not {("rediffuse", "params"), ("rediffuse", "tracking")} & set(names)


def test_every_parameter_belongs_to_a_stage_and_exists() -> None:
    leaves = set(flatten(load_params(ROOT / "params.yaml")))
    listed = {key for stage in stages().values() for dep in stage.deps if hasattr(dep, "params") for key in dep.params}
    belongs = {(leaf, key) for leaf in leaves for key in listed if f"{leaf}.".startswith(f"{key}.")}
    assert (leaves - {leaf for leaf, _ in belongs}, listed - {key for _, key in belongs}) == (set(), set())


@every_stage
def test_the_run_cache_can_serve_a_stage(name: str) -> None:
    """What dvc.stage.cache asks for before it saves a run and takes it back."""
    stage = stages()[name]
    assert stage.cmd and stage.deps and stage.outs and not (stage.is_callback or stage.always_changed or stage.frozen)
    for entry in [*stage.deps, *stage.outs]:
        assert entry.protocol == "local" and entry.def_path and not Path(entry.def_path).is_absolute()
    assert all(out.is_in_repo and not out.persist and (out.use_cache or out.metric or out.plot) for out in stage.outs)
    assert all(out.def_path.startswith("metrics/" if out.metric or out.plot else "data/") for out in stage.outs)
    assert all(out.use_cache == (Path(out.def_path).suffix not in (".json", ".csv")) for out in stage.outs)
