"""Every alarm fires on the run it was made for, and stays silent on a healthy one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from posttrain.alarms import Alarms, ConstantReward, EntropyFloor, default_rules

Make = Callable[[int], dict[str, float]]
STEPS = 60


def healthy(t: int) -> dict[str, float]:
    """A run that learns: the reward rises, entropy falls slowly, lengths follow the reward, one verdict in a thousand fails."""
    row = {
        "reward/mean": 0.2 + 0.01 * t,
        "reward/std": 0.3,
        "rollouts/nll": 1.5 * math.exp(-0.03 * t),
        "rollout/tokens_mean": 40.0 + t,
        "rollout/repetition": 0.1,
        "mismatch/mean_exp_abs": 1.01,
        "mismatch/k3": 1e-4,
        "reward/exact/ok": 999.0,
        "reward/exact/bad_format": 20.0,
        "reward/exact/timeout": 1.0,
        "reward/exact/error": 0.0,
    }
    return row | ({"eval/accuracy": 0.2 + 0.008 * t, "eval/low": 0.1 + 0.008 * t, "eval/high": 0.3 + 0.008 * t} if t % 10 == 9 else {})


SICK: dict[str, Make] = {
    "entropy_floor": lambda t: {"rollouts/nll": 1.5 * math.exp(-0.12 * t)},
    "entropy_fall": lambda t: {"rollouts/nll": 1.5 if t < 30 else 0.2},
    "repetition": lambda t: {"rollout/repetition": 0.1 if t < 30 else 0.8},
    "length_drift": lambda t: {"reward/mean": 0.4, "rollout/tokens_mean": 40.0 * 1.03**t},
    "verifier_errors": lambda t: {"reward/exact/timeout": 1.0 if t < 30 else 90.0},
    "mismatch": lambda t: {"mismatch/mean_exp_abs": 1.01 if t < 30 else 1.2},
    "constant_reward": lambda t: {"reward/mean": 0.0, "reward/std": 0.0, "rollout/tokens_mean": 40.0},
    "reward_hacking": lambda t: {"eval/accuracy": 0.6 - 0.008 * t, "eval/high": 0.65 - 0.008 * t} if t % 10 == 9 else {},
}


def run(change: Make | None = None, alarms: Alarms | None = None, steps: range = range(STEPS)) -> list[tuple[str, int]]:
    alarms = alarms or Alarms()
    return [(a.name, a.step) for t in steps for a in alarms.check(t, {**healthy(t), **(change(t) if change else {})})]


def test_a_healthy_run_is_silent() -> None:
    assert run() == []


@pytest.mark.parametrize("name", SICK)
def test_the_alarm_fires_alone_and_once(name: str) -> None:
    fired = run(SICK[name])
    assert fired and {n for n, _ in fired} == {name}
    assert len(fired) == 1


def test_every_rule_has_a_run_that_fires_it() -> None:
    assert {rule.name for rule in default_rules()} == set(SICK)


def test_measured_entropy_is_preferred_to_the_estimate() -> None:
    assert run(lambda t: {"rollouts/entropy": 0.5, "rollouts/nll": 0.0}) == []


def test_kl_of_the_mismatch_fires_too() -> None:
    assert run(lambda t: {"mismatch/k3": 5e-3}) == [("mismatch", 0)]


def test_a_fall_of_accuracy_within_its_interval_is_not_hacking() -> None:
    assert run(lambda t: {"eval/accuracy": 0.6 - 0.001 * t, "eval/high": 0.7} if t % 10 == 9 else {}) == []


def test_an_alarm_that_clears_is_told_again() -> None:
    fired = run(lambda t: {"mismatch/k3": 1e-2 if t in (5, 6, 20) else 0.0})
    assert fired == [("mismatch", 5), ("mismatch", 20)]


def test_message_says_what_was_seen_and_where_to_look() -> None:
    (alarm,) = [a for t in range(STEPS) for a in Alarms().check(t, {**healthy(t), "mismatch/mean_exp_abs": 1.2})][:1]
    assert "mismatch at step 0" in alarm.text and "1.2" in alarm.text and "dtypes" in alarm.text


def test_state_survives_a_restart() -> None:
    """Interrupted in the middle of a window, the alarm comes at the step it would have come."""
    whole = run(SICK["constant_reward"])
    first = Alarms()
    early = run(SICK["constant_reward"], first, range(11))
    second = Alarms()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert early + run(SICK["constant_reward"], second, range(11, STEPS)) == whole
    with pytest.raises(ValueError, match="active"):
        second.load_state_dict({"rows": []})


def test_missing_metrics_are_no_alarm() -> None:
    assert [a for t in range(STEPS) for a in Alarms().check(t, {"demos/nll": 0.0})] == []


def test_thresholds_are_settings_and_names_are_unique() -> None:
    assert run(lambda t: {"rollouts/nll": 0.1}, Alarms([EntropyFloor(floor=0.2)])) == [("entropy_floor", 0)]
    with pytest.raises(ValueError, match="constant_reward"):
        Alarms([ConstantReward(), ConstantReward(window=3)])
