"""The stages reference and evaluate on small made-up sets: what they write, and what they refuse before the work."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rediffuse.evaluation import instruments, pixel_pca
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import spread
from rediffuse.evaluation.instruments import Instrument
from rediffuse.evaluation.record import View, class_table, distances_by_class, headline, position, predicted_classes, real_sets
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.images.sample_sets import Samples, save_samples
from rediffuse.params import DIMENSIONS
from rediffuse.runtime.errors import UserError
from rediffuse.sources.splits import describe
from stages import evaluate, reference

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CNN = "fashion-mnist-cnn-v1"
N = 150


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)


def prepare(n: int = 320, labelled: bool = True) -> None:
    """An image set of noise in data/pixels."""
    names = ("train", "validation", "test")
    labels = np.arange(n) % 10 if labelled else None
    splits = {name: ImageSet(pictures(n, seed), labels, CLASSES if labelled else ()) for seed, name in enumerate(names)}
    save_images("data/pixels", splits, describe(splits, {"set": "noise"}))


def draw(model: str, labelled: bool, n: int = N) -> Path:
    """Sample sets of seeds 1 and 2."""
    folder = Path("data/samples", model)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in (1, 2):
        save_samples(folder / str(seed), Samples(pictures(n, 10 * seed), np.arange(n) % 10 if labelled else None))
    (folder / "sampling.json").write_text(json.dumps({"n": n, "seeds": [1, 2], "rounding": "nearest"}))
    return folder


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A checkout's folders: 320 made-up images a split, two sets of 150 samples of each model, labels for the DDPM alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    before = torch.are_deterministic_algorithms_enabled()
    choose([CNN, "pixel-pca-v1"])
    Path("data").mkdir()
    prepare()
    draw("vae", labelled=False)
    save_samples(Path("data/samples/vae/reconstructions"), Samples(pictures(N, 5)))
    draw("ddpm", labelled=True)
    yield tmp_path
    torch.use_deterministic_algorithms(before)


def choose(instruments: list[str], accuracy_images: int = 256, **changes: int) -> None:
    params = yaml.safe_load((ROOT / "recipes/fashion-mnist-cpu.yaml").read_text())
    params["reference"]["instruments"] = instruments
    params["sample"] |= {"n": N, "seeds": [1, 2]} | changes
    params["evaluate"] |= {"is_splits": 2, "kid_subsets": 5, "kid_subset_size": 100, "accuracy_images": accuracy_images}
    Path("params.yaml").write_text(yaml.safe_dump(params))


def judge(monkeypatch, model: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", model])
    evaluate.main()
    return json.loads(Path(f"metrics/evaluation/{model}.json").read_text())


def test_the_same_bytes_are_written_each_time(pipeline, monkeypatch):
    written = []
    for _ in range(2):
        reference.main()
        judge(monkeypatch, "vae")
        judge(monkeypatch, "ddpm")
        files = [path for folder in ("metrics", "data/reference") for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        written.append({path: path.read_bytes() for path in files})
        shutil.rmtree("metrics")
        shutil.rmtree("data/reference")
    assert len(written[0]) == 6 + 2 + 6  # records and headlines; classes of each model; instruments and neighbours
    assert written[0] == written[1]


def test_headline_is_the_mean_of_the_record_and_has_the_same_names_for_every_row(pipeline, monkeypatch):
    reference.main()
    record = judge(monkeypatch, "ddpm")
    shown = json.loads(Path("metrics/ddpm.json").read_text())
    floor = json.loads(Path("metrics/reference.json").read_text())
    scores = record["instruments"][CNN]["scores"]
    assert shown[CNN]["fd"] == scores["fd"]["mean"] == pytest.approx(sum(scores["fd"]["values"]) / 2)
    assert shown[CNN]["fd_std"] == scores["fd"]["std"] > 0
    assert shown["accuracy_score"] == record["accuracy_score"]["mean"] and shown["n"] == N
    assert set(shown) - set(floor) == {"label_accuracy"} and set(shown[CNN]) - set(floor[CNN]) == {"position"}
    [pca] = [id for id in shown if id.startswith("pixel-pca-v1-")]
    assert set(shown[pca]) == {"fd", "fd_std"}


def test_classes_are_those_asked_for_or_else_those_seen(pipeline, monkeypatch):
    reference.main()
    vae, ddpm = judge(monkeypatch, "vae"), judge(monkeypatch, "ddpm")
    assert [record["instruments"][CNN]["classes"]["by"] for record in (vae, ddpm)] == ["predicted", "label"]
    asked = ddpm["instruments"][CNN]["classes"]["fd"]
    assert {name: row["n"] for name, row in asked.items()} == dict.fromkeys(CLASSES, 30)
    assert sum(row["n"] for row in vae["instruments"][CNN]["classes"]["fd"].values()) == 2 * N
    assert "label_accuracy" not in vae and "accuracy_score" not in vae
    assert "reconstructions" in vae["instruments"][CNN] and "reconstructions" not in ddpm["instruments"][CNN]


def test_an_unlabelled_set_is_judged_by_what_needs_no_labels(pipeline, monkeypatch):
    prepare(labelled=False)
    choose(["random-conv-v1", "pixel-pca-v1"])
    reference.main()
    record = judge(monkeypatch, "vae")
    assert all("classes" not in part and "is" not in part["scores"] for part in record["instruments"].values())
    assert "accuracy_score" not in json.loads(Path("metrics/evaluation/reference.json").read_text())
    assert Path("metrics/plots/evaluate_vae/classes.csv").read_text() == "class,distance,n\n"


def test_an_accuracy_score_that_is_not_asked_for_is_left_out(pipeline, monkeypatch):
    choose(["pixel-pca-v1"], accuracy_images=0)
    reference.main()
    record = judge(monkeypatch, "ddpm")
    assert "accuracy_score" not in record and "label_accuracy" not in record  # nor does this instrument know the classes
    assert "accuracy_score" not in json.loads(Path("metrics/reference.json").read_text())


def names_in(record) -> set:
    """All keys of a record, however deep."""
    parts = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    return (set(record) if isinstance(record, dict) else set()).union(*map(names_in, parts))


def test_the_distances_of_inception_are_called_fid_throughout(pipeline, monkeypatch):
    """By an instrument that only bears its name: the real one needs weights, and 4,096 images."""
    monkeypatch.setitem(instruments._KINDS, "inception-v3", instruments._KINDS["pixel-pca-v1"])
    monkeypatch.setitem(DIMENSIONS, "inception-v3", 8)
    monkeypatch.setattr(pixel_pca, "DIMENSION", 8)  # of which each class has images enough
    choose(["inception-v3"])
    reference.main()
    record = judge(monkeypatch, "ddpm")
    written = [json.loads(path.read_text()) for path in sorted(Path("metrics").rglob("*.json"))]
    assert all("fid" in names_in(part) and "fd" not in names_in(part) for part in written) and len(written) == 4
    [(id, part)] = record["instruments"].items()
    assert id.startswith("inception-v3") and part["classes"]["by"] == "label"
    assert Path("metrics/plots/evaluate_ddpm/classes.csv").read_text().count("\n") == 1 + len(part["classes"]["fid"])


@pytest.mark.parametrize("instrument", [CNN, "classifier"])
def test_an_unlabelled_set_is_refused_by_classifiers_before_the_work(pipeline, monkeypatch, instrument):
    prepare(labelled=False)
    choose([instrument])
    monkeypatch.setattr(Instrument, "measure", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(UserError, match="random-conv-v1 or pixel-pca-v1"):
        reference.main()


@pytest.mark.parametrize(
    ("n", "sample_n", "words"),
    [(100, N, "too few test images: at least 128"), (140, 300, r"sample.n \(300\) must not exceed the 280 published training images")],
)
def test_too_few_real_images_are_said_before_the_work(pipeline, monkeypatch, n, sample_n, words):
    prepare(n)
    choose([CNN], n=sample_n)
    monkeypatch.setattr(Instrument, "measure", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(UserError, match=words):
        reference.main()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": pictures(100, 1)}, "must hold sets of 150 images"),
        ({"images": pictures(N, 1), "labels": np.zeros(N, np.int64)}, "all labelled or none, got 150 labelled, 150 unlabelled"),
        ({"images": pictures(N, 1).astype(np.float32)}, r"samples/vae/1: the images must be uint8 \(0..255\), got float32"),
        ({"images": np.full((N, 1, 28, 28), np.nan)}, "the images must be uint8"),
        ({"images": pictures(N, 1)[:, :, :20]}, r"\[N, 1, 28, 28\].*got \[150, 1, 20, 28\]"),
        ({"pictures": pictures(N, 1)}, r"1/images.npy is missing: make it with `dvc repro -f sample_vae`"),
        ({"images": pictures(N, 1), "labels": np.full(N, 10)}, r"samples/vae/1: labels must be 150 int64 numbers from 0 to 9"),
    ],
)
def test_samples_that_cannot_be_judged_stop_before_the_work(pipeline, monkeypatch, arrays, words):
    reference.main()
    folder = Path("data/samples/vae/1")
    shutil.rmtree(folder)
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    monkeypatch.setattr(Instrument, "measure", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(UserError, match=words):
        judge(monkeypatch, "vae")


def test_samples_of_another_size_than_the_floor_are_refused(pipeline, monkeypatch):
    reference.main()
    draw("vae", labelled=False, n=200)
    shutil.rmtree("data/samples/vae/reconstructions")
    with pytest.raises(UserError, match="got 2 sets of 200 and 2 of 150: run `dvc repro`"):
        judge(monkeypatch, "vae")


def test_missing_or_damaged_files_name_the_stage_that_makes_them(pipeline, monkeypatch):
    with pytest.raises(UserError, match=r"metrics/evaluation/reference.json is missing: make it with `dvc repro reference`"):
        judge(monkeypatch, "vae")
    reference.main()
    sampling = Path("data/samples/vae/sampling.json")
    for broken in ("", "[]", '{"n": 150}'):
        sampling.write_text(broken)
        with pytest.raises(UserError, match=r"sampling.json is damaged.*dvc repro -f sample_vae"):
            judge(monkeypatch, "vae")
    sampling.unlink()
    with pytest.raises(UserError, match=r"sampling.json is missing.*dvc repro -f sample_vae"):
        judge(monkeypatch, "vae")
    draw("vae", labelled=False)
    first = Path("data/samples/vae/1/images.npy")
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged.*dvc repro -f sample_vae"):
        judge(monkeypatch, "vae")
    first.unlink()
    with pytest.raises(UserError, match=r"1/images.npy is missing.*dvc repro -f sample_vae"):
        judge(monkeypatch, "vae")


# From features to records


def test_real_sets_are_disjoint_while_the_images_last():
    sets = real_sets(30, 100, 3)
    assert len(np.unique(np.concatenate(sets))) == 90
    overlapping = real_sets(60, 100, 3)
    assert [len(np.unique(part)) for part in overlapping] == [60, 60, 60]
    assert not np.array_equal(overlapping[0], overlapping[1])
    assert all(np.array_equal(one, other) for one, other in zip(sets, real_sets(30, 100, 3), strict=True))


def test_position_is_0_at_the_floor_and_1_at_the_ceiling():
    rows = {"train": {"fd": {"mean": 2.0}}, "noise": {"fd": 12.0}}
    found = position(spread([2.0, 12.0, 7.0, 1.0]), rows, "fd")
    assert found["position"]["values"] == [0, 1, 0.5, -0.1]
    assert (found["floor"], found["ceiling"]) == (2, 12)


def test_headline_calls_the_distance_of_inception_fid():
    scores = {"inception-v3": {"fid": spread([3.0, 5.0]), "precision": spread([0.5, 0.5])}, "b": {"fd": spread([1.0])}}
    shown = headline(10, scores, 0.25, accuracy_score=None, label_accuracy=spread([0.5]))
    assert shown == {
        "n": 10,
        "inception-v3": {"fid": 4, "precision": 0.5, "fid_std": pytest.approx(2**0.5)},
        "b": {"fd": 1, "fd_std": 0},
        "copies": 0.25,
        "label_accuracy": 0.5,
    }


def test_classes_come_from_the_first_instrument_that_knows_them():
    class Eye:
        def __init__(self, classes):
            self.classes = classes

    def view(classes, order):
        logits = torch.eye(3, dtype=torch.float64)[order]
        features = Features(torch.zeros(3, 2, dtype=torch.float64), logits)
        return View(Eye(classes), features, [features, features])

    blind, first, second = view((), [0, 0, 0]), view(("a", "b", "c"), [2, 1, 0]), view(("a", "b", "c"), [1, 1, 1])
    generated, real = predicted_classes([blind, first, second])
    assert generated.tolist() == [2, 1, 0, 2, 1, 0] and real.tolist() == [2, 1, 0]
    assert predicted_classes([blind]) is None


@pytest.mark.parametrize(("name", "distance"), [("inception-v3", "fid"), ("pixel-pca-v1", "fd")])
def test_a_distance_by_class_has_the_name_of_its_instrument(name, distance):
    random = torch.Generator().manual_seed(1)
    real, generated = (Features(torch.randn(56, 4, generator=random, dtype=torch.float64)) for _ in range(2))
    view = View(Instrument({"name": name, "id": "fake"}, torch.nn.Identity()), real, [generated])
    classes = torch.arange(56) // 25  # 6 images of the third are too few for a distance
    found = distances_by_class([view], classes, classes, ("a", "b", "c"))["fake"]
    assert {of_class: set(row) for of_class, row in found.items()} == {"a": {distance, "n"}, "b": {distance, "n"}, "c": {"n"}}
    record = {"instruments": {"fake": {"classes": {"by": "label", distance: found}}}}
    assert class_table(record) == [(of_class, found[of_class][distance], 25) for of_class in ("a", "b")]
