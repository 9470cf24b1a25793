"""The shipped instrument: it is the one of its record, sees what it should, and the stages that use it stop early and repeat exactly."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from rediffuse.data.images import ImageSet, save_images
from rediffuse.errors import UserError
from rediffuse.evaluation.classifier import INSTRUMENTS, WEIGHTS, Instrument, load_instrument
from rediffuse.evaluation.features import Features, load_features, save_features
from rediffuse.evaluation.fidelity import fidelity, frechet_distance
from rediffuse.files import write_json
from rediffuse.params import Evaluate
from stages import evaluate, reference

ROOT = Path(__file__).resolve().parents[1]
ID = "fashion-mnist-cnn-v1"
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument(ID)


@pytest.fixture(scope="module")
def real(instrument: Instrument, fashion_mnist: dict[str, ImageSet]) -> Features:
    return instrument.measure(fashion_mnist["test"].images)


def noise_images(n: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(256, size=(n, 1, 28, 28), dtype=np.uint8)


def test_accuracy_on_the_test_set_is_the_recorded_one(instrument: Instrument, real: Features, fashion_mnist: dict[str, ImageSet]) -> None:
    labels = fashion_mnist["test"].labels
    assert labels is not None
    accuracy = float((real.logits.argmax(1).numpy() == labels).mean())
    assert accuracy >= 0.92
    assert accuracy == pytest.approx(instrument.record["test_accuracy"], abs=5e-4)  # another processor rounds otherwise
    assert instrument.classes == fashion_mnist["test"].classes


def test_features_of_real_images_are_standardised_and_none_is_dead(instrument: Instrument, fashion_mnist: dict[str, ImageSet]) -> None:
    train = instrument.measure(fashion_mnist["train"].images[:4000])
    assert train.values.shape == (4000, instrument.dimension)
    assert train.values.mean(0).abs().max() < 0.1
    assert (train.values.std(0) - 1).abs().max() < 0.1
    assert torch.linalg.eigvalsh(torch.cov(train.values.T)).min() > 1e-4  # no feature is a combination of the others


def with_noise(images: Images, strength: float) -> Images:
    return np.clip(images + np.random.default_rng(1).normal(0, strength, images.shape), 0, 255).round().astype(np.uint8)


def blurred(images: Images, strength: float) -> Images:
    return np.stack([gaussian_filter(image, (0, strength, strength)) for image in images])


def occluded(images: Images, strength: float) -> Images:
    return np.where(np.arange(28) < strength, 0, images).astype(np.uint8)


@pytest.mark.parametrize(
    ("damage", "strengths"), [(with_noise, (5, 15, 40, 100)), (blurred, (0.4, 0.7, 1.2, 2.5)), (occluded, (6, 9, 12, 18))]
)
def test_distance_to_real_images_rises_with_damage(
    instrument: Instrument, real: Features, fashion_mnist: dict[str, ImageSet], damage: Any, strengths: tuple[float, ...]
) -> None:
    images = np.array(fashion_mnist["train"].images[:1000])
    distances = [frechet_distance(instrument.measure(images), real)]
    distances += [frechet_distance(instrument.measure(damage(images, strength)), real) for strength in strengths]
    assert distances == sorted(distances) and len(set(distances)) == len(distances), distances


def test_missing_classes_raise_the_distance_and_lower_recall(real: Features, fashion_mnist: dict[str, ImageSet]) -> None:
    labels = fashion_mnist["test"].labels
    assert labels is not None
    half, other = real.take(slice(0, None, 2)), real.take(slice(1, None, 2))  # two halves of real images
    settings = Evaluate(is_splits=1, kid_subsets=1, kid_subset_size=100, neighbours=3)
    found = [fidelity(half.take(torch.from_numpy(labels[::2] < classes)), other, settings) for classes in (10, 7, 4, 1)]
    distances, recalls = [row["fd"] for row in found], [row["recall"] for row in found]
    assert distances == sorted(distances) and recalls == sorted(recalls, reverse=True)


def test_batch_size_and_order_do_not_change_what_is_measured(instrument: Instrument) -> None:
    images = noise_images(60)
    whole = instrument.measure(images)
    torch.testing.assert_close(instrument.measure(images, batch=7).values, whole.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(instrument.measure(images[::-1]).values, whole.values.flip(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(instrument.measure(images).values, whole.values)


def test_measuring_leaves_the_images_and_the_random_state_alone(instrument: Instrument) -> None:
    images, before = noise_images(10), torch.get_rng_state()
    images.flags.writeable = False  # as memory-mapped arrays are
    found = instrument.measure(images)
    assert torch.equal(before, torch.get_rng_state())
    assert found.values.dtype == found.logits.dtype == torch.float64 and not found.values.requires_grad


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


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    for suffix in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"{ID}.{suffix}", tmp_path)
    return tmp_path


def test_altered_weights_are_refused(weights: Path) -> None:
    load_instrument(ID, weights)
    path = weights / f"{ID}.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # one bit of one weight
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"are altered.*git checkout"):
        load_instrument(ID, weights)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="are altered"):
        load_instrument(ID, weights)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_missing_files_are_named_with_the_remedy(weights: Path, suffix: str) -> None:
    (weights / f"{ID}.{suffix}").unlink()
    with pytest.raises(UserError, match=f"{ID}.{suffix}.*git checkout"):
        load_instrument(ID, weights)


def test_unknown_instruments_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"one of {', '.join(INSTRUMENTS)}, got 'inception'"):
        load_instrument("inception")


def test_features_come_back_from_disk_as_they_were(tmp_path: Path, instrument: Instrument) -> None:
    found, path = instrument.measure(noise_images(20)), tmp_path / "features.safetensors"
    save_features(path, {"test": found, "train": found.take(slice(5))})
    first = path.read_bytes()
    save_features(path, {"test": found, "train": found.take(slice(5))})
    assert path.read_bytes() == first
    loaded = load_features(path)
    assert torch.equal(loaded["test"].logits, found.logits) and torch.equal(loaded["train"].values, found.values[:5])
    path.write_bytes(first[:-8])
    with pytest.raises(UserError, match=r"damaged.*dvc repro -f reference"):
        load_features(path)


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        write_json(tmp_path / "metrics.json", {"fd": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instrument: Instrument) -> Path:
    """A checkout's folders with 300 made-up images a split and 250 samples of each model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sample"]["n"] = 250
    params["evaluate"] = {"is_splits": 2, "kid_subsets": 5, "kid_subset_size": 100, "neighbours": 3}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    labels = np.arange(300) % 10
    splits = {name: ImageSet(noise_images(300, seed), labels, instrument.classes) for seed, name in enumerate(("train", "test"))}
    Path("data").mkdir()
    save_images("data/prepared", splits, {"classes": list(instrument.classes)})
    Path("data/samples").mkdir()
    np.savez("data/samples/vae.npz", images=noise_images(250, 2))
    np.savez("data/samples/ddpm.npz", images=noise_images(250, 3), labels=labels[:250])
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", model])
    evaluate.main()


