"""Drawing images: the stage, `rediffuse generate` and the formula agree."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkout import SHAPE, T, make_checkout, save_vae, write_params
from toy import dvc, git

from rediffuse.commands.generate import generate
from rediffuse.diffusion.denoiser import GUIDE, Denoiser
from rediffuse.images import files as formats
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import SHARD, shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.guidance import guided
from rediffuse.vae.model import VAE
from stages import sample_ddpm, sample_vae

CPU = torch.device("cpu")
both_models = pytest.mark.parametrize("model", ["ddpm", "vae"])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that makes a checkout with these parameters and changes into it."""

    def make(**changes: Any) -> Path:
        root = tmp_path / "checkout"
        make_checkout(root, **changes)
        monkeypatch.chdir(root)
        return root

    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return make


def drawn(model: str = "ddpm", *, n: int = 4, seed: int = 3, **options: Any) -> dict[str, Any]:
    """The arrays that `rediffuse generate` writes."""
    with np.load(generate(model, "drawn.npz", n=n, seed=seed, **options)) as file:
        return {name: file[name] for name in file.files}


def images_of(model: str = "ddpm", **options: Any) -> Any:
    return drawn(model, **options)["images"]


def message(model: str = "ddpm", output: str = "out.png", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        generate(model, output, **({"n": 1, "seed": 1} | options))
    assert not Path(output).exists()
    return str(caught.value)


# What is drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample__ddpm__sampler": "ddim", "sample__ddpm__eta": 0.5, "sample__ddpm__guidance_scale": 2.0},
        {"ddpm__conditional": False, "sample__ddpm__autoguidance_scale": 1.5},
    ],
)
def test_generate_draws_the_images_of_the_stage(checkout, changes):
    checkout(**changes)
    sample_ddpm.main()
    sample_vae.main()
    for model in ("ddpm", "vae"):
        stored = {path.stem: np.load(path) for path in Path(f"data/samples/{model}/3").iterdir()}
        made = drawn(model, n=1000)
        assert made.keys() == stored.keys()
        assert ("labels" in made) == (model == "ddpm" and load_params().ddpm.conditional)
        for name, array in made.items():
            assert array.dtype == stored[name].dtype and np.array_equal(array, stored[name])


def test_one_step_is_the_denoiser_applied_to_noise(checkout):
    checkout(precision="float32")
    denoiser = load_model(Denoiser, Path("data/models/ddpm"), CPU)
    x_T = torch.randn(SHARD, *SHAPE, generator=shard_generator(7, 1))
    with torch.no_grad():
        x_0 = guided(denoiser)(x_T, torch.full((SHARD,), T), torch.full((SHARD,), 2)).clamp(-1, 1)
    expected = np.floor((x_0.numpy() + 1) / 2 * 255 + 0.5)
    images = images_of(n=2 * SHARD, seed=7, label="Bag", steps=1)[SHARD:]
    assert np.abs(images - expected).max() <= 1  # a grey level where the rounding is a tie
    assert (images == expected).mean() > 0.999


def test_an_image_of_the_vae_is_its_decoded_latent(checkout):
    checkout(precision="float32")
    vae = load_model(VAE, Path("data/models/vae"), CPU)
    z = torch.randn(SHARD, 4, generator=shard_generator(7, 1))
    with torch.no_grad():
        expected = torch.sigmoid(vae.decoder(z)) * 255
    images = images_of("vae", n=2 * SHARD, seed=7)[SHARD:]
    assert np.abs(images - expected.numpy()).max() <= 0.5 + 1e-4


@both_models
def test_image_i_depends_on_the_seed_and_not_on_how_many_are_drawn(checkout, tmp_path, model):
    checkout()
    many = images_of(model, n=70)
    for n in (1, 5, 64, 65):
        assert np.array_equal(images_of(model, n=n), many[:n])
    assert not np.array_equal(images_of(model, n=70, seed=4), many)
    Path("data/models", model).rename(tmp_path / model)  # a model in any folder
    assert np.array_equal(images_of(str(tmp_path / model), n=70), many)


def test_a_label_changes_the_class_and_not_the_noise(checkout):
    """Image i of a class alone is image i drawn in turn, where it is the turn of the class."""
    checkout()
    turn = drawn(n=66)
    assert turn["labels"].tolist() == [i % 3 for i in range(66)]
    alone = [drawn(n=66, label=str(label)) for label in range(3)]
    for label, arrays in enumerate(alone):
        assert set(arrays["labels"].tolist()) == {label}
        assert np.array_equal(arrays["images"][label::3], turn["images"][label::3])
    assert not np.array_equal(alone[0]["images"], alone[1]["images"])
    for name in ("Ankle boot", " ankle BOOT"):
        assert np.array_equal(images_of(n=66, label=name), alone[1]["images"])


def test_options_take_the_place_of_parameters(checkout):
    root = checkout(sample__ddpm__sampler="ddim", sample__ddpm__eta=0.5)  # which heun does not know
    optional = images_of(sampler="heun", steps=2, guidance_scale=3.0, autoguidance_scale=2.0)
    assert not np.array_equal(optional, images_of())
    settings = {"sampler": "heun", "steps": 2, "guidance_scale": 3.0, "autoguidance_scale": 2.0}
    write_params(root, {f"sample.ddpm.{name}": value for name, value in settings.items()})
    assert np.array_equal(optional, images_of())


