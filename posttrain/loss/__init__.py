"""One loss with swappable terms.  ``load("grpo")`` gives a composed objective; no engine and no cluster is needed to use it.

>>> from posttrain.loss import load
>>> from posttrain.records import Row, TokenBatch
>>> objective = load("grpo", ["streams.rollouts.masks.clip.high=0.28"])
>>> objective.weights(TokenBatch.from_sequences([Row(...)]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from posttrain.loss.unified import LossOutput, Needs, Objective, Stream
from posttrain.loss.view import Metrics, TokenView

__all__ = ["LossOutput", "Metrics", "Needs", "Objective", "Stream", "TokenView", "load"]


def load(name: str, overrides: Sequence[str] = ()) -> Objective:
    """The objective of ``configs/loss/NAME.yaml`` with overrides relative to it, such as ``streams.rollouts.masks.clip.low=0.1``.

    Raises ``ValueError`` naming the losses there are when ``name`` is not one of them, or the setting when an override does not fit.
    """
    from posttrain.cli import compose_loss

    try:
        return cast(Objective, compose_loss(name, overrides))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"loss {name!r}: {error.__cause__ or error}") from error
