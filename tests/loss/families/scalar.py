"""Objectives of models that answer with a number: the number at a column stands in the place of the token's log-probability.

In a run one column per sequence (or step) is read; here all learnt ones are, which the transcriptions do alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from tests.loss.cases import Case, Data, make
from tests.loss.families.policy import gae
from tests.loss.families.preference import ANSWERS, labelled, log_sigmoid, logp, only, over_pairs, pairs, sigmoid, tokens
from tests.loss.naive import Sequence, learnt, of, total


def reward_model(seqs: list[Sequence], margin: float = 0.0, centre: float = 0.0, gap: bool = False, sign: float = 1.0) -> Tensor:
    """Bradley-Terry with a margin, and a penalty on the square of the two numbers' sum."""

    def loss(w: Sequence, r: Sequence) -> Tensor:
        own = margin + (w["rewards"]["margin"] - r["rewards"]["margin"] if gap else 0.0)
        return -log_sigmoid(logp(w) - logp(r) - own) + centre * (logp(w) + sign * logp(r)) ** 2

    return over_pairs(seqs, loss)


def pointwise(seqs: list[Sequence], squared: bool = False) -> Tensor:
    """Binary cross-entropy, or the squared error, of the number at every learnt column with the answer's label; mean over answers of their sums."""
    found = labelled(seqs)
    out = []
    for s in found:
        y = s["rewards"]["label"]
        for t in tokens(s):
            r = s["l"][t]
            out.append((r - y) ** 2 if squared else -(y * torch.log(sigmoid(r)) + (1 - y) * torch.log(1 - sigmoid(r))))
    return -total(out) / len(found)


def steps(seqs: list[Sequence], squared: bool = False) -> Tensor:
    """The error of every learnt column with a label of its own, mean over the columns of the step."""
    found = [(s["l"][t], s["a"][t]) for s in of(seqs, "demo") if "pair" not in s for t in learnt(s, "demo")]
    loss = [(r - y) ** 2 if squared else -(y * torch.log(sigmoid(r)) + (1 - y) * torch.log(1 - sigmoid(r))) for r, y in found]
    return -total(loss) / len(found)


def value(seqs: list[Sequence], clip: float | None = 0.2, half: float = 0.5, smaller: bool = False) -> Tensor:
    """The critic's loss of PPO as released."""
    out = []
    for s in of(seqs, "policy"):
        for t in learnt(s, "policy"):
            v, old, g = s["l"][t], s["value"][t], s["a"][t]
            errors = [(v - g) ** 2]
            if clip is not None:
                errors.append((torch.clamp(v, old - clip, old + clip) - g) ** 2)
            out.append(half * (min(errors) if smaller else max(errors)))
    return -total(out) / len(out)


def contrast(seqs: list[Sequence], own: float = 1.0, averaged: bool = False) -> Tensor:
    """The mean number of given answers less that of the policy's own."""
    given, sampled = zip(*pairs(seqs), strict=True)
    size = [len(tokens(s)) if averaged else 1 for s in (*given, *sampled)]
    values = [logp(s) / n for s, n in zip((*given, *sampled), size, strict=True)]
    return total(values[: len(given)]) / len(given) - own * total(values[len(given) :]) / len(sampled)


def gated(seqs: list[Sequence], threshold: float = -0.4, coef: float = 2.0, gate: bool = True, slope: str = "k2", power: int = 2) -> Tensor:
    """The clipped surrogate with a critic, less a hinge on the step's mean log-ratio whose slope is that of an estimator of the KL."""
    on = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    ratios = [s["l"][t] - s["base"][t] for s, t in on]
    over = max(float(sum(float(d) for d in ratios)) / len(on) - threshold, 0.0)
    entropy = sum(s["entropy"][t] for s, t in on) / len(on)
    factor = max(0.5, 2.0 / (entropy + 0.1)) if gate else 1.0
    kl = total([d**2 / 2 if slope == "k2" else d for d in ratios]) / len(on)
    return gae(seqs, whiten=True, ddof=1) - coef * factor * power * over ** (power - 1) * kl


