"""The `rediffuse` command.  Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import click

import rediffuse
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS


class Commands(click.Group):
    """Commands that end with `error: ...` on stderr and status 1, without a traceback, where the user can mend it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rediffuse.__version__, prog_name="rediffuse")
def main() -> None:
    """A VAE and a DDPM as a reproducible pipeline.  The pipeline itself is run by DVC: `dvc repro`.

    \b
    Example:
      rediffuse compare HEAD workspace
    """


@main.command()
@click.argument("names", nargs=-1, metavar="A B [C]...")
@click.option("--instrument", "instruments", multiple=True, metavar="ID", help="Only this instrument; may be given again.")
@click.option("--json", "form", flag_value="json", help="Print JSON, for machines.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown, for a report.")
def compare(names: tuple[str, ...], instruments: tuple[str, ...], form: str | None) -> None:
    """Compare evaluations, or refuse: numbers stand side by side only if the same ruler measured them.

    Each of A, B, ... is looked for in this order: the word `workspace` (the files of the checkout), a git revision (branch, tag,
    commit, HEAD~1), a DVC experiment (a name of `dvc exp show`), an MLflow run (id or name).  NAME:vae or NAME:ddpm means that
    model alone; without it, each model that all of them have is compared.

    Rows are comparable if the instrument's SHA-256, the reference images, the settings of the metrics, the rounding and N agree.
    Every later row stands beside its difference to A in units of spread, the standard deviation between sample sets.

    The exit status is 0 if everything asked for was compared, and 1 if anything was refused or went wrong.  What only some rows
    have is named and left out, which is no refusal; with --instrument, only what it names counts.

    \b
    Examples:
      rediffuse compare HEAD workspace
      rediffuse compare main tidy-ox loopy-bias --markdown
      rediffuse compare workspace:vae workspace:ddpm
      rediffuse compare HEAD~1:ddpm HEAD:ddpm --instrument fashion-mnist-cnn-v1 --json
    """
    from rediffuse.commands.compare import FOOTNOTES, Row, label, to_json, to_markdown, to_refusal, to_text
    from rediffuse.commands.compare import compare as compare_rows
    from rediffuse.commands.records import by_model, find_source

    if len(names) < 2:
        raise UserError(
            f"a comparison needs at least two rows, got {len(names)}: name two or more, as in `rediffuse compare HEAD workspace`"
        )
    groups, notes = by_model([find_source(name) for name in names])
    comparisons = [
        compare_rows([Row(label(i), source.name, source.origin, record) for i, (source, record) in enumerate(group)], instruments)
        for group in groups
    ]
    refused = [to_refusal(comparison) for comparison in comparisons if comparison.refusals]
    comparable = any(comparison.comparable for comparison in comparisons)
    if form == "json":
        content = {"refused": bool(refused), "notes": notes, "comparisons": [to_json(comparison) for comparison in comparisons]}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    elif comparable:
        show = to_markdown if form == "markdown" else to_text
        click.echo("\n\n".join([*map(show, comparisons), *notes, "\n".join(FOOTNOTES)]))
    if refused:
        verdict = "a part may not be compared" if comparable else "these rows may not be compared, so no numbers are shown"
        raise UserError("\n".join([verdict, *refused]))


