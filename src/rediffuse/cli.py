"""The `rediffuse` command.  Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import json
from typing import Any

import click

import rediffuse
from rediffuse.errors import UserError


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
