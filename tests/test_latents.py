"""A DDPM in the latents of a VAE: the space, and the way from images to drawn images through the stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
from rediffuse.vae.latents import VAE_FOLDER, encode_set, has_latents, load_latents, measure_latents, save_latents
from rediffuse.vae.model import VAE
from stages import encode, sample_ddpm, train_ddpm

CPU, SHAPE = torch.device("cpu"), (1, 16, 12)
CONFIG = {"shape": list(SHAPE), "latent_dim": 3, "latent_channels": 2, "channels": [8, 8], "hidden": 16, "likelihood": "bernoulli"}


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(**CONFIG).eval()


def test_a_spatial_latent_has_dimensions_at_each_position() -> None:
    vae = VAE(**CONFIG)
    assert vae.latent_shape == (2, 4, 3) and vae.latent_dim == 24
    mean, log_variance = vae.encode(to_unit(images(5)))
    assert mean.shape == log_variance.shape == (5, 24)
    assert vae.decode(mean).shape == (5, *SHAPE)
    # Latents are local: a pixel in one corner moves none in the other.
    changed = images(1)
    changed[..., 0, 0] = 255 - changed[..., 0, 0]
    moved = (vae.encode(to_unit(changed))[0] - vae.encode(to_unit(images(1)))[0]).view(2, 4, 3)
    assert moved[:, 0, 0].abs().max() > 0 and moved[:, 3, 2].abs().max() == 0


def test_latents_have_mean_0_and_deviation_1_and_come_back(vae: VAE) -> None:
    space = measure_latents(vae, images(400))
    with torch.no_grad():
        codes = space.encode(images(400))
        assert codes.shape == (400, 2, 4, 3)
        torch.testing.assert_close(codes.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
        plain = vae.decode(vae.encode(to_unit(images(3)))[0])
        assert (space.decode(codes[:3]).float() - plain * 255).abs().max() < 1


def test_a_saved_space_holds_the_vae_itself_and_can_be_copied(vae: VAE, tmp_path: Path) -> None:
    space = measure_latents(vae, images(400))
    assert not has_latents(tmp_path / "space")
    save_latents(space, tmp_path / "space")
    copy_folder(tmp_path / "space" / VAE_FOLDER, tmp_path / "copy" / VAE_FOLDER)
    shutil.rmtree(tmp_path / "space")
    copy_folder(tmp_path / "space" / VAE_FOLDER, tmp_path / "pixels" / VAE_FOLDER)  # from where there is none
    assert has_latents(tmp_path / "copy") and not has_latents(tmp_path / "pixels")
    loaded = load_latents(tmp_path / "copy", CPU)
    assert torch.equal(loaded.mean, space.mean) and torch.equal(loaded.std, space.std) and loaded.shape == SHAPE
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(images(3)), space.encode(images(3)))
        codes = space.encode(images(3))
        assert torch.equal(loaded.decode(codes), space.decode(codes))


def test_a_set_is_encoded_with_its_labels_however_many_images_there_are(vae: VAE) -> None:
    space = measure_latents(vae, images(50))
    labels = np.arange(1001, dtype=np.int64) % 3  # of two chunks and one image
    encoded = encode_set(space, ImageSet(images(1001).numpy(), labels, ("a", "b", "c")))
    assert encoded.images.dtype == np.float32 and encoded.shape == (2, 4, 3) and len(encoded) == 1001
    assert encoded.labels is not None and np.array_equal(encoded.labels, labels) and encoded.classes == ("a", "b", "c")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(encoded.images[[0, 499, 500, 1000]]), space.encode(images(1001)[[0, 499, 500, 1000]]))


def test_a_vae_with_one_vector_is_refused() -> None:
    with pytest.raises(UserError, match=r"set vae\.latent_channels, for example to 4"):
        measure_latents(VAE(**CONFIG | {"latent_channels": 0}), images(10))


def test_a_channel_that_is_never_used_is_named(vae: VAE) -> None:
    with pytest.raises(UserError, match="uses only 0 of its 2 latent channels"):
        measure_latents(vae, images(1).expand(10, *SHAPE))


@pytest.mark.parametrize("statistics", [None, "{", "{}", "[]", '{"mean": [0.0, 0.0]}'])
def test_a_damaged_space_names_the_remedy(vae: VAE, tmp_path: Path, statistics: str | None) -> None:
    save_latents(measure_latents(vae, images(10)), tmp_path)
    (tmp_path / "vae/latents.json").unlink()
    if statistics is not None:
        (tmp_path / "vae/latents.json").write_text(statistics)
    with pytest.raises(UserError, match="dvc repro encode"):
        load_space(tmp_path, (2, 4, 3), CPU)


def test_a_model_without_a_vae_works_in_pixels(tmp_path: Path) -> None:
    space = load_space(tmp_path, SHAPE, CPU)
    assert isinstance(space, Pixels) and space.shape == SHAPE
    assert torch.equal(space.decode(space.encode(images(3))), images(3))


@pytest.fixture
def checkout(vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with data and a trained VAE, in which the DDPM is to work in latents."""
    root = tmp_path / "checkout"
    (root / ".dvc").mkdir(parents=True)
    tiny = {"ddpm.space": "latents", "vae.latent_channels": 2, "ddpm.fold": 1, "precision": "float32", "ddpm.blocks": 1}
    short = {f"ddpm.training.{name}": 640 for name in ("images", "log_every", "validate_every", "checkpoint_every")}
    write_params(root, tiny | short | {"ddpm.training.lr_warmup": 0, "sample.n": 1000})
    splits = {}
    for name, n in (("train", 200), ("validation", 50), ("test", 50)):
        labels = np.arange(n, dtype=np.int64) % 3
        splits[name] = ImageSet(images(n, seed=n).numpy(), labels, ("a", "b", "c"))
    save_images(root / "data/pixels", splits, {"classes": ["a", "b", "c"]})
    save_model(vae, root / "data/models/vae")
    monkeypatch.chdir(root)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return root


