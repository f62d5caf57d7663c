"""Objectives around judges: a reward that fades with the drift, and the clipped surrogate on a probability of winning."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.advantage import Reward
from tests.loss import naive
from tests.loss.cases import REWARD, Case
from tests.loss.naive import Sequence, learnt, of, total


def cgpo(seqs: list[Sequence], limit: float = 10.0, most: float | None = None, center: bool = True, floor: bool = True) -> Tensor:
    """The mean over answers of (paid reward - its mean) times the log-likelihood; what is paid carries no gradient."""
    group = of(seqs, "policy")
    paid = []
    for s in group:
        drift = sum(float(s["l"][t]) - s["base"][t] for t in learnt(s, "policy"))
        share = 1 - drift / limit
        share = max(share, 0.0) if floor else share
        paid.append(s["reward"] * (share if most is None else min(share, most)))
    mean = sum(paid) / len(paid) if center else 0.0
    each = [torch.stack([s["l"][t] for t in learnt(s, "policy")]).sum() * (p - mean) if learnt(s, "policy") else torch.zeros(()) for s, p in zip(group, paid, strict=True)]
    return total(each) / len(group)


def wins(seqs: list[Sequence], center: float = 0.5) -> Tensor:
    """PPO's surrogate on P - 1/2, mean over tokens."""
    out = [naive.surrogate(s, t, s["reward"] - center) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    return total(out) / len(out)


A = "streams.rollouts.advantage"
CASES: dict[str, Case] = {
    "cgpo": Case("cgpo", cgpo, REWARD, wrong=(lambda s: cgpo(s, 1.0), lambda s: cgpo(s, center=False), naive.reinforce)),
    "cgpo, drift beyond the limit": Case("cgpo", lambda s: cgpo(s, 0.2), REWARD, (f"{A}.limit=0.2",), (lambda s: cgpo(s, 0.2, floor=False), cgpo)),
    "cgpo, bounded": Case("cgpo", lambda s: cgpo(s, 0.5, 1.0), REWARD, (f"{A}.limit=0.5", f"{A}.most=1.0"), (lambda s: cgpo(s, 0.5),)),
    "cgpo, a wide limit and no mean is reinforce": Case("cgpo", naive.reinforce, REWARD, (f"{A}.limit=1e12", f"{A}.center=false"), (cgpo,)),
    "pairwise_rl": Case("pairwise_rl", wins, Reward(0.5), wrong=(lambda s: wins(s, 0.0),)),
}
