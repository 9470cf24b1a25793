"""Measure this project beside what one would take instead: `make bench`, or `python -m benchmarks [PART ...]`.

Results go to a folder: results.json, in which a part that is measured again replaces its own tables only, and overview.png.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import click

from benchmarks.report import PARTS, RESULTS, Settings, draw_overview, markdown, terminal, write_results
from rediffuse.runtime.errors import UserError

PEERS = ("diffusers", "denoising_diffusion_pytorch", "ema_pytorch", "pythae")


@click.command(help=f"Measure PARTs, of: {', '.join(PARTS)}; all if none is named.  Leave the machine alone meanwhile.")
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]...")
@click.option("--turns", default=Settings.turns, show_default=True, type=click.IntRange(1), help="Of each contender.")
@click.option("--seconds", default=Settings.seconds, show_default=True, type=click.FloatRange(1), help="Of training in `quality`.")
@click.option("--quick", is_flag=True, help="Tiny numbers: to see that all of it runs, not to measure.")
@click.option("--documented-lr", is_flag=True, help="In `quality`, train the peers with the learning rates they document too.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the results.")
@click.option("--markdown", "record", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Print a results.json instead.")
def main(parts: tuple[str, ...], turns: int, seconds: float, quick: bool, documented_lr: bool, out: Path, record: Path | None) -> None:
    if record:
        click.echo(markdown(json.loads(record.read_text())))
        return
    settings = Settings(turns=turns, seconds=seconds, quick=quick, out=out, documented_lr=documented_lr)
    failed = [part for part in parts or PARTS if not run(part, settings)]
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}; why is said above")


def run(part: str, settings: Settings) -> bool:
    """Measure a part, print its tables and keep them.  False, with a message, where it cannot be measured here."""
    click.secho(f"\n{part}", bold=True)
    begin = time.perf_counter()
    try:
        tables = importlib.import_module(f"benchmarks.{part}").measure(settings)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PEERS:
            raise
        click.echo(f"skipped: it needs the package {package}, which `make bench` installs (benchmarks/requirements.lock)", err=True)
        return False
    except UserError as error:
        click.echo(f"skipped: {error}", err=True)
        return False
    for table in tables:
        click.echo(terminal(table))
    whole = write_results(settings.out / "results.json", part, tables, settings)
    draw_overview(whole, settings.out / "overview.png")
    click.echo(f"{part}: {time.perf_counter() - begin:.0f} s; kept in {settings.out / 'results.json'}")
    return True


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
