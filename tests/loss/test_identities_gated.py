"""A KL beyond a threshold, gated by the entropy, and the controller that moves the threshold."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch

from posttrain.contrib.gated import GatedKL, RewardVelocity
from posttrain.loss import Objective
from posttrain.mixture.control import recall, steer
from posttrain.records import Row, TokenBatch
from tests.loss.cases import composed


def batch(*drifts: float, entropy: float = 1.9, rewards: tuple[float, ...] = (), memory: dict[str, float] | None = None) -> TokenBatch:
    """One answer of two tokens per drift, values 0, advantages 0: the gradient is the penalty's alone."""
    rows = [
        Row(
            ids=[1, 2, 3],
            sources=["prompt", "policy", "policy"],
            advantage=0.0,
            logps={"current": [0.0, -1.0, -2.0], "old": [0.0, -1.0, -2.0], "base": [0.0, -1.0 - d, -2.0 - d], "value": [0.0] * 3, "entropy": [math.nan, entropy, entropy]},
            rewards={"reward": rewards[i]} if rewards else {},
            sample_id=str(i),
        )
        for i, d in enumerate(drifts)
    ]
    found = TokenBatch.from_sequences(rows, dtype=torch.float64).replace(memory=memory or {})
    return found.replace(totals=goal().totals(found))


def goal(**changes: Any) -> Objective:
    settings = {"decay": 0.0, "threshold": 0.3, **changes}
    return composed("safe", tuple(f"regularizers.kl.{k}={v}" for k, v in settings.items()))


def penalty(objective: Objective, given: TokenBatch) -> float:
    total, count = objective.weigh(given)[1]["rollouts/kl"]
    return 0.1 * total / count


@pytest.mark.parametrize(("drift", "entropy", "expected"), [(0.8, 1.9, 0.025), (0.8, 0.0, 0.5), (0.8, 3.9, 0.0125), (0.8, 50.0, 0.0125), (0.3, 0.0, 0.0), (-5.0, 0.0, 0.0)])
def test_published_numbers(drift: float, entropy: float, expected: float) -> None:
    """``0.1 (KL - 0.3)**2`` times 20 at an entropy of 0, 1 at 1.9, 0.5 from 3.9 on; nothing up to the threshold."""
    given = batch(drift, entropy=entropy)
    assert penalty(goal(), given) == pytest.approx(expected, abs=1e-12)
    weights = goal().weights(given)
    gate = max(0.5, 2.0 / (entropy + 0.1))
    assert weights.tolist() == pytest.approx([-0.1 * 2 * max(drift - 0.3, 0.0) * gate * drift / 2] * 2, abs=1e-12)
    assert bool(weights.any()) == (expected > 0)


def test_an_entropy_below_0_by_rounding_is_0() -> None:
    assert penalty(goal(), batch(0.8, entropy=-1e-7)) == penalty(goal(), batch(0.8, entropy=0.0))
    with pytest.raises(ValueError, match="eps=0 must be above 0: an entropy may be 0"):
        GatedKL(eps=0)


def test_the_kl_is_that_of_the_step_and_not_of_an_answer() -> None:
    """Two answers that drift apart have a KL of 0 between them by k1, and no penalty; alone, one of them has."""
    assert not goal().weights(batch(1.0, -1.0)).any() and goal().weights(batch(1.0)).any()
    pulled = goal(threshold=-0.1).weights(batch(1.0, -1.0))
    assert pulled.tolist()[0] < 0 < pulled.tolist()[-1], "both are drawn back to the base"
    with pytest.raises(ValueError, match="GatedKL must see the whole optimizer step"):
        GatedKL().gradient(goal().views(batch(1.0, 1.0).take([0]))["rollouts"])


def test_the_running_mean_is_carried_on() -> None:
    objective = goal(decay=0.9, threshold=0.05)
    memory: dict[str, float] = {}
    seen = []
    for drift in (1.0, 1.0, 0.0):
        given = batch(drift, memory=memory)
        seen.append((objective.weigh(given)[1]["rollouts/kl/running"][0], bool(objective.weights(given).any())))
        memory = objective.remember(given)
    assert [x for x, _ in seen] == pytest.approx([0.1, 0.19, 0.171])
    assert [on for _, on in seen] == [True, True, False], "where nothing has drifted there is nothing to draw back"
    assert memory["rollouts/GatedKL.kl"] == pytest.approx(0.171) and objective.remembers
    assert json.loads(json.dumps(memory)) == memory


def test_what_it_reports() -> None:
    found = goal().weigh(batch(0.8, 0.2, entropy=0.4, rewards=(1.0, math.nan)))[1]
    assert found["rollouts/kl/drift"] == (pytest.approx(2.0), 4.0) and found["rollouts/kl/gate"] == (pytest.approx(4.0), 1.0)
    assert found["rollouts/kl/reward"] == (1.0, 1.0) and goal().weigh(batch(0.8))[1]["rollouts/kl/reward"] == (0.0, 0.0)


