"""Checks that a run is really training what it says it trains; all are on by default.

* at the first step, the learner's and the engine's log-probs of the sampled tokens agree within the tolerance of the dtype, or the run stops;
* after the first optimizer steps that had a gradient, every trainable tensor has moved;
* the reward is not constant for ``constant_reward_steps`` steps;
* after every publish the engine's fingerprint equals the learner's (in ``sync``), which for adapters means that the engine serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import CheckConfig
from posttrain.records import Group


class CanaryError(RuntimeError):
    """The run is not training what it claims.  The message says what was seen and where to look."""


@dataclass
class Canaries:
    """``patience``: optimizer steps with a gradient after which every tensor must have moved (2 for adapters: one half starts at zero)."""

    config: CheckConfig
    learner: Any
    warn: Callable[[str], None]
    patience: int = 1
    moving_steps: int = 0
    moved: bool = False
    flat_steps: int = 0
    last_reward: float | None = None
    told: set[str] = field(default_factory=set)

    async def after(self, step: int, items: Sequence[Any], totals: Any) -> None:
        result = totals.result()
        if self.config.weights_moved and not self.moved and result.get("learner/grad_norm", 0.0) > 0 and result.get("learner/lr", 0.0) > 0:
            self.moving_steps += 1
            if self.moving_steps >= self.patience:
                frozen = await self.learner.frozen()
                if frozen:
                    raise CanaryError(
                        f"after {self.moving_steps} optimizer steps {len(frozen)} trainable tensors have not moved, first {', '.join(frozen[:5])}; "
                        "they get no gradient (unused by the forward?) or the update is below the dtype's resolution (raise learner.lr, or use "
                        "model.dtype=float32); check.weights_moved=false silences this"
                    )
                self.moved = True
        self._constant_reward(items)

    def _constant_reward(self, items: Sequence[Any]) -> None:
        rewards = {r.reward for i in items if isinstance(i, Group) for r in i.rollouts if r.reward is not None}
        if not rewards:
            return
        constant = len(rewards) == 1 and self.last_reward in (None, next(iter(rewards)))
        self.flat_steps = self.flat_steps + 1 if constant else 0
        self.last_reward = next(iter(rewards)) if len(rewards) == 1 else None
        if self.config.constant_reward_steps and self.flat_steps == self.config.constant_reward_steps:
            self.alarm(
                f"every rollout of the last {self.flat_steps} steps had the same reward ({self.last_reward}): there is nothing to learn from; "
                "look at the completions, the answer's format and the reward function"
            )

    def alarm(self, text: str) -> None:
        """Warn, or stop the run, as ``check.alarm`` says; each text once."""
        if self.config.alarm == "stop":
            raise CanaryError(text)
        if text not in self.told:
            self.told.add(text)
            self.warn(f"alarm: {text}")
