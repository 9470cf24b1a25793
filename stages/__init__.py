"""What DVC runs: one thin script a stage, `python -m stages.NAME` from the root of the checkout."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# In the temporary workspace of `dvc exp run --temp` or `--queue`, an editable installation would import the
# code of the parent checkout.
SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

PACKAGES = (
    *("filelock", "jinja2", "mlflow", "numpy", "PIL", "pydantic", "safetensors", "scipy", "sklearn"),
    *("torch", "torch_fidelity", "tqdm", "yaml"),
)
if missing := [name for name in PACKAGES if find_spec(name) is None]:
    raise SystemExit(
        f"error: {sys.executable}, which DVC found as `python`, lacks {', '.join(missing)}: activate the"
        " environment (. .venv/bin/activate) and run `dvc repro` again, or run `make repro`, which makes"
        " and uses it"
    )

import rediffuse  # noqa: E402
from rediffuse.runtime.errors import UserError  # noqa: E402
from rediffuse.runtime.files import dvc_root  # noqa: E402

if SOURCE not in Path(rediffuse.__file__).resolve().parents:
    raise ImportError(f"stages must run the code of their checkout, {SOURCE}, got {rediffuse.__file__}")


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage.  A UserError is printed without a traceback, and the exit status is 1."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def checkpoint_folder() -> Path:
    """Return the folder of unfinished trainings.  It outlives a temporary workspace."""
    return dvc_root() / ".dvc/tmp/checkpoints"
