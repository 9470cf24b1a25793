"""A DDPM in the latents of a VAE: the space, and the way from images to drawn images through the stages."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkout import write_params

import rediffuse
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.images.pixels import to_unit
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import save_model
from rediffuse.sampling.space import Pixels, open_space
from rediffuse.vae.latents import measure_latents, open_latents
from rediffuse.vae.model import VAE
from stages import encode, sample, train_ddpm

CPU, SHAPE = torch.device("cpu"), (1, 16, 12)
CONFIG = {"shape": list(SHAPE), "latent_dim": 3, "latent_channels": 2, "channels": [8, 8], "hidden": 16, "likelihood": "bernoulli"}


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "vae"
    save_model(VAE(**CONFIG), CONFIG, folder)
    return folder


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


def test_latents_have_mean_0_and_deviation_1_and_come_back(vae: Path, tmp_path: Path) -> None:
    space = measure_latents(vae, images(400), tmp_path / "space", CPU)
    with torch.no_grad():
        codes = space.encode(images(400))
        assert codes.shape == (400, 2, 4, 3)
        torch.testing.assert_close(codes.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
        plain = space.vae.decode(space.vae.encode(to_unit(images(3)))[0])
        assert (space.decode(codes[:3]).float() - plain * 255).abs().max() < 1
        shutil.rmtree(vae)  # the space holds the VAE itself
        opened = open_latents(tmp_path / "space", CPU)
        torch.testing.assert_close(opened.encode(images(3)), codes[:3])


def test_a_vae_with_one_vector_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"latent_channels": 0}
    save_model(VAE(**config), config, tmp_path / "vae")
    with pytest.raises(UserError, match=r"set vae\.latent_channels, for example to 4"):
        measure_latents(tmp_path / "vae", images(10), tmp_path / "space", CPU)


def test_a_channel_that_is_never_used_is_named(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="uses only 0 of its 2 latent channels"):
        measure_latents(vae, images(1).expand(10, *SHAPE), tmp_path / "space", CPU)


def test_a_damaged_space_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro encode"):
        open_latents(tmp_path, CPU)


def test_a_model_without_a_vae_works_in_pixels(tmp_path: Path) -> None:
    space = open_space(tmp_path, SHAPE, CPU)
    assert isinstance(space, Pixels) and space.shape == SHAPE
    assert torch.equal(space.decode(space.encode(images(3))), images(3))


@pytest.fixture
def checkout(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    save_images(root / "data/prepared", splits, {"classes": ["a", "b", "c"]})
    shutil.copytree(vae, root / "data/models/vae")
    monkeypatch.chdir(root)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", list(arguments))
    {"encode": encode, "train_ddpm": train_ddpm, "sample": sample}[arguments[0]].main()  # type: ignore[attr-defined]


def test_from_images_to_drawn_images(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (["encode"], ["train_ddpm"], ["sample", "ddpm"]):
        run(monkeypatch, *stage)
    config = json.loads((checkout / "data/models/ddpm/config.json").read_text())
    assert config["shape"] == [2, 4, 3] and config["clip"] is False
    with np.load(checkout / "data/samples/ddpm/3.npz") as drawn:
        assert drawn["images"].shape == (1000, *SHAPE) and drawn["images"].dtype == np.uint8
    # The model draws by itself, wherever it lies
    moved = checkout.parent / "moved"
    shutil.copytree(checkout / "data/models/ddpm", moved)
    loaded = rediffuse.load(str(moved))
    with np.load(checkout / "data/samples/ddpm/3.npz") as drawn:
        np.testing.assert_array_equal(loaded.generate(5, seed=3), drawn["images"][:5])
    assert loaded.reconstruct(images(2).numpy(), steps=5).shape == (2, *SHAPE)
    assert loaded.interpolate(1, 2, 3, steps=5).shape == (3, *SHAPE)
    with pytest.raises(UserError, match="a DDPM of latents knows no probability"):
        loaded.nll(images(1).numpy())


def test_for_pixels_encode_has_nothing_to_do(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(checkout, {"ddpm.space": "pixels"})
    shutil.rmtree(checkout / "data/models/vae")
    run(monkeypatch, "encode")
    assert [path.name for path in (checkout / "data/spaces/latents").iterdir()] == ["space.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"vae.latent_channels": 0}, "needs a VAE with a spatial latent"), ({"ddpm.flip": True}, "cannot mirror latents")],
)
def test_what_does_not_go_with_latents_is_refused(checkout: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_params(checkout, {"ddpm.space": "latents", "vae.latent_channels": 2, **changes})
