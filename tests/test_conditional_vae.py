"""The VAE that knows the labels: against unconditional ones, one a label; in training, in the stages, and in hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_checkout import write_params
from torch import Tensor

import rediffuse
from rediffuse.commands.generate import generate
from rediffuse.figures.vae import draw_vae
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.images.pixels import to_unit
from rediffuse.images.sample_sets import load_sets
from rediffuse.inference.settings import SAMPLING, sampling_settings
from rediffuse.params import Params, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model
from rediffuse.tracking.models import model_files
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import elbo, importance_weighted_bound
from rediffuse.vae.prior import CHUNK, posterior_means
from rediffuse.vae.step import final_measures, measure
from stages import sample_vae, train_vae
from stages.train_vae import make_vae

CPU, SHAPE = torch.device("cpu"), (1, 8, 8)
NAMES = ("dark", "bright")
ADDED = ["encoder.by_label", "decoder.by_label"]  # the weights of a conditional VAE that another lacks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(latent_channels: int, likelihood: Any = "bernoulli", names: tuple[str, ...] = ("a", "b", "c"), *, scale: float = 1.5) -> VAE:
    """A small VAE whose labels matter, as if it were trained."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"latent_dim": 3, "latent_channels": latent_channels, "channels": [4, 6], "hidden": 16}
    vae = VAE(SHAPE, likelihood=likelihood, class_names=names, **settings)
    for name, parameter in vae.named_parameters():
        if name.endswith("by_label"):
            parameter.data.normal_(generator=seeded(5))
        elif name != "log_sigma":
            parameter.data *= scale
    return vae


def unconditional(vae: VAE, label: int, latent_channels: int) -> VAE:
    """The VAE of one label: that label's rows of the weights are part of its biases."""
    plain = make(latent_channels, vae.likelihood, ())
    plain.load_state_dict({name: value for name, value in vae.state_dict().items() if not name.endswith("by_label")})
    for layers, of in ((plain.encoder, vae.encoder), (plain.decoder, vae.decoder)):
        first = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.ReLU))
        assert of.by_label is not None
        layers[first - 1].bias.data += of.by_label.data[label]
    return plain


both_latents = pytest.mark.parametrize("latent_channels", [0, 2])


# The mathematics


@both_latents
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@torch.no_grad()
def test_given_a_label_it_is_the_vae_of_that_label(latent_channels: int, likelihood: str) -> None:
    vae, x, y = make(latent_channels, likelihood), torch.rand(6, *SHAPE, generator=seeded()), torch.tensor([2, 0, 1, 1, 0, 2])
    eps = torch.randn(6, vae.latent_dim, generator=seeded(1))
    found, bounds = elbo(vae, x, eps, y), importance_weighted_bound(vae, x, y, k=5, generator=seeded(2))
    for label in range(3):
        plain, of = unconditional(vae, label, latent_channels), y == label
        expected = elbo(plain, x, eps)
        torch.testing.assert_close(found.reconstruction[of], expected.reconstruction[of])
        torch.testing.assert_close(found.kl[of], expected.kl[of])
        torch.testing.assert_close(bounds[of], importance_weighted_bound(plain, x, k=5, generator=seeded(2))[of])
        torch.testing.assert_close(vae.decode(eps, y)[of], plain.decode(eps)[of])
    assert (found.total - elbo(vae, x, eps, (y + 1) % 3).total).abs().min() > 0.01


@torch.no_grad()
def test_a_label_is_a_one_hot_vector_beside_the_input() -> None:
    vae, z, y = make(0), torch.randn(4, 3, generator=seeded()), torch.tensor([1, 0, 2, 1])
    assert vae.decoder.by_label is not None
    weight = torch.cat([vae.decoder[0].weight, vae.decoder.by_label.T], 1)  # (hidden, latent_dim + classes)
    h = torch.cat([z, torch.eye(3)[y]], 1) @ weight.T + vae.decoder[0].bias
    for layer in list(vae.decoder)[1:]:
        h = layer(h)
    torch.testing.assert_close(vae.decode_logits(z, y), h)


@both_latents
def test_the_loss_does_not_hang_on_the_order_of_the_labels(latent_channels: int) -> None:
    vae, x, y = make(latent_channels), torch.rand(5, *SHAPE, generator=seeded()), torch.tensor([0, 1, 2, 2, 0])
    eps, order = torch.randn(5, vae.latent_dim, generator=seeded(1)), torch.tensor([2, 0, 1])
    before = elbo(vae, x, eps, y).total
    for layers in (vae.encoder, vae.decoder):
        assert layers.by_label is not None
        layers.by_label.data = layers.by_label.data[order]
    torch.testing.assert_close(elbo(vae, x, eps, order.argsort()[y]).total, before)


