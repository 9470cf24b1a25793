"""rediffuse: a VAE and a DDPM as a reproducible pipeline.

rediffuse.load("models:/rediffuse-ddpm@champion").generate(n=16, label="ankle boot", seed=1)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rediffuse.commands.generate import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` on first use (PEP 562): it needs packages that no stage needs."""
    if name == "load":
        return importlib.import_module("rediffuse.commands.generate").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
