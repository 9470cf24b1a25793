"""A DDPM in the latents of a VAE: the space, and the way from images to drawn images through the stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkout import write_params

import rediffuse
from rediffuse.images.image_set import ImageSet, load_images, save_images
from rediffuse.images.pixels import to_unit
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import copy_folder
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.sampling.space import Pixels, load_space
from rediffuse.training.checkpoint import Checkpoint
from rediffuse.vae.latents import (
    VAE_FOLDER,
    encode_set,
    has_latents,
    load_latents,
    measure_latents,
    save_latents,
)
from rediffuse.vae.model import VAE
from stages import encode, sample_ddpm, train_ddpm

CPU, SHAPE, NAMES = torch.device("cpu"), (1, 16, 12), ("a", "b", "c")
CONFIG: dict[str, Any] = {"shape": SHAPE, "latent_dim": 3, "latent_channels": 2, "channels": [8, 8]}
CONFIG |= {"hidden": 16, "likelihood": "bernoulli"}
TINY = {"ddpm.space": "latents", "vae.latent_channels": 2, "ddpm.fold": 1, "ddpm.blocks": 1}
TINY |= {"precision": "float32", "ddpm.training.lr_warmup": 0}
TINY |= {
    f"ddpm.training.{name}": 640 for name in ("images", "log_every", "validate_every", "checkpoint_every")
}


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def make_vae(seed: int = 0, **changes: Any) -> VAE:
    torch.manual_seed(seed)
    return VAE(**CONFIG | changes).eval()


@torch.no_grad()
def test_a_spatial_latent_has_dimensions_at_each_position() -> None:
    vae = make_vae()
    assert vae.latent_shape == (2, 4, 3) and vae.latent_dim == 24
    mean, log_variance = vae.encode(to_unit(images(5)))
    assert mean.shape == log_variance.shape == (5, 24) and vae.decode(mean).shape == (5, *SHAPE)
    # Latents are local: a pixel in one corner moves none in the other.
    changed = images(1)
    changed[..., 0, 0] = 255 - changed[..., 0, 0]
    moved = (vae.encode(to_unit(changed))[0] - vae.encode(to_unit(images(1)))[0]).view(2, 4, 3)
    assert moved[:, 0, 0].abs().max() > 0 and moved[:, 3, 2].abs().max() == 0


@torch.no_grad()
def test_latents_have_mean_0_and_deviation_1_and_come_back() -> None:
    vae = make_vae()
    space = measure_latents(vae, images(400))
    codes = space.encode(images(400))
    assert codes.shape == (400, 2, 4, 3)
    torch.testing.assert_close(codes.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    plain = vae.decode(vae.encode(to_unit(images(3)))[0])
    assert (space.decode(codes[:3]).float() - plain * 255).abs().max() < 1


@torch.no_grad()
def test_a_saved_space_holds_the_vae_itself_and_can_be_copied(tmp_path: Path) -> None:
    space = measure_latents(make_vae(), images(400))
    save_latents(space, tmp_path / "space")
    copy_folder(tmp_path / "space" / VAE_FOLDER, tmp_path / "copy" / VAE_FOLDER)
    shutil.rmtree(tmp_path / "space")
    copy_folder(tmp_path / "space" / VAE_FOLDER, tmp_path / "pixels" / VAE_FOLDER)  # from where there is none
    assert has_latents(tmp_path / "copy") and not has_latents(tmp_path / "pixels")
    loaded = load_latents(tmp_path / "copy", CPU)
    assert torch.equal(loaded.mean, space.mean) and torch.equal(loaded.std, space.std)
    codes = space.encode(images(3))
    torch.testing.assert_close(loaded.encode(images(3)), codes)
    assert torch.equal(loaded.decode(codes), space.decode(codes)) and loaded.shape == SHAPE
    pixels = load_space(tmp_path / "pixels", SHAPE, CPU)
    assert isinstance(pixels, Pixels) and torch.equal(pixels.decode(pixels.encode(images(3))), images(3))


@torch.no_grad()
def test_a_set_is_encoded_with_its_labels_however_many_images_there_are() -> None:
    space = measure_latents(make_vae(), images(50))
    labels = np.arange(1001, dtype=np.int64) % 3  # of two chunks and one image
    encoded = encode_set(space, ImageSet(images(1001).numpy(), labels, NAMES))
    assert encoded.images.dtype == np.float32 and encoded.images.shape == (1001, 2, 4, 3)
    assert np.array_equal(encoded.labels, labels) and encoded.classes == NAMES
    some = [0, 499, 500, 1000]
    expected = space.encode(images(1001)[some])
    torch.testing.assert_close(torch.from_numpy(encoded.images[some]), expected)


def test_a_vae_without_usable_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae\.latent_channels"):
        measure_latents(make_vae(latent_channels=0), images(10))
    with pytest.raises(UserError, match="only 0 of its 2 latent channels"):
        measure_latents(make_vae(), images(1).expand(10, *SHAPE))
    for name, value in (("vae.latent_channels", 0), ("vae.conditional", True), ("ddpm.flip", True)):
        with pytest.raises(UserError, match=name):
            write_params(tmp_path, TINY | {name: value})


@pytest.mark.parametrize("statistics", [None, "{", "{}", "[]", '{"mean": [0.0, 0.0]}'])
def test_a_damaged_space_names_the_remedy(tmp_path: Path, statistics: str | None) -> None:
    save_latents(measure_latents(make_vae(), images(10)), tmp_path)
    (tmp_path / "vae/latents.json").unlink()
    if statistics is not None:
        (tmp_path / "vae/latents.json").write_text(statistics)
    with pytest.raises(UserError, match="dvc repro encode"):
        load_space(tmp_path, (2, 4, 3), CPU)


# Through the stages


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with data and a trained VAE, in which the DDPM is to work in latents."""
    root = tmp_path / "checkout"
    (root / ".dvc").mkdir(parents=True)
    write_params(root, TINY)
    splits = {}
    for name, n in (("train", 200), ("validation", 50), ("test", 50)):
        splits[name] = ImageSet(images(n, seed=n).numpy(), np.arange(n, dtype=np.int64) % 3, NAMES)
    save_images(root / "data/pixels", splits, {"classes": NAMES})
    save_model(make_vae(), root / "data/models/vae")
    monkeypatch.chdir(root)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    monkeypatch.setenv("DVC_ROOT", str(root))
    return root


