"""The `rediffuse` command.  Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import click

import rediffuse
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS


class Commands(click.Group):
    """Commands that end with `error: ...` on stderr and status 1 after a UserError or an error of a file.

    A traceback follows only with --debug, or from an error that is ours.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # of `| head`: click ends quietly
            raise
        except (UserError, OSError) as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
@click.option("--debug", is_flag=True, help="After an error, print where it arose.")
@click.version_option(rediffuse.__version__, prog_name="rediffuse")
def main(quiet: bool, debug: bool) -> None:
    """A VAE and a DDPM as a reproducible pipeline.  The pipeline itself is run by DVC: `dvc repro`.

    Results go to stdout, progress and warnings to stderr; the exit status is 0, or 1 after an error, or 2 for
    arguments that are wrong.  `eval "$(_REDIFFUSE_COMPLETE=bash_source rediffuse)"` completes commands and
    options in bash; zsh_source and fish_source do it in those.
    """
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # which tqdm reads when it is imported, by the command


@main.command()
@click.argument("names", nargs=-1, metavar="A B [C]...")
@click.option("--instrument", "instruments", multiple=True, metavar="ID", help="Only this one, or these.")
@click.option("--json", "form", flag_value="json", help="Print JSON, for machines.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown, for a report.")
def compare(names: tuple[str, ...], instruments: tuple[str, ...], form: str | None) -> None:
    """Compare evaluations, or refuse: numbers stand side by side only if the same ruler measured them.

    Each of A, B, ... is looked for in this order: the word `workspace` (the files of the checkout), a git
    revision (branch, tag, commit, HEAD~1), a DVC experiment (a name of `dvc exp show`), an MLflow run (id or
    name).  NAME:vae or NAME:ddpm means that model alone; without it, each model that all have is compared.

    Rows are comparable if the instrument's SHA-256, the reference images, the settings of the metrics, the
    rounding and N agree.  Each later row has its difference to A, also in units of spread, the standard
    deviation between sample sets.  What only some rows have is named and left out.  The exit status is 1 if
    anything was refused or went wrong.

    \b
    Examples:
      rediffuse compare HEAD workspace
      rediffuse compare main tidy-ox loopy-bias --markdown
      rediffuse compare HEAD~1:ddpm HEAD:ddpm --instrument fashion-mnist-cnn-v1 --json
    """
    from rediffuse.commands import compare as table
    from rediffuse.commands.records import by_model, find_source

    groups, notes = by_model([find_source(name) for name in names])
    comparisons = [table.compare(rows, instruments) for rows in groups]
    refused = any(each.refusals for each in comparisons)
    if form == "json":
        shown = [table.to_json(each) for each in comparisons]
        content = {"refused": refused, "notes": notes, "comparisons": shown}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        texts = [table.to_text(each, markdown=form == "markdown") for each in comparisons]
        click.echo("\n\n".join([*texts, *notes, table.FOOTNOTES]))
    if refused:
        raise UserError("what is refused above may not be compared")


@main.command()
@click.option("--all", "every", is_flag=True, help="All experiments, not only those on this commit.")
def sync(every: bool) -> None:
    """Complete the rows in MLflow from what DVC knows; doing it again changes nothing.

    It adds cached stages, the final dvc.lock, an experiment's commit, and results of a killed process, of an
    experiment that was pulled, and from a time when the server was away.  `make repro` calls it.

    \b
    Examples:
      dvc exp run -S ddpm.T=1000 && rediffuse sync
      dvc exp pull origin my-experiment && rediffuse sync --all
    """
    from rediffuse.tracking.sync import sync as sync_rows

    outcomes = sync_rows(every=every)
    for outcome in outcomes:
        click.echo(f"{outcome.name}  {outcome.run_id}  {outcome.what}")
    if not outcomes:
        click.echo("nothing to complete")


FORMAT = click.Choice(["folder", "onnx", "diffusers"])
SAMPLER = click.Choice(["ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++", "heun"])
WHERE = "ddpm or vae of the checkout, REVISION:ddpm, a folder, or models:/NAME@ALIAS."
MODEL = click.option("--model", default="ddpm", show_default=True, help=WHERE)
OWN_MODEL = click.option("--model", type=click.Choice(KINDS), default="ddpm", show_default=True)
SEED = click.option("--seed", type=int, default=1, show_default=True, help="Same seed, same result.")
CLASS = "Name or index of the class of the images.  [default: no class; a VAE with labels needs one]"
LABEL = click.option("--label", metavar="CLASS", help=CLASS)
STEPS = click.option("--steps", type=int, help="Of DDIM, to noise and back; at most T.  [default: 100]")


