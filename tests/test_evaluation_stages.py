"""The stages reference and evaluate on small made-up sets: what they write and what they refuse."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from rediffuse.cli import main
from rediffuse.commands.judge import judge as judge_command
from rediffuse.commands.rows import find_row
from rediffuse.evaluation import instruments, shared
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import Instrument
from rediffuse.evaluation.record import real_sets
from rediffuse.evaluation.shipped import load_shipped
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.images.pixels import ROUNDING
from rediffuse.images.sample_sets import Samples, save_samples
from rediffuse.params import DIMENSIONS
from rediffuse.runtime.errors import UserError
from rediffuse.sources.splits import describe
from stages import evaluate, reference

ROOT = Path(__file__).resolve().parents[1]
CNN = "fashion-mnist-cnn-v1"
CLASSES = tuple(load_shipped(CNN)[0]["classes"])
N = 150


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)


def prepare(n: int = 320, labelled: bool = True) -> None:
    """An image set of noise in data/pixels."""
    labels, classes = (np.arange(n) % 10, CLASSES) if labelled else (None, ())
    names = enumerate(("train", "validation", "test"))
    splits = {name: ImageSet(pictures(n, seed), labels, classes) for seed, name in names}
    save_images("data/pixels", splits, describe(splits, {"set": "noise"}))


def draw(model: str, labelled: bool, n: int = N) -> None:
    """Sample sets of seeds 1 and 2."""
    folder, labels = Path("data/samples", model), np.arange(n) % 10 if labelled else None
    folder.mkdir(parents=True, exist_ok=True)
    for seed in (1, 2):
        save_samples(folder / str(seed), Samples(pictures(n, 10 * seed), labels))
    (folder / "sampling.json").write_text(json.dumps({"n": n, "seeds": [1, 2], "rounding": ROUNDING}))


def choose(instruments: list[str], accuracy_images: int = 256, split: str = "test", **changes: int) -> None:
    params = yaml.safe_load((ROOT / "recipes/fashion-mnist-cpu.yaml").read_text())
    params["reference"] = {"split": split, "instruments": instruments}
    params["sample"] |= {"n": N, "seeds": [1, 2]} | changes
    params["evaluate"] |= {"is_splits": 2, "kid_subsets": 5, "kid_subset_size": 100}
    params["evaluate"]["accuracy_images"] = accuracy_images
    Path("params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A checkout: 320 made-up images a split, two sets of 150 samples of each model, labels for the DDPM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    before = torch.are_deterministic_algorithms_enabled()
    choose([CNN, "random-conv-v1"])
    Path("data").mkdir()
    prepare()
    draw("vae", labelled=False)
    save_samples(Path("data/samples/vae/reconstructions"), Samples(pictures(N, 5)))
    draw("ddpm", labelled=True)
    yield tmp_path
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def idle(monkeypatch):
    """Call it to fail at the first measurement."""
    return lambda: monkeypatch.setattr(Instrument, "measure", lambda *_, **__: pytest.fail("work began"))


def judge(monkeypatch, model: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", model])
    evaluate.main()
    return read(f"metrics/evaluation/{model}.json")


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_the_records_and_headlines_of_a_run_and_the_same_bytes_each_time(pipeline, monkeypatch):
    written = []
    for _ in range(2):
        reference.main()
        vae, ddpm = judge(monkeypatch, "vae"), judge(monkeypatch, "ddpm")
        shown, floor = read("metrics/ddpm.json"), read("metrics/reference.json")
        folders = ("metrics", "data/reference")
        files = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        written.append({path: path.read_bytes() for path in files})
        for folder in folders:
            shutil.rmtree(folder)
    assert written[0] == written[1]
    assert len(files) == 6 + 2 + 6  # records and headlines; classes of each model; instruments and neighbours
    # The headline is the mean of the record and has the same names for every row.
    parts = {model: record["instruments"][CNN] for model, record in (("vae", vae), ("ddpm", ddpm))}
    fd = parts["ddpm"]["scores"]["fd"]
    assert shown[CNN]["fd"] == fd["mean"] == pytest.approx(sum(fd["values"]) / 2)
    assert shown[CNN]["fd_std"] == fd["std"] > 0
    assert shown["accuracy_score"] == ddpm["accuracy_score"]["mean"] and shown["n"] == N
    assert set(shown) - set(floor) == {"label_accuracy", "ratio_to_real"}
    assert set(shown[CNN]) - set(floor[CNN]) == {"ratio_to_real"}
    assert (
        shown["ratio_to_real"] == pytest.approx(fd["mean"] / floor[CNN]["fd"]) == shown[CNN]["ratio_to_real"]
    )
    [other] = [id for id in shown if id.startswith("random-conv-v1-")]
    assert set(shown[other]) == {"fd", "ratio_to_real", "fd_std"}
    assert set(ddpm["instruments"][other]["scores"]) == {"fd", "fd_inf"}  # the first instrument gives all
    # Classes are those asked for, or else those seen.
    assert [part["classes"]["by"] for part in parts.values()] == ["predicted", "label"]
    asked, seen = parts["ddpm"]["classes"]["fd"], parts["vae"]["classes"]["fd"]
    assert {name: row["n"] for name, row in asked.items()} == dict.fromkeys(CLASSES, 30)
    assert sum(row["n"] for row in seen.values()) == 2 * N
    assert "label_accuracy" not in vae and "accuracy_score" not in vae
    assert "reconstructions" in parts["vae"] and "reconstructions" not in parts["ddpm"]


def test_training_images_can_be_those_that_are_compared_with(pipeline, monkeypatch):
    """As published FIDs of CIFAR-10 have it.  The floor are then test images, if they are enough."""
    prepare(n=400)
    for name, empty in (("images", pictures(0, 1)), ("labels", np.zeros(0, np.int64))):
        np.save(f"data/pixels/validation/{name}.npy", empty)  # data.validation: 0
    np.save("data/pixels/test/images.npy", pictures(300, 2))
    np.save("data/pixels/test/labels.npy", np.arange(300) % 10)
    for n, ratio in ((N, True), (400, False)):
        choose([CNN, "random-conv-v1"], accuracy_images=0, split="train", n=n)
        draw("ddpm", labelled=True, n=n)
        reference.main()
        record, floor = judge(monkeypatch, "ddpm"), read("metrics/evaluation/reference.json")
        assert floor["reference"]["split"] == "train" and floor["reference"]["n"] == 400
        part, network = record["instruments"][CNN], instruments.open_instrument(Path("data/reference", CNN))
        real, drawn = network.measure(pictures(400, 0)), network.measure(pictures(n, 10))
        assert part["scores"]["fd"]["values"][0] == pytest.approx(frechet_distance(drawn, real))
        assert ("ratio_to_real" in part) == ratio


def test_an_unlabelled_set_is_judged_by_what_needs_no_labels(pipeline, monkeypatch):
    prepare(labelled=False)
    choose(["random-conv-v1"])
    reference.main()
    record = judge(monkeypatch, "vae")
    [part] = record["instruments"].values()
    assert "classes" not in part and "is" not in part["scores"] and "accuracy_score" not in record
    assert "accuracy_score" not in read("metrics/evaluation/reference.json")
    assert Path("metrics/plots/evaluate_vae/classes.csv").read_text() == "class,distance,n\n"


def test_the_distances_of_inception_are_called_fid_throughout(pipeline, monkeypatch):
    """By an instrument that only has its name: the real one needs weights, and 4,096 images."""

    class Small(torch.nn.Module):
        def forward(self, images):
            return images.double()[:, 0, 0, :8] / 255, None

    kind = SimpleNamespace(
        check=lambda name, images: None,
        make=lambda context: (shared.new_record(context, layer="", dimension=8), None),
        load=lambda record, folder: Small(),
    )
    monkeypatch.setitem(instruments._KINDS, "inception-v3", kind)
    monkeypatch.setitem(DIMENSIONS, "inception-v3", 8)
    choose(["inception-v3"], accuracy_images=0)
    reference.main()
    record = judge(monkeypatch, "ddpm")
    assert "accuracy_score" not in record and "label_accuracy" not in record  # it does not know the classes
    written = [path.read_text() for path in Path("metrics").rglob("*.json")]
    assert len(written) == 4 and all('"fid"' in text and '"fd"' not in text for text in written)
    assert Path("metrics/plots/evaluate_ddpm/classes.csv").read_text().count("\n") == 1 + len(CLASSES)


@pytest.mark.parametrize(
    ("n", "labelled", "sample_n", "words"),
    [
        (320, False, N, "random-conv-v1"),
        (100, True, N, "too few test images: at least 128"),
        (140, True, 300, r"sample.n \(300\) must not exceed the 280 published training images"),
    ],
)
def test_unfit_image_sets_are_refused_before_the_work(pipeline, idle, n, labelled, sample_n, words):
    prepare(n, labelled)
    choose([CNN], n=sample_n)
    idle()
    with pytest.raises(UserError, match=words):
        reference.main()


def test_samples_that_cannot_be_judged_stop_before_the_work(pipeline, monkeypatch, idle):
    with pytest.raises(UserError, match=r"reference.json is missing: make it with `dvc repro reference`"):
        judge(monkeypatch, "vae")
    reference.main()
    idle()
    folder, images = Path("data/samples/vae"), pictures(N, 1)
    for arrays, words in (
        ({"images": images[:100]}, "must hold sets of 150 images"),
        ({"images": images, "labels": np.zeros(N, np.int64)}, "all labelled or none"),
        ({"images": images.astype(np.float32)}, r"samples/vae/1: the images must be uint8"),
        ({"images": images[:, :, :20]}, r"\[N, 1, 28, 28\].*got \[150, 1, 20, 28\]"),
        ({}, r"1/images.npy is missing: make it with `dvc repro -f sample_vae`"),
        ({"images": images, "labels": np.full(N, 10)}, r"samples/vae/1: labels must be .* from 0 to 9"),
    ):
        shutil.rmtree(folder / "1")
        (folder / "1").mkdir()
        for name, array in arrays.items():
            np.save(folder / "1" / f"{name}.npy", array)
        with pytest.raises(UserError, match=words):
            judge(monkeypatch, "vae")
    for file, content, words in (
        ("1/images.npy", b"", "damaged"),
        ("sampling.json", b'{"n": 150}', "sampling.json is damaged"),
        ("sampling.json", None, "sampling.json is missing"),
    ):
        path = folder / file
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{words}.*dvc repro -f sample_vae"):
            judge(monkeypatch, "vae")
    shutil.rmtree(folder)
    draw("vae", labelled=False)
    Path("data/reference", CNN, "features.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged.*`dvc repro -f reference`"):
        judge(monkeypatch, "vae")
    draw("vae", labelled=False, n=200)
    with pytest.raises(UserError, match="got 200 and 150: run `dvc repro`"):
        judge(monkeypatch, "vae")


# From features to records


def test_real_sets_are_disjoint_while_the_images_last():
    sets, overlapping = real_sets(30, 100, 3), real_sets(60, 100, 3)
    assert len(np.unique(np.concatenate(sets))) == 90
    assert [len(np.unique(part)) for part in overlapping] == [60, 60, 60]
    assert not np.array_equal(overlapping[0], overlapping[1])
    assert all(np.array_equal(one, other) for one, other in zip(sets, real_sets(30, 100, 3), strict=True))


# Images of another tool


def test_images_of_another_tool_are_judged_as_those_of_a_model(pipeline, monkeypatch):
    monkeypatch.delenv("REDIFFUSE_TRACKING")
    Path(".dvc").mkdir()
    images = pictures(2 * N + 7, 10)
    reference.main()
    np.save("mine.npy", images[:, 0, :, :, None])  # channels last, as most tools have it
    Path("mine").mkdir()
    for i, image in enumerate(images[:N]):
        Image.fromarray(image[0]).convert("RGB").save(f"mine/{i:03}.png")
    for source, sets in (("mine.npy", [images[:N], images[N : 2 * N]]), ("mine", [images[:N]])):
        done = CliRunner().invoke(main, ["judge", source, "--name", "gan"])
        assert done.exit_code == 0, done.output
        record = read("metrics/judged/gan/evaluation/ddpm.json")
        network = instruments.open_instrument(Path("data/reference", CNN))
        real = network.measure(pictures(320, 2))
        expected = [frechet_distance(network.measure(part), real) for part in sets]
        assert record["instruments"][CNN]["scores"]["fd"]["values"] == pytest.approx(expected)
        assert json.loads(done.stdout) == read("metrics/judged/gan/ddpm.json")
    judge(monkeypatch, "ddpm")
    compared = CliRunner().invoke(main, ["compare", "workspace", "gan", "--json"])
    assert compared.exit_code == 0 and CNN in compared.output, compared.output
    client, row = find_row("gan")  # the second attempt; the first is folded below it
    assert row.data.tags["rediffuse.attempt"] == "2" and row.info.status == "FINISHED"
    assert "rediffuse rebuild" not in row.data.tags["mlflow.note.content"]  # there is nothing to rebuild
    assert row.data.metrics[f"ddpm/{CNN}/fd"] == record["instruments"][CNN]["scores"]["fd"]["mean"]
    assert any("ddpm~samples" in file.path for file in client.list_artifacts(row.info.run_id, "images"))
    for array, words in (
        (images[: N - 1], "holds 149 images"),
        (images.astype(np.float32) / 127.5 - 1, r"float32, not uint8.*\(x \+ 1\) \* 127.5"),
        (np.repeat(images, 3, axis=1), r"\[307, 3, 28, 28\], and images of data.set are \[N, 1, 28, 28\]"),
        (images[:, :, ::2, ::2], r"\[307, 1, 14, 14\].*in this size"),
    ):
        np.save("mine.npy", array)
        with pytest.raises(UserError, match=words):
            judge_command("mine.npy", name="gan", model="ddpm")
    Image.new("RGB", (28, 28), "red").save("mine/red.png")
    Image.new("L", (32, 28)).save("mine/wide.png")
    with pytest.raises(
        UserError, match=r"(?s) images in mine cannot .*colour.*red.png.*32 x 28 pixels.*wide.png"
    ):
        judge_command("mine", name="gan", model="ddpm")
    with pytest.raises(UserError, match="--name must be a name for a folder"):
        judge_command("mine", name="../gan", model="ddpm")
    with pytest.raises(UserError, match="must be a folder of images or a"):
        judge_command("nothing", name="gan", model="ddpm")
