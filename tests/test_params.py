"""params.yaml and its schema: an error names the parameter, the value, what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rediffuse.params import flatten, load_params
from rediffuse.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
VALID: dict[str, Any] = yaml.safe_load((ROOT / "recipes/fashion-mnist-cpu.yaml").read_text())


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(VALID)
    for name, value in changes.items():
        *groups, leaf = name.split(".")
        node = raw
        for group in groups:
            node = node[group]
        node[leaf] = value
    return raw


@pytest.fixture
def load(tmp_path):
    """Write the parameters with these changes as DVC would, and load them."""

    def load_changed(changes, text=""):
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(changed(changes)).replace("HERE", text))
        return load_params(file)

    return load_changed


@pytest.fixture
def message(load):
    def message_of(*arguments):
        with pytest.raises(UserError) as caught:
            load(*arguments)
        return str(caught.value)

    return message_of


def test_flatten_gives_every_leaf_as_dvc_names_it(load):
    flat = flatten(load({}))
    assert flat["seed"] == VALID["seed"] and flat["ddpm.training.lr"] == VALID["ddpm"]["training"]["lr"]
    assert changed(flat) == VALID


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ddpm.T", 0, "greater than or equal to 2"),
        ("ddpm.T", 10_001, "less than or equal to 10000"),
        ("ddpm.T", "abc", "valid integer"),
        ("ddpm.T", 500.5, "valid integer"),
        ("ddpm.T", True, "valid integer"),
        ("ddpm.T", None, "valid integer"),
        ("ddpm.schedule", "cubic", "'linear', 'cosine' or 'sigmoid'"),
        ("ddpm.conditional", "yes please", "valid boolean"),
        ("ddpm.width", 65, "multiple of 8"),
        ("ddpm.training.lr", "fast", "valid number"),
        ("ddpm.training.lr", 0, "greater than 0"),
        ("vae.beta", True, "valid number"),
        ("vae.beta", "true", "valid number"),
        ("vae.channels", [], "at least 1 item after validation, not 0"),
        ("vae.channels", [8] * 6, "at most 5 items after validation, not 6"),
        ("vae.channels", "32,64", "valid list"),
        ("ddpm", 5, "instance of DDPM"),
        ("sample.seeds", [], "at least 1 item after validation, not 0"),
        ("seed", -1, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_what_is_allowed(message, name, value, allowed):
    found = message({name: value})
    assert found.startswith(f"{name}: ") and found.endswith(f"{allowed}, got {value!r} (params.yaml)")


def test_a_wrong_item_of_a_list_is_named_by_its_number(message):
    assert message({"vae.channels": [32, 0]}).startswith("vae.channels.1: ")
    assert message({"reference.instruments": ["fid"]}).startswith("reference.instruments.0: ")


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "inf", "nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused(message, text):
    assert message({"ddpm.min_snr_gamma": "HERE"}, text).startswith("ddpm.min_snr_gamma: ")


@pytest.mark.parametrize("text", ["1e-05", "1.0e-05", "1e-5", "0.00001"])
def test_a_number_as_dvc_writes_it_is_a_number(load, text):
    assert load({"ddpm.training.lr": "HERE"}, text).ddpm.training.lr == 1e-5
    assert isinstance(load({"vae.beta": 4}).vae.beta, float)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ddpm.typo", "space, T, schedule, predict"),
        ("typo", "seed, precision, compile, launcher, data"),
        ("vae.training.typo", "images, batch"),
    ],
)
def test_an_unknown_parameter_is_named_with_the_known_ones(message, name, known):
    found = message({name: 1})
    assert found.startswith(f"{name} is not a parameter (params.yaml)") and f": {known}" in found


SMALL = {"sample.n": 5, "evaluate.kid_subset_size": 5, "reference.instruments": ["classifier"]}
ONE_SPLIT = SMALL | {"evaluate.is_splits": 1}
SHORT = {"vae.training.images": 99, "vae.training.lr_warmup": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.size": 15}, r"data: size \(15\) .* 16 to 128"),
        ({"data.validation_share": 0.4, "data.test_share": 0.6}, r"_share \(0.4\) .*test_share \(0.6\)"),
        ({"ddpm.T": 10, "sample.ddpm.steps": 20}, r"sample.ddpm.steps \(20\) .*ddpm.T \(10\)"),
        ({"sample.ddpm.eta": 0.5, "sample.ddpm.sampler": "heun"}, r"sample.ddpm: eta \(0.5\) .*ddim.* heun"),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.conditional": False}, r"scale \(2.0\) .*ddpm.conditional"),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0}, r"scale \(2.0\) .*ddpm.label_drop"),
        (SHORT | {"vae.training.batch": 200}, r"batch \(200\) .*images \(99\)"),
        ({"ddpm.training.lr_warmup": 10**9}, r"ddpm.training: lr_warmup \(1000000000\)"),
        ({"sample.n": 999, "evaluate.kid_subset_size": 1000}, r"sample.n \(999\) .*1000 .*kid_subset_size"),
        (SMALL | {"evaluate.is_splits": 6}, r"sample.n \(5\) must be at least 6 for evaluate.is_splits"),
        (ONE_SPLIT | {"evaluate.neighbours": 5}, "at least 6 for evaluate.neighbours"),
        (ONE_SPLIT | {"evaluate.density_neighbours": 5}, "at least 6 for evaluate.density_neighbours"),
        ({"sample.n": 4000, "reference.instruments": ["inception-v3"]}, r"\(4000\) .* 4096 for inception-v3"),
        ({"sample.seeds": [1, 1]}, "sample.seeds .*1, 1"),
        ({"reference.instruments": ["classifier"] * 2}, "reference.instruments .*classifier, classifier"),
        ({"launcher": "torchrun --nproc-per-node=2"}, r"launcher \('torchrun --nproc-per-node=2'\) .*-m"),
        ({"launcher": "python -m stages.train_vae"}, r"launcher \('python -m stages.train_vae'\) .*-m"),
    ],
    ids=str,
)
def test_an_impossible_combination_names_both_parameters(load, changes, words):
    with pytest.raises(UserError, match=rf"{words}.*\(params.yaml\)$"):
        load(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample.ddpm.steps": 500, "ddpm.T": 500},
        {"sample.ddpm.eta": 1, "sample.ddpm.sampler": "ddim"},
        {"sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0.1},
        {"reference.instruments": [], "sample.n": 5},
        {"launcher": "srun --nodes=2 torchrun --nnodes=2 -m"},
    ],
    ids=str,
)
def test_a_possible_combination_is_accepted(load, changes):
    load(changes)


def test_each_error_has_its_line(message):
    lines = message({"ddpm.T": 0, "ddpm.typo": 1, "vae.likelihood": "poisson"}).splitlines()
    assert {line.split()[0] for line in lines} == {"ddpm.T:", "ddpm.typo", "vae.likelihood:"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: [1", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        (b"", "must be a mapping"),
        (b"seed: 1", "vae is missing"),
    ],
)
def test_a_damaged_file_or_a_missing_group_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=r"params.yaml is missing: run from the root"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(text)
    with pytest.raises(UserError, match=words):
        load_params(tmp_path / "params.yaml")


def test_parameters_cannot_be_changed_after_the_check(load):
    with pytest.raises(ValueError, match="frozen"):
        load({}).ddpm.__setattr__("T", 3)


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=str)
def test_the_parameters_and_recipes_of_the_checkout_are_valid(file):
    load_params(file)  # refuses what is missing or unknown
