"""Checks that a run is really training what it says it trains; all are on by default.

* at the first step, the learner's and the engine's log-probs of the sampled tokens agree within the tolerance of the dtype, or the run stops;
* after the first optimizer steps that had a gradient, every trainable tensor has moved, of the policy and of the critic;
* the reward is not constant for ``check.constant_reward_steps`` steps, and the other rules of ``alarms.py``;
* after every publish the engine's fingerprint equals the learner's (in ``sync``), which for adapters means that the engine serves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.config import CheckConfig


class CanaryError(RuntimeError):
    """The run is not training what it claims.  The message says what was seen and where to look."""


@dataclass
class Canaries:
    """``patience``: optimizer steps with a gradient after which every tensor must have moved (2 for adapters: one half starts at zero).  ``critic``: the
    ranks of the critic, which is watched in the same way; None without one."""

    config: CheckConfig
    learner: Any
    patience: int = 1
    critic: Any = None
    moving_steps: dict[str, int] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)

    def resumed(self) -> None:
        """A run that goes on has been watched before, and a restored tensor has not moved yet."""
        self.moved |= {"learner", "critic"}

    async def after(self, step: int, totals: Any) -> None:
        result = totals.result()
        for name, ranks in (("learner", self.learner), ("critic", self.critic)):
            moving = result.get(f"{name}/grad_norm", 0.0) > 0 and result.get(f"{name}/lr", 0.0) > 0
            if ranks is None or not self.config.weights_moved or name in self.moved or not moving:
                continue
            self.moving_steps[name] = self.moving_steps.get(name, 0) + 1
            if self.moving_steps[name] >= self.patience:
                await self._look(name, ranks)

    async def _look(self, name: str, ranks: Any) -> None:
        frozen = await ranks.frozen()
        if frozen:
            raise CanaryError(
                f"after {self.moving_steps[name]} optimizer steps {len(frozen)} trainable tensors of the {name} have not moved, first {', '.join(frozen[:5])}; "
                f"they get no gradient (unused by the forward?) or the update is below the dtype's resolution (raise {name}.lr, or use "
                "model.dtype=float32); check.weights_moved=false silences this"
            )
        self.moved.add(name)
