"""A tiny model folder for the learner's tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.testing.tiny import create_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers, hidden size 64, tied embeddings."""
    folder: Path = tmp_path_factory.mktemp("tiny") / "model"
    return str(create_tiny_model(folder, hidden_size=64, num_heads=2, num_kv_heads=1, num_layers=2, intermediate_size=96))