@cache
def graded(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """The common sequences with a label from 0 to 1 on every token, some hard and some soft."""
    data, draw = make(seed, advantage, spread), torch.Generator().manual_seed(seed)
    seqs, rows = [], []
    for s, row in zip(data.seqs, data.rows, strict=True):
        labels = [round(x) if x < 0.5 else x for x in torch.rand(len(s["ids"]), generator=draw, dtype=torch.float64).tolist()]
        seqs.append({**s, "a": labels})
        rows.append(replace(row, advantage=labels))
    return Data(seqs, rows, data.model)


GAP = "streams.pairs.advantage.gap=margin"
CENTRE = "regularizers.centre.coef=0.05"
STEPS = "streams.steps.advantage.f=squared"
ABOVE = ("regularizers.kl.threshold=-0.4", "regularizers.kl.coef=2.0", "regularizers.kl.decay=0.0")
CASES = {
    "reward_model": Case("reward_model", reward_model, wrong=(partial(reward_model, margin=0.5), partial(reward_model, centre=0.1)), data=only),
    "reward_model with a margin and centring": Case(
        "reward_model",
        partial(reward_model, margin=0.5, centre=0.05),
        overrides=("streams.pairs.advantage.margin=0.5", CENTRE),
        wrong=(partial(reward_model, margin=-0.5, centre=0.05), partial(reward_model, margin=0.5, centre=0.05, sign=-1.0)),
        data=only,
    ),
    "reward_model with margins of the pairs": Case(
        "reward_model", partial(reward_model, gap=True), overrides=(GAP,), wrong=(reward_model,), data=only
    ),
    "reward_model_pointwise": Case("reward_model_pointwise", pointwise, wrong=(partial(pointwise, squared=True),), data=ANSWERS),
    "reward_model_pointwise, squared": Case(
        "reward_model_pointwise", partial(pointwise, squared=True), overrides=("streams.demos.advantage.f=squared",), wrong=(pointwise,), data=ANSWERS
    ),
    "reward_from_data": Case("reward_from_data", contrast, wrong=(partial(contrast, own=0.0), partial(contrast, averaged=True), reward_model), data=only),
    "process_reward_model": Case("process_reward_model", steps, wrong=(partial(steps, squared=True),), data=graded),
    "process_reward_model, squared": Case("process_reward_model", partial(steps, squared=True), overrides=(STEPS,), wrong=(steps,), data=graded),
    "value": Case("value", value, wrong=(partial(value, clip=None), partial(value, smaller=True), partial(value, half=1.0))),
    "value, not clipped": Case("value", partial(value, clip=None), overrides=("streams.rollouts.advantage.clip=null",), wrong=(value,)),
    "fine_grained": Case(
        "fine_grained",
        partial(gae, coef=0.3, each=True, whiten=True, ddof=1),
        wrong=(partial(gae, coef=0.3, whiten=True, ddof=1), partial(gae, coef=0.3, each=True), partial(gae, lam=1.0, coef=0.3, each=True, whiten=True, ddof=1)),
    ),
    "concise_rl": Case("concise_rl", partial(gae, per_answer=True), wrong=(gae, partial(gae, lam=1.0, per_answer=True), partial(gae, coef=0.05, per_answer=True))),
    "safe": Case("safe", partial(gae, whiten=True, ddof=1), wrong=(gated, partial(gae, coef=0.05, whiten=True, ddof=1))),
    "safe, above the threshold": Case(
        "safe",
        gated,
        overrides=ABOVE,
        wrong=(partial(gae, whiten=True, ddof=1), partial(gated, gate=False), partial(gated, slope="k1"), partial(gated, power=1), partial(gated, threshold=-0.5)),
    ),
    "ppo_gae": Case(
        "ppo_gae",
        partial(gae, coef=0.05, whiten=True, ddof=1),
        wrong=(partial(gae, coef=0.05, whiten=True), partial(gae, whiten=True, ddof=1), partial(gae, gamma=0.9, coef=0.05, whiten=True, ddof=1)),
    ),
}