def test_from_images_to_drawn_images(checkout: Path) -> None:
    for stage in (encode, train_ddpm, sample_ddpm):
        stage.main()
    config = json.loads((checkout / "data/models/ddpm/config.json").read_text())
    assert config["kind"] == "ddpm" and config["shape"] == [2, 4, 3] and config["clip"] is False
    drawn = np.load(checkout / "data/samples/ddpm/3/images.npy")
    assert drawn.shape == (1000, *SHAPE) and drawn.dtype == np.uint8
    # The model draws by itself, wherever it lies
    moved = checkout.parent / "moved"
    shutil.copytree(checkout / "data/models/ddpm", moved)
    loaded = rediffuse.load(str(moved))
    np.testing.assert_array_equal(loaded.generate(5, seed=3), drawn[:5])
    assert loaded.reconstruct(images(2).numpy(), steps=5).shape == (2, *SHAPE)
    assert loaded.interpolate(1, 2, 3, steps=5).shape == (3, *SHAPE)
    with pytest.raises(UserError, match="a DDPM of latents knows no probability"):
        loaded.nll(images(1).numpy())


def test_the_latents_are_an_image_set_beside_their_vae(checkout: Path) -> None:
    encode.main()
    latents = load_latents(checkout / "data/latents", CPU)
    for split, n in (("train", 200), ("validation", 50)):
        found, pixels = load_images(checkout / "data/latents", split), load_images(checkout / "data/pixels", split)
        assert found.images.dtype == np.float32 and found.images.shape == (n, 2, 4, 3) and found.classes == ("a", "b", "c")
        assert np.array_equal(found.labels, pixels.labels)
        np.testing.assert_array_equal(found.images, encode_set(latents, pixels).images)
    assert not (checkout / "data/latents/test").exists()  # nothing is learnt from it
    trained = load_model(VAE, checkout / "data/models/vae", CPU).state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in latents.vae.state_dict().items())


class Killed(BaseException):
    """What kill -9 is to a test in one process."""


def checkpoints(checkout: Path) -> list[Path]:
    return sorted((checkout / ".dvc/tmp/checkpoints").glob("*.pt"))


def interrupt_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the DDPM and die behind the first checkpoint."""
    save = Checkpoint.save

    def save_and_die(checkpoint: Checkpoint, state: dict[str, object]) -> None:
        save(checkpoint, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train_ddpm.main()


def test_an_interrupted_training_goes_on_with_its_own_latents_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another VAE makes other latents of the same images, classes and shape, for which what was learnt is worth nothing."""
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    params = {"ddpm.space": "latents", "vae.latent_channels": 2, "ddpm.fold": 1, "precision": "float32", "ddpm.blocks": 1}
    often = {f"ddpm.training.{name}": 640 for name in ("log_every", "validate_every", "checkpoint_every")}
    write_params(checkout, params | often | {"ddpm.training.images": 1280, "ddpm.training.lr_warmup": 0})
    encode.main()
    interrupt_training(monkeypatch)
    (first,) = checkpoints(checkout)

    torch.manual_seed(77)
    other = VAE(**CONFIG)
    save_model(other, checkout / "data/models/vae")
    encode.main()
    interrupt_training(monkeypatch)  # from the beginning, with a checkpoint of its own
    assert len(checkpoints(checkout)) == 2 and first in checkpoints(checkout)
    capsys.readouterr()
    train_ddpm.main()  # and with the same latents again it goes on
    assert "640/1280" in capsys.readouterr().err.split("\r")[1]
    assert checkpoints(checkout) == [first]


def test_for_pixels_encode_has_nothing_to_do(checkout: Path) -> None:
    write_params(checkout, {"ddpm.space": "pixels"})
    shutil.rmtree(checkout / "data/models/vae")
    encode.main()
    assert [path.name for path in (checkout / "data/latents").iterdir()] == ["manifest.json"]
    assert not has_latents(checkout / "data/latents")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"vae.latent_channels": 0}, "needs a VAE with a spatial latent"), ({"ddpm.flip": True}, "cannot mirror latents")],
)
def test_what_does_not_go_with_latents_is_refused(checkout: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_params(checkout, {"ddpm.space": "latents", "vae.latent_channels": 2, **changes})
