"""Schedules, parameter groups, the update's size, and who is blamed for a NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from posttrain.config import LearnerConfig
from posttrain.learner import optim


def rates(total: int = 11, **settings: object) -> list[float]:
    cfg = LearnerConfig(lr=2.0, **settings)  # type: ignore[arg-type]
    return [optim.learning_rate(cfg, step, total) for step in range(total + 2)]


def test_schedules() -> None:
    assert rates() == [2.0] * 13
    assert rates(warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = rates(schedule="linear", min_lr_ratio=0.1)
    assert linear[0] == 2.0 and linear[5] == pytest.approx(1.1) and linear[10] == linear[12] == pytest.approx(0.2)
    cosine = rates(schedule="cosine", warmup_steps=1)
    assert cosine[0] == cosine[1] == 2.0 and cosine[10] == cosine[12] == pytest.approx(0.0, abs=1e-12)
    assert cosine[4] == pytest.approx(1 + math.cos(math.pi * 3 / 9))
    assert rates(total=1, schedule="cosine")[0] == 2.0
    with pytest.raises(ValueError, match=r"learner.schedule='step'"):
        rates(schedule="step")


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decay, plain = optim.param_groups(model.named_parameters(), 0.3)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decay["params"]] == [(4, 3), (5, 4)] and len(plain["params"]) == 3
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        optim.param_groups(model.named_parameters(), 0.3)


def test_update_norm_is_what_moved() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    cfg = LearnerConfig(lr=0.01, weight_decay=0.2, eps=1e-3)
    optimizer = optim.adamw(optim.param_groups(model.named_parameters(), cfg.weight_decay), cfg)
    for _ in range(3):
        before = [p.detach().double().clone() for p in model.parameters()]
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        owned = [(p, g) for g in optimizer.param_groups for p in g["params"]]
        update, weight = optim.update_and_weight_squares(owned, optimizer).tolist()
        moved = sum(float((p.detach().double() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
        assert update == pytest.approx(moved, rel=1e-3) and weight == pytest.approx(sum(float(b.square().sum()) for b in before), rel=1e-5)


def test_watch_names_the_tensor() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    watch = optim.GradientWatch(model.named_parameters())
    model(torch.ones(2, 3)).sum().backward()
    assert watch.bad() == []
    (model[1](torch.ones(2, 3)) * math.nan).sum().backward()
    assert set(watch.bad()) == {"1.weight", "1.bias"}
    with pytest.raises(FloatingPointError, match=r"optimizer step 7, rank 3: the gradient of 1\.(weight|bias) \(and 1 more\)"):
        optim.raise_if_bad(watch.bad(), True, 3, 7)
    with pytest.raises(FloatingPointError, match="another rank"):
        optim.raise_if_bad([], True, 0, 7)
    watch.clear()
    assert watch.bad() == []


def test_canary() -> None:
    weights = {"a": torch.ones(2), "x.lora_A.w": torch.ones(3), "x.lora_B.w": torch.zeros(3), "y.lora_A.w": torch.ones(3), "y.lora_B.w": torch.zeros(3)}
    canary = optim.Canary(iter(weights.items()))
    assert set(canary.frozen(iter(weights.items()))) == set(weights)
    weights["a"] += torch.tensor([1.0, -0.5])
    weights["x.lora_B.w"] += 0.1
    assert set(canary.frozen(iter(weights.items()))) == {"y.lora_A.w", "y.lora_B.w"}


def test_position_hash_sees_changes_that_cancel() -> None:
    from posttrain.sync.fingerprint import fingerprint_tensor

    a, swapped = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])
    assert fingerprint_tensor(a) == fingerprint_tensor(swapped) and optim.position_hash(a) != optim.position_hash(swapped)
    for dtype in (torch.float64, torch.bfloat16):
        assert optim.position_hash(a.to(dtype)) != optim.position_hash(swapped.to(dtype))
