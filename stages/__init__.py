"""What DVC runs: one thin script a stage, `python -m stages.NAME` from the root of the checkout."""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# The code of *this* checkout runs, also in the temporary workspace of `dvc exp run --temp` or `--queue`, where an editable
# installation would import the parent checkout's.
SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

PACKAGES = ("filelock", "mlflow", "numpy", "PIL", "pydantic", "safetensors", "scipy", "sklearn", "torch", "torch_fidelity", "tqdm", "yaml")
if missing := [name for name in PACKAGES if find_spec(name) is None]:
    raise SystemExit(
        f"error: {sys.executable}, which DVC found as `python`, lacks {', '.join(missing)}: activate the environment"
        " (. .venv/bin/activate) and run `dvc repro` again, or run `make repro`, which makes and uses it"
    )

import rediffuse  # noqa: E402
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
