"""dvc.yaml against the code: each stage depends on the packages that it runs, and on its own parameters.

A missing package: a change in it runs no stage, and results belong to other code.  A superfluous one: hours
of work for nothing.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rediffuse.params import flatten, load_params

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# A package may import those to its left: models know no parameters, stages and figures no tracking.
ORDER = [
    *("runtime", "images", "vae", "diffusion", "params", "sources", "training", "sampling"),
    *("evaluation", "figures", "inference", "tracking", "commands", "cli"),
]
# params only checks, and each parameter is listed itself; tracking changes no output
# (tests/test_pipeline.py).
NOT_LISTED = {"params", "tracking"}

every_stage = pytest.mark.parametrize("name", STAGES)


def imports(*files: Path) -> set[str]:
    """The packages of rediffuse that these files import, at any indentation."""
    text = "\n".join(file.read_text() for file in files)
    return set(re.findall(r"^ *(?:from|import) rediffuse\.(\w+)", text, re.MULTILINE))


def imports_of(package: str) -> set[str]:
    path = ROOT / "src/rediffuse" / package
    return imports(*path.rglob("*.py")) if path.is_dir() else imports(path.with_suffix(".py"))


@every_stage
def test_a_stage_lists_the_packages_that_it_imports(name: str) -> None:
    script = next(word for word in STAGES[name]["cmd"].split() if word.startswith("stages."))
    path = f"{script.replace('.', '/')}.py"
    reached, waiting = set[str](), imports(ROOT / path)
    while waiting := waiting - reached - NOT_LISTED:
        reached |= waiting
        waiting = set().union(*map(imports_of, waiting))
    listed = {dep for dep in STAGES[name]["deps"] if dep.startswith(("src/", "stages/"))}
    assert listed == {path, *(f"src/rediffuse/{package}" for package in reached)}


def test_imports_go_one_way() -> None:
    packages = {path.stem for path in (ROOT / "src/rediffuse").iterdir() if not path.name.startswith("__")}
    assert packages == set(ORDER)
    arrows = {(package, other) for package in ORDER for other in imports_of(package)}
    assert {(a, b) for a, b in arrows if ORDER.index(b) > ORDER.index(a)} == set()


def test_every_parameter_belongs_to_a_stage_and_exists() -> None:
    leaves = {f"{leaf}." for leaf in flatten(load_params(ROOT / "params.yaml"))}
    listed = {f"{key}." for stage in STAGES.values() for key in stage["params"]}
    assert {leaf for leaf in leaves if not leaf.startswith(tuple(listed))} == set()
    assert {key for key in listed if not any(leaf.startswith(key) for leaf in leaves)} == set()


@every_stage
def test_the_run_cache_can_serve_a_stage(name: str) -> None:
    """It serves no stage with git-tracked plain `outs`, nor with outputs that persist."""
    stage = STAGES[name]
    assert all(isinstance(out, str) and out.startswith("data/") for out in stage.get("outs", []))
    entries = [*stage.get("metrics", []), *stage.get("plots", [])]
    for entry in entries:
        [(path, settings)] = entry.items() if isinstance(entry, dict) else [(entry, {})]
        assert path.startswith("metrics/") and "persist" not in settings
        assert settings.get("cache", True) == (Path(path).suffix not in (".json", ".csv"))
