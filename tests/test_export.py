"""Exported models draw what the checkpoint draws, and a model card claims only what dvc.lock proves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers.utils.dynamic_modules_utils
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from tiny_checkout import CLASSES, PROJECT, SHAPE, make_checkout, write_params
from torch import Tensor
from toy import git

import rediffuse
from rediffuse.cli import main
from rediffuse.commands.export import export
from rediffuse.diffusion.denoiser import GUIDE, Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import read_config
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import ddim, ddpm, even_times
from rediffuse.sources.splits import describe
from rediffuse.tracking.lock import directory_md5, md5_of
from rediffuse.vae.latents import load_latents, measure_latents, save_latents
from rediffuse.vae.model import VAE

CPU = torch.device("cpu")
DDPM = Path("data/models/ddpm")
T = 20
ODD = (3, 17, 19)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with models of random weights; diffusers copies code to a folder of the test."""
    root = tmp_path / "checkout"
    make_checkout(root, precision="float32", sample__ddpm__autoguidance_scale=1.5)
    monkeypatch.chdir(root)
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return root


def randomise(model: Any, std: float) -> Any:
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def put_ddpm(**changes: Any) -> Denoiser:
    """Another DDPM in the checkout, with a guide, of random weights."""
    config: dict[str, Any] = {"shape": list(ODD), "T": T, "schedule": "cosine", "predict": "v", "fold": 2}
    config |= {"class_names": list(CLASSES), "width": 16, "multipliers": [1, 2], "blocks": 1}
    config |= {"attention": 8, "dropout": 0.1} | changes
    denoiser: Denoiser = randomise(Denoiser(**config), 0.15)
    save_model(denoiser, DDPM)
    save_model(randomise(Denoiser(**config), 0.14), DDPM / GUIDE)
    return denoiser


def make_vae(**changes: Any) -> VAE:
    config = {name: value for name, value in read_config(Path("data/models/vae")).items() if name != "kind"}
    vae: VAE = randomise(VAE(**config | changes), 0.3)
    return vae


def put_latent_ddpm() -> Denoiser:
    vae = make_vae(latent_channels=2)
    network = {"fold": 1, "multipliers": [1], "attention": 0, "class_names": [], "clip": False}
    denoiser = put_ddpm(shape=list(vae.latent_shape), **network)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (50, *SHAPE)).astype(np.uint8))
    save_latents(measure_latents(vae, images), DDPM)
    return denoiser


@pytest.mark.parametrize("kind", ["vae", "ddpm"])
def test_a_folder_is_complete(
    kind: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_latent_ddpm()
    expected = rediffuse.load(kind).generate(5, seed=3)
    assert export(str(tmp_path / "out"), model=kind, form="folder") == tmp_path / "out"
    shutil.rmtree(checkout)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(rediffuse.load("out").generate(5, seed=3), expected)


# diffusers


def exported(label: str | None = None, folder: str = "out") -> DDPMPipeline:
    export(folder, model="ddpm", form="diffusers", label=label)
    pipeline = DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(denoiser: Denoiser, sampler: Any, steps: int, label: int | None, eta: float = 0.0) -> Tensor:
    """What our sampler draws from the noise that a pipeline draws, in [0, 1]."""
    generator = torch.Generator().manual_seed(5)

    def noise() -> Tensor:
        return torch.randn(3, *denoiser.shape, generator=generator)

    labels, times = None if label is None else torch.full((3,), label), even_times(denoiser.schedule, steps)
    D, schedule = guided(denoiser), denoiser.schedule
    with torch.inference_mode():
        x_0 = sampler(D, schedule, noise(), labels, times=times, eta=eta, noise=noise)
    assert (x_0.abs() < 0.99).float().mean() > 0.2  # black and white alone would hide most mistakes
    return (x_0 / 2 + 0.5).clamp(0, 1)


def drawn(pipeline: Any, steps: int = T, **more: Any) -> Tensor:
    how = {"generator": torch.Generator().manual_seed(5), "output_type": "pt"} | more
    images: Tensor = pipeline(3, num_inference_steps=steps, **how).images
    return images


@pytest.mark.parametrize(("predict", "schedule"), [("eps", "linear"), ("x0", "cosine"), ("v", "sigmoid")])
def test_diffusers_draws_the_images_of_our_ancestral_sampler(predict: str, schedule: str) -> None:
    denoiser = put_ddpm(predict=predict, schedule=schedule)
    assert (drawn(exported("bag")) - ours(denoiser, ddpm, T, CLASSES.index("Bag"))).abs().max() < 1e-4


@pytest.mark.parametrize("class_names", [CLASSES, ()])
def test_diffusers_draws_without_a_label_where_none_is_given(class_names: tuple[str, ...]) -> None:
    denoiser = put_ddpm(class_names=list(class_names), shape=[1, 16, 16], fold=1, attention=0)
    assert (drawn(exported()) - ours(denoiser, ddpm, T, None)).abs().max() < 1e-4


def test_a_caller_may_ask_the_network_of_diffusers_for_labels() -> None:
    denoiser, network = put_ddpm(), exported("1").unet
    x_t, t, labels = torch.randn(3, *ODD), torch.full((3,), 7), torch.tensor([0, 3, 1])
    with torch.inference_mode():
        output, [of_one] = network(x_t, 6, class_labels=labels).sample, network(x_t, 6, return_dict=False)
        expected = denoiser(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.ones_like(labels)]))
    torch.testing.assert_close(torch.cat([output, of_one]), expected, rtol=1e-4, atol=1e-5)


