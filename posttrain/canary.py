"""Checks that a run is really training what it says it trains; all are on by default.

* at the first step, the learner's and the engine's log-probs of the sampled tokens agree within the tolerance of the dtype, or the run stops;
* after the first optimizer steps that had a gradient, every trainable tensor has moved;
* the reward is not constant for ``check.constant_reward_steps`` steps, and the other rules of ``alarms.py``;
* after every publish the engine's fingerprint equals the learner's (in ``sync``), which for adapters means that the engine serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.config import CheckConfig


class CanaryError(RuntimeError):
    """The run is not training what it claims.  The message says what was seen and where to look."""


@dataclass
class Canaries:
    """``patience``: optimizer steps with a gradient after which every tensor must have moved (2 for adapters: one half starts at zero)."""

    config: CheckConfig
    learner: Any
    patience: int = 1
    moving_steps: int = 0
    moved: bool = False

    async def after(self, step: int, totals: Any) -> None:
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
