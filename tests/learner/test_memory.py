"""The memory estimate against what an engine really holds."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.learner.memory import count_parameters, estimate
from posttrain.learner.model import load_model


def of(tiny: str, lora: bool = False, dtype: str = "float32", checkpointing: bool = False, **learner: Any) -> Any:
    model = ModelConfig(path=tiny, dtype=dtype, lora=LoraConfig(r=4) if lora else None, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    return estimate(model, LearnerConfig(**learner))


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4), LoraConfig(r=4, targets=["q_proj", "down_proj"])])
def test_counts_are_exact(tiny: str, lora: LoraConfig | None) -> None:
    from transformers import AutoConfig

    model = load_model(ModelConfig(path=tiny, dtype="float32", lora=lora))
    total, trainable = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(AutoConfig.from_pretrained(tiny), lora) == (total, trainable)


def test_bytes_per_parameter(tiny: str) -> None:
    plain = of(tiny, engine="torch")
    n = plain.parameters
    assert (plain.weights, plain.gradients, plain.optimizer, plain.host) == (4 * n, 4 * n, 8 * n, 0)
    half = of(tiny, engine="torch", dtype="bfloat16")
    assert (half.weights, half.gradients, half.optimizer) == (2 * n, 4 * n, 12 * n)


@pytest.mark.parametrize(("stage", "sharded"), [(0, ""), (1, "optimizer"), (2, "optimizer gradients"), (3, "optimizer gradients weights")])
def test_stages_shard(tiny: str, stage: int, sharded: str) -> None:
    one, four = of(tiny, zero_stage=stage), of(tiny, zero_stage=stage, world_size=4)
    for name in ("optimizer", "gradients", "weights"):
        a, b = getattr(one, name), getattr(four, name)
        assert (b == pytest.approx(a / 4, abs=16)) == (name in sharded) and (a == b) == (name not in sharded)


def test_every_setting_acts(tiny: str) -> None:
    base = of(tiny)
    assert of(tiny, micro_batch_tokens=100).activations < base.activations > of(tiny, checkpointing=True).activations
    assert of(tiny, head_chunk=10).head < base.head
    assert of(tiny, lora=True).optimizer < base.optimizer
    offloaded = of(tiny, zero_stage=1, offload_optimizer=True)
    assert offloaded.optimizer == 0 and offloaded.host > 0 and "offloaded" in str(offloaded)
    assert base.total == base.device + base.host and "activations" in str(base)
