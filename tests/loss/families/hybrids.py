"""Supervised fine-tuning and its mixtures with reinforcement learning, transcribed from their papers and releases.

Rollouts and demonstrations of :func:`tests.loss.cases.make`; demonstrations are scored by ``old`` and everything by a ``teacher``, as in a run whose loss
asks for them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from posttrain.advantage import Chain, PositivePart, Reward
from posttrain.records import Group
from tests.loss import naive
from tests.loss.cases import CENTER, NORM, Case, Data, make
from tests.loss.naive import Sequence, advantage_center, advantage_norm, dft, learnt, of, r, sft, surrogate, total

_POSITIVE = Chain({"reward": Reward(), "positive": PositivePart()})


def positive(groups: list[Group]) -> list[Group]:
    return _POSITIVE(groups)


@cache
def mixed(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """Rollouts and demonstrations (the pairs' sides among them), with ``old`` and ``teacher`` on every token."""
    data, rng = make(seed, advantage, spread), random.Random(seed + 500)
    seqs, rows = [dict(s) for s in data.seqs], []
    for s, row in zip(seqs, data.rows, strict=True):
        s.pop("pair", None)
        with torch.no_grad():
            logp = [math.nan, *data.model.alone(s["ids"]).tolist()]
        s["teacher"] = [x + rng.gauss(0.0, 2 * spread) for x in logp]
        if "demo" in s["sources"]:
            s["old"] = [x + rng.gauss(0.0, spread) for x in logp]
        if not isinstance(row.advantage, list):
            s["given_advantage"] = row.advantage
        rows.append(replace(row, pair=None, side=None, logps={**row.logps, "old": s["old"], "teacher": s["teacher"]}))
    return Data(seqs, rows, data.model)


@cache
def confident(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """The same texts under a sharper policy, for weights that vanish unless a token is probable.  Its recorded log-probs mean nothing."""
    data = mixed(seed, advantage, spread)
    model = deepcopy(data.model)
    with torch.no_grad():
        model.head.mul_(4.0)
    return Data([dict(s) for s in data.seqs], data.rows, model)


# -- pieces --------------------------------------------------------------------------------------------------------------------------
def tokens(seqs: list[Sequence], source: str) -> list[tuple[Sequence, int]]:
    return [(s, t) for s in of(seqs, source, paired=False) for t in learnt(s, source)]


def mean(values: list[Tensor]) -> Tensor:
    return total(values) / len(values)


def nll_mean(seqs: list[Sequence]) -> Tensor:
    return mean([s["l"][t] for s, t in tokens(seqs, "demo")])


def p(s: Sequence, t: int) -> Tensor:
    return torch.exp(s["l"][t])


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two rows of log-probabilities."""
    return (a.exp() * (a - b)).sum()


def entropy(row: Tensor) -> Tensor:
    return -(row.exp() * row).sum()


def bonus(seqs: list[Sequence], coef: float = 0.001) -> Tensor | float:
    """The entropy of demonstrations and rollouts alike, over their common token count."""
    return coef and coef * mean([entropy(s["rows"][t]) for source in ("policy", "demo") for s, t in tokens(seqs, source)])


# -- supervised ----------------------------------------------------------------------------------------------------------------------
def asft(seqs: list[Sequence], coef: float = 0.1, weighted: bool = True, forward: bool = True) -> Tensor:
    """arXiv 2509.23753: ``sg(p) log p - lambda KL(base || pi)``, the KL over the whole vocabulary."""
    out = []
    for s, t in tokens(seqs, "demo"):
        row, base = s["rows"][t], naive.base_row(len(s["rows"][t]))
        weight = p(s, t).detach() if weighted else 1.0
        out.append(weight * s["l"][t] - coef * (kl(base, row) if forward else kl(row, base)))
    return mean(out)


def power(seqs: list[Sequence], a: float = 10.0) -> Tensor:
    """arXiv 2510.00526: the loss is ``(1 - p**a) / a``; p is differentiated."""
    return mean([(p(s, t) ** a - 1) / a for s, t in tokens(seqs, "demo")])


def threshold(seqs: list[Sequence], q: float, nll: bool = False, above: bool = True, survivors: bool = True) -> Tensor:
    """``(1 - p) 1[p >= q]`` and its three siblings, a mean over the tokens that survive."""
    everything = tokens(seqs, "demo")
    kept = [(s, t) for s, t in everything if (float(p(s, t)) >= q) == above]
    return total([s["l"][t] if nll else p(s, t) for s, t in kept]) / len(kept if survivors else everything)


def demos_under_power(seqs: list[Sequence], a: float, most: float) -> Tensor:
    return mean([torch.clamp(p(s, t) ** a, max=most).detach() * s["l"][t] for s, t in tokens(seqs, "demo")])


# -- rejection sampling --------------------------------------------------------------------------------------------------------------
def k3(s: Sequence, t: int) -> Tensor:
    d = s["l"][t] - s["base"][t]
    return torch.exp(-d) + d - 1


def raft(seqs: list[Sequence], count_all: bool = True, coef: float = 0.001) -> Tensor:
    """arXiv 2504.11343: ``max(r, 0) log p`` over all response tokens, k3 to the start."""
    found = tokens(seqs, "policy")
    good = [(s, t) for s, t in found if s["reward"] > 0]
    learnt_from = total([max(s["reward"], 0.0) * s["l"][t] for s, t in good]) / len(found if count_all else good)
    return learnt_from - coef * mean([k3(s, t) for s, t in found])


def raft_plus_plus(seqs: list[Sequence]) -> Tensor:
    found = tokens(seqs, "policy")
    return mean([surrogate(s, t, max(s["reward"], 0.0)) - 0.001 * k3(s, t) for s, t in found])


# -- mixtures ------------------------------------------------------------------------------------------------------------------------
def hpt(seqs: list[Sequence], length: int = 8192, per_sequence: bool = False, clipped: bool = False, share: float = 1.0) -> Tensor:
    """arXiv 2509.04419 as released: ``sum(ratio A) / 8192`` over the step, plus the demonstrations' token mean, plus 0.001 of the entropy."""
    found = tokens(seqs, "policy")
    each = [surrogate(s, t, advantage_center(seqs, s)) if clipped else r(s, t) * advantage_center(seqs, s) for s, t in found]
    count = len(of(seqs, "policy")) if per_sequence else 1
    return total(each) / (length * count) + share * nll_mean(seqs) + bonus(seqs)


def luffy(seqs: list[Sequence], gamma: float = 0.1, shaped: bool = True, coef: float = 0.001, rollouts: bool = True) -> Tensor:
    """arXiv 2504.14945 as released: ``ratio A`` on rollouts, ``p / (p + gamma) A`` on demonstrations, summed, over 8192."""
    own = [r(s, t) * advantage_center(seqs, s) for s, t in tokens(seqs, "policy") if rollouts]
    given = [(p(s, t) / (p(s, t) + gamma) if shaped else p(s, t)) * s["a"][t] for s, t in tokens(seqs, "demo")]
    return (total(own) + total(given)) / 8192 + bonus(seqs, coef)


def clipped_mean(seqs: list[Sequence]) -> Tensor:
    return mean([surrogate(s, t, advantage_norm(seqs, s)) for s, t in tokens(seqs, "policy")])


def chord(seqs: list[Sequence], mu: float, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """arXiv 2508.11408: ``(1 - mu) GRPO + mu sum sg(phi(p)) log p / N``."""
    expert = mean([weight(p(s, t).detach()) * s["l"][t] for s, t in tokens(seqs, "demo")])
    return (1 - mu) * clipped_mean(seqs) + mu * expert


def phi(x: Tensor) -> Tensor:
    return x * (1 - x)


# -- distillation --------------------------------------------------------------------------------------------------------------------
def reverse_kl_sampled(seqs: list[Sequence], credit: str = "own", sign: float = 1.0) -> Tensor:
    """``sg(log T - log pi) log pi`` on own samples."""
    out = []
    for s in of(seqs, "policy"):
        mine = learnt(s, "policy")
        for i, t in enumerate(mine):
            scope = {"own": [t], "to_go": mine[i:], "sequence": mine}[credit]
            a = sum(s["teacher"][u] - float(s["l"][u]) for u in scope)
            out.append(sign * a * s["l"][t])
    return mean(out)


def k2_to_teacher(seqs: list[Sequence]) -> Tensor:
    """The same gradient as an ordinary loss: half the squared log-ratio."""
    return -mean([(s["l"][t] - s["teacher"][t]) ** 2 / 2 for s, t in tokens(seqs, "policy")])


def gkd(seqs: list[Sequence], beta: float = 0.5, student: float = 0.5, swapped: bool = False) -> Tensor:
    """arXiv 2306.13649: ``beta KL(T || M) + (1 - beta) KL(pi || M)``, ``M = beta T + (1 - beta) pi``."""

    def jsd(row: Tensor) -> Tensor:
        teacher = naive.teacher_row(len(row))
        b = 1 - beta if swapped else beta
        m = torch.log(b * teacher.exp() + (1 - b) * row.exp())
        return b * kl(teacher, m) + (1 - b) * kl(row, m)

    own, given = ([jsd(s["rows"][t]) for s, t in tokens(seqs, source)] for source in ("policy", "demo"))
    return -(student * mean(own) + (1 - student) * mean(given))


def one_kl(seqs: list[Sequence], reverse: bool) -> Tensor:
    rows = [s["rows"][t] for s, t in tokens(seqs, "policy")]
    teacher = naive.teacher_row(len(rows[0]))
    return -mean([kl(row, teacher) if reverse else kl(teacher, row) for row in rows])


# -- what is compared ----------------------------------------------------------------------------------------------------------------
DEMOS, BAND = "streams.demos", "streams.demos.masks.band={_target_: posttrain.loss.mask.ProbabilityBand, "
KEPT = f"{DEMOS}.aggregation.denominator=kept"
FULL = "{_target_: posttrain.loss.regularizer.FullKL, to: teacher, coef: 1.0, streams: [rollouts], direction: "
ONE_KL = ("regularizers.student=null", "regularizers.given=null")


def case(loss: str, objective: naive.Objective, *wrong: naive.Objective, overrides: tuple[str, ...] = (), **more: object) -> Case:
    return Case(loss, objective, overrides=overrides, wrong=wrong, **{"data": mixed, **more})  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "asft": case("asft", asft, dft, partial(asft, forward=False), partial(asft, weighted=False)),
    "sft_kl": case("sft_kl", partial(asft, weighted=False), sft, asft),
    "asft without an anchor": case("asft", dft, asft, overrides=("regularizers.kl.coef=0.0",)),
    "probability_power": case("probability_power", power, dft, partial(power, a=8.0), data=confident),
    "a square root of p": case("probability_power", partial(power, a=0.5), power, overrides=(f"{DEMOS}.reference.a=0.5",)),
    "a bounded inverse of p": case(
        "probability_power",
        partial(demos_under_power, a=-1.0, most=10.0),
        partial(power, a=-1.0),
        overrides=(f"{DEMOS}.reference.a=-1.0", f"{DEMOS}.reference.most=10.0"),
    ),
    "only probable tokens": case(
        "probability_power",
        partial(threshold, q=0.08),
        partial(threshold, q=0.08, survivors=False),
        partial(threshold, q=0.08, above=False),
        overrides=(f"{DEMOS}.reference.a=1.0", BAND + "min: 0.08}", KEPT),
    ),
    "only improbable tokens, log-likelihood": case(
        "sft", partial(threshold, q=0.08, nll=True, above=False), sft, overrides=(BAND + "max: 0.08}", KEPT)
    ),
    "only probable tokens, over all": case(
        "sft", partial(threshold, q=0.08, nll=True, survivors=False), sft, overrides=(BAND + "min: 0.08}",)
    ),
    "raft": case("raft", raft, partial(raft, count_all=False), partial(raft, coef=0.5), advantage=positive),
    "raft_plus_plus": case("raft_plus_plus", raft_plus_plus, raft, advantage=positive, spread=0.4),
    "hpt": case("hpt", hpt, partial(hpt, share=0.3), partial(hpt, length=8), advantage=CENTER, spread=0.4),
    "hpt with short answers": case(
        "hpt",
        partial(hpt, length=8),
        partial(hpt, length=8, per_sequence=True),
        partial(hpt, length=8, clipped=True),
        overrides=("streams.rollouts.aggregation.length=8",),
        advantage=CENTER,
        spread=0.4,
    ),
    "luffy": case("luffy", luffy, partial(luffy, shaped=False), partial(luffy, coef=0.0), advantage=CENTER),
    "luffy, demonstrations alone": case(
        "luffy",
        partial(luffy, gamma=0.5, coef=0.0, rollouts=False),
        luffy,
        overrides=("streams.demos.reference.gamma=0.5", "streams.rollouts=null", "regularizers.entropy=null"),
        advantage=CENTER,
    ),
    "chord_mu": case(
        "chord_mu",
        partial(chord, mu=0.9, weight=torch.ones_like),
        partial(chord, mu=0.1, weight=torch.ones_like),
        partial(chord, mu=0.9, weight=phi),
        advantage=NORM,
    ),
    "chord_phi": case(
        "chord_phi",
        partial(chord, mu=0.1, weight=phi),
        partial(chord, mu=0.1, weight=torch.ones_like),
        lambda seqs: clipped_mean(seqs) + 0.1 * mean([phi(p(s, t).detach()) * s["l"][t] for s, t in tokens(seqs, "demo")]),
        advantage=NORM,
        spread=0.4,
    ),
    "on_policy_distillation": case(
        "on_policy_distillation", k2_to_teacher, partial(reverse_kl_sampled, sign=-1.0), partial(reverse_kl_sampled, credit="to_go")
    ),
    "on_policy_distillation of whole answers": case(
        "on_policy_distillation",
        partial(reverse_kl_sampled, credit="to_go"),
        reverse_kl_sampled,
        partial(reverse_kl_sampled, credit="sequence"),
        overrides=("streams.rollouts.advantage.credit=to_go",),
    ),
    "gkd": case("gkd", gkd, partial(gkd, beta=0.1), partial(gkd, student=1.0)),
    "gkd at another beta": case(
        "gkd",
        partial(gkd, beta=0.1, student=0.8),
        partial(gkd, beta=0.1, student=0.8, swapped=True),
        overrides=tuple(f"regularizers.{k}.{v}" for k, c in (("student", 0.8), ("given", 0.2)) for v in ("beta=0.1", f"coef={c}")),
    ),
    "gkd with a reverse KL": case(
        "gkd",
        partial(one_kl, reverse=True),
        partial(one_kl, reverse=False),
        gkd,
        overrides=(*ONE_KL, f"regularizers.distill={FULL}reverse}}"),
    ),
    "gkd with a forward KL": case(
        "gkd", partial(one_kl, reverse=False), gkd, overrides=(*ONE_KL, f"regularizers.distill={FULL}forward}}")
    ),
}
