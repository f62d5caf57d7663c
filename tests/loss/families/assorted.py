"""Objectives that stand alone: a matrix of answers and instructions, a log-partition per prompt, logits as values, several objectives at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from posttrain.records import Row
from tests.loss import naive
from tests.loss.cases import NORM, Case, Data
from tests.loss.families.hybrids import mixed
from tests.loss.naive import Sequence, advantage_norm, learnt, of, total


# -- a matrix of answers and instructions ---------------------------------------------------------------------------------------------
@cache
def matrix(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """Two matrices, of 3 x 3 and 2 x 2 given texts, in any order."""
    rng, model = random.Random(seed), naive.TinyCausal(seed=seed)
    seqs: list[Sequence] = []
    for question, n in (("q1", 3), ("q2", 2)):
        for i in range(n):
            for j in range(n):
                answer = rng.randint(1, 4)
                ids = [rng.randrange(13) for _ in range(2 + answer)]
                sources = ["prompt"] * 2 + ["demo"] * answer
                seqs.append({"ids": ids, "sources": sources, "question": question, "row": i, "column": j, "trainable": [x == "demo" for x in sources]})
    rng.shuffle(seqs)
    rows = [
        Row(
            ids=s["ids"],
            sources=s["sources"],
            trainable=s["trainable"],
            group=s["question"],
            rewards={"reward": float(s["row"] == s["column"]), "instruction": float(s["row"]), "answer": float(s["column"])},
            sample_id=str(k),
        )
        for k, s in enumerate(seqs)
    ]
    return Data(seqs, rows, model)


def sami(seqs: list[Sequence], rows: bool = True, columns: bool = True, mean: bool = False) -> Tensor:
    """``1/(2n) sum_i [log softmax_j(s)_ii + log softmax_i(s)_ii]``, mean over questions."""
    out, questions = [], sorted({s["question"] for s in seqs})
    for q in questions:
        score = {}
        for s in (s for s in seqs if s["question"] == q):
            tokens = learnt(s, "demo")
            score[s["row"], s["column"]] = total([s["l"][t] for t in tokens]) / (len(tokens) if mean else 1)
        n = 1 + max(i for i, _ in score)
        for i in range(n):
            if rows:
                out.append((score[i, i] - torch.logsumexp(torch.stack([score[i, j] for j in range(n)]), 0)) / (2 * n))
            if columns:
                out.append((score[i, i] - torch.logsumexp(torch.stack([score[j, i] for j in range(n)]), 0)) / (2 * n))
    return total(out) / len(questions)


# -- a log-partition per prompt ---------------------------------------------------------------------------------------------------------
def flowrl(seqs: list[Sequence], beta: float = 15.0, cap: float = 10.0, sums: bool = False, partition: bool = True) -> Tensor:
    """``-w (log Z + mean l - beta R - mean log base)**2``, ``log Z`` a number: the best one for the group."""
    group = of(seqs, "policy")
    learnable = [s for s in group if learnt(s, "policy")]

    def away(s: Sequence) -> Tensor:
        tokens = learnt(s, "policy")
        return total([s["l"][t] - s["base"][t] for t in tokens]) / (1 if sums else len(tokens)) - beta * advantage_norm(seqs, s)

    out = []
    for s in learnable:
        peers = [x for x in learnable if x["question"] == s["question"]]
        log_z = -sum(float(away(x)) for x in peers) / len(peers) if partition else 0.0
        weight = min(math.exp(sum(float(s["l"][t]) - s["old"][t] for t in learnt(s, "policy"))), cap)
        if len(peers) > 1:
            out.append(-weight * (log_z + away(s)) ** 2)
    return total(out) / len(group)


# -- two anchors ------------------------------------------------------------------------------------------------------------------------
def remix(seqs: list[Sequence], base: float = 0.3, previous: float = 0.7, of_policy: str = "behaviour") -> Tensor:
    """GRPO by the ratio to the policy that sampled, and k3 to the base and to the policy before."""
    group, out = of(seqs, "policy"), []
    for s in group:
        a = advantage_norm(seqs, s)
        for t in learnt(s, "policy"):
            ratio = naive.r(s, t, of_policy)
            k3 = [c * (torch.exp(s[to][t] - s["l"][t]) - (s[to][t] - s["l"][t]) - 1) for c, to in ((base, "base"), (previous, "old"))]
            out.append((torch.minimum(ratio * a, naive.clip(ratio, 0.2, 0.2) * a) - k3[0] - k3[1]) / len(learnt(s, "policy")))
    return total(out) / len(group)


# -- several objectives ----------------------------------------------------------------------------------------------------------------
def halves(seqs: list[Sequence], share: float = 0.5) -> Tensor:
    """What several objectives begin with: equal shares."""
    demos = [s["l"][t] for s in of(seqs, "demo") for t in learnt(s, "demo")]
    return (1 - share) * naive.grpo(seqs) + share * total(demos) / len(demos)


# -- logits as values ------------------------------------------------------------------------------------------------------------------
def td_mle(seqs: list[Sequence], lam: float = 0.5, gamma: float = 0.9, terminal: float = 0.0, shifted: bool = True) -> Tensor:
    """Likelihood less ``lam (z[t] - gamma V[t+1])**2``, ``V`` the log-sum-exp of the logits: here log-probs plus half the first of them."""
    out, count = [], 0
    for s in of(seqs, "demo"):
        tokens = learnt(s, "demo")
        logits = {t: s["rows"][t] + (s["rows"][t][0] / 2 if shifted else 0.0) for t in tokens}
        value = {t: torch.logsumexp(logits[t], 0) for t in tokens}
        for t, following in zip(tokens, [*tokens[1:], None], strict=True):
            ahead = terminal if following is None else value[following]
            out.append(s["l"][t] - lam * (logits[t][s["ids"][t]] - gamma * ahead) ** 2)
        count += len(tokens)
    return total(out) / count


TD = ("regularizers.td.coef=0.5", "regularizers.td.gamma=0.9")
ANCHORS = ("regularizers.kl.coef=0.3", "regularizers.kl_previous.coef=0.7")




CASES = {
    "sami": Case("sami", sami, wrong=(partial(sami, rows=False), partial(sami, columns=False), partial(sami, mean=True)), data=matrix),
    "sami, without the length": Case(
        "sami",
        partial(sami, mean=True),
        overrides=("streams.matrix.advantage.score=logp_mean", "streams.matrix.aggregation._target_=posttrain.loss.aggregate.GroupSumTokenMean"),
        wrong=(sami,),
        data=matrix,
    ),
    "flowrl": Case("flowrl", flowrl, NORM, wrong=(partial(flowrl, sums=True), partial(flowrl, partition=False), partial(flowrl, beta=7.0))),
    "flowrl, cap reached": Case("flowrl", partial(flowrl, cap=1.2), NORM, ("streams.rollouts.masks.cap.max=1.2",), (flowrl,), 0.4),
    "remix": Case("remix", remix, NORM, ANCHORS, (partial(remix, of_policy="old"), partial(remix, base=0.7, previous=0.3)), 0.3),
    "recap": Case("recap", halves, NORM, wrong=(partial(halves, share=0.4), naive.grpo), data=mixed),
    "td_mle": Case(
        "td_mle", td_mle, overrides=TD, wrong=(partial(td_mle, gamma=0.5), partial(td_mle, shifted=False), partial(td_mle, terminal=1.0)), data=mixed
    ),
}
