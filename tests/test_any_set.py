"""Any set of images, from the folder to the scores: few images, odd sizes, one class or thousands."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkout import write_params

from rediffuse.commands.compare import Row, compare
from rediffuse.figures.latent import latent_map
from rediffuse.figures.scores import class_chart
from rediffuse.inference.model import load_image_model
from rediffuse.runtime.device import to_device
from rediffuse.runtime.errors import UserError
from rediffuse.sources import own
from rediffuse.sources.folder import ImageFiles
from rediffuse.sources.found import Found

STAGES = [
    *("prepare", "reference", "train_vae", "encode", "train_ddpm", "sample_vae", "sample_ddpm"),
    *("evaluate vae", "evaluate ddpm", "report"),
]
SHORT = {"images": 64, "batch": 32, "lr_warmup": 0, "log_every": 32, "validate_every": 32}
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
MEASURED = {
    "reference__instruments": ["random-conv-v1"],
    "sample__n": 128,
    "evaluate__is_splits": 2,
    "evaluate__kid_subset_size": 10,
    "evaluate__kid_subsets": 2,
}
MIXTURE = {"sample__vae__prior": "mixture", "sample__vae__components": 50}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stages, all or those named, with tiny models and these parameters ("__" for the dot)."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")

    def stages(*names, **changes):
        write_params(tmp_path, TINY | {name.replace("__", "."): value for name, value in changes.items()})
        for stage in STAGES:
            if not names or stage.split()[0] in names:
                monkeypatch.setattr(sys, "argv", stage.split())
                importlib.import_module(f"stages.{stage.split()[0]}").main()

    return stages


def fill(folder: str, n: int, *, size: tuple[int, int] = (16, 16), mode: str = "L", first: int = 0) -> None:
    """n different images, width x height = size."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.RandomState(i).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(Path(folder, f"{i}.png"))


def record(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"metrics/evaluation/{model}.json").read_text())
    return found


# Few images


def test_ten_images_go_all_the_way(run, capsys):
    """Batches, components and pictures are larger than the set; only the memorisation is measured."""
    fill("in", 10)
    run(**MIXTURE)
    splits = json.loads(Path("data/pixels/manifest.json").read_text())["splits"]
    assert [splits[name]["count"] for name in ("train", "validation", "test")] == [7, 2, 1]
    assert "sample.vae.components (50)" in capsys.readouterr().err
    for model in ("vae", "ddpm"):
        found = record(model)
        assert found["instruments"] == {} and "accuracy_score" not in found
        copies = found["memorisation"]["copies"]["mean"]
        assert json.loads(Path(f"metrics/{model}.json").read_text()) == {"n": 12, "copies": copies}
        assert Path(f"metrics/plots/evaluate_{model}/classes.csv").read_text() == "class,distance,n\n"
    row = Row("A", "workspace", record("vae"))
    comparison = compare([row, row])
    assert not comparison.refusals
    assert "memorisation.copies" in [line.metric for line in comparison.table]
    with pytest.raises(UserError, match="random-conv-v1"):
        compare([row, row], ["random-conv-v1"])

    settings = {"precision": "float32", "prior": "mixture", "components": 50}
    prior = Path("data/samples/vae/prior.safetensors")
    loaded = load_image_model(Path("data/models/vae"), settings, prior=prior)
    np.testing.assert_array_equal(loaded.generate(12, seed=1), np.load("data/samples/vae/1/images.npy"))
    # The settings are the parameters, not the outcome.
    with pytest.raises(UserError, match="and 7 components"):
        load_image_model(Path("data/models/vae"), settings | {"components": 7}, prior=prior)


def test_of_few_images_the_best_model_is_kept(run):
    fill("in", 40, mode="RGB")
    patience = {f"{model}__training__patience": 2 for model in ("vae", "ddpm")}
    without_guide = {"ddpm__guide_share": 0, "sample__ddpm__autoguidance_scale": 1}
    few = {"vae__training__images": 320, "vae__training__lr": 0.1, "ddpm__training__images": 640}
    run(**patience, **without_guide, **few, ddpm__augment=0.5, ddpm__training__lr=0.05)
    for model, error in (("vae", "elbo"), ("ddpm", "eps_mse")):
        with Path(f"metrics/plots/train_{model}/validation.csv").open() as file:
            rows = [(float(row[f"validation_{error}"]), int(row["images"])) for row in csv.DictReader(file)]
        best = rows.index(min(rows))
        kept = json.loads(Path(f"metrics/train_{model}.json").read_text())["kept_at"]
        assert kept == rows[best][1]
        assert len(rows) == best + 3 or rows[-1][1] == few[f"{model}__training__images"]
    settings = {"precision": "float32", "sampler": "ddim", "steps": 2, "eta": 0.0, "guidance_scale": 1.0}
    model = load_image_model(Path("data/models/ddpm"), settings)
    assert model.generate(4, seed=1).shape == (4, 3, 16, 16)


# Sizes


