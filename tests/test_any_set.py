"""Any set of images, from the folder to the scores: few images, odd sizes, one class, none, or ten thousand."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkout import write_params

from rediffuse.commands.compare import Row, compare
from rediffuse.evaluation.record import class_table
from rediffuse.figures import scores
from rediffuse.figures.latent import latent_map
from rediffuse.figures.scores import class_chart
from rediffuse.inference.card import model_card
from rediffuse.inference.model import load_image_model
from rediffuse.runtime.device import to_device
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import write_csv
from rediffuse.sources import folder
from rediffuse.sources.folder import find_images
from rediffuse.tracking.writer import RowWriter
from stages import encode, evaluate, prepare, reference, report, sample_ddpm, sample_vae, train_ddpm, train_vae

STAGES: list[tuple[Any, list[str]]] = [
    (prepare, []),
    (reference, []),
    (train_vae, []),
    (encode, []),
    (train_ddpm, []),
    (sample_vae, []),
    (sample_ddpm, []),
    (evaluate, ["vae"]),
    (evaluate, ["ddpm"]),
    (report, []),
]
Run = Callable[..., None]
SHORT = {"images": 64, "batch": 32, "lr_warmup": 0, "log_every": 32, "validate_every": 32, "checkpoint_every": 64}
TINY = {
    "precision": "float32",
    "data.set": "folder",
    "data.path": "in",
    "data.size": 16,
    "data.split_seed": 4,
    "reference.instruments": [],
    "sample.n": 12,
    "sample.seeds": [1, 2],
    "vae.latent_dim": 3,
    "vae.channels": [8, 8],
    **{f"{model}.training.{name}": value for model in ("vae", "ddpm") for name, value in SHORT.items()},
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return tmp_path


@pytest.fixture
def run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the stages, all or those named, with tiny models and these leaves of params.yaml."""

    def stages(*names: str, only: Sequence[str] = ("vae", "ddpm"), **changes: Any) -> None:
        write_params(checkout, TINY | {name.replace("__", "."): value for name, value in changes.items()})
        for module, arguments in STAGES:
            name = module.__name__.removeprefix("stages.")
            if (not names or name in names) and set(arguments) <= set(only):
                monkeypatch.setattr(sys, "argv", [name, *arguments])
                module.main()

    return stages


def fill(folder: Path, n: int, *, size: tuple[int, int] = (16, 16), mode: str = "L", first: int = 0) -> None:
    """n different images, width x height = size."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.RandomState(i).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def sizes() -> list[int]:
    splits = json.loads(Path("data/pixels/manifest.json").read_text())["splits"]
    return [splits[name]["count"] for name in ("train", "validation", "test")]


def record(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"metrics/evaluation/{model}.json").read_text())
    return found


# Few images


def test_ten_images_go_all_the_way(checkout: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches, components and pictures are larger than the set; nothing is measured but the memorisation."""
    fill(checkout / "in", 10)
    run(sample__vae__prior="mixture", sample__vae__components=50)
    assert sizes() == [7, 2, 1]
    assert "sample.vae.components (50) is lowered to the number of training images, 7" in capsys.readouterr().err
    assert json.loads(Path("data/samples/vae/sampling.json").read_text())["components"] == 7
    for model in ("vae", "ddpm"):
        found = record(model)
        assert found["instruments"] == {} and "accuracy_score" not in found
        assert json.loads(Path(f"metrics/{model}.json").read_text()) == {"n": 12, "copies": found["memorisation"]["copies"]["mean"]}
        assert Path(f"metrics/plots/evaluate_{model}/classes.csv").read_text() == "class,distance,n\n"
        for name in ("scores", "classes", "neighbours"):
            with Image.open(f"metrics/report/{model}/{name}.png") as picture:
                assert picture.width > 100
    assert json.loads(Path("metrics/reference.json").read_text()) == {"n": 12, "copies": 0.0}
    card = model_card("ddpm", config={"shape": [1, 16, 16]}, settings={}, manifest=None, record=record("ddpm"), parameters={}, origin={})
    assert "No distance was measured" in card and "near-copies" in card


