"""A step is told to everybody, and alarms are wired to it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.canary import CanaryError
from posttrain.config import CheckConfig, RunConfig
from posttrain.folder import RunFolder
from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.report.reporter import Reporter
from posttrain.watchdog import Timings


def groups(*rewards: float) -> list[Any]:
    prompt = Prompt("p", (1, 2))
    segment = Segment((3, 4), Source.policy, logprobs=(-1.0, -0.5), version=0)
    return [Group(prompt, tuple(Rollout(f"s{i}", prompt, (segment,), "stop", text="x", reward=r) for i, r in enumerate(rewards)))]


@pytest.fixture
def make(tmp_path):
    said: list[str] = []

    def reporter(**check: Any) -> Reporter:
        console = SimpleNamespace(start_stage=lambda *a: None, step=lambda *a: None, message=said.append)
        config = RunConfig(loss=None, check=CheckConfig(**check))
        return Reporter(config, "train", RunFolder(tmp_path, False), console, None, Timings(), 0)

    reporter.said = said  # type: ignore[attr-defined]
    return reporter


def test_a_row_holds_the_step_and_what_the_rollouts_were_like(make, tmp_path):
    with make() as reporter:
        reporter.step(0, {"rollouts/tokens": 4.0}, groups(0.0, 1.0))
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 1 and row["reward/mean"] == 0.5 and row["rollout/tokens_mean"] == 2.0 and row["rollout/repetition"] == 0.0
    assert list((tmp_path / "completions").iterdir())


def test_advantages_and_failed_verdicts_are_in_the_row(make, tmp_path):
    first, second, third = (replace(groups(*r)[0], prompt=Prompt(str(i), (1,))) for i, r in enumerate([(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]))
    first = replace(first, rollouts=tuple(replace(r, advantage=a) for r, a in zip(first.rollouts, (-1.0, 1.0), strict=True)))
    third = replace(third, rollouts=(third.rollouts[0], replace(third.rollouts[1], reward=None)))
    with make() as reporter:
        reporter.step(0, {}, [first, second, third])
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["advantage/abs"] == 1.0 and row["advantage/dead_groups"] == 1 / 3 == row["advantage/single_groups"]
    assert row["reward/failed"] == 1 / 6 and row["reward/mean"] == 3 / 5


def test_a_constant_reward_is_told_once(make):
    with make(constant_reward_steps=3) as reporter:
        for step in range(5):
            reporter.step(step, {}, groups(0.0, 0.0))
    told = [text for text in make.said if "constant_reward" in text]
    assert len(told) == 1 and "at step 3" in told[0]


def test_no_alarm_when_it_is_switched_off_or_rewards_differ(make):
    with make(constant_reward_steps=0) as off, make(constant_reward_steps=2) as on:
        for step in range(4):
            off.step(step, {}, groups(0.0, 0.0))
            on.step(step, {}, groups(0.0, float(step)))
    assert not make.said


def test_an_alarm_can_stop_the_run(make):
    with make(constant_reward_steps=2, alarm="stop") as reporter:
        reporter.step(0, {}, groups(1.0, 1.0))
        with pytest.raises(CanaryError, match="constant_reward at step 2"):
            reporter.step(1, {}, groups(1.0, 1.0))


def test_alarms_are_remembered_across_a_resume(make):
    first, second = make(constant_reward_steps=3), make(constant_reward_steps=3)
    with first:
        for step in range(2):
            first.step(step, {}, groups(0.0, 0.0))
    second.alarms.load_state_dict(json.loads(json.dumps(first.alarms.state_dict())))
    with second:
        second.step(2, {}, groups(0.0, 0.0))
    assert any("constant_reward at step 3" in text for text in make.said)