def test_generate_draws_from_the_mixture_of_the_stage(checkout):
    root = checkout(sample__vae__prior="mixture")
    assert "dvc repro sample_vae" in message("vae")
    sample_vae.main()
    assert np.array_equal(images_of("vae", n=100), np.load("data/samples/vae/3/images.npy")[:100])
    params = write_params(root, {"sample.vae.prior": "mixture", "sample.vae.components": 4})
    assert "4 components" in message("vae")
    write_params(root, {"sample.vae.prior": "mixture"})
    save_vae(root, params, seed=9)  # as if the model had been trained again, but no images drawn
    assert "dvc repro sample_vae" in message("vae")


# What is written


def test_a_png_is_a_grid_and_a_folder_holds_an_image_in_each_file(checkout):
    checkout()
    images = images_of(n=12)
    generate("ddpm", "grid.png", n=12, seed=3)
    picture = np.asarray(Image.open("grid.png"))
    assert np.array_equal(picture[2:18:2, 2:18:2], images[0, 0])
    assert np.array_equal(picture[20:36:2, 20:36:2], images[11, 0])
    assert generate("ddpm", "deep/folder", n=12, seed=3) == Path("deep/folder")
    assert sorted(path.name for path in Path("deep").iterdir()) == ["folder"]
    files = sorted(Path("deep/folder").iterdir())
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(12)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), images[:, 0])


def test_images_with_three_channels_are_written_in_colour():
    image = np.arange(3 * 2 * 5, dtype=np.uint8).reshape(3, 2, 5)
    with Image.open(io.BytesIO(formats.encode_image(image))) as picture:
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), image.transpose(1, 2, 0))


def test_a_folder_appears_as_a_whole_or_not_at_all_and_replaces_nothing(checkout, monkeypatch):
    checkout()
    contents = iter([b"", b""])  # then the disk is full
    before = sorted(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(formats, "encode_image", lambda image: next(contents))
        with pytest.raises(StopIteration):
            generate("ddpm", "folder", n=4, seed=1)
    assert sorted(Path().iterdir()) == before
    Path("empty").mkdir()
    generate("vae", "empty", n=1, seed=1)
    with pytest.raises(UserError, match="empty"):  # no longer
        generate("vae", "empty", n=2, seed=1)
    assert [path.name for path in Path("empty").iterdir()] == ["00000.png"]
    Path("old.png").write_bytes(b"old")
    generate("vae", "old.png", n=1, seed=1)  # a file is replaced
    Image.open("old.png").verify()


# What is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(({"label": label}, "0 T-shirt/top, 1 Ankle boot, 2 Bag") for label in ("hat", "3", "-1")),
        ({"steps": T + 1}, f"got {T + 1}"),
        ({"sampler": "euler"}, "sampler"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"n": 0}, "at least 1, got 0"),
        ({"seed": 2**32}, "seed must be"),
        ({"model": "vae", "guidance_scale": 2.0}, "--guidance-scale"),
        ({"model": "vae", "label": "Bag"}, "without labels"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "data"}, "config.json is missing"),
        ({"output": "out.jpg"}, ".png"),
    ],
)
def test_what_does_not_fit_is_named(checkout, options, text):
    checkout()
    assert text in message(**options)


def test_a_model_without_labels_takes_none(checkout):
    checkout(ddpm__conditional=False)
    assert "without labels" in message(label="Bag") and "guidance-scale" in message(guidance_scale=2.0)


def test_a_model_without_a_guide_takes_no_autoguidance(checkout):
    checkout()
    before = images_of()
    assert not np.array_equal(images_of(autoguidance_scale=1.5), before)
    shutil.rmtree(Path("data/models/ddpm", GUIDE))
    assert np.array_equal(images_of(), before)
    assert "(1.5) must be 1" in (told := message(autoguidance_scale=1.5)) and "ddpm.guide_share" in told


def test_a_missing_or_damaged_model_is_named(checkout, monkeypatch, tmp_path):
    checkout()
    config = Path("data/models/ddpm/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"width": 16}))
    assert "another version" in message() and "dvc repro" in message()
    for content, text in ((json.dumps({"width": 3}), "vae or ddpm, got none"), ("{", "config.json")):
        config.write_text(content)
        assert text in message()
    config.unlink()
    assert "dvc pull" in message()
    monkeypatch.chdir(tmp_path)
    assert "checkout" in message()


# Models of a revision


@pytest.mark.slow
def test_a_model_of_a_revision_is_drawn_from_with_its_own_settings(checkout):
    root = checkout(sample__ddpm__steps=3)
    (root / ".dvc").rmdir()
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "add", "-q", "data/models/ddpm")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "three steps")
    expected = images_of(seed=1)
    write_params(root, {"sample.ddpm.steps": 5})
    assert not np.array_equal(images_of(seed=1), expected)
    (root / "data/models/ddpm/model.safetensors").unlink()
    np.testing.assert_array_equal(images_of("HEAD:ddpm", seed=1), expected)
    assert "git log" in message("nobody:ddpm")
    shutil.rmtree(root / ".dvc/cache")
    assert "dvc pull" in message("HEAD:ddpm")
