"""Test set-up for everything: the kernels are importable also where the package is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("posttrain_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
