"""The model card (Mitchell et al. 2019, arXiv:1810.03993) of a trained model: README.md beside its weights."""

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
COMMIT, ROW = "commit", "row"  # of `origin`: either makes the model again


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
    """Markdown.  What is None is not known, or not of this model, and the card says so.

    config: of the model; settings: of sampling; manifest: of the image set it was trained on; record: of the evaluation of its images;
    parameters: it was trained with, as in params.yaml; origin: what leads back to the run, such as the commit, by names.
    """
    shape = " x ".join(map(str, config["shape"]))
    of = "images" if config.get("clip", True) else "latents, which the VAE in the folder `vae` makes images of"
    parts = {
        "Use": [usage],
        "Data": _data(manifest),
        "Scores": _scores(record),
        "Sampling": _table(settings),
        "Model": _table(config),
        "Limits": _limits(kind, manifest),
        "How to rebuild it": _rebuilding(origin, parameters),
    }
    lines = [f"# {TITLES[kind]}", "", f"Draws images like those it has learnt from.  Channels, height and width of its {of}: {shape}."]
    return "\n".join([*lines, *(line for title, part in parts.items() for line in ("", f"## {title}", "", *part)), ""])


def _data(manifest: Mapping[str, Any] | None) -> list[str]:
    if manifest is None:
        return ["Not known: data/pixels is not there, or is not what this model was trained on."]
    train = manifest["splits"]["train"]
    return _table(
        {
            "set": manifest["set"],
            "what": manifest["description"],
            "source": manifest.get("source") or "not published",
            "licence": manifest.get("licence") or "not known: ask whoever made the images before you publish what the model draws",
            "training images": f"{train['count']:,}",
            "SHA-256 of the training images": train["sha256"]["images"],
            "classes": ", ".join(name.strip() for name in manifest["classes"]) or "none",
        }
    )


def _scores(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return ["None: when this card was written, no images of this model had been judged.  How good they are is not known."]
    sampling = record["sampling"]
    drawn = "; ".join(f"{name}: {value}" for name, value in sampling.items() if name not in ("n", "seeds"))
    lines = [
        f"{len(sampling['seeds'])} sets of {sampling['n']:,} images against {record['reference']['n']:,} test images; mean ± standard"
        f" deviation over the sets.  Drawn with {drawn}.",
        "",
    ]
    if record["instruments"]:
        lines += ["| instrument (SHA-256) | score | value | of real training images |", "|---|---|---|---|"]
    else:
        lines += ["No distance was measured: `reference.instruments` is empty."]
    for id, part in record["instruments"].items():
        for name, value in part["scores"].items():
            floor = f"{part['floor']:.3f}" if name in ("fd", "fid") and "floor" in part else ""
            lines.append(f"| {id} ({part['instrument']['sha256'][:12]}) | {name} | {value['mean']:.4g} ± {value['std']:.2g} | {floor} |")
    copies = record["memorisation"]["copies"]["mean"]
    return [
        *lines,
        "",
        f"Share of images that are near-copies of a training image: {copies:.4f}.",
        "",
        "Numbers of another instrument, or of another number of images, cannot be compared with these.",
    ]


def _limits(kind: str, manifest: Mapping[str, Any] | None) -> list[str]:
    lines = ["- It draws what its training images are like, at their size, with their gaps and biases; nothing else."]
    if kind == "vae":
        lines.append("- Its images are blurred: each is the mean of what the decoder holds for possible.")
    if manifest is None or not manifest.get("licence"):
        lines.append("- The licence of the training images is not known, so neither is what may be done with what it draws.")
    return [*lines, "- A score says how near two sets of images are in the eyes of an instrument; a person may see otherwise."]


def _rebuilding(origin: Mapping[str, str], parameters: Mapping[str, Any] | None) -> list[str]:
    lines = [*_table(origin), ""] if origin else []
    if ROW in origin:
        lines += [f"In a checkout with the row in its store: `rediffuse rebuild {origin[ROW]}`.", ""]
    elif COMMIT in origin:
        lines += [f"    git checkout {origin[COMMIT]} && make repro", ""]
    else:
        lines += ["No commit is known that makes this model again.", ""]
    if parameters is None:
        return [*lines, "The parameters it was trained with are not known: dvc.lock names another model, or none."]
    return [*lines, "It was trained with these values in params.yaml:", "", "```yaml", yaml.safe_dump(dict(parameters)).rstrip(), "```"]


def _table(values: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in values.items())]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split())