@both_latents
@torch.no_grad()
def test_without_what_a_label_adds_it_is_the_unconditional_vae(latent_channels: int) -> None:
    vae, plain = make(latent_channels), make(latent_channels, names=())
    assert [name for name in vae.state_dict() if name not in plain.state_dict()] == ADDED
    vae.load_state_dict(plain.state_dict() | {name: torch.zeros(3, len(vae.state_dict()[name][0])) for name in ADDED})
    x, y, eps = torch.rand(4, *SHAPE, generator=seeded()), torch.tensor([0, 2, 1, 0]), torch.randn(4, vae.latent_dim, generator=seeded())
    assert torch.equal(elbo(vae, x, eps, y).total, elbo(plain, x, eps).total)
    assert torch.equal(elbo(plain, x, eps, y).total, elbo(plain, x, eps).total)  # labels are ignored


def test_labels_that_are_missing_are_asked_for() -> None:
    vae = make(0)
    for call in (lambda: vae.encode(torch.zeros(2, *SHAPE)), lambda: vae.decode(torch.zeros(2, 3))):
        with pytest.raises(ValueError, match=r"a VAE of 3 classes needs labels, int64 \(2,\)"):
            call()


@torch.no_grad()
def test_measures_take_each_image_with_its_label() -> None:
    vae = make(0)
    images = torch.randint(0, 256, (CHUNK + 3, *SHAPE), generator=seeded()).to(torch.uint8)  # more than one chunk
    labels = torch.arange(len(images)) % 3
    torch.testing.assert_close(posterior_means(vae, images, labels), vae.encode(to_unit(images), labels)[0])
    found, generator = measure(vae, images, labels, seed=4), seeded(4)
    eps = torch.cat([torch.randn(n, 3, generator=generator) for n in (CHUNK, 3)])
    assert found["elbo"] == pytest.approx(elbo(vae, to_unit(images), eps, labels).total.mean().item(), rel=1e-5)
    report = final_measures(vae, (images, labels), (images[:20], labels[:20]), seed=4)
    assert report["train"]["elbo"] == report["test"]["elbo"] == measure(vae, images[:20], labels[:20], seed=4)["elbo"]


# The parameters


def test_a_set_without_labels_makes_an_unconditional_vae() -> None:
    params = load_params(Path(__file__).resolve().parents[1] / "params.yaml").vae
    assert not params.conditional and make_vae(params, SHAPE, NAMES).config["class_names"] == []
    wanted = params.model_copy(update={"conditional": True})
    assert make_vae(wanted, SHAPE, NAMES).config["class_names"] == ["dark", "bright"]
    assert make_vae(wanted, SHAPE, NAMES).classes == 2 and make_vae(wanted, SHAPE, ()).classes == 0


def test_a_ddpm_of_latents_needs_a_vae_without_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae\.conditional is true: set it to false, .*\(ddpm\.conditional\)"):
        write_params(tmp_path, {"ddpm.space": "latents", "vae.latent_channels": 2, "vae.conditional": True})


# From images to drawn images


def toy(n: int, seed: int, *, labelled: bool = True) -> ImageSet:
    """Dark and bright images in turn, in each of which the left or the right half is the brighter one, whatever the class."""
    labels, random = np.arange(n, dtype=np.int64) % 2, np.random.RandomState(seed)
    images = np.where(labels, 160, 20)[:, None, None, None] + random.randint(0, 11, (n, *SHAPE))
    left = random.randint(0, 2, n) == 1
    images[left, ..., :4] += 70
    images[~left, ..., 4:] += 70
    return ImageSet(images.astype(np.uint8), labels if labelled else None, NAMES if labelled else ())


def prepare(root: Path, changes: dict[str, Any], *, labelled: bool = True) -> Params:
    (root / ".dvc").mkdir(parents=True)
    training: dict[str, Any] = {f"vae.training.{name}": 16_000 for name in ("images", "log_every", "validate_every", "checkpoint_every")}
    short = {"vae.conditional": True, "vae.kl_warmup": 0, "vae.training.lr_warmup": 0, "vae.training.batch": 32, "precision": "float32"}
    params = write_params(
        root, training | short | {"vae.channels": [16, 16], "vae.training.lr": 5e-3, "vae.training.ema_half_life": 1000} | changes
    )
    splits = {name: toy(n, n, labelled=labelled) for name, n in (("train", 200), ("validation", 20), ("test", 40))}
    save_images(root / "data/pixels", splits, {"classes": NAMES if labelled else ()})
    return params