def test_models_of_few_images_are_compared_by_their_memorisation(checkout: Path, run: Run) -> None:
    fill(checkout / "in", 10)
    run("prepare", "reference", "train_vae", "sample_vae", "evaluate", only=["vae"])
    rows = [Row(label, label, "workspace", record("vae")) for label in "AB"]
    comparison = compare(rows)
    assert comparison.comparable and not comparison.refusals
    [section] = comparison.sections
    assert "memorisation.copies" in [line.metric for line in section.lines]
    with pytest.raises(UserError, match="they were with none"):
        compare(rows, ["random-conv-v1"])
    with pytest.raises(UserError, match="lacks instruments"):
        compare([Row("A", "A", "workspace", {key: value for key, value in rows[0].record.items() if key != "instruments"}), rows[1]])


def test_the_mixture_of_few_images_draws_again(checkout: Path, run: Run) -> None:
    fill(checkout / "in", 10)
    changes = {"sample__vae__prior": "mixture", "sample__vae__components": 50}
    run("prepare", "train_vae", "sample_vae", only=["vae"], **changes)
    loaded = load_image_model(
        Path("data/models/vae"),
        {"precision": "float32", "prior": "mixture", "components": 50},
        prior=Path("data/samples/vae/prior.safetensors"),
    )
    np.testing.assert_array_equal(loaded.generate(12, seed=1), np.load("data/samples/vae/1/images.npy"))
    with pytest.raises(UserError, match="and 7 components"):  # the settings are what was asked for, not what came of it
        load_image_model(
            Path("data/models/vae"),
            {"precision": "float32", "prior": "mixture", "components": 7},
            prior=Path("data/samples/vae/prior.safetensors"),
        )


def test_distances_of_few_images_are_refused_with_a_remedy_that_works(checkout: Path, run: Run) -> None:
    fill(checkout / "in", 10)
    small = {"evaluate__is_splits": 2, "evaluate__kid_subset_size": 10}
    with pytest.raises(UserError, match=r"at least 128 training images.*reference\.instruments: \[\]"):
        run("prepare", "reference", reference__instruments=["random-conv-v1"], sample__n=128, **small)
    run("reference")


def test_few_test_images_are_refused_with_a_remedy_that_works(checkout: Path, run: Run) -> None:
    fill(checkout / "in", 300)
    wanted = {"reference__instruments": ["pixel-pca-v1"], "sample__n": 128, "evaluate__is_splits": 2, "evaluate__kid_subset_size": 10}
    with pytest.raises(UserError, match=r"too few test images: at least 128.*raise data\.test_share.*reference\.instruments: \[\]"):
        run("prepare", "reference", **wanted)
    run("prepare", "reference", data__test_share=0.5, **wanted)


# Sizes


@pytest.mark.parametrize(
    ("size", "mode", "changes"),
    [
        ((17, 23), "RGB", {"data__size": 0}),
        ((128, 128), "L", {"data__size": 128, "vae__channels": [8, 8, 8], "ddpm__fold": 4}),
        ((16, 16), "RGB", {"ddpm__fold": 4, "ddpm__multipliers": [1, 1, 1, 1, 1], "ddpm__attention": 16, "vae__channels": [8, 8, 8, 8, 8]}),
        ((17, 23), "L", {"data__size": 0, "ddpm__space": "latents", "vae__latent_channels": 2, "ddpm__fold": 1}),
        ((40, 16), "RGB", {"data__size": 0, "vae__likelihood": "gaussian", "ddpm__flip": True, "ddpm__predict": "eps"}),
    ],
    ids=["17x23", "128", "five halvings of 16", "latents", "wide"],
)
def test_sizes(checkout: Path, run: Run, size: tuple[int, int], mode: str, changes: dict[str, Any]) -> None:
    fill(checkout / "in", 40, size=size, mode=mode)
    run(sample__n=5, sample__seeds=[1], **changes)
    for model in ("vae", "ddpm"):
        assert np.load(f"data/samples/{model}/1/images.npy").shape == (5, 1 if mode == "L" else 3, size[1], size[0])