@main.command()
@click.argument("source", metavar="FOLDER|FILE.npy")
@click.option("--name", default="judged", show_default=True, help="Of the record and the row.")
@OWN_MODEL
def judge(source: str, name: str, model: str) -> None:
    """Judge images that any other tool has drawn, as the images of the model are judged.

    Takes a folder of images, or uint8 numbers that numpy.save wrote, of the size of data.set, at least
    sample.n of them.  Uses the instruments and real images of the stage `reference`.  Writes the record below
    metrics/judged/NAME, which `rediffuse compare workspace NAME` finds, and a row of MLflow, in which the
    scores are those of MODEL, so that they stand beside its.

    \b
    Examples:
      rediffuse judge samples/ --name gan
      rediffuse judge samples.npy --name gan && rediffuse compare workspace gan
    """
    from rediffuse.commands.judge import judge as measure

    folder, headline = measure(source, name=name, model=model)
    click.echo(json.dumps(headline, indent=2))
    click.echo(f"{folder}; compare it with `rediffuse compare workspace:{model} {name}`", err=True)


@main.command()
@click.argument("path")
@click.option(
    "--sheet",
    type=click.Path(),
    default="contact-sheet.png",
    show_default=True,
    help="PNG of some of the images.",
)
def inspect(path: str, sheet: str) -> None:
    """Look at images of your own before any training.

    PATH: what data.path may be, a folder, a zip or tar of one, a .npy or .npz file, or parquet files.  Says
    how many images, classes, sizes and kinds there are, what is passed over, what is equal, how many fall to
    each split, which instruments are possible, and which parameters fit.  Changes nothing.

    \b
    Example:
      rediffuse inspect photos/
    """
    from pathlib import Path

    from rediffuse.commands.inspect import inspect as look

    for line in look(path, Path(sheet)):
        click.echo(line)


def _number(default: int, help: str) -> Callable[..., Any]:
    return click.option("-n", "--number", "n", type=int, default=default, show_default=True, help=help)


@main.command()
@click.argument("output")
@MODEL
@click.option("--label", metavar="CLASS", help="Name or index of the class.  [default: all in turn]")
@_number(16, "How many images.")
@SEED
@click.option("--sampler", type=SAMPLER, help="Of the DDPM.")
@click.option("--steps", type=int, help="Of the DDPM's sampler, at most its T.")
@click.option("--guidance-scale", type=float, help="Of the DDPM; 1: as trained.")
@click.option("--autoguidance-scale", type=float, help="Of the DDPM; 1: as trained.")
@click.option("--guidance-interval", type=float, nargs=2, help="Shares of T between which it is used.")
def generate(output: str, model: str, **options: Any) -> None:
    """Draw images: OUTPUT.png is one grid, OUTPUT.npz holds arrays, any other name is a new folder of PNGs.

    \b
    Example:
      rediffuse generate --label "ankle boot" -n 16 out.png
    """
    from rediffuse.commands.generate import generate as command

    click.echo(command(model, output, **options))


@main.command()
@click.argument("output")
@click.argument("images", nargs=-1, required=True)
@MODEL
@LABEL
@STEPS
def reconstruct(output: str, images: tuple[str, ...], **options: Any) -> None:
    """Code IMAGES and decode them: a VAE by its latents, a DDPM by inverting DDIM.  OUTPUT.png shows both.

    \b
    Example:
      rediffuse reconstruct out.png --model vae boot.png shirt.jpg
    """
    from rediffuse.commands.coding import reconstruct as command

    click.echo(command(output, images, **options))


@main.command()
@click.argument("output")
@click.argument("a")
@click.argument("b")
@_number(10, "How many images, A and B included.")
@MODEL
@LABEL
@STEPS
def interpolate(output: str, a: str, b: str, **options: Any) -> None:
    """Draw images from A to B, each an image or a seed: through a VAE's latents or a DDPM's noise.

    \b
    Examples:
      rediffuse interpolate out.png boot.png shirt.jpg
      rediffuse interpolate out.png 1 2 --model vae
    """
    from rediffuse.commands.coding import interpolate as command

    click.echo(command(output, (a, b), **options))


@main.command()
@click.argument("output")
@click.argument("image")
@click.argument("mask")
@_number(8, "How many ways to fill it in.")
@SEED
@click.option("--rounds", type=int, default=10, show_default=True, help="Of each step; more fit in better.")
@MODEL
@LABEL
@STEPS
def inpaint(output: str, image: str, mask: str, **options: Any) -> None:
    """Fill in IMAGE where the image MASK is bright; the rest stays as it is (RePaint, with a DDPM).

    \b
    Example:
      rediffuse inpaint out.png boot.png mask.png --label "ankle boot"
    """
    from rediffuse.commands.coding import inpaint as command

    click.echo(command(output, image, mask, **options))


