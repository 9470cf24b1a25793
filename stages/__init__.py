"""What DVC runs: one thin script a stage, `python -m stages.NAME` from the root of the checkout."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The code of *this* checkout runs, also in the temporary workspace of `dvc exp run --temp` or `--queue`, where an editable
# installation would import the parent checkout's.
SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

import rediffuse  # noqa: E402
from rediffuse.params import Params  # noqa: E402
from rediffuse.runtime.errors import UserError  # noqa: E402

if SOURCE not in Path(rediffuse.__file__).resolve().parents:
    raise ImportError(f"stages must run the code of their own checkout, {SOURCE}, but rediffuse was imported from {rediffuse.__file__}")


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; an error that the user can mend is printed without a traceback, and the exit status is 1."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def checkpoint_folder() -> Path:
    """Where unfinished trainings wait for their next run: below DVC's own checkout, which outlives a temporary workspace."""
    return Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/checkpoints")


def checkpoint_configuration(params: Params, group: str) -> dict[str, Any]:
    """Of what the user chose, what the bytes of a trained model depend on: its own parameters, the common ones, and the data."""
    manifest = json.loads(Path("data/prepared/manifest.json").read_text())
    return params.model_dump(include={group, "seed", "precision", "compile"}) | {"data": manifest}