@pytest.mark.parametrize(
    ("size", "mode", "changes"),
    [
        ((17, 23), "RGB", {"vae__likelihood": "gaussian", "ddpm__flip": True, "ddpm__predict": "eps"}),
        ((17, 23), "L", {"ddpm__space": "latents", "vae__latent_channels": 2, "ddpm__fold": 1}),
        ((256, 16), "L", {"ddpm__fold": 4, "ddpm__multipliers": [1] * 5, "vae__channels": [8] * 5}),
    ],
    ids=["pixels", "latents", "largest and smallest, halved five times"],
)
def test_sizes(run, size, mode, changes):
    fill("in", 40, size=size, mode=mode)
    run(data__size=0, sample__n=5, sample__seeds=[1], ddpm__attention=16, **changes)
    shape = (5, 1 if mode == "L" else 3, size[1], size[0])
    for model in ("vae", "ddpm"):
        assert np.load(f"data/samples/{model}/1/images.npy").shape == shape


@pytest.mark.parametrize(("size", "mode"), [((16, 16), "RGB"), ((17, 256), "L")])
def test_instruments_measure_all_sizes_or_name_a_remedy_that_works(run, size, mode):
    fill("in", 300, size=size, mode=mode)
    words = r"at least 128.*raise data\.test_share.*reference\.instruments: \[\]"
    with pytest.raises(UserError, match=words):
        run("prepare", "reference", data__size=0, **MEASURED)
    run("prepare", "reference", data__size=0, data__test_share=0.5, **MEASURED)
    assert all(part["rows"]["noise"]["fd"] >= 0 for part in record("reference")["instruments"].values())


# Classes

NAMES = [
    *("a, b", "x.png", "T-shirt.v2", " spaced ", "naïve 日本語 🦊", "$\\foo$", "l" * 200),
    *("Cat", "cat", "-1", "_hidden", '"quoted"', "a|b"),
]


def test_class_names_of_any_kind(run):
    for i, name in enumerate(NAMES):
        fill(f"in/{name}", 6, first=10 * i)
    run()
    classes = sorted(NAMES)
    assert json.loads(Path("data/pixels/manifest.json").read_text())["classes"] == classes
    settings = {"precision": "float32", "sampler": "ddim", "steps": 2, "eta": 0.0, "guidance_scale": 1.0}
    model = load_image_model(Path("data/models/ddpm"), settings)
    assert [model.label(name) for name in classes] == list(range(len(classes)))  # also "Cat" and "cat"
    assert model.label("CAT") in (classes.index("Cat"), classes.index("cat"))
    with pytest.raises(UserError, match="known are"):
        model.label("dog")


@pytest.mark.parametrize("names", [NAMES, [f"class {i}" for i in range(1000)]], ids=["any names", "many"])
def test_a_chart_of_any_classes_stays_small(names):
    scores = {"fd": {"mean": 2.0, "min": 1.0, "max": 3.0}}
    classes = {"by": "label", "fd": {name: {"fd": 1.0 + i, "n": 200} for i, name in enumerate(names)}}
    found = {"model": "ddpm", "instruments": {"cnn": {"scores": scores, "classes": classes}}}
    assert max(class_chart(found, {"instruments": {}}).shape) < 2500
    latent_map(np.random.RandomState(0).normal(size=(2000, 4)), np.arange(2000) % len(names), names)


def test_one_class(run):
    fill("set/only", 12)
    images = np.stack([np.asarray(Image.open(f"set/only/{i}.png")) for i in range(12)])
    np.savez("in.npz", images=images, labels=np.full(12, 7))
    run(data__path="in.npz")
    assert json.loads(Path("data/pixels/manifest.json").read_text())["classes"] == ["7"]
    assert record("ddpm")["instruments"] == {}
    assert (np.load("data/samples/ddpm/1/labels.npy") == 0).all()


def test_thousands_of_classes(run, monkeypatch, capsys):
    """One file under 2,000 names, with other pixels each time: real files would take long."""
    numbers = itertools.count()

    def made(image, shape, **_):
        return np.random.RandomState(next(numbers)).randint(0, 256, shape).astype(np.uint8)

    names = tuple(f"class {i:05}" for i in range(2_000))
    Image.new("L", (16, 16)).save("x.png")
    found = Found(ImageFiles(["x.png"] * 2_000), [*range(2_000)], names)
    monkeypatch.setattr(own, "decode", made)
    monkeypatch.setattr(own, "find_images", lambda *_, **__: found)
    Path("in").mkdir()
    run(data__channels=1, evaluate__accuracy_images=128, **MEASURED)
    assert "sample.n (128) is less than the 2,000 classes" in capsys.readouterr().err
    [part] = record("ddpm")["instruments"].values()
    distances = part["classes"]["fd"]
    assert len(distances) == 2_000
    assert distances["class 00127"] == {"n": 2} and distances["class 00128"] == {"n": 0}
    for path in Path("metrics/report").rglob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) <= 2500, path


# Many images


def test_images_on_the_cpu_stay_in_their_file(tmp_path, recwarn):
    np.save(tmp_path / "images.npy", np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    images = to_device(mapped, torch.device("cpu"))
    assert images.data_ptr() == mapped.ctypes.data and (images.numpy() == mapped).all()
    assert not recwarn.list


def test_images_that_do_not_fit_onto_the_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (10**9, 10**10))
    huge = np.broadcast_to(np.zeros(1, np.uint8), (10**7, 1, 16, 16))
    with pytest.raises(UserError, match=r"take 2\.6 GB, and the GPU has 1\.0 GB free: lower data\.size"):
        to_device(huge, torch.device("cuda"))
