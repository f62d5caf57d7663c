"""What a step looked like, told to everybody who wants to know: the console, the metrics file, the trackers and the completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.advantage.group import statistics
from posttrain.alarms import Alarms, ConstantReward, default_rules
from posttrain.canary import CanaryError
from posttrain.config import RunConfig
from posttrain.folder import RunFolder
from posttrain.metrics import Accumulator, repetition
from posttrain.mixture.gate import is_given
from posttrain.records import Group, Rollout


@dataclass
class Reporter:
    """``last`` holds the metrics of the newest step.  Used as a context manager, so that every writer is closed."""

    config: RunConfig
    stage: str
    folder: RunFolder
    console: Any
    tokenizer: Any
    timings: Any
    start: int
    last: dict[str, float] = field(default_factory=dict)
    alarms: Alarms = field(init=False)
    _since: float = 0.0

    def __post_init__(self) -> None:
        steps = self.config.check.constant_reward_steps
        rules = [ConstantReward(steps) if isinstance(rule, ConstantReward) else rule for rule in default_rules()]
        self.alarms = Alarms([rule for rule in rules if steps or not isinstance(rule, ConstantReward)])

    def __enter__(self) -> Reporter:
        from posttrain.tracking import CompletionsWriter, open_trackers

        tracking = self.config.tracking
        self.trackers = open_trackers(
            self.folder.root,
            self.stage,
            resume_step=self.start,
            wandb=tracking.wandb,
            tensorboard=tracking.tensorboard,
            project=tracking.project,
            name=self.folder.root.name,
        )
        self.completions = CompletionsWriter(self.folder.of("completions", self.stage))
        self.console.start_stage(self.stage, self.config.steps, self.start)
        self._since = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        for tracker in self.trackers:
            tracker.close()

    def step(self, step: int, metrics: dict[str, float], items: Sequence[Any]) -> None:
        """``step`` counts from 0; files and people count finished steps, from 1."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        rollouts = [r for i in items if isinstance(i, Group) for r in i.rollouts if not is_given(r)]
        shown = {"progress/step": float(step + 1), **metrics, **_group_metrics(items), **_rollout_metrics(rollouts)}
        tokens = sum(v for k, v in shown.items() if k.endswith("/tokens") and k.count("/") == 1 and k != "mismatch/tokens")
        shown |= {"time/step_s": seconds, "time/tokens_per_s": tokens / max(seconds, 1e-9)}
        shown |= {f"time/{phase}_s": value for phase, value in self.timings.last().items()}
        self.last = shown
        for tracker in self.trackers:
            tracker.log(step + 1, shown)
        tracking = self.config.tracking
        if rollouts and tracking.completions_every and step % tracking.completions_every == 0:
            limit = None if tracking.completions_per_step < 0 else tracking.completions_per_step
            self.completions.write(step + 1, rollouts[:limit])
        for alarm in self.alarms.check(step + 1, shown):
            if self.config.check.alarm == "stop":
                raise CanaryError(f"{alarm.text} (check.alarm=warn only tells)")
            self.console.message(f"alarm: {alarm.text}")
        groups = [i.rollouts for i in items if isinstance(i, Group) and i.rollouts]
        self.console.step(step + 1, shown, [g[step % len(g)] for g in groups[: tracking.console_samples]])


def _group_metrics(items: Sequence[Any]) -> dict[str, float]:
    """What the advantages were made of; answers that were given count for nothing."""
    groups = [replace(i, rollouts=tuple(r for r in i.rollouts if not is_given(r))) for i in items if isinstance(i, Group)]
    measured = Accumulator()
    measured.add(statistics(groups))
    return measured.result()


def _rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Reward, length and truncation of what this step learnt from."""
    if not rollouts:
        return {}
    rewards = [r.reward for r in rollouts if r.reward is not None]
    lengths = sorted(r.num_tokens for r in rollouts)
    out = {
        "rollout/tokens_mean": sum(lengths) / len(lengths),
        "rollout/tokens_max": float(lengths[-1]),
        "rollout/repetition": sum(repetition([i for s in r.segments for i in s.ids]) for r in rollouts) / len(rollouts),
        "rollout/truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
    }
    if rewards:
        mean = sum(rewards) / len(rewards)
        out |= {"reward/mean": mean, "reward/std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5}
    advantages = [abs(r.advantage) for r in rollouts if r.advantage is not None]
    if advantages:
        out["advantage/dead"] = sum(a == 0.0 for a in advantages) / len(advantages)
    return out
