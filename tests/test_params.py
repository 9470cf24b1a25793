"""params.yaml and its schema: an error names the parameter, the value, what is allowed."""

from __future__ import annotations

import copy
import re
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
        ("ddpm.T", 10_001, "less than or equal to 10000"),
        ("ddpm.T", 500.5, "valid integer"),
        ("ddpm.T", True, "valid integer"),
        ("ddpm.schedule", "cubic", "'linear', 'cosine' or 'sigmoid'"),
        ("ddpm.training.lr", "fast", "valid number"),
        ("vae.beta", "true", "valid number"),
        ("sample.ddpm.guidance_scale", -0.5, "greater than or equal to 0"),
        ("reference.split", "validation", "'test' or 'train'"),
        ("vae.channels", [8] * 6, "at most 5 items after validation, not 6"),
        ("ddpm", 5, "instance of DDPM"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_what_is_allowed(message, name, value, allowed):
    found = message({name: value})
    assert found.startswith(f"{name}: ") and found.endswith(f"{allowed}, got {value!r} (params.yaml)")


@pytest.mark.parametrize("text", [".inf", "nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused(message, text):
    assert message({"ddpm.min_snr_gamma": "HERE"}, text).startswith("ddpm.min_snr_gamma: ")


@pytest.mark.parametrize("text", ["1e-05", "1.0e-05", "0.00001"])
def test_a_number_as_dvc_writes_it_is_a_number(load, text):
    assert load({"ddpm.training.lr": "HERE"}, text).ddpm.training.lr == 1e-5


def test_each_error_has_its_line_and_an_unknown_parameter_is_named_with_the_known_ones(message):
    lines = message({"vae.channels": [32, 0], "ddpm.typo": 1, "typo": 1}).splitlines()
    of_channels, in_group, at_top = sorted(lines, key=lambda line: "typo" in line)
    assert of_channels.startswith("vae.channels.1: ")
    assert in_group.startswith("ddpm.typo is not a parameter (params.yaml)") and ": space, T" in in_group
    assert at_top.startswith("typo is not a parameter (params.yaml)") and ": seed, precision" in at_top


SMALL = {"sample.n": 5, "evaluate.kid_subset_size": 5, "reference.instruments": ["classifier"]}
ONE_SPLIT = SMALL | {"evaluate.is_splits": 1}
SHORT = {"vae.training.images": 99, "vae.training.lr_warmup": 0, "vae.training.batch": 200}
LATENTS = {"ddpm.space": "latents", "vae.latent_channels": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.size": 15}, r"data: size \(15\) .* 16 to 256"),
        ({"data.validation_share": 0.4, "data.test_share": 0.6}, r"_share \(0.4\) .*test_share \(0.6\)"),
        ({"ddpm.T": 10, "sample.ddpm.steps": 20}, r"sample.ddpm.steps \(20\) .*ddpm.T \(10\)"),
        ({"sample.ddpm.eta": 0.5, "sample.ddpm.sampler": "heun"}, r"sample.ddpm: eta \(0.5\) .*ddim.* heun"),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.conditional": False}, r"scale \(2.0\) .*ddpm.conditional"),
        ({"sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0}, r"scale \(2.0\) .*ddpm.label_drop"),
        ({"sample.ddpm.autoguidance_scale": 1.5, "ddpm.guide_share": 0}, r"scale \(1.5\) .*ddpm.guide_share"),
        ({"sample.ddpm.guidance_interval": [0.5, 0.1]}, r"guidance_interval \(\[0.5, 0.1\]\) must rise"),
        (SHORT, r"batch \(200\) .*images \(99\)"),
        ({"ddpm.training.lr_warmup": 10**9}, r"ddpm.training: lr_warmup \(1000000000\)"),
        (LATENTS | {"vae.latent_channels": 0}, "ddpm.space latents needs vae.latent_channels above 0"),
        (LATENTS | {"vae.conditional": True}, "ddpm.space latents needs vae.conditional false"),
        (LATENTS | {"ddpm.flip": True}, "ddpm.space latents needs ddpm.flip false"),
        (LATENTS | {"ddpm.augment": 0.1}, "ddpm.space latents needs ddpm.augment 0"),
        (
            {"data.validation": 0, "vae.training.patience": 2},
            r"vae.training.patience \(2\) .*data.validation",
        ),
        ({"ddpm.training.patience": 3}, r"ddpm.training.patience \(3\) needs ddpm.guide_share 0.*got 0.15"),
        ({"sample.n": 999, "evaluate.kid_subset_size": 1000}, r"sample.n \(999\) .*1000 .*kid_subset_size"),
        (SMALL | {"evaluate.is_splits": 6}, r"sample.n \(5\) must be at least 6 for evaluate.is_splits"),
        (ONE_SPLIT | {"evaluate.neighbours": 5}, "at least 6 for evaluate.neighbours"),
        (ONE_SPLIT | {"evaluate.density_neighbours": 5}, "at least 6 for evaluate.density_neighbours"),
        ({"sample.n": 4000, "reference.instruments": ["inception-v3"]}, r"\(4000\) .* 4096 for inception-v3"),
        ({"sample.seeds": [1, 1]}, "sample.seeds .*1, 1"),
        ({"reference.instruments": ["classifier"] * 2}, "reference.instruments .*classifier, classifier"),
        ({"launcher": "python -m stages.train_vae"}, r"launcher \('python -m stages.train_vae'\) .*-m"),
    ],
    ids=str,
)
def test_an_impossible_combination_names_both_parameters(message, changes, words):
    assert re.search(rf"{words}.*\(params.yaml\)$", message(changes))


def test_settings_at_the_border_of_what_is_possible_are_accepted(load):
    load({"ddpm.T": 500, "sample.ddpm.steps": 500, "sample.ddpm.guidance_scale": 2.0, "ddpm.label_drop": 0.1})
    load({"reference.instruments": [], "sample.n": 5, "sample.ddpm.eta": 1, "sample.ddpm.sampler": "ddim"})
    load(LATENTS | {"launcher": "srun --nodes=2 torchrun --nnodes=2 -m"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "params.yaml is missing: run from the root"),
        (b"a: [1", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        (b"", "must be a mapping"),
        (b"seed: 1", "vae is missing"),
    ],
)
def test_a_missing_or_damaged_file_or_a_missing_group_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "params.yaml").write_bytes(text)
    with pytest.raises(UserError, match=words):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=str)
def test_the_parameters_and_recipes_of_the_checkout_are_valid(file):
    load_params(file)  # refuses what is missing or unknown
