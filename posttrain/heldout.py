"""Held-out accuracy during a run: sample answers to the evaluation prompts with the engines' current weights, score, report an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import EvalConfig
from posttrain.evaluate import accuracy_report
from posttrain.records import Group, Prompt, Sampling

STEP = -1
"""Sampling step of evaluations: their random streams never meet those of training, and two evaluations of equal weights agree."""


@dataclass
class HeldOut:
    """``results`` maps ``before``, ``after`` and ``step N`` to reports of :func:`posttrain.evaluate.accuracy_report`."""

    config: EvalConfig
    pool: Any
    reward: Any
    prompts: Sequence[Prompt]
    sampling: Sampling
    total_steps: int
    say: Callable[[str], None]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether the weights after ``step`` steps are evaluated."""
        if self.pool is None:
            return False
        return (self.config.every > 0 and step % self.config.every == 0) or (self.config.at_end and step == self.total_steps)

    async def measure(self) -> dict[str, Any]:
        """One report, from the weights the engines hold now."""
        groups: list[Group] = await self.pool.sample(list(self.prompts), self.config.n, self.sampling, STEP)
        before = self.reward.budget.state_dict(), self.reward.metrics
        try:
            scored = await self.reward.score(groups, STEP, 1.0)
        finally:  # failed verdicts of an evaluation are in its report; they do not count against the training's budget
            self.reward.budget.load_state_dict(before[0])
            self.reward.metrics = before[1]
        return accuracy_report(scored, score=self.config.metric, threshold=self.config.threshold - 1e-9)

    async def at_start(self, run: Any) -> None:
        if self.config.at_start and self.pool is not None and run.start == 0:
            with run.timings.phase("evaluate"):
                self.results["before"] = await self.measure()
            self.say(f"held-out accuracy before training: {sentence(self.results['before'])}")

    async def after(self, run: Any, step: int) -> dict[str, float]:
        if not self.due(step):
            return {}
        with run.timings.phase("evaluate"):
            report = await self.measure()
        self.results["after" if step == self.total_steps else f"step {step}"] = report
        self.say(f"held-out accuracy after step {step}: {sentence(report)}")
        return {"eval/accuracy": report["accuracy"], "eval/low": report["interval"][0], "eval/high": report["interval"][1]}


def sentence(report: dict[str, Any]) -> str:
    """``41.2 % [35.3, 47.4] on 256 prompts``."""
    low, high = report["interval"]
    text = f"{100 * report['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] on {report['n']} prompts"
    return text + (f", {report['failed']} verdicts failed" if report["failed"] else "")