def test_reference_and_evaluate_write_the_same_bytes_each_time(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = ["data/reference/features.safetensors", "data/reference/instrument.json"]
    outputs += ["metrics/reference.json", "metrics/vae.json", "metrics/ddpm.json"]
    written = []
    for _ in range(2):
        reference.main()
        run(monkeypatch, "vae")
        run(monkeypatch, "ddpm")
        written.append([Path(name).read_bytes() for name in outputs])
        shutil.rmtree("metrics")
        shutil.rmtree("data/reference")
    assert written[0] == written[1]
    found = {name: json.loads(content) for name, content in zip(outputs[1:], written[0][1:], strict=True)}
    floor = found["metrics/reference.json"][ID]
    assert floor["n"] == 300 and set(floor["floor"]) == {"fd", "kid", "precision", "recall"} and floor["is_max"] == 10
    vae, ddpm = found["metrics/vae.json"], found["metrics/ddpm.json"]
    assert vae["n"] == 250 and vae[ID]["is_real"] == floor["is_real"] and vae[ID]["fd_floor"] > 0
    assert "label_accuracy" not in vae[ID] and 0 <= ddpm[ID]["label_accuracy"] <= 1
    assert found["data/reference/instrument.json"]["sha256"] == load_instrument(ID).record["sha256"]


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"images": noise_images(100)}, "at least 128 are needed.*in 64 dimensions.*got 100; raise sample.n"),
        ({"images": noise_images(250).astype(np.float32)}, "vae.npz: the images must be uint8"),
        ({"images": noise_images(250)[:, :, :20]}, r"\[N, 1, 28, 28\].*got \[250, 1, 20, 28\]"),
        ({"pictures": noise_images(250)}, "must hold the array images, got pictures"),
        ({"images": noise_images(250), "labels": np.full(250, 10)}, "250 integers from 0 to 9"),
    ],
)
def test_samples_that_cannot_be_judged_stop_before_the_work(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any], named: str
) -> None:
    np.savez("data/samples/vae.npz", **arrays)
    monkeypatch.setattr(Instrument, "measure", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(UserError, match=named):
        run(monkeypatch, "vae")


def test_missing_or_damaged_files_name_the_stage_that_makes_them(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"instrument.json is missing: make it with `dvc repro reference`"):
        run(monkeypatch, "vae")
    Path("data/samples/vae.npz").write_bytes(Path("data/samples/vae.npz").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged.*dvc repro sample@vae"):
        run(monkeypatch, "vae")
    Path("data/samples/vae.npz").unlink()
    with pytest.raises(UserError, match="missing: make it with `dvc repro sample@vae`"):
        run(monkeypatch, "vae")


def test_reference_features_of_another_instrument_are_refused(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data/reference").mkdir()
    write_json(Path("data/reference/instrument.json"), {"sha256": "0"})
    with pytest.raises(UserError, match="measured with other weights"):
        run(monkeypatch, "vae")


def test_an_image_set_that_the_instrument_was_not_made_for_is_refused(pipeline: Path) -> None:
    digits = tuple(str(digit) for digit in range(10))
    splits = {name: ImageSet(noise_images(300), np.arange(300) % 10, digits) for name in ("train", "test")}
    save_images("data/prepared", splits, {"classes": list(digits)})
    with pytest.raises(UserError, match="choose the instrument that belongs to the set"):
        reference.main()
