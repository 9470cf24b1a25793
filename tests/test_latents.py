"""A DDPM in the latents of a VAE: the space, and the way from images to drawn images through the stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import workspace
from tiny_checkout import CLASSES, SHAPE, write_params

import rediffuse
from rediffuse.images.image_set import load_images
from rediffuse.images.pixels import to_unit
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.sampling.space import load_space
from rediffuse.vae.latents import load_latents, measure_latents, save_latents
from rediffuse.vae.model import VAE
from stages import encode, sample_ddpm, train_ddpm

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {"shape": SHAPE, "latent_dim": 3, "latent_channels": 2, "channels": [8, 8]}
CONFIG |= {"hidden": 16, "likelihood": "bernoulli"}
TINY: dict[str, Any] = {"ddpm.space": "latents", "vae.latent_channels": 2, "ddpm.fold": 1, "ddpm.blocks": 1}


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def make_vae(seed: int = 0, **changes: Any) -> VAE:
    torch.manual_seed(seed)
    return VAE(**CONFIG | changes).eval()


@torch.no_grad()
def test_latents_have_mean_0_and_deviation_1_and_come_back() -> None:
    vae = make_vae()
    for parameter in vae.parameters():
        parameter *= 3  # so that latents matter without training
    space = measure_latents(vae, images(400))
    codes = space.encode(images(400))
    assert codes.shape == (400, 2, 2, 2)
    torch.testing.assert_close(codes.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    plain = vae.decode(vae.encode(to_unit(images(3)))[0])
    assert (space.decode(codes[:3]).float() - plain * 255).abs().max() < 1


def test_a_vae_without_usable_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae\.latent_channels"):
        measure_latents(make_vae(latent_channels=0), images(10))
    with pytest.raises(UserError, match="only 0 of its 2 latent channels"):
        measure_latents(make_vae(), images(1).expand(10, *SHAPE))
    for name, value in (("vae.latent_channels", 0), ("vae.conditional", True), ("ddpm.flip", True)):
        with pytest.raises(UserError, match=name):
            write_params(tmp_path, TINY | {name: value})


@pytest.mark.parametrize("statistics", [None, "{", "[]", '{"mean": [0.0, 0.0]}'])
def test_a_damaged_space_names_the_remedy(tmp_path: Path, statistics: str | None) -> None:
    save_latents(measure_latents(make_vae(), images(10)), tmp_path)
    (tmp_path / "vae/latents.json").unlink()
    if statistics is not None:
        (tmp_path / "vae/latents.json").write_text(statistics)
    with pytest.raises(UserError, match="dvc repro encode"):
        load_space(tmp_path, (2, 2, 2), CPU)


# Through the stages


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with more images than a chunk, and a VAE in whose latents the DDPM is to work."""
    root = workspace(tmp_path / "checkout", TINY)
    save_model(make_vae(), root / "data/models/vae")
    monkeypatch.chdir(root)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    monkeypatch.setenv("DVC_ROOT", str(root))
    return root


def test_from_images_to_drawn_images(checkout: Path) -> None:
    for stage in (encode, train_ddpm, sample_ddpm):
        stage.main()
    config = json.loads((checkout / "data/models/ddpm/config.json").read_text())
    assert config["kind"] == "ddpm" and config["shape"] == [2, 2, 2] and config["clip"] is False
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
        with torch.no_grad():
            expected = latents.encode(torch.tensor(pixels.images))
        assert found.images.dtype == np.float32 and found.images.shape == (len(pixels), 2, 2, 2)
        torch.testing.assert_close(torch.tensor(found.images), expected)
        assert np.array_equal(found.labels, pixels.labels) and found.classes == CLASSES
    assert not (checkout / "data/latents/test").exists()  # nothing is learnt from it
    trained = load_model(VAE, checkout / "data/models/vae", CPU).state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in latents.vae.state_dict().items())
