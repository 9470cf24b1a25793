"""dvc.yaml against the code: each stage depends on exactly the modules that it imports, and on its own parameters.

A module too few: a change in it does not run the stage, and a number no longer belongs to the code beside it.  One too many: a
change runs stages for hours that cannot differ.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rediffuse.params import flatten, load_params

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["prepare", "reference", "train_vae", "encode", "train_ddpm", "sample_vae", "sample_ddpm", "evaluate_vae", "evaluate_ddpm"]
ONLY = {"draw_vae": "sample_vae", "draw_ddpm": "sample_ddpm"}  # functions of stages/sample.py that one model alone runs
WEIGHTS = "src/rediffuse/evaluation/weights"  # read, not imported, by the module beside them
# Tracking writes the row and can change no byte of an output (tests/test_pipeline.py runs the stages without it and compares).
# So no stage depends on it: a change in how a row is written trains nothing again.
WITHOUT_EFFECT = "rediffuse.tracking"

every_stage = pytest.mark.parametrize("name", NAMES)


@cache
def stages() -> dict[str, Any]:
    """Every stage as DVC itself resolves it."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def dependencies(name: str) -> set[str]:
    """The files and folders that the stage depends on, but for the user's own folder of images."""
    return {dep.def_path for dep in stages()[name].deps if not hasattr(dep, "params")} - {load_params(ROOT / "params.yaml").data.path}


def parameters(name: str) -> set[str]:
    """What of params.yaml the stage depends on: leaves and groups, dotted."""
    return {key for dep in stages()[name].deps if hasattr(dep, "params") for key in dep.params}


def outputs(name: str) -> set[str]:
    return {out.def_path for out in stages()[name].outs}


# What the code imports


def file_of(module: str) -> Path | None:
    """The file of a module or package of ours, or None."""
    path = (ROOT if module.partition(".")[0] == "stages" else ROOT / "src") / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def nodes(node: ast.AST, stage: str) -> Iterator[ast.AST]:
    """Everything in the code that the stage can run: not what is there for types only, nor functions of another stage."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            assert not child.orelse
        elif not (isinstance(child, ast.FunctionDef) and ONLY.get(child.name, stage) != stage):
            yield from nodes(child, stage)


def imported(code: str, stage: str = "") -> set[str]:
    """The modules of ours that the code names in its imports, with the packages around them."""
    found = set[str]()
    for node in nodes(ast.parse(code), stage):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "this walk knows no relative imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {".".join(name.split(".")[: i + 1]) for name in found for i in range(name.count(".") + 1)}
    ours = {name for name in parents if name.partition(".")[0] in ("rediffuse", "stages") and file_of(name)}
    return {name for name in ours if not f"{name}.".startswith(f"{WITHOUT_EFFECT}.")}


def modules_of(name: str) -> set[str]:
    """The files of all modules that the stage's script imports, directly or through others, and the script itself."""
    files, waiting = set[Path](), {"stages", f"stages.{name.partition('@')[0]}"}
    while waiting:
        file = file_of(waiting.pop())
        assert file
        if file not in files:
            files.add(file)
            waiting |= imported(file.read_text(), name)
    return {str(file.relative_to(ROOT)) for file in files}


def script_of(name: str) -> ast.Module:
    return ast.parse((ROOT / f"stages/{name.partition('@')[0]}.py").read_text())


# The walk itself


def test_the_walk_finds_imports_wherever_they_stand():
    code = """
import rediffuse.vae.model
from rediffuse.images import image_set as images
from rediffuse.params import Params
from os import path
if TYPE_CHECKING:
    from rediffuse.vae.step import VAEStep
from rediffuse.tracking.row import stage_run
class A:
    def f(self):
        if self:
            from rediffuse.runtime.errors import UserError
def draw_vae():
    import rediffuse.runtime.shards
"""
    always = {"rediffuse", "rediffuse.vae", "rediffuse.vae.model", "rediffuse.data", "rediffuse.images.image_set"}
    always |= {"rediffuse.params", "rediffuse.runtime.errors"}
    assert imported(code, "sample_ddpm") == always
    assert imported(code, "sample_vae") == always | {"rediffuse.runtime.shards"}


def test_functions_of_one_model_exist():
    """Else the walk would silently look at everything or nothing."""
    found = {node.name for node in ast.walk(script_of("sample_vae")) if isinstance(node, ast.FunctionDef)}
    assert set(ONLY) <= found


# Dependencies


def test_the_stages_are_those_of_the_design():
    assert sorted(stages()) == sorted(NAMES)


@every_stage
def test_code_dependencies_are_exactly_the_modules_imported(name):
    listed = set[str]()
    for path in dependencies(name):
        if (ROOT / path).suffix == ".py":
            assert (ROOT / path).is_file()
            listed.add(path)
        elif path.startswith(("src/", "stages")) and path != WEIGHTS:
            inside = {str(file.relative_to(ROOT)) for file in (ROOT / path).rglob("*.py")}
            assert inside, f"{path} holds no module"
            listed |= inside
    needed = modules_of(name)
    assert listed - needed == set(), "listed in dvc.yaml, imported by nobody"
    assert needed - listed == set(), "imported, but not in dvc.yaml"


@every_stage
def test_weights_belong_to_the_stages_that_load_them(name):
    listed = any(path == WEIGHTS or WEIGHTS.startswith(f"{path}/") for path in dependencies(name))
    assert listed == ("src/rediffuse/evaluation/classifier.py" in modules_of(name))
    assert list((ROOT / WEIGHTS).glob("*.safetensors"))


