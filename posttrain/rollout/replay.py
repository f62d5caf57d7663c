"""The rollout stage of SFT and preference learning: the data set, as it is.

It has the engine pool's place in the loop, so that the controller asks no question about the kind of run: ``sample`` gives back what
was drawn,
``publish`` has nobody to tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from posttrain.records import Demo, Pair, Sampling

Item = TypeVar("Item", Demo, Pair)


class Replay:
    """Demonstrations and pairs pass through unchanged.  ``version`` is the newest published one, for the log."""

    def __init__(self) -> None:
        self.version = 0

    async def ready(self) -> None:
        """There is nothing to wait for."""

    async def sample(self, items: Sequence[Item], n: int = 1, sampling: Sampling | None = None, step: int = 0) -> list[Item]:
        """The items, in order.  Raises ``ValueError`` for ``n`` other than 1 and for anything that is neither a demonstration nor a
        pair."""
        if n != 1:
            raise ValueError(f"rollout.n={n}: given data has one answer per record; set rollout.n=1, or rollout=vllm to sample several")
        for item in items:
            if not isinstance(item, (Demo, Pair)):
                raise ValueError(
                    f"rollout=replay got a {type(item).__name__}; it needs demonstrations or pairs, prompts alone must be answered by "
                    "an engine"
                )
        return list(items)

    async def publish(self, version: int, buckets: Sequence[Any] = (), fingerprint: Mapping[str, Any] | None = None) -> None:
        self.version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing was started."""