@pytest.mark.parametrize(("size", "mode"), [((16, 16), "RGB"), ((17, 23), "L"), ((128, 128), "L")])
def test_instruments_measure_all_sizes(checkout: Path, run: Run, size: tuple[int, int], mode: str) -> None:
    fill(checkout / "in", 300, size=size, mode=mode)
    wanted = {"sample__n": 128, "evaluate__is_splits": 2, "evaluate__kid_subset_size": 10, "evaluate__kid_subsets": 2}
    run("prepare", "reference", data__size=0, data__test_share=0.5, reference__instruments=["random-conv-v1", "pixel-pca-v1"], **wanted)
    assert all(part["rows"]["noise"]["fd"] >= 0 for part in record("reference")["instruments"].values())


# Classes

NAMES = [
    "a, b",
    "x.png",
    "T-shirt.v2",
    " spaced ",
    "naïve 日本語 🦊",
    "$\\foo$",
    "l" * 200,
    "Cat",
    "cat",
    "-1",
    "_hidden",
    '"quoted"',
    "a|b",
]


def test_class_names_of_any_kind(checkout: Path, run: Run) -> None:
    for i, name in enumerate(NAMES):
        fill(checkout / "in" / name, 6, first=10 * i)
    run()
    classes = sorted(NAMES)
    assert json.loads(Path("data/pixels/manifest.json").read_text())["classes"] == classes
    model = load_image_model(
        Path("data/models/ddpm"), {"precision": "float32", "sampler": "ddim", "steps": 2, "eta": 0.0, "guidance_scale": 1.0}
    )
    assert [model.label(name) for name in classes] == list(range(len(classes)))  # also where two differ in case alone
    with pytest.raises(UserError, match="known are"):
        model.label("dog")
    assert model.label("CAT") in (classes.index("Cat"), classes.index("cat"))


