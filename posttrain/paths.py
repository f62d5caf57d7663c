"""Where the YAML trees are: beside the package in a checkout, inside it in an installed wheel."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def _tree(name: str) -> Path:
    checkout, installed = _ROOT.parent / name, _ROOT / f"_{name}"
    return checkout if (checkout.is_dir() and (_ROOT.parent / "pyproject.toml").exists()) else installed


CONFIGS = _tree("configs")
RECIPES = _tree("recipes")

OWN_CODE: list[str] = []
"""Folders with modules of the user's own, beside the working directory: every process of a run can import from them."""


def import_from(folder: Path) -> None:
    """Let settings name what is in the modules of ``folder``."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if str(folder) not in OWN_CODE:
        OWN_CODE.append(str(folder))