@every_stage
def test_folders_of_code_hold_nothing_that_changes_by_itself(name):
    """Python's caches in a folder would make the stage run again on another machine."""
    for dep in stages()[name].deps:
        if (ROOT / dep.def_path).is_dir() and dep.def_path.startswith("src/"):
            files = [Path(file).relative_to(ROOT) for file in dep.repo.dvcignore.find(dep.fs, dep.fs_path)]
            assert files and not [file for file in files if file.suffix == ".pyc"]


@every_stage
def test_no_dependency_stands_inside_another(name):
    for path in dependencies(name):
        assert not [other for other in dependencies(name) if path.startswith(f"{other}/")]


@every_stage
def test_data_read_are_the_output_of_another_stage(name):
    made = {path for other in NAMES if other != name for path in outputs(other)}
    assert {path for path in dependencies(name) if not path.startswith(("src/", "stages"))} <= made


@every_stage
def test_paths_in_the_script_are_dependencies_or_outputs(name):
    """`f"data/samples/{model}.npz"` in the script, `data/samples/vae.npz` in dvc.yaml: neither may lack the other."""
    item = name.partition("@")[2]
    texts = [node for node in nodes(script_of(name), name) if isinstance(node, ast.JoinedStr | ast.Constant)]
    inside = {id(value) for node in texts if isinstance(node, ast.JoinedStr) for value in node.values}
    written = [ast.unparse(node).strip("f'\"").replace("{model}", item) for node in texts if id(node) not in inside]
    named = {path for path in written if re.fullmatch(r"(data|metrics)/[\w/.]+", path)}
    declared = {path for path in dependencies(name) | outputs(name) if path.startswith(("data/", "metrics/"))}

    def covered(path: str, by: set[str]) -> bool:
        return any(path == other or path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in by)

    assert [path for path in sorted(named) if not covered(path, declared)] == []
    assert [path for path in sorted(declared) if not covered(path, named)] == []


# Parameters


def within(name: str, groups: set[str]) -> bool:
    """Whether the dotted name is one of the groups' or lies in one."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def leaves() -> set[str]:
    return set(flatten(load_params(ROOT / "params.yaml")))


def test_every_parameter_belongs_to_a_stage():
    listed = {key for name in NAMES for key in parameters(name)}
    assert sorted(leaf for leaf in leaves() if not within(leaf, listed)) == []


@every_stage
def test_no_stage_lists_a_parameter_that_does_not_exist(name):
    assert [key for key in parameters(name) if not any(within(leaf, {key}) for leaf in leaves())] == []


@every_stage
def test_parameters_are_those_that_the_script_reads(name):
    """`params.sample.n` in the script, `sample.n` or `sample` in dvc.yaml; the launcher is read by the command."""
    chains = {ast.unparse(node) for node in nodes(script_of(name), name) if isinstance(node, ast.Attribute)}
    found = {chain.removeprefix("params.") for chain in chains if re.fullmatch(r"params(\.\w+)+", chain)}
    read = {key for key in found if any(within(leaf, {key}) for leaf in leaves())}
    read -= {key for key in read if any(other.startswith(f"{key}.") for other in read)}  # params.sample of params.sample.n
    listed = parameters(name) - ({"launcher"} if name != "prepare" else set())
    assert [key for key in sorted(read) if not within(key, listed)] == [], "read, but not in dvc.yaml"
    assert [key for key in sorted(listed) if not any(within(key, {other}) or within(other, {key}) for other in read)] == []


# Everything else that DVC needs for exactness


@every_stage
def test_a_stage_is_described_and_runs_its_own_script(name):
    stage = stages()[name]
    script, _, item = name.partition("@")
    assert stage.desc and len(stage.desc) > 10
    assert stage.cmd == f"python -m stages.{script} {item}".strip()


def test_the_launcher_starts_every_stage_that_depends_on_it():
    """It stands in the command and among the parameters of the same stages: all but the one that only copies."""
    commands = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    started = {name for name, stage in commands.items() if stage.get("do", stage)["cmd"].startswith("${launcher} stages.")}
    assert started == {name.partition("@")[0] for name in NAMES if "launcher" in parameters(name)} == set(commands) - {"prepare", "encode"}


@every_stage
def test_outputs_lie_where_the_house_keeps_them(name):
    for out in stages()[name].outs:
        assert out.def_path.startswith("metrics/" if out.metric or out.plot else "data/"), out.def_path
        assert not out.persist, out.def_path
        # Small text is tracked by git, everything else is in DVC's cache.
        assert out.use_cache == (Path(out.def_path).suffix not in (".json", ".csv")), out.def_path
    assert outputs(name)


@every_stage
def test_the_run_cache_can_serve_a_stage(name):
    """What dvc.stage.cache asks for before it saves a run and takes it back."""
    stage = stages()[name]
    assert stage.cmd and stage.deps and stage.outs
    assert not (stage.is_callback or stage.always_changed or stage.frozen)
    for entry in [*stage.deps, *stage.outs]:
        assert entry.protocol == "local" and entry.def_path and not Path(entry.def_path).is_absolute()
    assert all(out.is_in_repo and (out.use_cache or out.metric or out.plot) for out in stage.outs)


@every_stage
def test_the_committed_results_belong_to_the_committed_code_and_parameters(name):
    """dvc.lock names the code and parameters that its results come from; a change without a new `dvc repro` shows here."""
    stage = stages()[name]
    assert not stage.changed_stage(), "the command differs from dvc.lock: run `make repro` and commit dvc.lock and metrics"
    changed = {str(dep): dep.status() for dep in stage.deps if not str(dep).startswith("data/") and dep.status()}
    assert not changed, "run `make repro` and commit dvc.lock and metrics"