@main.command()
@click.argument("images", nargs=-1, required=True)
@SEED
@click.option("--evaluations", type=int, help="Times per image of a DDPM [all], samples of a VAE [1].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@MODEL
@LABEL
def nll(images: tuple[str, ...], **options: Any) -> None:
    """Print an upper bound of -log p(x) of IMAGES in bits per dimension (ELBO); lower is more probable.

    \b
    Example:
      rediffuse nll --evaluations 50 boot.png shirt.jpg
    """
    from rediffuse.commands.coding import nll as command

    click.echo(command(images, **options))


@main.command()
@click.argument("output")
@OWN_MODEL
@click.option("--format", "form", type=FORMAT, default="folder", show_default=True)
@click.option("--label", metavar="CLASS", help="Class that --format diffusers draws.  [default: no class]")
def export(output: str, **options: Any) -> None:
    """Write a model for other programs, as a new folder OUTPUT with a model card, README.md.

    \b
      folder     weights and settings of sampling: for rediffuse.load and the other commands
      onnx       the network of a DDPM or the decoder of a VAE, for any batch: for onnxruntime
      diffusers  a DDPM of pixels: for diffusers.DDPMPipeline, without rediffuse

    \b
    Examples:
      rediffuse export my-model && rediffuse generate --model my-model out.png
      rediffuse export my-decoder --model vae --format onnx
      rediffuse export my-boots --format diffusers --label "ankle boot"
    """
    from rediffuse.commands.export import export as command

    click.echo(command(output, **options))


@main.command()
@click.argument("name", metavar="ROW_OR_VERSION")
@OWN_MODEL
@click.option("--alias", default="champion", show_default=True)
def promote(name: str, model: str, alias: str) -> None:
    """Move the alias of a registered model to the version of a row, or to a version by its number.

    \b
    Examples:
      rediffuse promote tidy-ox
      rediffuse promote 3 --model vae --alias candidate
    """
    from rediffuse.commands.promote import promote as move

    click.echo(move(name, model, alias))


@main.command()
@click.argument("row", metavar="RUN")
@click.option("--keep", is_flag=True, help="Leave the clone and say where it is.")
def rebuild(row: str, keep: bool) -> None:
    """Make the results of a row again, in a fresh clone, and compare every hash and every number.

    RUN is the id or the name of an MLflow run.  An experiment is rebuilt from its own commit, here or on a
    git remote; a plain `dvc repro` from the commit it ran on, or a later one with its dvc.lock.  Results of
    code that is in no commit are refused.  The clone has a DVC cache of its own and takes raw data only.

    The verdict is the last line, a tag of the row (rebuild.verdict), and the exit status:

    \b
      0  exact              every output has the recorded hash
      3  exact-env-differs  the same, but on another class of machine
      4  diverged           an output or a number differs; the first stage is named
      1  an error, or a refusal: nothing was compared

    \b
    Examples:
      rediffuse rebuild tidy-ox
      rediffuse rebuild 3f2a9c0d41e84c5f8f0c1a2b3c4d5e6f --keep
    """
    from rediffuse.commands import rebuild as command
    from rediffuse.commands.verdict import STATUS
    from rediffuse.tracking.sync import sync

    with contextlib.suppress(UserError):  # a row is complete after a sync; if that fails, rebuild says so
        sync()
    raise SystemExit(STATUS[command.rebuild(row, keep=keep)])


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Look for what silently breaks reproducibility, and say how to mend it.

    FAIL: results are wrong or cannot be rebuilt.  warn: may cost a result or its proof.  The exit status is 1
    if there is a FAIL.

    \b
    Example:
      rediffuse doctor && make repro
    """
    from rediffuse.commands.doctor import doctor as examine

    colours, found = {"ok": "green", "warn": "yellow", "FAIL": "red"}, examine()
    for level, what, remedy in found:
        remedy = f"  -> {remedy}" if remedy else ""
        click.echo(f"{click.style(f'{level:4}', fg=colours[level])}  {what}{remedy}")
    ctx.exit(int(any(level == "FAIL" for level, *_ in found)))


@main.command()
@click.option("--port", type=int, default=5000, show_default=True, help="Of the server, on 127.0.0.1.")
def ui(port: int) -> None:
    """Show the rows in MLflow: print the address of the page that compares them, and serve it.

    If MLFLOW_TRACKING_URI names a server (http://...), its address is printed and no server is started.

    \b
    Example:
      rediffuse ui --port 5001
    """
    from rediffuse.commands.ui import ui as show

    show(port)