def test_it_stands_in_the_published_objective() -> None:
    objective = composed("safe")
    assert objective.needs.references == {"old", "base", "value", "entropy"} and objective.needs.keep_whole == "batch"
    (control,) = objective.controls.values()
    assert control == RewardVelocity("threshold")
    penalised = objective.regularizers["kl"]
    assert (penalised.coef, penalised.decay, penalised.certain, penalised.eps, penalised.least) == (0.1, 0.9, 2.0, 0.1, 0.5)
    moved = batch(0.8, memory={"control/threshold.value": 0.5})
    assert penalty(composed("safe", ("regularizers.kl.decay=0",)), moved) == pytest.approx(0.1 * 0.09)


# -- the controller ------------------------------------------------------------------------------------------------------------------
def after(control: RewardVelocity, rewards: list[float], memory: dict[str, float] | None = None) -> dict[str, float]:
    memory = dict(memory or {})
    for reward in rewards:
        memory |= steer({control.name: control}, memory, {control.metric: (reward, 1.0)}, 8)
    return memory


def naive(rewards: list[float], kp: float = 0.3, ki: float = 0.01, kd: float = 0.05) -> list[float]:
    """The release's update line by line, without its phases."""
    out, ema, integral, before = [], None, 0.0, 0.0
    for reward in rewards:
        if ema is None:
            ema, adjustment = reward, 0.0
        else:
            old, ema = ema, 0.95 * ema + 0.05 * reward
            error = (ema - old) - 0.001
            integral = max(-1.0, min(1.0, integral + error))
            adjustment = kp * error + ki * integral + kd * (error - before)
            before = error
        out.append(max(0.1, min(0.6, 0.3 + adjustment)))
    return out


def test_it_is_the_released_update_away_from_its_bounds() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = (torch.rand(30, generator=draw) + torch.arange(30) / 10).tolist()
    control = RewardVelocity("threshold")
    ours = [recall(control, after(control, rewards[: n + 1]))["value"] for n in range(len(rewards))]
    assert ours == pytest.approx(naive(rewards), rel=1e-12) and len({round(x, 9) for x in ours}) > 20
    assert ours[0] == 0.3 and ours != pytest.approx(naive(rewards, kd=0.0), rel=1e-6)
    assert control(0.5) == 0.3 and control.value(control.begin()) == 0.3
    assert pickle.loads(pickle.dumps(control)) == control


def test_a_step_without_rewards_leaves_it_alone() -> None:
    control = RewardVelocity("threshold")
    memory = after(control, [0.0, 1.0, 2.0])
    assert steer({"threshold": control}, memory, {control.metric: (0.0, 0.0)}, 8) == {k: v for k, v in memory.items() if k.startswith("control/")}


def test_a_run_that_is_resumed_goes_on_where_it_was() -> None:
    control, rewards = RewardVelocity("threshold", ki=0.3), [0.1, 0.9, 0.4, 2.0, 1.0, 0.2]
    saved = json.loads(json.dumps(after(control, rewards[:3])))
    assert after(control, rewards[3:], saved) == after(control, rewards)
    assert after(control, rewards[3:]) != after(control, rewards)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_at_a_bound_the_sum_does_not_wind_up(sign: float) -> None:
    """A thousand steps against a bound, then the other way: it leaves the bound at once, where a sum that went on growing would hold it there."""
    control = RewardVelocity("t", kp=0.1, ki=0.3, kd=0.0, decay=0.0, target=0.0, limit=100.0)
    climb = [sign * float(x) for x in range(1000)]
    memory = after(control, climb)
    bound = 0.6 if sign > 0 else 0.1
    assert recall(control, memory)["value"] == bound
    turned = [climb[-1] - sign * 1.0 * (k + 1) for k in range(3)]
    assert recall(control, after(control, turned[:1], memory))["value"] != bound
    wound = recall(control, memory)["sum"]
    assert abs(wound) < 2.0, "a sum of all errors would be 100"
    held = {**memory, "control/t.sum": sign * 100.0}
    assert recall(control, after(control, turned, held))["value"] == bound


@pytest.mark.parametrize("changes", [{"base": 0.7}, {"low": 0.4}, {"decay": 1.0}, {"limit": 0.0}, {"kp": -0.1}])
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="RewardVelocity"):
        RewardVelocity("t", **changes)
    for wrong in ({"decay": 1.0}, {"certain": -1.0}, {"to": "self"}):
        with pytest.raises(ValueError, match="GatedKL"):
            GatedKL(**wrong)  # type: ignore[arg-type]