# With eps and eta = 0 all pixels would be black or white.
@pytest.mark.parametrize(("predict", "eta", "steps"), [("eps", 0.5, 20), ("x0", 0.0, 4), ("v", 1.0, 4)])
def test_ddim_of_diffusers_draws_our_images_if_the_steps_divide_T(
    predict: str, eta: float, steps: int
) -> None:
    denoiser, loaded = put_ddpm(predict=predict), exported("0")
    pipeline = DDIMPipeline(unet=loaded.unet, scheduler=DDIMScheduler.from_config(loaded.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    images = drawn(pipeline, steps, eta=eta, use_clipped_model_output=True)
    assert (images - ours(denoiser, ddim, steps, 0, eta)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_the_schedule_of_diffusers_is_ours_over_many_steps(name: Any) -> None:
    put_ddpm(schedule=name, T=1000)
    alphas = exported().scheduler.alphas_cumprod
    torch.testing.assert_close(alphas.double(), Schedule.make(name, 1000).alpha_bar[1:], rtol=1e-3, atol=1e-6)
    assert alphas.min() > 0


SCRIPT = f"""
import sys
sys.modules["rediffuse"] = None  # an import of it fails
import torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained("out", trust_remote_code=True)
generator = torch.Generator().manual_seed(5)
images = pipeline(3, generator=generator, num_inference_steps={T}, output_type="pt").images
torch.save(images, "images.pt")
"""


@pytest.mark.slow
def test_the_folder_of_diffusers_needs_no_rediffuse(checkout: Path, tmp_path: Path) -> None:
    put_ddpm()
    expected = drawn(exported("bag", str(tmp_path / "out")))
    shutil.rmtree(checkout)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-4)


# ONNX


def onnx(name: str, **inputs: Tensor | None) -> Tensor:
    """The output of an exported network."""
    session = onnxruntime.InferenceSession(f"out/{name}.onnx", providers=["CPUExecutionProvider"])
    [output] = session.run(None, {name: x.numpy() for name, x in inputs.items() if x is not None})
    return torch.from_numpy(output)


@pytest.mark.slow
def test_onnx_has_the_output_of_the_network_for_every_batch() -> None:
    denoiser = put_ddpm(shape=[3, 9, 7])
    guide = load_model(Denoiser, DDPM / GUIDE, CPU)
    export("out", model="ddpm", form="onnx")
    for batch, network, name in ((1, denoiser, "model"), (5, denoiser, "model"), (3, guide, "guide")):
        x_t, t = torch.randn(batch, *denoiser.shape), torch.randint(1, T + 1, (batch,))
        labels = torch.randint(0, denoiser.classes + 1, (batch,))
        with torch.inference_mode():
            expected = network(x_t, t, labels)
        torch.testing.assert_close(onnx(name, x_t=x_t, t=t, labels=labels), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.05
    names = {"README.md", "config.json", "model.onnx", "guide.onnx", "sampling.json"}
    assert {path.name for path in Path("out").iterdir()} == names
    alpha_bar = json.loads(Path("out/config.json").read_text())["alpha_bar"]
    np.testing.assert_allclose(alpha_bar, denoiser.schedule.alpha_bar)


@pytest.mark.slow
def test_onnx_has_the_images_of_the_decoder_of_a_vae() -> None:
    vae = make_vae(shape=[3, 9, 7], class_names=["cat", "dog", "owl"])
    save_model(vae, Path("data/models/vae"))
    export("out", model="vae", form="onnx")
    assert f"(batch, {vae.latent_dim})" in Path("out/README.md").read_text()
    for batch in (1, 7):
        z = 3 * torch.randn(batch, vae.latent_dim)
        labels = torch.arange(batch) % 3
        with torch.inference_mode():
            expected = vae.decode(z, labels)
        torch.testing.assert_close(onnx("model", z=z, labels=labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_ddpm_in_latents_comes_with_the_decoder() -> None:
    denoiser = put_latent_ddpm()
    export("out", model="ddpm", form="onnx")
    x_0, t = 2 * torch.randn(3, *denoiser.shape), torch.full((3,), 4)
    with torch.inference_mode():
        images, output = load_latents(DDPM, CPU).decode(x_0), denoiser(x_0, t, None)
    assert (onnx("decoder", x_0=x_0) * 255 - images.float()).abs().max() < 0.51  # rounded there, not here
    torch.testing.assert_close(onnx("model", x_t=x_0, t=t), output, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_examples_of_the_documentation_run() -> None:
    denoiser = put_ddpm(shape=list(SHAPE))
    text = (PROJECT / "docs/models.md").read_text()
    for command in re.findall(r"^    rediffuse (export .*)$", text, re.MULTILINE):
        result = CliRunner().invoke(main, shlex.split(command))
        assert result.exit_code == 0, result.output
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    # The loop over an ONNX network is DDIM: with the same noise it draws what our sampler draws.
    noise, labels = torch.from_numpy(names["noise"]), torch.from_numpy(names["labels"])
    D, schedule, times = guided(denoiser), denoiser.schedule, even_times(denoiser.schedule, names["steps"])
    with torch.inference_mode():
        x_0 = ddim(D, schedule, noise, labels, times=times, noise=torch.Tensor)
    np.testing.assert_allclose(names["x"], x_0.numpy(), atol=1e-4)


# The model card

Stages = dict[str, dict[str, Any]]


@pytest.fixture
def judged(checkout: Path) -> Stages:
    """The stages of a dvc.lock that leads from the data to the scores of the DDPM, with these files."""
    pixels = np.random.RandomState(0).randint(0, 256, (9, *SHAPE)).astype(np.uint8)
    splits = dict.fromkeys(("train", "validation", "test"), ImageSet(pixels, np.arange(9) % 3, CLASSES))
    about = {"set": "shoes", "description": "9 shoes", "source": "https://shoes.example", "licence": "CC0"}
    shutil.rmtree("data/pixels")
    save_images("data/pixels", splits, describe(splits, about))
    report = Path("metrics/evaluation/ddpm.json")
    report.parent.mkdir(parents=True)
    shutil.copy(PROJECT / report, report)

    def entry(path: str, md5: str) -> list[dict[str, str]]:
        return [{"path": path, "md5": md5}]

    model, data = entry("data/models/ddpm", directory_md5(DDPM)), entry("data/pixels", "da.dir")
    samples, scores = entry("data/samples/ddpm", "5a.dir"), entry(str(report), md5_of(report))
    return {
        "prepare": {"outs": data, "params": {"params.yaml": {"seed": 1}}},
        "train_ddpm": {"deps": data, "outs": model, "params": {"params.yaml": {"ddpm": {"T": 4711}}}},
        "sample_ddpm": {"deps": model, "outs": samples},
        "evaluate_ddpm": {"deps": samples, "outs": scores},
    }


def card(stages: Stages) -> dict[str, str]:
    """The sections of the card, by their titles, where dvc.lock says this."""
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    shutil.rmtree("out", ignore_errors=True)
    export("out", model="ddpm", form="folder")
    _, *sections = Path("out/README.md").read_text().split("\n## ")
    return dict(section.split("\n", 1) for section in sections)  # type: ignore[misc]


def test_a_card_says_data_licence_scores_instrument_and_parameters(judged: Stages) -> None:
    sections = card(judged)
    instruments = json.loads((PROJECT / "metrics/evaluation/ddpm.json").read_text())["instruments"]
    digest = json.loads(Path("data/pixels/manifest.json").read_text())["splits"]["train"]["sha256"]["images"]
    facts = ["3 sets of 5,000", "10,000 test images", "steps: 20"]
    for name, part in instruments.items():
        fd, of = part["scores"]["fd"], f"{name} ({part['instrument']['sha256'][:12]})"
        facts.append(f"| {of} | fd | {fd['mean']:.4g} ± {fd['std']:.2g} | {part['floor']:.3f} |")
    assert [fact for fact in facts if fact not in sections["Scores"]] == []
    for fact in ("shoes", "CC0", "https://shoes.example", digest, CLASSES[1]):
        assert fact in sections["Data"]
    rebuilding = sections["How to rebuild it"]
    assert yaml.safe_load(rebuilding.split("```")[1][4:]) == {"seed": 1, "ddpm": {"T": 4711}}
    assert directory_md5(DDPM) in rebuilding and "licence" not in sections["Limits"]


@pytest.mark.parametrize(
    ("stage", "entries", "lost"),
    [
        ("train_ddpm", "outs", {"Data", "How to rebuild it"}),  # another model was trained there
        ("train_ddpm", "deps", {"Data"}),  # on other data
        ("sample_ddpm", "deps", {"Scores"}),  # the images that were judged are of another model
        ("evaluate_ddpm", "deps", {"Scores"}),
        ("evaluate_ddpm", "outs", {"Scores"}),
    ],
)
def test_a_card_claims_nothing_of_another_model(
    judged: Stages, stage: str, entries: str, lost: set[str]
) -> None:
    judged[stage][entries] = [{**judged[stage][entries][0], "md5": "other"}]
    sections, facts = card(judged), {"Data": "CC0", "Scores": "| fd |", "How to rebuild it": "4711"}
    assert {title for title, fact in facts.items() if fact not in sections[title]} == lost
    assert all(("not known" in sections[title].lower()) == (title in lost) for title in ("Data", "Scores"))
    assert ("licence" in sections["Limits"]) == ("Data" in lost)


def test_a_card_names_the_commit_that_has_the_model_in_its_lock(judged: Stages, checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "remote", "add", "origin", "https://ana:secret@git.example/shoes.git")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "before the model")
    assert "git checkout" not in card(judged)["How to rebuild it"]
    git(checkout, "add", "dvc.lock")
    git(checkout, "commit", "-q", "-m", "the model")
    text = card(judged)["How to rebuild it"]
    assert f"git checkout {git(checkout, 'rev-parse', 'HEAD')} && make repro" in text
    assert "https://git.example/shoes.git" in text and "secret" not in text


# What is refused


MIXTURE = {"sample.vae.prior": "mixture"}


@pytest.mark.parametrize(
    ("before", "arguments", "words"),
    [
        (None, {"model": "vae", "form": "diffusers"}, "--format .* DDPM of pixels, .* vae"),
        (put_latent_ddpm, {"form": "diffusers"}, "--format .* DDPM of pixels, .* latents"),
        (None, {"form": "diffusers", "label": "hat"}, "label 'hat' .* 2 Bag"),
        (None, {"form": "onnx", "label": "bag"}, "--label .* --format onnx"),
        (lambda: Path("out").mkdir(), {}, "OUTPUT out exists"),
        (lambda: shutil.rmtree(DDPM), {}, "config.json is missing"),
        (lambda: shutil.rmtree(".dvc"), {}, "change into the checkout"),
        (lambda: write_params(Path(), MIXTURE), {"model": "vae"}, "prior.safetensors is missing: `dvc repro"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(before: Any, arguments: Any, words: str) -> None:
    if before:
        before()
    there = sorted(Path.cwd().iterdir())
    with pytest.raises(UserError, match=words):
        export("out", **{"model": "ddpm", "form": "folder"} | arguments)
    assert sorted(Path.cwd().iterdir()) == there


def test_onnx_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'rediffuse\[onnx\]'"):
        export("out", model="ddpm", form="onnx")


def test_the_command_writes_a_folder() -> None:
    result = CliRunner().invoke(main, ["export", "new/out", "--format", "diffusers", "--label", "ankle boot"])
    assert (result.exit_code, result.output) == (0, "new/out\n")
    assert json.loads(Path("new/out/unet/config.json").read_text())["label"] == 1
    with pytest.raises(ValueError, match="trust_remote_code"):  # before it runs the network
        DDPMPipeline.from_pretrained("new/out")
