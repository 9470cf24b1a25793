"""Drawing images: the stage, `rediffuse generate` and the formula agree; image i hangs on the seed, i and its label alone."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkout import SHAPE, T, make_checkout, save_vae, write_params
from toy import dvc, git

from rediffuse.commands.generate import generate
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.images import files as formats
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import SHARD, shard_generator
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.guidance import guided
from rediffuse.vae.model import VAE
from stages import sample_ddpm, sample_vae

CPU = torch.device("cpu")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that makes a checkout with these parameters and changes into it."""

    def make(**changes):
        root = tmp_path / "checkout"
        make_checkout(root, **changes)
        monkeypatch.chdir(root)
        return root

    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return make


def as_file(array):
    """The bytes of the array in a file of the stages'."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def drawn(model="ddpm", *, n=4, seed=3, **options):
    """The arrays that `rediffuse generate` writes."""
    with np.load(generate(model, "drawn.npz", n=n, seed=seed, **options)) as file:
        return {name: file[name] for name in file.files}


def images_of(model="ddpm", **options):
    return drawn(model, **options)["images"]


def message(model="ddpm", output="out.png", *, n=1, seed=1, **options):
    with pytest.raises(UserError) as caught:
        generate(model, output, n=n, seed=seed, **options)
    assert not Path(output).exists()
    return str(caught.value)


# What is drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "float32", "sample__ddpm__sampler": "ddpm"},
        {"sample__ddpm__sampler": "ddim", "sample__ddpm__eta": 0.5, "sample__ddpm__guidance_scale": 2.0},
        {"ddpm__conditional": False},
    ],
)
def test_generate_draws_the_images_of_the_stage_to_the_byte(checkout, changes):
    checkout(sample__n=1000, **changes)
    sample_ddpm.main()
    sample_vae.main()
    for model in ("ddpm", "vae"):
        files = {path.stem: path.read_bytes() for path in Path(f"data/samples/{model}/3").iterdir()}
        assert set(files) == {"images", "labels"} if model == "ddpm" and load_params().ddpm.conditional else {"images"}
        with np.load(generate(model, f"{model}.npz", n=1000, seed=3)) as made:
            assert {name: as_file(made[name]) for name in made.files} == files


def test_one_step_is_the_denoiser_applied_to_noise(checkout):
    checkout(precision="float32")
    denoiser = load_model(Denoiser, Path("data/models/ddpm"), CPU)
    x_T = torch.randn(SHARD, *SHAPE, generator=shard_generator(7, 1))
    labels = torch.full((SHARD,), 2)
    with torch.no_grad():
        x_0 = guided(denoiser)(x_T, torch.full((SHARD,), T), labels)
    expected = np.floor((np.clip(x_0.numpy(), -1, 1) + 1) / 2 * 255 + 0.5).astype(np.uint8)
    images = images_of(n=2 * SHARD, seed=7, label="Bag", steps=1)[SHARD:]
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1  # a grey level where the rounding is a tie
    assert (images == expected).mean() > 0.999


def test_an_image_of_the_vae_is_its_decoded_latent(checkout):
    checkout(precision="float32")
    vae = load_model(VAE, Path("data/models/vae"), CPU)
    z = torch.randn(SHARD, 4, generator=shard_generator(7, 1))
    with torch.no_grad():
        expected = torch.sigmoid(vae.decoder(z)) * 255
    images = images_of("vae", n=2 * SHARD, seed=7)[SHARD:]
    assert np.abs(images - expected.numpy()).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("model", ["ddpm", "vae"])
def test_image_i_does_not_hang_on_how_many_are_drawn(checkout, model):
    checkout()
    many = images_of(model, n=70)
    for n in (1, 5, 64, 65):
        assert np.array_equal(images_of(model, n=n), many[:n])


def test_a_label_changes_the_class_and_not_the_noise(checkout):
    """What is drawn for a class alone, at index i, is what is drawn in turn at i where it is the turn of that class."""
    checkout()
    turn = drawn(n=66)
    assert turn["labels"].tolist() == [i % 3 for i in range(66)]
    alone = {label: drawn(n=66, label=str(label)) for label in range(3)}
    for label, arrays in alone.items():
        assert set(arrays["labels"].tolist()) == {label}
        assert np.array_equal(arrays["images"][label::3], turn["images"][label::3])
    assert not np.array_equal(alone[0]["images"], alone[1]["images"])


@pytest.mark.parametrize("label", ["1", "Ankle boot", "ankle BOOT", " Ankle boot "])
def test_a_class_is_meant_by_name_or_index(checkout, label):
    checkout()
    assert drawn(label=label)["labels"].tolist() == [1] * 4
    assert np.array_equal(images_of(label=label), images_of(label="1"))


def test_seeds_give_other_images_and_the_same_again(checkout):
    checkout()
    assert np.array_equal(images_of(seed=1), images_of(seed=1))
    assert not np.array_equal(images_of(seed=1), images_of(seed=2))


def test_options_take_the_place_of_parameters(checkout):
    root = checkout(sample__ddpm__sampler="ddim", sample__ddpm__eta=0.5)
    optional = images_of(sampler="heun", steps=2, guidance_scale=3.0)  # heun knows no eta: that of ddim must not stand in the way
    assert not np.array_equal(optional, images_of())
    write_params(root, {"sample.ddpm.sampler": "heun", "sample.ddpm.steps": 2, "sample.ddpm.guidance_scale": 3.0})
    assert np.array_equal(optional, images_of())


def test_a_model_in_any_folder_is_drawn_from(checkout, tmp_path):
    checkout()
    before = {model: images_of(model) for model in ("vae", "ddpm")}
    for model, images in before.items():
        Path("data/models", model).rename(tmp_path / model)
        assert np.array_equal(images_of(str(tmp_path / model)), images)


# The mixture prior


def test_generate_draws_from_the_mixture_of_the_stage(checkout):
    root = checkout(sample__vae__prior="mixture")
    assert "dvc repro sample_vae" in message("vae")
    sample_vae.main()
    assert np.array_equal(images_of("vae", n=100), np.load("data/samples/vae/3/images.npy")[:100])
    params = write_params(root, {"sample.vae.prior": "mixture", "sample.vae.components": 4})
    assert "4 components" in message("vae")
    write_params(root, {"sample.vae.prior": "mixture"})
    save_vae(root, params, seed=9)  # as if the model had been trained again, but no images drawn
    assert "is not of the VAE" in message("vae")


# What is written


def test_a_png_is_a_grid_and_a_folder_holds_an_image_in_each_file(checkout):
    checkout()
    images = images_of(n=12)
    generate("ddpm", "grid.png", n=12, seed=3)
    picture = np.asarray(Image.open("grid.png"))
    assert picture.shape == (2 * (16 + 2) + 2, 10 * (16 + 2) + 2)
    assert np.array_equal(picture[2:18:2, 2:18:2], images[0, 0]) and np.array_equal(picture[20:36:2, 20:36:2], images[11, 0])
    assert generate("ddpm", "deep/folder", n=12, seed=3) == Path("deep/folder")
    assert sorted(path.name for path in Path("deep").iterdir()) == ["folder"]
    files = sorted(Path("deep/folder").iterdir())
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(12)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), images[:, 0])


def test_a_folder_appears_wholly_or_not_at_all(checkout, monkeypatch):
    checkout()
    written = []

    def fail(image):
        written.append(image)
        if len(written) == 3:
            raise OSError("disk full")
        return b""

    monkeypatch.setattr(formats, "encode_image", fail)
    before = sorted(Path().iterdir())
    with pytest.raises(OSError, match="disk full"):
        generate("ddpm", "folder", n=4, seed=1)
    assert sorted(Path().iterdir()) == before


def test_what_is_there_is_replaced_as_a_whole_or_kept(checkout):
    checkout()
    Path("empty").mkdir()
    generate("vae", "empty", n=1, seed=1)
    assert [path.name for path in Path("empty").iterdir()] == ["00000.png"]
    with pytest.raises(UserError, match="holds something"):
        generate("vae", "empty", n=2, seed=1)
    assert [path.name for path in Path("empty").iterdir()] == ["00000.png"]
    Path("old.png").write_bytes(b"old")
    generate("vae", "old.png", n=1, seed=1)
    Image.open("old.png").verify()


# What is refused


def test_an_unknown_label_lists_the_known_ones(checkout):
    checkout()
    for label in ("hat", "3", "-1", ""):
        assert "0 T-shirt/top, 1 Ankle boot, 2 Bag" in message(label=label)


def test_a_model_without_labels_takes_none(checkout):
    checkout(ddpm__conditional=False)
    assert "without labels" in message(label="Bag")
    assert "guidance_scale must be 1" in message(guidance_scale=2.0)
    assert "without labels" in message("vae", label="Bag")
    assert set(drawn()) == {"images"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": T + 1}, f"at most T, the {T} steps this model was trained on, got {T + 1}"),
        ({"steps": 0}, "steps"),
        ({"sampler": "euler"}, "sampler"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"n": 0}, "at least 1, got 0"),
        ({"seed": 2**32}, "seed must be"),
        ({"seed": -1}, "seed must be"),
        ({"model": "vae", "steps": 3}, "--steps belongs to the ddpm"),
        ({"model": "vae", "guidance_scale": 2.0}, "--guidance-scale belongs to the ddpm"),
        ({"model": "nowhere"}, "nowhere is no folder"),
        ({"model": "data"}, "config.json is missing"),
        ({"output": "out.jpg"}, ".png"),
    ],
)
def test_what_does_not_fit_is_named(checkout, options, text):
    checkout()
    assert text in message(**options)


def test_a_missing_or_damaged_model_is_named(checkout, monkeypatch, tmp_path):
    root = checkout()
    (root / "data/models/vae/config.json").write_text(json.dumps({"width": 3}))
    assert "must name the kind of the model, vae or ddpm, got none" in message("vae")
    (root / "data/models/ddpm/config.json").write_text("{")
    assert "cannot be read" in message()
    (root / "data/models/ddpm/config.json").unlink()
    assert "dvc pull" in message()
    monkeypatch.chdir(tmp_path)
    assert "change into the checkout" in message()


def test_images_with_three_channels_are_written_in_colour():
    image = np.arange(3 * 2 * 5, dtype=np.uint8).reshape(3, 2, 5)
    with Image.open(io.BytesIO(formats.encode_image(image))) as picture:
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), image.transpose(1, 2, 0))


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
