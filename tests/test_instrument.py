"""The shipped instrument: it is the one of its record, and sees what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rediffuse.evaluation.features import Features, load_features, save_features
from rediffuse.evaluation.instruments import Instrument, check_available, make_instrument, open_instrument
from rediffuse.evaluation.shipped import WEIGHTS, load_shipped
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import write_json

ID = "fashion-mnist-cnn-v1"
SHA256 = "e84baefed7afb1252060b4d825a056f476da5939cbea6acc4b7758fa900820ea"  # numbers were published with these weights
Images = NDArray[np.uint8]


def noise_images(n: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(256, size=(n, 1, 28, 28), dtype=np.uint8)


def noise_set(n: int = 20, **changes: Any) -> ImageSet:
    """A set that the instrument fits, whatever it shows, or one that differs from it in something."""
    record, _ = load_shipped(ID)
    return ImageSet(**({"images": noise_images(n), "labels": np.arange(n) % 10, "classes": tuple(record["classes"])} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("instrument")


@pytest.fixture(scope="module")
def instrument(folder: Path) -> Instrument:
    return make_instrument(ID, noise_set(), folder)


@pytest.fixture(scope="module")
def real(instrument: Instrument, fashion_mnist: dict[str, ImageSet]) -> Features:
    return instrument.measure(fashion_mnist["test"].images)


def test_accuracy_on_the_test_set_is_the_recorded_one(instrument: Instrument, real: Features, fashion_mnist: dict[str, ImageSet]) -> None:
    labels = fashion_mnist["test"].labels
    assert labels is not None and real.logits is not None
    accuracy = float((real.logits.argmax(1).numpy() == labels).mean())
    assert accuracy >= 0.92
    assert accuracy == pytest.approx(instrument.record["accuracy"], abs=5e-4)  # another processor rounds otherwise
    assert instrument.classes == fashion_mnist["test"].classes
    assert instrument.distance == "fd"


def test_the_weights_are_the_published_ones(instrument: Instrument) -> None:
    assert instrument.sha256 == SHA256


def test_features_and_logits_are_those_of_the_weights_written_out_as_functions(instrument: Instrument) -> None:
    """Independent of the class that holds the layers, which has grown other sizes since."""
    w = safetensors.torch.load_file(WEIGHTS / f"{ID}.safetensors")

    def normalised(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.relu(functional.batch_norm(x, *parts))

    images = noise_images(30)
    x = functional.pixel_unshuffle(torch.from_numpy(images).float() / 127.5 - 1, 2)
    for i in (1, 4, 8, 11):
        x = functional.max_pool2d(x, 2) if i == 8 else x
        x = normalised(functional.conv2d(x, w[f"convolutions.{i}.weight"], padding=1), f"convolutions.{i + 1}")
    raw = functional.linear(x.flatten(1), w["penultimate.2.weight"], w["penultimate.2.bias"])
    logits = functional.linear(normalised(raw, "logits.0"), w["logits.2.weight"], w["logits.2.bias"])
    found = instrument.measure(images)
    torch.testing.assert_close(found.values, (raw.double() - w["feature_mean"]) / w["feature_std"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits.double(), rtol=1e-4, atol=1e-5)


def test_features_of_real_images_are_standardised_and_none_is_dead(instrument: Instrument, fashion_mnist: dict[str, ImageSet]) -> None:
    train = instrument.measure(fashion_mnist["train"].images[:4000])
    assert train.values.shape == (4000, instrument.dimension)
    assert train.values.mean(0).abs().max() < 0.1
    assert (train.values.std(0) - 1).abs().max() < 0.1
    assert torch.linalg.eigvalsh(torch.cov(train.values.T)).min() > 1e-4  # no feature is a combination of the others


def test_batch_size_and_order_do_not_change_what_is_measured(instrument: Instrument) -> None:
    images = noise_images(60)
    whole = instrument.measure(images)
    torch.testing.assert_close(instrument.measure(images, batch=7).values, whole.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(instrument.measure(images[::-1]).values, whole.values.flip(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(instrument.measure(images).values, whole.values)


def test_measuring_leaves_the_images_and_the_random_state_alone(instrument: Instrument, folder: Path) -> None:
    images, before = noise_images(10), torch.get_rng_state()
    images.flags.writeable = False  # as memory-mapped arrays are
    found = open_instrument(folder).measure(images)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found.values, instrument.measure(images).values)
    assert found.values.dtype == torch.float64 and not found.values.requires_grad
    assert found.logits is not None and found.logits.dtype == torch.float64


def test_measuring_inside_autocast_gives_the_same_numbers(instrument: Instrument) -> None:
    images = noise_images(10)
    with torch.autocast("cpu", torch.bfloat16):
        found = instrument.measure(images)
    assert torch.equal(found.values, instrument.measure(images).values)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.full((4, 1, 28, 28), np.nan, np.float32), "must be uint8"),
        (noise_images(4)[:, 0], r"\[N, 1, 28, 28\].*got \[4, 28, 28\]"),
        (np.zeros((4, 3, 32, 32), np.uint8), r"got \[4, 3, 32, 32\]"),
        (noise_images(0), r"got \[0, 1, 28, 28\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(instrument: Instrument, images: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        instrument.measure(images)


@pytest.mark.parametrize(
    ("changes", "found", "remedy"),
    [
        ({"images": np.zeros((20, 3, 32, 32), np.uint8)}, r"\[3, 32, 32\]", "take classifier, random-conv-v1"),
        ({"classes": tuple(str(digit) for digit in range(10))}, "classes 0, 1, 2", "take classifier, random-conv-v1"),
        ({"classes": tuple(reversed(noise_set().classes))}, "in this order; .*classes Ankle boot, Bag", "take classifier, random-conv-v1"),
        ({"labels": None, "classes": ()}, "with no classes", "take random-conv-v1 or pixel-pca-v1"),
    ],
)
def test_image_sets_that_it_was_not_made_for_are_refused_with_what_fits(changes: dict[str, Any], found: str, remedy: str) -> None:
    check_available(ID, noise_set())
    with pytest.raises(UserError, match=f"reference.instruments names {ID}.*{found}.*{remedy}"):
        check_available(ID, noise_set(**changes))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    for suffix in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"{ID}.{suffix}", tmp_path)
    return tmp_path


def test_altered_weights_are_refused(weights: Path) -> None:
    load_shipped(ID, weights)
    path = weights / f"{ID}.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # one bit of one weight
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"are altered.*git checkout"):
        load_shipped(ID, weights)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="are altered"):
        load_shipped(ID, weights)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_missing_files_are_named_with_the_remedy(weights: Path, suffix: str) -> None:
    (weights / f"{ID}.{suffix}").unlink()
    with pytest.raises(UserError, match=f"{ID}.{suffix} missing.*git checkout"):
        load_shipped(ID, weights)


def test_a_reference_made_with_other_shipped_weights_is_refused(instrument: Instrument, tmp_path: Path) -> None:
    write_json(tmp_path / "instrument.json", instrument.record | {"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"other weights of fashion-mnist-cnn-v1.*dvc repro reference"):
        open_instrument(tmp_path)


def test_the_folder_holds_the_record_and_no_copy_of_the_weights(instrument: Instrument, folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["instrument.json"]
    assert json.loads((folder / "instrument.json").read_text()) == instrument.record


def test_features_come_back_from_disk_as_they_were(tmp_path: Path, instrument: Instrument) -> None:
    found, path = instrument.measure(noise_images(20)), tmp_path / "features.safetensors"
    sets = {"test": found, "train": found.take(slice(5)), "label-free": Features(found.values)}
    save_features(path, sets)
    first = path.read_bytes()
    save_features(path, sets)
    assert path.read_bytes() == first
    loaded = load_features(path)
    assert set(loaded) == set(sets)
    assert found.logits is not None and loaded["test"].logits is not None and loaded["label-free"].logits is None
    assert torch.equal(loaded["test"].logits, found.logits) and torch.equal(loaded["train"].values, found.values[:5])
    assert torch.equal(loaded["label-free"].take(slice(3)).values, found.values[:3])
    path.write_bytes(first[:-8])
    with pytest.raises(UserError, match=r"damaged.*dvc repro -f reference"):
        load_features(path)


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        write_json(tmp_path / "metrics.json", {"fd": float("nan")})
    assert not list(tmp_path.iterdir())
