"""Measure this project beside other packages: `make bench`, or `python -m benchmarks [PART ...]`."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import click

from benchmarks.report import PARTS, RESULTS, Settings, about, markdown
from rediffuse.runtime.errors import UserError

TABLES = RESULTS / "results.md"
PEERS = ("diffusers", "denoising_diffusion_pytorch", "ema_pytorch", "pythae")


@click.command(help=f"Measure PARTs, of: {', '.join(PARTS)}; all by default.  Run nothing else meanwhile.")
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]...")
@click.option("--turns", default=3, show_default=True, type=click.IntRange(1), help="Of each contender.")
@click.option("--seconds", default=600.0, show_default=True, help="Seconds of training in `quality`.")
@click.option("--quick", is_flag=True, help="Use tiny numbers, to check that the code runs.")
@click.option("--out", default=TABLES, show_default=True, type=Path, help="File to append the tables to.")
def main(parts: tuple[str, ...], turns: int, seconds: float, quick: bool, out: Path) -> None:
    settings = Settings(turns, seconds, quick)
    if failed := [part for part in parts or PARTS if not run(part, settings, out)]:
        raise click.ClickException(f"not measured: {', '.join(failed)}; the reasons are above")


def run(part: str, settings: Settings, out: Path) -> bool:
    """Measure a part, print and append its tables.  Return False, with a message, if it cannot run here."""
    begin = time.perf_counter()
    try:
        tables = importlib.import_module(f"benchmarks.{part}").measure(settings)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PEERS:
            raise
        click.echo(f"{part} is skipped: it needs {package}, which `make bench` installs", err=True)
        return False
    except UserError as error:
        click.echo(f"{part} is skipped: {error}", err=True)
        return False
    text = "\n\n".join([f"## {part}", about(settings), *map(markdown, tables)]) + "\n"
    click.echo(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(text + "\n")
    click.echo(f"{part}: {time.perf_counter() - begin:.0f} s; the tables are appended to {out}\n", err=True)
    return True


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