def test_names_of_classes_in_charts_and_tables(tmp_path: Path) -> None:
    score = {"mean": 2.0, "min": 1.0, "max": 3.0}
    instrument = {
        "scores": {"fd": score},
        "classes": {"by": "label", "fd": {name: {"fd": 1.0 + i, "n": 200} for i, name in enumerate(NAMES)}},
    }
    found = {"model": "ddpm", "instruments": {"cnn": instrument}}
    picture = class_chart(found, {"instruments": {}})
    assert picture.shape[0] < 1000 and picture.shape[1] < 1000
    write_csv(tmp_path / "classes.csv", ("class", "distance", "n"), class_table(found))
    with (tmp_path / "classes.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == NAMES
    means = np.random.RandomState(0).normal(size=(2 * len(NAMES), 4))
    latent_map(means, np.arange(2 * len(NAMES)) % len(NAMES), NAMES)


def test_a_sub_folder_whose_name_is_no_text_is_refused(checkout: Path, run: Run) -> None:
    fill(checkout / "in" / os.fsdecode(b"caf\xe9"), 10)
    with pytest.raises(UserError, match="is not UTF-8: rename it"):
        run("prepare")


def test_one_class(checkout: Path, run: Run) -> None:
    fill(checkout / "in" / "only", 12)
    run()
    assert record("ddpm")["instruments"] == {}
    assert (np.load("data/samples/ddpm/1/labels.npy") == 0).all()


def test_ten_thousand_classes(checkout: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One file under 10,000 names, with other pixels each time: what takes long is the file system."""
    numbers = itertools.count()

    def made(path: str, shape: tuple[int, int, int]) -> np.ndarray:
        return np.random.RandomState(next(numbers)).randint(0, 256, shape).astype(np.uint8)

    names = [f"class {i:05}" for i in range(10_000)]
    monkeypatch.setattr(folder, "decode", made)
    monkeypatch.setattr(folder, "find_images", lambda path: folder.Found(["x.png"] * 10_000, list(range(10_000)), tuple(names)))
    wanted = {"reference__instruments": ["pixel-pca-v1"], "sample__n": 128, "evaluate__is_splits": 2, "evaluate__kid_subset_size": 10}
    run(data__channels=1, evaluate__kid_subsets=2, evaluate__accuracy_images=128, **wanted)
    assert "sample.n (128) is less than the 10,000 classes" in capsys.readouterr().err
    [part] = record("ddpm")["instruments"].values()
    assert len(part["classes"]["fd"]) == 10_000
    assert part["classes"]["fd"]["class 00127"] == {"n": 2} and part["classes"]["fd"]["class 00128"] == {"n": 0}
    for path in Path("metrics/report").rglob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) <= 2500, path


def test_the_row_names_the_set_however_long_its_classes_are() -> None:
    """MLflow takes 16 MB of what is said of a data set."""
    client = Mock()
    row = SimpleNamespace(
        info=SimpleNamespace(run_id="1", status="RUNNING"),
        data=SimpleNamespace(tags={}, params={}),
        inputs=SimpleNamespace(dataset_inputs=[]),
    )
    long = {"set": "folder", "classes": ["é" * 100 + f"{i}" for i in range(30_000)], "splits": {}}
    for manifest in (long, long | {"classes": ["a"]}):
        RowWriter(client, row).log_dataset("folder", "0", {"path": "data/pixels"}, manifest)  # type: ignore[arg-type]
    whole, short = (json.loads(call.args[1][0].dataset.profile) for call in client.log_inputs.call_args_list)
    assert whole == {"set": "folder"} and short["classes"] == ["a"]


def test_of_many_classes_the_furthest_are_charted() -> None:
    score = {"mean": 2.0, "min": 1.0, "max": 3.0}
    distances = {f"class {i}": {"fd": float(i), "n": 200} if i % 2 else {"n": 3} for i in range(1000)}
    shown = scores._furthest(list(distances), scores._measured(distances))
    assert shown == [f"class {i}" for i in range(999, 899, -2)]
    record = {"model": "ddpm", "instruments": {"cnn": {"scores": {"fd": score}, "classes": {"by": "label", "fd": distances}}}}
    assert class_chart(record, {"instruments": {}}).shape[0] == 100 * 1.8 + 32 * scores.MOST
    record["instruments"]["cnn"]["classes"]["fd"] = {name: {"n": 3} for name in distances}
    assert class_chart(record, {"instruments": {}}).shape[0] < 300  # a sentence


# Many images


def test_an_image_takes_little_room_while_it_is_looked_for(tmp_path: Path) -> None:
    """10 million images of 150 bytes each are 1.5 GB."""
    n = 4000
    for i in range(n):
        place = tmp_path / "images" / f"class {i % 10}" / f"{i:08}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    tracemalloc.start()
    found = find_images(tmp_path / "images")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.paths) == n and len(found.classes) == 10
    assert taken / n < 150 + len(str(tmp_path))


def test_images_on_the_cpu_stay_in_their_file(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "images.npy", np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    images = to_device(mapped, torch.device("cpu"))
    assert images.data_ptr() == mapped.ctypes.data and (images.numpy() == mapped).all()
    assert not recwarn.list


def test_images_that_a_gpu_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (10**9, 10**10))
    huge = np.broadcast_to(np.zeros(1, np.uint8), (10**7, 1, 16, 16))
    with pytest.raises(UserError, match=r"take 2\.6 GB, and the GPU has 1\.0 GB free: lower data\.size"):
        to_device(huge, torch.device("cuda"))


def test_splits_larger_than_they_need_be_are_warned_of(
    checkout: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "MANY", 10)
    fill(checkout / "in", 100)
    run("prepare")
    assert re.search(r"warning: \d+ images are more than the split test needs.* lower data\.test_share", capsys.readouterr().err)