def test_from_images_to_drawn_images(checkout: Path) -> None:
    for stage in (encode, train_ddpm, sample_ddpm):
        stage.main()
    config = json.loads((checkout / "data/models/ddpm/config.json").read_text())
    assert config["kind"] == "ddpm" and config["shape"] == [2, 4, 3] and config["clip"] is False
    drawn = np.load(checkout / "data/samples/ddpm/3/images.npy")
    assert drawn.shape == (1000, *SHAPE) and drawn.dtype == np.uint8
    moved = checkout.parent / "moved"  # the model draws by itself, wherever it lies
    shutil.copytree(checkout / "data/models/ddpm", moved)
    loaded = rediffuse.load(str(moved))
    np.testing.assert_array_equal(loaded.generate(5, seed=3), drawn[:5])
    assert loaded.reconstruct(images(2).numpy(), steps=5).shape == (2, *SHAPE)
    assert loaded.interpolate(1, 2, 3, steps=5).shape == (3, *SHAPE)
    with pytest.raises(UserError, match="latents"):
        loaded.nll(images(1).numpy())


def test_the_latents_are_an_image_set_beside_their_vae(checkout: Path) -> None:
    encode.main()
    latents = load_latents(checkout / "data/latents", CPU)
    for split in ("train", "validation"):
        found, pixels = (load_images(checkout / "data" / of, split) for of in ("latents", "pixels"))
        expected = encode_set(latents, pixels)
        np.testing.assert_array_equal(found.images, expected.images)
        assert np.array_equal(found.labels, pixels.labels) and found.classes == NAMES
    assert not (checkout / "data/latents/test").exists()  # nothing is learnt from it
    trained = load_model(VAE, checkout / "data/models/vae", CPU).state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in latents.vae.state_dict().items())


def test_for_pixels_encode_has_nothing_to_do(checkout: Path) -> None:
    write_params(checkout, {"ddpm.space": "pixels"})
    shutil.rmtree(checkout / "data/models/vae")
    encode.main()
    assert [path.name for path in (checkout / "data/latents").iterdir()] == ["manifest.json"]
    assert not has_latents(checkout / "data/latents")


class Killed(BaseException):
    """What kill -9 is to a test in one process."""


def test_an_interrupted_training_goes_on_with_its_own_latents_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another VAE makes other latents of the same images, for which what was learnt is worth nothing."""

    def checkpoints() -> list[Path]:
        return sorted((checkout / ".dvc/tmp/checkpoints").glob("*.pt"))

    def interrupt_training() -> None:
        save = Checkpoint.save

        def save_and_die(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
            save(checkpoint, state)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_die)
            with pytest.raises(Killed):
                train_ddpm.main()

    write_params(checkout, TINY | {"ddpm.training.images": 1280})
    encode.main()
    interrupt_training()
    (first,) = checkpoints()
    save_model(make_vae(seed=77), checkout / "data/models/vae")
    encode.main()
    interrupt_training()  # from the beginning, with a checkpoint of its own
    assert len(checkpoints()) == 2 and first in checkpoints()
    capsys.readouterr()
    train_ddpm.main()  # with the same latents again it goes on
    assert "640/1280" in capsys.readouterr().err.split("\r")[1]
    assert checkpoints() == [first]