@main.command()
@click.option("--all", "every", is_flag=True, help="All experiments, not only those on the commit that is checked out.")
def sync(every: bool) -> None:
    """Complete the rows in MLflow from what DVC knows; doing it again changes nothing.

    A stage that DVC finds up to date starts no process, so nobody logs for it; an experiment gets its commit, and dvc.lock its last
    entry, when the last process has ended; a server may have been away, a process killed, an experiment pulled from a remote.  Run
    this afterwards and every row is complete.  `make repro` does.

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


@main.command()
@click.argument("output")
@click.option(
    "--model", default="ddpm", show_default=True, help="ddpm or vae of the checkout, REVISION:ddpm, a folder, or models:/NAME@ALIAS."
)
@click.option("--label", metavar="CLASS", help="Name or index of the class; without it the classes take turns.")
@click.option("-n", "--number", "n", type=int, default=16, show_default=True, help="How many images.")
@click.option("--seed", type=int, default=1, show_default=True, help="Image i of a seed and a class is always the same.")
@click.option("--sampler", type=click.Choice(["ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++", "heun"]), help="Of the DDPM.")
@click.option("--steps", type=int, help="Of the DDPM's sampler, at most its T.")
@click.option("--guidance-scale", type=float, help="Of the DDPM; 1: as trained.")
def generate(
    output: str, model: str, label: str | None, n: int, seed: int, sampler: str | None, steps: int | None, guidance_scale: float | None
) -> None:
    """Draw images: OUTPUT.png is one grid, OUTPUT.npz holds arrays, anything else is a new folder of PNGs.

    \b
    Example:
      rediffuse generate --label "ankle boot" -n 16 out.png
    """
    from rediffuse.commands.generate import generate as draw

    click.echo(draw(model, output, n=n, seed=seed, label=label, sampler=sampler, steps=steps, guidance_scale=guidance_scale))


def _uses_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all commands with a model share."""
    options = [
        click.option(
            "--model",
            default="ddpm",
            show_default=True,
            help="ddpm or vae of the checkout, REVISION:ddpm, a folder, or models:/NAME@ALIAS.",
        ),
        click.option(
            "--label",
            metavar="CLASS",
            help="Name or index of the class the images are of; without it: no class, which a VAE with labels refuses.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


STEPS = click.option("--steps", type=int, help="Of the DDPM, in which images become noise and noise images; at most its T.  [default: 100]")


@main.command()
@click.argument("output")
@click.argument("images", nargs=-1, required=True)
@_uses_a_model
@STEPS
def reconstruct(output: str, images: tuple[str, ...], model: str, label: str | None, steps: int | None) -> None:
    """Code IMAGES and decode them again: a VAE by its latents, a DDPM by inverting DDIM.  OUTPUT.png shows both.

    \b
    Example:
      rediffuse reconstruct out.png --model vae boot.png shirt.jpg
    """
    from rediffuse.commands.coding import reconstruct as command

    click.echo(command(output, images, model=model, label=label, steps=steps))


@main.command()
@click.argument("output")
@click.argument("a")
@click.argument("b")
@click.option("-n", "--number", "n", type=int, default=10, show_default=True, help="How many images, A and B included.")
@_uses_a_model
@STEPS
def interpolate(output: str, a: str, b: str, n: int, model: str, label: str | None, steps: int | None) -> None:
    """Go from A to B, each an image or a seed: through the latents of a VAE, or the noise that a DDPM draws images from.

    \b
    Examples:
      rediffuse interpolate out.png boot.png shirt.jpg
      rediffuse interpolate out.png 1 2 --model vae
    """
    from rediffuse.commands.coding import interpolate as command

    click.echo(command(output, (a, b), n=n, model=model, label=label, steps=steps))


@main.command()
@click.argument("output")
@click.argument("image")
@click.argument("mask")
@click.option("-n", "--number", "n", type=int, default=8, show_default=True, help="How many ways to fill it in.")
@click.option("--seed", type=int, default=1, show_default=True, help="Way i of a seed is always the same.")
@click.option("--rounds", type=int, default=10, show_default=True, help="How often each step is gone: more fit better to what is known.")
@_uses_a_model
@STEPS
def inpaint(output: str, image: str, mask: str, n: int, seed: int, rounds: int, model: str, label: str | None, steps: int | None) -> None:
    """Fill in IMAGE where MASK, an image too, is bright; what is dark stays as it is.  (RePaint, with a DDPM.)

    \b
    Example:
      rediffuse inpaint out.png boot.png mask.png --label "ankle boot"
    """
    from rediffuse.commands.coding import inpaint as command

    click.echo(command(output, image, mask, n=n, seed=seed, model=model, label=label, steps=steps, rounds=rounds))


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the noise.")
@click.option(
    "--evaluations", type=int, help="Of the network for each image: times of a DDPM [default: all], samples of a VAE [default: 1]."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_uses_a_model
def nll(images: tuple[str, ...], seed: int, evaluations: int | None, as_json: bool, model: str, label: str | None) -> None:
    """How improbable IMAGES are to the model: an upper bound of -log p(x) in bits per dimension (ELBO); lower is more probable.

    \b
    Example:
      rediffuse nll --evaluations 50 boot.png shirt.jpg
    """
    from rediffuse.commands.coding import nll as command

    click.echo(command(images, model=model, label=label, seed=seed, evaluations=evaluations, as_json=as_json))


@main.command()
@click.argument("output")
@click.option("--model", type=click.Choice(KINDS), default="ddpm", show_default=True, help="Of the checkout.")
@click.option("--format", "form", type=click.Choice(["folder", "onnx", "diffusers"]), default="folder", show_default=True)
@click.option("--label", metavar="CLASS", help="Of --format diffusers: name or index of the class it draws; without it: no class.")
def export(output: str, model: str, form: str, label: str | None) -> None:
    """Write a model for others, as a new folder OUTPUT with a model card, README.md.

    \b
      folder     weights, settings of sampling: for rediffuse.load and the other commands
      onnx       the network of a DDPM, the decoder of a VAE, for any batch: for onnxruntime
      diffusers  a DDPM of pixels: for diffusers.DDPMPipeline, which then needs no rediffuse

    \b
    Examples:
      rediffuse export my-model && rediffuse generate --model my-model out.png
      rediffuse export my-decoder --model vae --format onnx
      rediffuse export my-boots --format diffusers --label "ankle boot"
    """
    from rediffuse.commands.export import export as command

    click.echo(command(output, model=model, form=form, label=label))


@main.command()
@click.argument("name", metavar="ROW_OR_VERSION")
@click.option("--model", type=click.Choice(KINDS), default="ddpm", show_default=True)
@click.option("--alias", default="champion", show_default=True)
def promote(name: str, model: str, alias: str) -> None:
    """Move the alias of a registered model to the version of a row, or to a version by its number.

    \b
    Example:
      rediffuse promote tidy-ox
    """
    from rediffuse.commands.promote import promote as move

    click.echo(move(name, model, alias))


@main.command()
@click.argument("row", metavar="RUN")
@click.option("--stage", metavar="STAGE", help="Only this stage of dvc.yaml; its inputs are taken from DVC's cache, and checked.")
@click.option("--keep", is_flag=True, help="Leave the clone, and say where it is; a failed stage can be looked into there.")
def rebuild(row: str, stage: str | None, keep: bool) -> None:
    """Make the results of a row again, in a fresh clone, and compare every hash and every number.

    RUN is the id or the name of an MLflow run.  Its revision is the experiment's commit, or its ref here or on a git remote, or
    the commit it started from with the row's code.diff and params.yaml.  The clone has a DVC cache of its own and takes raw data
    only.  Nothing runs unless parameters, dvc.yaml, code and data are those of the row; what differs is named.

    The verdict is the last line, a tag of the row (rebuild.verdict), and the exit status:

    \b
      0  exact              every output has the recorded hash
      3  exact-env-differs  so it has, though the environment is of another class
      4  diverged           an output or a number differs; the first stage is named
      1  an error, or a refusal: nothing was compared

    \b
    Examples:
      rediffuse rebuild tidy-ox
      rediffuse rebuild 3f2a9c0d41e84c5f8f0c1a2b3c4d5e6f --keep
      rediffuse rebuild tidy-ox --stage evaluate_ddpm
    """
    from rediffuse.commands import rebuild as command
    from rediffuse.commands.verdict import STATUS

    _complete_rows()
    raise SystemExit(STATUS[command.rebuild(row, stage, keep=keep)])


@main.command()
@click.argument("row", metavar="RUN")
@click.option("--branch", metavar="NAME", help="The branch; kept/<name of the row> unless given.")
@click.option("--remote", metavar="REMOTE", help="The git remote; origin, or the only one, unless given.")
def keep(row: str, branch: str | None, remote: str | None) -> None:
    """Keep what a row shows: make it a branch, and push branch, experiment and data to the remotes.

    It then outlives `dvc exp remove`, `dvc gc` and this machine.  RUN is the id or the name of an MLflow run.  The results of a
    plain `dvc repro` are looked for in the history, and else saved from the checkout (`dvc exp save`), if they are still there.
    Data go to DVC's default remote.

    Without a remote the rest is done, and what is missing is said.  The exit status is 1 if something could not be done: no commit
    has the results, the branch is another already, or a remote does not take them.  Keeping twice does nothing new.

    \b
    Examples:
      rediffuse keep tidy-ox
      rediffuse keep tidy-ox --branch kept/wide-unet --remote origin
    """
    from rediffuse.commands import keep as command

    _complete_rows()
    command.keep(row, branch, remote)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look for what silently breaks reproducibility, and say how to mend it.

    FAIL: results come out wrong or cannot be rebuilt.  warn: may cost a result or its proof.  The exit status is 1 if anything is a
    FAIL.

    \b
    Example:
      rediffuse doctor
    """
    from rediffuse.commands.doctor import doctor as examine
    from rediffuse.commands.doctor import failed, to_json, to_text

    groups = examine()
    click.echo(json.dumps(to_json(groups), indent=2, ensure_ascii=False) if as_json else to_text(groups))
    ctx.exit(1 if failed(groups) else 0)


@main.command()
@click.option("--port", type=int, default=5000, show_default=True, help="Of the server that is started on 127.0.0.1.")
def ui(port: int) -> None:
    """Show the rows in MLflow, and print the address of the page that compares them.

    Where MLFLOW_TRACKING_URI names a server (http://...), that is the address, and nothing is started.

    \b
    Example:
      rediffuse ui --port 5001
    """
    from rediffuse.commands.ui import ui as show

    show(port)


def _complete_rows() -> None:
    """What a row records is final only after a sync.  Where that fails, the command itself says what it lacks."""
    from rediffuse.tracking.sync import sync as sync_rows

    with contextlib.suppress(UserError):
        sync_rows()
