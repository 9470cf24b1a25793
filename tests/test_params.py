"""params.yaml and its schema: what is wrong is said in the words a user needs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rediffuse.params import Params, flatten, load_params
from rediffuse.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def raw() -> dict[str, Any]:
    """Parameters that are valid, whatever stands in params.yaml today."""
    return dict(yaml.safe_load((ROOT / "recipes/fashion-mnist-cpu.yaml").read_text()))


def load(raw: Any, folder: Path) -> Params:
    """Write the parameters as DVC would, and load them."""
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load_params(file)


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    for name, value in changes.items():
        *groups, leaf = name.split(".")
        node = raw
        for group in groups:
            node = node[group]
        node[leaf] = value
    return raw


def message(raw: Any, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(raw, folder)
    return str(caught.value)


def test_the_file_of_the_checkout_is_valid() -> None:
    load_params(ROOT / "params.yaml")


def test_flatten_gives_every_leaf_as_dvc_names_it(raw: dict[str, Any], tmp_path: Path) -> None:
    flat = flatten(load(raw, tmp_path))
    assert flat["seed"] == raw["seed"] and flat["ddpm.training.lr"] == raw["ddpm"]["training"]["lr"]
    assert changed({"ddpm": {"training": {}, **raw["ddpm"]}, **raw}, flat) == raw


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ddpm.T": 0}, "ddpm.T: input should be greater than or equal to 2, got 0 (params.yaml)"),
        ({"ddpm.T": 10_001}, "ddpm.T: input should be less than or equal to 10000, got 10001 (params.yaml)"),
        ({"ddpm.T": "abc"}, "ddpm.T: input should be a valid integer, got 'abc' (params.yaml)"),
        ({"ddpm.T": 500.5}, "ddpm.T: input should be a valid integer, got 500.5 (params.yaml)"),
        ({"ddpm.T": True}, "ddpm.T: input should be a valid integer, got True (params.yaml)"),
        ({"ddpm.T": None}, "ddpm.T: input should be a valid integer, got None (params.yaml)"),
        ({"ddpm.schedule": "cubic"}, "ddpm.schedule: input should be 'linear', 'cosine' or 'sigmoid', got 'cubic' (params.yaml)"),
        ({"ddpm.conditional": "yes please"}, "ddpm.conditional: input should be a valid boolean, got 'yes please' (params.yaml)"),
        ({"ddpm.fold": 3}, "ddpm.fold: input should be 1, 2 or 4, got 3 (params.yaml)"),
        ({"ddpm.width": 65}, "ddpm.width: input should be a multiple of 8, got 65 (params.yaml)"),
        ({"ddpm.training.lr": "fast"}, "ddpm.training.lr: input should be a valid number, got 'fast' (params.yaml)"),
        ({"ddpm.training.lr": 0}, "ddpm.training.lr: input should be greater than 0, got 0 (params.yaml)"),
        ({"vae.channels": [32, "many"]}, "vae.channels.1: input should be a valid integer, got 'many' (params.yaml)"),
        ({"vae.channels": [32, 0]}, "vae.channels.1: input should be greater than or equal to 1, got 0 (params.yaml)"),
        ({"ddpm": 5}, "ddpm: input should be a valid dictionary or instance of DDPM, got 5 (params.yaml)"),
        ({"sample.seeds": []}, "sample.seeds: list should have at least 1 item after validation, not 0, got [] (params.yaml)"),
        ({"reference.instruments": ["fid"]}, "reference.instruments.0: input should be 'fashion-mnist-cnn-v1', 'classifier', "),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1 (params.yaml)"),
    ],
    ids=str,
)
def test_wrong_value_is_named_with_what_is_allowed(raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    found = message(changed(raw, changes), tmp_path)
    assert found == expected or (expected.endswith(" ") and found.startswith(expected))


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ([], "list should have at least 1 item after validation, not 0"),
        ([8] * 6, "list should have at most 5 items after validation, not 6"),
        (32, "input should be a valid list"),
        ("32,64", "input should be a valid list"),
        ({"a": 1}, "input should be a valid list"),
    ],
    ids=str,
)
def test_list_of_another_form_is_named_with_what_is_allowed(raw: dict[str, Any], tmp_path: Path, value: Any, allowed: str) -> None:
    assert message(changed(raw, {"vae.channels": value}), tmp_path) == f"vae.channels: {allowed}, got {value!r} (params.yaml)"


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "inf", "nan", "1e999"])
def test_number_that_is_not_finite_is_refused(raw: dict[str, Any], tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(raw, {"ddpm.min_snr_gamma": "HERE"})).replace("HERE", text))
    with pytest.raises(UserError, match=r"^ddpm.min_snr_gamma: input should be a finite number, got .*\(params.yaml\)$"):
        load_params(file)


@pytest.mark.parametrize("text", ["1e-05", "1.0e-05", "1e-5", "0.00001"])
def test_number_as_dvc_writes_it_arrives_as_a_number(raw: dict[str, Any], tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(raw, {"ddpm.training.lr": "HERE"})).replace("HERE", text))
    assert load_params(file).ddpm.training.lr == 1e-5


def test_integer_is_a_number_too(raw: dict[str, Any], tmp_path: Path) -> None:
    beta = load(changed(raw, {"vae.beta": 4}), tmp_path).vae.beta
    assert beta == 4.0 and isinstance(beta, float)


@pytest.mark.parametrize("value", [True, "true"])
def test_truth_value_is_not_a_number(raw: dict[str, Any], tmp_path: Path, value: Any) -> None:
    assert message(changed(raw, {"vae.beta": value}), tmp_path) == f"vae.beta: input should be a valid number, got {value!r} (params.yaml)"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ddpm.typo", "space, T, schedule, predict"),
        ("typo", "seed, precision, compile, launcher, data"),
        ("sample.vae.steps", "prior, components"),
        ("vae.training.typo", "images, batch"),
    ],
)
def test_unknown_parameter_is_named_with_the_known_ones(raw: dict[str, Any], tmp_path: Path, name: str, known: str) -> None:
    found = message(changed(raw, {name: 1}), tmp_path)
    assert found.startswith(f"{name} is not a parameter (params.yaml); known here: {known}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample.ddpm.steps": 501, "ddpm.T": 500}, ["sample.ddpm.steps (501)", "ddpm.T (500)"]),
        ({"ddpm.T": 10, "sample.ddpm.steps": 20}, ["sample.ddpm.steps (20)", "ddpm.T (10)"]),
        ({"sample.ddpm.eta": 0.5, "sample.ddpm.sampler": "dpm-solver++"}, ["eta (0.5)", "ddim", "dpm-solver++", "sample.ddpm"]),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.conditional": False}, ["sample.ddpm.guidance_scale (2.0)", "ddpm.conditional"]),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0}, ["sample.ddpm.guidance_scale (2.0)", "ddpm.label_drop"]),
        (
            {"vae.training.batch": 200, "vae.training.images": 100, "vae.training.lr_warmup": 0},
            ["vae.training", "batch (200)", "images (100)"],
        ),
        ({"sample.n": 999, "evaluate.kid_subset_size": 1000}, ["sample.n (999)", "at least 1000", "evaluate.kid_subset_size"]),
        ({"sample.n": 5, "evaluate.kid_subset_size": 5, "evaluate.is_splits": 6}, ["sample.n (5)", "evaluate.is_splits"]),
        (
            {"sample.n": 5, "evaluate.kid_subset_size": 5, "evaluate.is_splits": 1, "evaluate.neighbours": 5},
            ["at least 6", "evaluate.neighbours"],
        ),
        ({"sample.n": 1000, "evaluate.density_neighbours": 100, "sample.seeds": [1, 1]}, ["sample.seeds must differ", "1, 1"]),
        ({"reference.instruments": ["classifier", "classifier"]}, ["reference.instruments must differ", "classifier, classifier"]),
        ({"sample.n": 4000, "reference.instruments": ["inception-v3"]}, ["sample.n (4000)", "at least 4096", "inception-v3"]),
        (
            {"sample.n": 127, "evaluate.kid_subset_size": 100, "reference.instruments": ["pixel-pca-v1"]},
            ["sample.n (127)", "at least 128", "pixel-pca-v1 in reference.instruments"],
        ),
        ({"ddpm.training.lr_warmup": 10**9}, ["ddpm.training", "lr_warmup (1000000000)"]),
    ],
    ids=str,
)
def test_impossible_combination_names_both_parameters(
    raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    found = message(changed(raw, changes), tmp_path)
    assert all(word in found for word in words), found
    assert found.endswith("(params.yaml)") and "\n" not in found


@pytest.mark.parametrize(
    "changes",
    [
        {"sample.ddpm.steps": 500, "ddpm.T": 500},
        {"sample.ddpm.eta": 1, "sample.ddpm.sampler": "ddim"},
        {"sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0.1},
    ],
    ids=str,
)
def test_possible_combination_is_accepted(raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    load(changed(raw, changes), tmp_path)


def test_each_thing_wrong_has_its_line(raw: dict[str, Any], tmp_path: Path) -> None:
    lines = message(changed(raw, {"ddpm.T": 0, "ddpm.typo": 1, "vae.likelihood": "poisson"}), tmp_path).splitlines()
    assert len(lines) == 3
    assert {line.split()[0] for line in lines} == {"ddpm.T:", "ddpm.typo", "vae.likelihood:"}


def test_missing_parameter_and_group_are_named(raw: dict[str, Any], tmp_path: Path) -> None:
    del raw["ddpm"]["T"], raw["vae"]
    assert message(raw, tmp_path).splitlines() == ["vae is missing (params.yaml)", "ddpm.T is missing (params.yaml)"]


def test_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params.yaml is missing: run from the root of the checkout"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "words"), [(b"a: [1", "is not YAML"), (b"", "must be a mapping"), (b"- 1", "got list"), (b"a: \xff", "is not YAML")]
)
def test_file_of_another_form_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=words):
        load_params(file)


def test_parameters_cannot_be_changed_after_the_check(raw: dict[str, Any], tmp_path: Path) -> None:
    params = load(raw, tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        params.ddpm.__setattr__("T", 3)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_complete_and_say_how_they_are_used(recipe: Path) -> None:
    load_params(recipe)  # refuses what is missing or unknown
    head = recipe.read_text().partition("\nseed:")[0]
    assert f"make repro RECIPE={recipe.stem} " in head and ("Measured" in head or "Not measured yet" in head)


@pytest.mark.parametrize("launcher", ["python -m", "torchrun --nproc-per-node=2 -m", "srun --nodes=2 torchrun --nnodes=2 -m"])
def test_a_launcher_takes_the_name_of_a_module(raw: dict[str, Any], tmp_path: Path, launcher: str) -> None:
    assert load(changed(raw, {"launcher": launcher}), tmp_path).launcher == launcher


@pytest.mark.parametrize("launcher", ["", "python", "torchrun --nproc-per-node=2", "python -m stages.train_vae"])
def test_a_launcher_that_takes_no_module_is_refused(raw: dict[str, Any], tmp_path: Path, launcher: str) -> None:
    assert message(changed(raw, {"launcher": launcher}), tmp_path).startswith(f"launcher ({launcher!r}) must end with -m")
