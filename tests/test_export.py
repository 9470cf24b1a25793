"""A model in the formats of others: what is exported draws what the checkpoint draws, and its card claims nothing that is not proved."""

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
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny_checkout import CLASSES, PROJECT, SHAPE, make_checkout, write_params

import rediffuse
from rediffuse.cli import main
from rediffuse.commands.export import export
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import read_config
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import ddim, ddpm, even_times
from rediffuse.sources.splits import describe
from rediffuse.tracking.lock import directory_md5
from rediffuse.vae.latents import load_latents, measure_latents, save_latents
from rediffuse.vae.model import VAE

CPU = torch.device("cpu")
DDPM = Path("data/models/ddpm")
T = 20
ODD = (3, 17, 19)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with models of random weights; what diffusers copies goes to a folder of the test's own."""
    root = tmp_path / "checkout"
    make_checkout(root, precision="float32")
    monkeypatch.chdir(root)
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return root


def put_ddpm(**changes: Any) -> Denoiser:
    """Another DDPM in the checkout, of random weights."""
    config: dict[str, Any] = {
        "shape": list(ODD),
        "T": T,
        "schedule": "cosine",
        "predict": "v",
        "class_names": list(CLASSES),
        "fold": 2,
        "width": 16,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": 8,
        "dropout": 0.1,
    } | changes
    torch.manual_seed(4)
    denoiser = Denoiser(**config)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_model(denoiser, DDPM)
    return denoiser.eval()


def model_arguments(folder: Path) -> dict[str, Any]:
    """Those of the class of the model in the folder."""
    return {name: value for name, value in read_config(folder).items() if name != "kind"}


def put_latent_ddpm(checkout: Path) -> Denoiser:
    config = model_arguments(checkout / "data/models/vae") | {"latent_channels": 2}
    torch.manual_seed(1)
    vae = VAE(**config)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoiser = put_ddpm(shape=list(vae.latent_shape), fold=1, multipliers=[1], attention=0, class_names=[], clip=False)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (50, *SHAPE)).astype(np.uint8))
    save_latents(measure_latents(vae.eval(), images), DDPM)
    return denoiser


