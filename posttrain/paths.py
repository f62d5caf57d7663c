"""Where the YAML trees are: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def _tree(name: str) -> Path:
    checkout, installed = _ROOT.parent / name, _ROOT / f"_{name}"
    return checkout if (checkout.is_dir() and (_ROOT.parent / "pyproject.toml").exists()) else installed


CONFIGS = _tree("configs")
RECIPES = _tree("recipes")