@pytest.fixture(scope="module", params=[0, 2], ids=["dense", "spatial"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose VAE the stage has trained."""
    root = tmp_path_factory.mktemp("checkout") / "root"
    params = prepare(root, {"vae.latent_channels": request.param})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
        train_vae.main()
    assert params.vae.conditional
    return root


@pytest.fixture
def checkout(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    return trained


def looks(images: NDArray[np.uint8] | Tensor) -> NDArray[np.int64]:
    """The class that each image looks like: 60 and 200 are the mean grey levels of the classes."""
    greys = np.asarray(images, np.float64).mean((1, 2, 3))
    assert (np.minimum(np.abs(greys - 60), np.abs(greys - 200)) < 40).mean() > 0.98, greys  # a latent far out may be off
    return (greys > 130).astype(np.int64)


def brighter_half(images: NDArray[np.uint8] | Tensor) -> NDArray[np.int64]:
    """0: the left one, 1: the right one."""
    return np.asarray(images, np.float64).reshape(-1, 8, 2, 4).mean((1, 3)).argmax(1)


def test_the_label_decides_the_class_whatever_the_latent(checkout: Path) -> None:
    vae = load_model(VAE, checkout / "data/models/vae", CPU)
    assert vae.class_names == NAMES
    z = torch.randn(50, vae.latent_dim, generator=seeded())
    with torch.no_grad():
        for label in (0, 1):
            assert (looks(vae.decode(z, torch.full((50,), label)) * 255) == label).all()
    with torch.inference_mode():
        draw_vae(vae, toy(40, 40), checkout / "report")
    assert (checkout / "report/analogies.png").is_file()


@torch.no_grad()
def test_the_latent_holds_what_is_not_the_class(checkout: Path) -> None:
    vae, test = load_model(VAE, checkout / "data/models/vae", CPU), toy(40, 40)
    x, y = to_unit(torch.tensor(test.images)), torch.tensor(test.labels)
    z = vae.encode(x, y)[0]
    for labels in (y, 1 - y):
        decoded = vae.decode(z, labels) * 255
        assert (looks(decoded) == labels.numpy()).all()
        assert (brighter_half(decoded) == brighter_half(test.images)).all()
    kl = json.loads((checkout / "metrics/train_vae.json").read_text())["test"]["kl"]
    assert 0.9 * np.log(2) < kl < 2 * np.log(2)  # a bit for the half; without labels it would take another one for the class


@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_the_stage_draws_the_labels_in_turn(checkout: Path, monkeypatch: pytest.MonkeyPatch, prior: str) -> None:
    raw = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(raw.replace("prior: normal", f"prior: {prior}"))
    assert load_params().sample.vae.prior == prior
    sample_vae.main()
    (checkout / "params.yaml").write_text(raw)
    found = load_sets(checkout / "data/samples/vae", SHAPE, 2)
    assert found.labels is not None and found.labels.tolist() == [0, 1] * 500
    assert (looks(found.sets[0].images) == found.labels).all()
    assert found.reconstructions is not None and (looks(found.reconstructions) == toy(40, 40).labels).all()


def test_generate_draws_the_images_of_the_stage(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_vae.main()
    generate("vae", "drawn.npz", n=1000, seed=3)
    with np.load("drawn.npz") as drawn:
        for name in ("images", "labels"):
            assert np.array_equal(drawn[name], np.load(f"data/samples/vae/3/{name}.npy"))


def test_a_loaded_model_takes_labels_by_name(checkout: Path) -> None:
    model, test = rediffuse.load("vae"), toy(40, 40)
    assert (looks(model.generate(20, label="Bright")) == 1).all() and (looks(model.generate(20, label=0)) == 0).all()
    assert looks(model.generate(4)).tolist() == [0, 1, 0, 1]
    of_class = test.images[1::2]
    assert (looks(model.reconstruct(of_class, label="bright")) == 1).all()
    assert (looks(model.interpolate(of_class[0], 3, 5, label="bright")) == 1).all()
    assert (model.nll(of_class[:3], label="bright") < model.nll(of_class[:3], label="dark")).all()


def test_what_codes_images_needs_their_label(checkout: Path) -> None:
    model, images = rediffuse.load("vae"), toy(2, 0).images
    for call in (lambda: model.reconstruct(images), lambda: model.interpolate(1, 2), lambda: model.nll(images)):
        with pytest.raises(UserError, match="give their label, by index or name: 0 dark, 1 bright"):
            call()
    with pytest.raises(UserError, match="label 'grey' is no class of this model; known are, by index or name: 0 dark, 1 bright"):
        model.generate(1, label="grey")


def test_a_packed_model_names_its_classes(checkout: Path) -> None:
    files = model_files("vae", checkout / "data/models/vae", sampling_settings(load_params(), "vae"), checkout)
    assert json.loads(files[SAMPLING])["class_names"] == ["dark", "bright"]


def test_without_labels_in_the_set_the_stages_make_an_unconditional_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "root", {"vae.training.images": 640}, labelled=False)
    monkeypatch.chdir(tmp_path / "root")
    monkeypatch.setenv("REDIFFUSE_TRACKING", "off")
    train_vae.main()
    sample_vae.main()
    assert [path.name for path in Path("data/samples/vae/3").iterdir()] == ["images.npy"]
    with pytest.raises(UserError, match="trained without labels"):
        rediffuse.load("vae").generate(1, label="dark")
