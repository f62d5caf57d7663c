"""Canaries: a tensor that does not move stops the run, whose ever it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.canary import Canaries, CanaryError
from posttrain.config import CheckConfig
from posttrain.metrics import Accumulator


class Ranks:
    def __init__(self, *frozen: str) -> None:
        self.names, self.looked = list(frozen), 0

    async def frozen(self) -> list[str]:
        self.looked += 1
        return self.names


def after(canaries: Canaries, *moving: str) -> None:
    totals = Accumulator()
    totals.add({f"{name}/{what}": (1.0, 1.0) for name in moving for what in ("grad_norm", "lr")})
    asyncio.run(canaries.after(0, totals))


@pytest.mark.parametrize("which", ["learner", "critic"])
def test_a_frozen_tensor_stops_the_run_and_its_model_is_named(which: str) -> None:
    ranks: dict[str, Any] = {"learner": Ranks(), "critic": Ranks(), which: Ranks("layer.weight")}
    canaries = Canaries(CheckConfig(), ranks["learner"], critic=ranks["critic"])
    with pytest.raises(CanaryError, match=rf"1 trainable tensors of the {which} have not moved, first layer\.weight.*raise {which}\.lr"):
        after(canaries, "learner", "critic")


def test_each_model_is_looked_at_once_after_its_own_steps() -> None:
    learner, critic = Ranks(), Ranks()
    canaries = Canaries(CheckConfig(), learner, patience=2, critic=critic)
    after(canaries, "critic")  # the critic warms up: the policy has no step yet
    assert (learner.looked, critic.looked) == (0, 0)
    after(canaries, "critic")
    assert (learner.looked, critic.looked) == (0, 1)
    for _ in range(3):
        after(canaries, "learner", "critic")
    assert (learner.looked, critic.looked) == (1, 1)


def test_who_is_not_looked_at() -> None:
    stuck = Ranks("w")
    after(Canaries(CheckConfig(weights_moved=False), stuck, critic=stuck), "learner", "critic")
    after(Canaries(CheckConfig(), stuck, critic=stuck))  # no gradient yet
    resumed = Canaries(CheckConfig(), stuck, critic=stuck)
    resumed.resumed()
    after(resumed, "learner", "critic")
    after(Canaries(CheckConfig(), Ranks()), "critic")
    assert stuck.looked == 0