# A folder of ours


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_a_folder_is_complete_in_itself(model: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rediffuse.load(model).generate(5, seed=3)
    assert export(str(tmp_path / "out"), model=model, form="folder") == tmp_path / "out"
    shutil.rmtree(checkout)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(rediffuse.load("out").generate(5, seed=3), expected)


def test_a_folder_keeps_the_vae_of_a_ddpm_in_latents(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_latent_ddpm(checkout)
    expected = rediffuse.load("ddpm").generate(3)
    export(str(tmp_path / "out"), model="ddpm", form="folder")
    shutil.rmtree(checkout)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(rediffuse.load("out").generate(3), expected)


# diffusers


def pipeline_of(folder: str) -> DDPMPipeline:
    pipeline = DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(denoiser: Denoiser, sampler: Any, steps: int, label: int | None, n: int = 3, seed: int = 5, eta: float = 0.0) -> torch.Tensor:
    """What our sampler draws from the noise that a pipeline draws, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(n, *denoiser.shape, generator=generator)

    labels = None if label is None else torch.full((n,), label)
    times = even_times(denoiser.schedule, steps)
    with torch.inference_mode():
        x_0 = sampler(guided(denoiser), denoiser.schedule, noise(), labels, times=times, eta=eta, noise=noise)
    grey = (x_0.abs() < 0.99).float().mean()
    assert grey > 0.2, f"an image of black and white alone would hide most mistakes, {grey}"
    return (x_0 / 2 + 0.5).clamp(0, 1)


def drawn(pipeline: Any, steps: int, n: int = 3, seed: int = 5, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images: torch.Tensor = pipeline(n, generator=generator, num_inference_steps=steps, output_type="pt", **more).images
    return images


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_diffusers_draws_the_images_of_our_ancestral_sampler(predict: str, schedule: str) -> None:
    denoiser = put_ddpm(predict=predict, schedule=schedule)
    export("out", model="ddpm", form="diffusers", label="bag")
    assert (drawn(pipeline_of("out"), T) - ours(denoiser, ddpm, T, CLASSES.index("Bag"))).abs().max() < 1e-4


@pytest.mark.parametrize("class_names", [CLASSES, ()])
def test_diffusers_draws_without_a_label_where_none_is_given(class_names: tuple[str, ...]) -> None:
    denoiser = put_ddpm(class_names=list(class_names), shape=[1, 16, 16], fold=1, attention=0)
    export("out", model="ddpm", form="diffusers")
    assert (drawn(pipeline_of("out"), T) - ours(denoiser, ddpm, T, None)).abs().max() < 1e-4


def test_a_caller_may_ask_the_network_of_diffusers_for_labels() -> None:
    denoiser = put_ddpm()
    export("out", model="ddpm", form="diffusers", label="1")
    x_t, labels = torch.randn(3, *ODD, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])
    with torch.inference_mode():
        network = pipeline_of("out").unet
        output = network(x_t, 6, class_labels=labels).sample
        torch.testing.assert_close(output, denoiser(x_t, torch.full((3,), 7), labels), rtol=1e-4, atol=1e-5)
        [of_one] = network(x_t, torch.tensor(6), return_dict=False)
        torch.testing.assert_close(of_one, denoiser(x_t, torch.full((3,), 7), torch.full((3,), 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [20, 10, 4])
@pytest.mark.parametrize(("predict", "eta"), [("eps", 0.5), ("x0", 0.0), ("x0", 1.0), ("v", 0.0), ("v", 1.0)])  # eps, 0: all black or white
def test_ddim_of_diffusers_draws_the_images_of_ours_where_the_steps_divide_T(predict: str, eta: float, steps: int) -> None:
    denoiser = put_ddpm(predict=predict)
    export("out", model="ddpm", form="diffusers", label="0")
    loaded = pipeline_of("out")
    pipeline = DDIMPipeline(unet=loaded.unet, scheduler=DDIMScheduler.from_config(loaded.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    images = drawn(pipeline, steps, eta=eta, use_clipped_model_output=True)
    assert (images - ours(denoiser, ddim, steps, 0, eta=eta)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_the_schedule_of_diffusers_is_ours_over_many_steps(name: Any) -> None:
    put_ddpm(schedule=name, T=1000)
    export("out", model="ddpm", form="diffusers")
    scheduler = DDPMScheduler.from_pretrained("out/scheduler")
    alpha_bar = Schedule.make(name, 1000).alpha_bar[1:]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, rtol=1e-3, atol=1e-6)
    assert scheduler.alphas_cumprod.min() > 0


@pytest.mark.slow
def test_the_folder_of_diffusers_needs_no_rediffuse(checkout: Path, tmp_path: Path) -> None:
    put_ddpm()
    export(str(tmp_path / "out"), model="ddpm", form="diffusers", label="bag")
    expected = drawn(pipeline_of(str(tmp_path / "out")), T)
    shutil.rmtree(checkout)
    script = f"""
import sys
sys.modules["rediffuse"] = None  # an import of it fails
import torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained("out", trust_remote_code=True)
images = pipeline(3, generator=torch.Generator().manual_seed(5), num_inference_steps={T}, output_type="pt").images
torch.save(images, "images.pt")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-4)


def test_diffusers_asks_for_trust_before_it_runs_the_network() -> None:
    export("out", model="ddpm", form="diffusers")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DDPMPipeline.from_pretrained("out")


# ONNX


def session(path: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3, 9, 7], "fold": 2, "attention": 8},
        {"shape": [1, 8, 8], "fold": 1, "attention": 4, "class_names": [], "predict": "eps"},
    ],
    ids=["labels, fold 2, odd", "no labels, fold 1"],
)
def test_onnx_has_the_output_of_the_network_for_every_batch(changes: dict[str, Any]) -> None:
    denoiser = put_ddpm(**changes)
    export("out", model="ddpm", form="onnx")
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "config.json", "model.onnx", "sampling.json"]
    network = session("out/model.onnx")
    for batch in (1, 2, 5, 64):
        x_t, t = torch.randn(batch, *denoiser.shape), torch.randint(1, T + 1, (batch,))
        labels = torch.randint(0, denoiser.classes + 1, (batch,)) if denoiser.classes else None
        inputs = {"x_t": x_t.numpy(), "t": t.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        with torch.inference_mode():
            expected = denoiser(x_t, t, labels)
        torch.testing.assert_close(torch.from_numpy(network.run(["output"], inputs)[0]), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.05
    np.testing.assert_allclose(json.loads(Path("out/config.json").read_text())["alpha_bar"], denoiser.schedule.alpha_bar)


@pytest.mark.slow
@pytest.mark.parametrize("class_names", [[], ["cat", "dog", "owl"]], ids=["no labels", "labels"])
@pytest.mark.parametrize("latent_channels", [0, 2])
def test_onnx_has_the_images_of_the_decoder_of_a_vae(latent_channels: int, class_names: list[str]) -> None:
    config = model_arguments(Path("data/models/vae")) | {"latent_channels": latent_channels, "shape": [3, 9, 7], "class_names": class_names}
    vae = VAE(**config).eval()
    save_model(vae, Path("data/models/vae"))
    export("out", model="vae", form="onnx")
    assert f"(batch, {vae.latent_dim})" in Path("out/README.md").read_text()
    for batch in (1, 7):
        z, labels = 3 * torch.randn(batch, vae.latent_dim), torch.arange(batch) % len(class_names) if class_names else None
        inputs = {"z": z.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        [images] = session("out/model.onnx").run(["image"], inputs)
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(images), vae.decode(z, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_ddpm_in_latents_comes_with_the_decoder(checkout: Path) -> None:
    denoiser = put_latent_ddpm(checkout)
    export("out", model="ddpm", form="onnx")
    x_0 = 2 * torch.randn(3, *denoiser.shape)
    [images] = session("out/decoder.onnx").run(["image"], {"x_0": x_0.numpy()})
    with torch.inference_mode():
        expected = load_latents(DDPM, CPU).decode(x_0)
        output = denoiser(x_0, torch.full((3,), 4), None)
    assert np.abs(images * 255 - expected.numpy().astype(float)).max() < 0.51  # rounded there, not here
    [found] = session("out/model.onnx").run(None, {"x_t": x_0.numpy(), "t": np.full(3, 4)})
    torch.testing.assert_close(torch.from_numpy(found), output, rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'rediffuse\[onnx\]'"):
        export("out", model="ddpm", form="onnx")


# The examples of the documentation


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(checkout: Path) -> None:
    put_ddpm(shape=list(SHAPE))
    text = (PROJECT / "docs/models.md").read_text()
    commands = re.findall(r"^    rediffuse (export .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command))
        assert result.exit_code == 0, result.output
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    # The loop over an ONNX network is DDIM: with the same noise it draws what our sampler draws.
    denoiser = load_model(Denoiser, DDPM, CPU)
    with torch.inference_mode():
        start = torch.from_numpy(names["noise"])
        times = even_times(denoiser.schedule, names["steps"])
        x_0 = ddim(guided(denoiser), denoiser.schedule, start, torch.from_numpy(names["labels"]), times=times, noise=torch.Tensor)
    np.testing.assert_allclose(names["x"], x_0.numpy(), atol=1e-4)


# The model card


@pytest.fixture
def judged(checkout: Path) -> dict[str, Any]:
    """A checkout whose dvc.lock leads from the data to the scores of the DDPM.  Returns the stages of the lock, to be changed."""
    rng = np.random.RandomState(0)
    pictures, labels = rng.randint(0, 256, (9, *SHAPE)).astype(np.uint8), np.arange(9) % len(CLASSES)
    splits = {name: ImageSet(pictures, labels, CLASSES) for name in ("train", "validation", "test")}
    about = {"set": "shoes", "description": "9 shoes", "source": "https://shoes.example", "licence": "CC0"}
    shutil.rmtree("data/pixels")
    save_images("data/pixels", splits, describe(splits, about))
    Path("metrics/evaluation").mkdir(parents=True)
    report = Path(shutil.copy(PROJECT / "metrics/evaluation/ddpm.json", "metrics/evaluation/ddpm.json"))
    model = [{"path": "data/models/ddpm", "md5": directory_md5(DDPM)}]
    samples, data = [{"path": "data/samples/ddpm", "md5": "5a.dir"}], [{"path": "data/pixels", "md5": "da.dir"}]
    scores = subprocess.run(["md5sum", report], capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "prepare": {"outs": data, "params": {"params.yaml": {"data": {"set": "shoes"}, "seed": 1}}},
        "train_ddpm": {"deps": data, "outs": model, "params": {"params.yaml": {"ddpm": {"T": 12, "training": {"images": 4711}}}}},
        "sample_ddpm": {"deps": model, "outs": samples},
        "evaluate_ddpm": {"deps": samples, "outs": [{"path": "metrics/evaluation/ddpm.json", "md5": scores}]},
    }


def card(stages: dict[str, Any]) -> dict[str, str]:
    """The parts of the card, by their titles, where dvc.lock says this."""
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    shutil.rmtree("out", ignore_errors=True)
    export("out", model="ddpm", form="folder")
    first, *parts = Path("out/README.md").read_text().split("\n## ")
    return dict([("", first), *(part.split("\n", 1) for part in parts)])


def test_a_card_says_data_licence_scores_instrument_and_parameters(judged: dict[str, Any]) -> None:
    parts = card(judged)
    record = json.loads((PROJECT / "metrics/evaluation/ddpm.json").read_text())
    manifest = json.loads(Path("data/pixels/manifest.json").read_text())
    for words in ("shoes", "CC0", "https://shoes.example", manifest["splits"]["train"]["sha256"]["images"], "Ankle boot"):
        assert words in parts["Data"]
    for instrument, part in record["instruments"].items():
        fd = part["scores"]["fd"]
        row = f"| {instrument} ({part['instrument']['sha256'][:12]}) | fd | {fd['mean']:.4g} ± {fd['std']:.2g} | {part['floor']:.3f} |"
        assert row in parts["Scores"]
    assert "3 sets of 5,000 images against 10,000 test images" in parts["Scores"]
    assert "sampler: sde-dpm-solver++; steps: 20" in parts["Scores"]
    block = parts["How to rebuild it"].split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {"data": {"set": "shoes"}, "seed": 1, "ddpm": {"T": 12, "training": {"images": 4711}}}
    assert directory_md5(DDPM) in parts["How to rebuild it"]
    assert "licence" not in parts["Limits"]


@pytest.mark.parametrize(
    ("stage", "entries", "lost"),
    [
        ("train_ddpm", "outs", {"Data", "How to rebuild it"}),  # another model was trained there
        ("train_ddpm", "deps", {"Data"}),  # on other data
        ("prepare", "outs", {"Data"}),
        ("sample_ddpm", "deps", {"Scores"}),  # the images that were judged are of another model
        ("sample_ddpm", "outs", {"Scores"}),
        ("evaluate_ddpm", "deps", {"Scores"}),
        ("evaluate_ddpm", "outs", {"Scores"}),
    ],
)
def test_a_card_claims_nothing_of_another_model(judged: dict[str, Any], stage: str, entries: str, lost: set[str]) -> None:
    changed = {**judged, stage: {**judged[stage], entries: [{**judged[stage][entries][0], "md5": "other"}]}}
    parts = card(changed)
    said = {
        "Data": "Not known" in parts["Data"] and "CC0" not in parts["Data"],
        "Scores": "None: " in parts["Scores"] and "| fd |" not in parts["Scores"],
        "How to rebuild it": "are not known" in parts["How to rebuild it"] and "4711" not in parts["How to rebuild it"],
    }
    assert {title for title, unknown in said.items() if unknown} == lost
    assert ("licence of the training images is not known" in parts["Limits"]) == ("Data" in lost)


def test_a_card_without_dvc_lock_says_that_nothing_is_known() -> None:
    export("out", model="vae", form="folder")
    text = Path("out/README.md").read_text()
    for words in (
        "Not known: data/pixels",
        "None: when this card was written",
        "No commit is known",
        "parameters it was trained with are not",
    ):
        assert words in text


def test_a_card_names_the_commit_that_has_the_model_in_its_lock(judged: dict[str, Any], checkout: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(["git", *identity, *arguments], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("remote", "add", "origin", "https://ana:secret@git.example/shoes.git")
    card(judged)
    git("commit", "-q", "--allow-empty", "-m", "before the model")
    assert "No commit is known" in card(judged)["How to rebuild it"]
    git("add", "dvc.lock")
    git("commit", "-q", "-m", "the model")
    text = card(judged)["How to rebuild it"]
    assert f"git checkout {git('rev-parse', 'HEAD')} && make repro" in text
    assert "https://git.example/shoes.git" in text and "secret" not in text


# What is refused


def no_model() -> None:
    shutil.rmtree(DDPM)


def with_mixture() -> None:
    write_params(Path.cwd(), {"sample.vae.prior": "mixture"})


@pytest.mark.parametrize(
    ("before", "arguments", "words"),
    [
        (None, {"model": "vae", "form": "diffusers"}, "--format diffusers takes a DDPM, but --model is vae.*--format folder or onnx"),
        (None, {"form": "diffusers", "label": "hat"}, "label 'hat' is no class.*2 Bag"),
        (lambda: put_ddpm(class_names=[]), {"form": "diffusers", "label": "bag"}, "trained without labels"),
        (lambda: put_latent_ddpm(Path.cwd()), {"form": "diffusers"}, "latents of a VAE.*--format folder or onnx"),
        (None, {"form": "onnx", "label": "bag"}, "--label is for --format diffusers.*got --format onnx"),
        (lambda: Path("out").mkdir(), {}, "OUTPUT out is there already"),
        (no_model, {}, "config.json is missing"),
        (lambda: shutil.rmtree(".dvc"), {}, "change into the checkout"),
        (with_mixture, {"model": "vae"}, "prior.safetensors is missing: `dvc repro sample_vae` fits it"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(before: Any, arguments: dict[str, Any], words: str) -> None:
    if before:
        before()
    there = sorted(path.name for path in Path.cwd().iterdir())
    with pytest.raises(UserError, match=words):
        export("out", **{"model": "ddpm", "form": "folder"} | arguments)
    assert sorted(path.name for path in Path.cwd().iterdir()) == there


def test_the_command_writes_a_folder_and_help_has_examples() -> None:
    result = CliRunner().invoke(main, ["export", "new/out", "--format", "diffusers", "--label", "ankle boot"])
    assert (result.exit_code, result.output) == (0, "new/out\n")
    assert json.loads(Path("new/out/unet/config.json").read_text())["label"] == 1
    help = CliRunner().invoke(main, ["export", "--help"]).output
    for form in ("folder", "onnx", "diffusers"):
        assert form in help
    assert "rediffuse export " in help.partition("Examples")[2]
