"""The model card (Mitchell et al. 2019, arXiv:1810.03993): README.md beside the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

CARD = "README.md"
TITLES = {"vae": "Variational autoencoder (VAE)", "ddpm": "Denoising diffusion model (DDPM)"}
USAGE = """\
    import rediffuse

    rediffuse.load("THIS FOLDER").generate(n=16, seed=1)

or `rediffuse generate --model "THIS FOLDER" out.png`."""
COMMIT, ROW = "commit", "row"  # keys of `origin`; each is enough to rebuild the model


def model_card(
    kind: str,
    *,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any] | None,
    record: Mapping[str, Any] | None,
    parameters: Mapping[str, Any] | None,
    origin: Mapping[str, str],
    usage: str = USAGE,
) -> str:
    """Return the card, in Markdown.  None means not known, or not of this model; the card says so.

    config: of the model.  settings: of sampling.  manifest: of the images it was trained on.  record: the
    evaluation of its images.  parameters: that it was trained with, as in params.yaml.  origin: the run, by
    names such as COMMIT.
    """
    of = "images" if config.get("clip", True) else "latents, which the VAE in the folder `vae` decodes"
    shape = " x ".join(map(str, config["shape"]))
    sections = {
        "Use": usage,
        "Data": _data(manifest),
        "Scores": _scores(record),
        "Sampling": _table(settings),
        "Model": _table(config),
        "Limits": _limits(kind, manifest),
        "How to rebuild it": _rebuilding(origin, parameters),
    }
    about = f"Draws images like its training images.  Channels, height and width of its {of}: {shape}."
    parts = [f"# {TITLES[kind]}", about, *(f"## {title}\n\n{text}" for title, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def _data(manifest: Mapping[str, Any] | None) -> str:
    if manifest is None:
        return "Not known: data/pixels is missing, or is not what this model was trained on."
    train = manifest["splits"]["train"]
    ask = "not known: ask the owner of the images before you publish what the model draws"
    rows = {
        "set": manifest["set"],
        "what": manifest["description"],
        "source": manifest.get("source") or "not published",
        "licence": manifest.get("licence") or ask,
        "training images": f"{train['count']:,}",
        "SHA-256 of the training images": train["sha256"]["images"],
        "classes": ", ".join(name.strip() for name in manifest["classes"]) or "none",
    }
    return _table(rows)


def _scores(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "Not known: no images of this model had been evaluated when this card was written."
    sampling = record["sampling"]
    drawn = "; ".join(f"{name}: {value}" for name, value in sampling.items() if name not in ("n", "seeds"))
    sets = f"{len(sampling['seeds'])} sets of {sampling['n']:,} images"
    lines = [
        f"{sets} against {record['reference']['n']:,} test images; mean ± standard deviation over the sets.",
        f"Drawn with {drawn}.",
        "",
        "| instrument (SHA-256) | score | value | of real training images |",
        "|---|---|---|---|",
    ]
    if not record["instruments"]:
        lines[-2:] = ["No distance was measured: `reference.instruments` is empty."]
    for name, part in record["instruments"].items():
        instrument = f"{name} ({part['instrument']['sha256'][:12]})"
        for score, value in part["scores"].items():
            floor = f"{part['floor']:.3f}" if score in ("fd", "fid") and "floor" in part else ""
            lines.append(f"| {instrument} | {score} | {value['mean']:.4g} ± {value['std']:.2g} | {floor} |")
    copies = record["memorisation"]["copies"]["mean"]
    lines += ["", f"Share of images that are near-copies of a training image: {copies:.4f}.", ""]
    lines += ["Scores of another instrument or another number of images are not comparable with these."]
    return "\n".join(lines)


def _limits(kind: str, manifest: Mapping[str, Any] | None) -> str:
    lines = ["- It draws only what is like its training images, at their size, with their gaps and biases."]
    if kind == "vae":
        lines.append("- Its images are blurred: each is the mean of all images that fit its latents.")
    if manifest is None or not manifest.get("licence"):
        lines += ["- The licence of the training images is not known.  It may restrict the use of the model."]
    lines.append("- A score measures what its instrument sees.  A person may judge otherwise.")
    return "\n".join(lines)


def _rebuilding(origin: Mapping[str, str], parameters: Mapping[str, Any] | None) -> str:
    parts = [_table(origin)] if origin else []
    if ROW in origin:
        parts.append(f"In a checkout with this row in its store: `rediffuse rebuild {origin[ROW]}`.")
    elif COMMIT in origin:
        parts.append(f"    git checkout {origin[COMMIT]} && make repro")
    else:
        parts.append("Not known: no commit has this model in its dvc.lock.")
    if parameters is None:
        parts.append("The training parameters are not known: dvc.lock names another model, or none.")
    else:
        values = yaml.safe_dump(dict(parameters)).rstrip()
        parts.append(f"It was trained with these values in params.yaml:\n\n```yaml\n{values}\n```")
    return "\n\n".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split())
