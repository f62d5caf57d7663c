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
from tests.loss.families.policy import gae
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


@cache
def varied(seed: int, advantage: Callable | None = None, spread: float = 0.25, *, how: str) -> Data:
    """:func:`mixed` with what a method asks for beside it: ``prefixes`` at the beginning of some answers, two ``classes`` of demonstrations, several
    ``targets`` per prompt, two ``turns``, or ``observed`` tool tokens."""
    data, rng = mixed(seed, advantage, spread), random.Random(seed + 900)
    seqs, rows = [dict(s) for s in data.seqs], []
    for number, (s, row) in enumerate(zip(seqs, data.rows, strict=True)):
        own = "policy" in s["sources"]
        if how == "prefixes" and own and not s["untrainable"] and s["sources"].count("policy") > 1:
            first = s["sources"].index("policy")
            s["sources"] = [
                ("prefix" if t == first or (t == first + 1 and s["sources"][t] == "policy" and number % 2) else x)
                for t, x in enumerate(s["sources"])
            ]
            row = replace(row, sources=s["sources"])
        if how == "classes" and not own:
            s["weight"] = (1.0, 0.1, 0.4)[number % 3]
            row = replace(row, weight=s["weight"])
        if how == "targets" and not own:
            s["question"] = f"t{number % 3}"
            row = replace(row, group=s["question"])
        if how == "turns" and own:
            cut = (len(s["ids"]) + s["sources"].index("policy")) // 2
            s["turns"] = [int(t >= cut) for t in range(len(s["ids"]))]
            s["paid"] = {f"turn_{k}": float(rng.random() < 0.5) for k in (1, 2)}
            row = replace(row, turn=s["turns"], rewards={**row.rewards, **s["paid"]})
        if how == "observed":
            s["trainable"] = [on or source == "tool" for on, source in zip(s["trainable"], s["sources"], strict=True)]
            row = replace(row, trainable=s["trainable"])
        rows.append(row)
    return Data(seqs, rows, data.model)


PREFIXES, CLASSES, TARGETS, TURNS, OBSERVED = (partial(varied, how=how) for how in ("prefixes", "classes", "targets", "turns", "observed"))


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


def dft_of(seqs: list[Sequence]) -> Tensor:
    return mean([p(s, t).detach() * s["l"][t] for s, t in tokens(seqs, "demo")])


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


# -- supervised, weighed ---------------------------------------------------------------------------------------------------------------
def demos_of(seqs: list[Sequence]) -> list[tuple[Sequence, list[int]]]:
    return [(s, learnt(s, "demo")) for s in of(seqs, "demo")]


def clipped(x: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(x, torch.clamp(x, 1 - low, 1 + high))


def psft(seqs: list[Sequence], low: float = 0.2, high: float = 0.28, capped: bool = False) -> Tensor:
    """arXiv 2508.17784: ``min(r, clip(r, 1 - low, 1 + high))``; the lower side cannot act."""
    each = [(s, t, r(s, t)) for s, t in tokens(seqs, "demo")]
    return mean([torch.clamp(x, max=1 + high).detach() * s["l"][t] if capped else clipped(x, low, high) for s, t, x in each])


def delta(s: Sequence, where: list[int], per_token: bool = True) -> Tensor:
    value = total([s["l"][t] - s["base"][t] for t in where])
    return value / len(where) if per_token else value


def minor_sft(seqs: list[Sequence], beta: float = 0.1, per_token: bool = True) -> Tensor:
    return mean([torch.log(torch.sigmoid(beta * delta(s, w, per_token))) for s, w in demos_of(seqs)])


def sequence_sft(seqs: list[Sequence], per_token: bool = True) -> Tensor:
    return mean([total([s["l"][t] for t in w]) / (len(w) if per_token else 1) for s, w in demos_of(seqs)])


def f_divergence(seqs: list[Sequence], phi: Callable[[Tensor], Tensor], beta: float = 0.05) -> Tensor:
    return mean([phi(beta * delta(s, w, per_token=False)) for s, w in demos_of(seqs)])


def pearson(x: Tensor) -> Tensor:
    return x - x**2 / 4


def openchat(seqs: list[Sequence], by_sum: bool = True) -> Tensor:
    """arXiv 2309.11235: ``sum_i c_i mean_t l / sum_i c_i``."""
    found = demos_of(seqs)
    over = sum(s["weight"] for s, _ in found) if by_sum else len(found)
    return total([s["weight"] * total([s["l"][t] for t in w]) / len(w) for s, w in found]) / over


def multi_target(seqs: list[Sequence], beta: float = 0.25, by_mean: bool = False) -> Tensor:
    """arXiv 2205.14318: ``(1/beta) log sum_k exp(beta s_k)`` per prompt, over the answers that hold something to learn."""
    every = [s for s in seqs if "question" in s]
    questions = sorted({s["question"] for s in every})
    every = [s for s in every if learnt(s, "policy") or learnt(s, "demo")]
    scores = {
        q: [total([s["l"][t] for kind in ("policy", "demo") for t in learnt(s, kind)]) for s in every if s["question"] == q]
        for q in questions
    }
    if by_mean:
        counts = {q: [sum(len(learnt(s, kind)) for kind in ("policy", "demo")) for s in every if s["question"] == q] for q in questions}
        scores = {q: [x / max(n, 1) for x, n in zip(scores[q], counts[q], strict=True)] for q in questions}
    if beta == 0:
        return mean([mean(scores[q]) for q in questions])
    return total([torch.logsumexp(beta * torch.stack(scores[q]), 0) / beta for q in questions if scores[q]]) / len(questions)


def loss_softmax(seqs: list[Sequence], f: Callable[[Tensor], Tensor], temperature: float = 1.0, detached: bool = True) -> Tensor:
    losses = torch.stack([-total([s["l"][t] for t in w]) / len(w) for s, w in demos_of(seqs)])
    seen = losses.detach() if detached else losses
    h = 2 * (seen - seen.min()) / (seen.max() - seen.min()) - 1
    return -(torch.softmax(f(h) / temperature, 0) * losses).sum()


def linupper(h: Tensor) -> Tensor:
    return torch.clamp(h + 1, max=1.0)


def suffix_loss(seqs: list[Sequence], gamma: float = 0.95, detached: bool = False) -> Tensor:
    """arXiv 2405.11870: token losses weighed by their discounted sums to come, which carry a gradient in the release."""
    out = []
    for s, w in demos_of(seqs):
        n = [-s["l"][t] for t in w]
        ahead = [total([gamma ** (j - i) * n[j] for j in range(i, len(n))]) for i in range(len(n))]
        ahead = [a.detach() for a in ahead] if detached else ahead
        out.append(-total([a * x for a, x in zip(ahead, n, strict=True)]) / total(ahead))
    return mean(out)


# -- mixtures, continued -----------------------------------------------------------------------------------------------------------------
def both(seqs: list[Sequence]) -> Tensor:
    """Maximum likelihood of own and given answers alike."""
    return mean([s["l"][t] for source in ("policy", "demo") for s, t in tokens(seqs, source)])


def own_likelihood(seqs: list[Sequence]) -> Tensor:
    return mean([s["l"][t] for s, t in tokens(seqs, "policy")])


def observations(seqs: list[Sequence]) -> Tensor:
    return mean([s["l"][t] for s, t in tokens(seqs, "tool")])


def srft(seqs: list[Sequence], demo_sign: float = -1.0, own_sign: float = 1.0, detached: bool = True) -> Tensor:
    """arXiv 2506.19767, equations 8-13 as quoted: four parts, the entropy of an answer without gradient."""

    def weight(s: Sequence, where: list[int], coef: float, sign: float) -> Tensor:
        h = mean([entropy(s["rows"][t]) for t in where])
        return coef * torch.exp(sign * (h.detach() if detached else h))

    found = demos_of(seqs)
    imitate = total([weight(s, w, 0.5, demo_sign) * s["l"][t] for s, w in found for t in w]) / sum(len(w) for _, w in found)
    members = total([p(s, t) * s["a"][t] for s, w in found for t in w]) / 8192
    own = []
    for s in of(seqs, "policy"):
        if w := learnt(s, "policy"):
            factor = weight(s, w, 0.1, own_sign) if s["reward"] >= 1 else -1.0
            own += [factor * s["l"][t] for t in w]
    return imitate + members + total(own) / 8192 + 0.001 * mean([entropy(s["rows"][t]) for s, t in tokens(seqs, "policy")])


def dual_clipped(s: Sequence, t: int, a: float, c: float = 3.0) -> Tensor:
    term = surrogate(s, t, a)
    return torch.maximum(term, torch.tensor(c * a, dtype=torch.float64)) if a < 0 else term


def prefix_rft(seqs: list[Sequence], share: float = 0.2, length: float = 256.0) -> Tensor:
    """arXiv 2507.01679: of the prefix only the tokens with the highest entropy; one constant."""
    prefix = tokens(seqs, "prefix")
    certain = sorted((float(entropy(s["rows"][t])) for s, t in prefix), reverse=True)[: math.ceil(share * len(prefix))]
    kept = [(s, t) for s, t in prefix if float(entropy(s["rows"][t])) >= certain[-1]]
    own = tokens(seqs, "policy")
    surrogates = [dual_clipped(s, t, advantage_center(seqs, s)) for s, t in own] + [
        surrogate(s, t, advantage_center(seqs, s)) for s, t in kept
    ]
    every = mean([entropy(s["rows"][t]) for s, t in own + prefix])
    return total(surrogates) / length + 0.001 * every


def uft(seqs: list[Sequence], hint: float = 0.001, kl_everywhere: bool = False) -> Tensor:
    """arXiv 2505.16984: the clipped surrogate, KL and entropy on what was sampled, the likelihood of the hint."""
    own, hints = tokens(seqs, "policy"), tokens(seqs, "prefix")
    out = clipped_mean(seqs) + hint * mean([s["l"][t] for s, t in hints])
    out = out + 0.001 * mean([entropy(s["rows"][t]) for s, t in own])
    return out - 0.001 * mean([k3(s, t) for s, t in own]) - (mean([k3(s, t) for s, t in hints]) if kl_everywhere else 0.0)


def ahpo(seqs: list[Sequence], joint: bool = True) -> Tensor:
    """arXiv 2510.08540: both sums over one normaliser."""
    own, demos = tokens(seqs, "policy"), tokens(seqs, "demo")
    surrogates, likelihood = total([surrogate(s, t, advantage_norm(seqs, s)) for s, t in own]), total([s["l"][t] for s, t in demos])
    if joint:
        return (surrogates + likelihood) / (len(own) + len(demos))
    return surrogates / len(own) + likelihood / len(demos)


def visurf(seqs: list[Sequence], label: bool = True) -> Tensor:
    """arXiv 2510.10606: members of one group, each a mean over its tokens, the label by the same ratio."""
    out = []
    for s in seqs:
        for source in ("policy", "demo") if label else ("policy",):
            if source in s["sources"]:
                w = learnt(s, source)
                a = advantage_norm(seqs, s) if source == "policy" else None
                out.append(total([surrogate(s, t, s["a"][t] if a is None else a) for t in w]) / max(len(w), 1))
    return mean(out)


def kdrl(seqs: list[Sequence], coef: float = 0.005, estimator: str = "k2") -> Tensor:
    def penalty(s: Sequence, t: int) -> Tensor:
        d = s["l"][t] - s["teacher"][t]
        return d**2 / 2 if estimator == "k2" else torch.exp(-d) + d - 1

    return clipped_mean(seqs) - coef * mean([penalty(s, t) for s, t in tokens(seqs, "policy")])


def rltf(seqs: list[Sequence], share: float = 0.1) -> Tensor:
    """arXiv 2602.02482: second answers under the first prompt by their advantage, without a ratio; critiques by likelihood."""
    return mean([s["a"][t] * s["l"][t] for s, t in tokens(seqs, "demo")]) + share * observations(seqs)


def told_outcome(seqs: list[Sequence], feedback: float = 1.0) -> Tensor:
    """arXiv 2305.10314: the likelihood of every answer, good or bad, and of what was said of it; the outcome stands in the context."""
    return nll_mean(seqs) + feedback * observations(seqs)


def trajectories(seqs: list[Sequence], negatives: bool = True, ratio: bool = False) -> Tensor:
    """arXiv 2403.14589: the reward times the log-likelihood of every action and rationale; a rationale written afterwards has no behaviour policy."""
    out = []
    for s, t in [*tokens(seqs, "policy"), *tokens(seqs, "demo")]:
        a = s["a"][t] if negatives else max(s["a"][t], 0.0)
        old = s["old"][t]
        out.append(a * (torch.exp(s["l"][t] - old) if ratio else s["l"][t]))
    return mean(out)


def turns(seqs: list[Sequence], alpha: float = 10.0, coefs: tuple[float, float] = (0.01, 0.01), first: bool = False) -> Tensor:
    """arXiv 2409.12917: REINFORCE on shaped rewards per turn, less a KL per turn and length."""
    group, out = of(seqs, "policy"), []
    for s in group:
        one, two = s["paid"]["turn_1"], s["paid"]["turn_2"]
        for k, paid in enumerate((0.0, two) if first else (one, two + alpha * (two - one))):
            mine = [t for t in learnt(s, "policy") if s["turns"][t] == k]
            if mine:
                kl_mean = sum(float(s["l"][t]) - s["base"][t] for t in mine) / len(mine)
                out += [(paid - coefs[k] * kl_mean) * s["l"][t] for t in mine]
    return total(out) / len(group)


def self_rewarding(seqs: list[Sequence], c: float = 1.0) -> Tensor:
    """arXiv 2510.21090 without a critic: reward-to-go of the log-ratio of two frozen models, clipped, less c times the KL to one of them."""
    out = []
    for s in of(seqs, "policy"):
        w = learnt(s, "policy")
        for i, t in enumerate(w):
            out.append(surrogate(s, t, sum(s["teacher"][u] - s["base"][u] for u in w[i:])) - c * (s["l"][t] - s["base"][t]) ** 2 / 2)
    return mean(out)


def offline_kd(seqs: list[Sequence], forward: bool = True) -> Tensor:
    rows = [s["rows"][t] for s, t in tokens(seqs, "demo")]
    teacher = naive.teacher_row(len(rows[0]))
    return -mean([kl(teacher, row) if forward else kl(row, teacher) for row in rows])


def weak_to_strong(seqs: list[Sequence], c: float, hardened: bool = True) -> Tensor:
    """arXiv 2312.09390: cross-entropy to ``(1 - c) weak + c own``, the own label without gradient."""
    out = []
    for s, w in demos_of(seqs):
        each = []
        for t in w:
            row = s["rows"][t]
            own = row.max() if hardened else (row.exp().detach() * row).sum()
            each.append((1 - c) * s["l"][t] + c * own)
        out.append(total(each) / len(w))
    return mean(out)


def think_tuning(seqs: list[Sequence], clamp: bool = False, everything: bool = False) -> Tensor:
    """arXiv 2508.07616 as intended: ``p / (sg(p) + gamma(A)) A`` on the teacher's words, minus the improbable ones of bad answers."""
    own = mean([dual_clipped(s, t, advantage_norm(seqs, s)) for s, t in tokens(seqs, "policy")])
    guided = []
    for s, t in tokens(seqs, "prefix"):
        a, x = advantage_norm(seqs, s), p(s, t)
        gamma = -0.001 if clamp else -0.001 + 0.002 * min(max((a + 4) / 8, 0.0), 1.0)
        dropped = a < 0 and float(x) < 0.01 and not everything
        guided.append(0.0 * x if dropped else x / (x.detach() + gamma) * a)
    return own + mean(guided)


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
    "amft": case(
        "amft", partial(chord, mu=0.5, weight=torch.ones_like), partial(chord, mu=0.0, weight=torch.ones_like), partial(chord, mu=0.5, weight=phi), advantage=NORM
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
    "psft": case("psft", psft, sft, partial(psft, high=0.1), partial(psft, capped=True), spread=0.4),
    "minor_sft": case("minor_sft", minor_sft, sequence_sft, partial(minor_sft, per_token=False), partial(minor_sft, beta=0.2)),
    "minor_sft, a large beta": case(
        "minor_sft",
        partial(minor_sft, beta=3.0),
        lambda seqs: sequence_sft(seqs) * 1.5,
        overrides=("streams.demos.advantage.beta=3.0",),
        spread=1.0,
    ),
    "f_divergence_sft": case("f_divergence_sft", partial(f_divergence, phi=pearson), partial(f_divergence, phi=lambda x: x)),
    "f_divergence_sft, total variation": case(
        "f_divergence_sft",
        lambda seqs: 0.05 * sequence_sft(seqs, per_token=False),
        sequence_sft,
        overrides=(f"{DEMOS}.advantage.shape=identity",),
    ),
    "f_divergence_sft, Hellinger": case(
        "f_divergence_sft",
        partial(f_divergence, phi=lambda x: x / (1 + x)),
        partial(f_divergence, phi=pearson),
        overrides=(f"{DEMOS}.advantage.shape=hellinger",),
        spread=1.0,
    ),
    "openchat": case("openchat", openchat, sequence_sft, partial(openchat, by_sum=False), data=CLASSES),
    "multi_target": case("multi_target", multi_target, partial(multi_target, beta=1.0), partial(multi_target, beta=0), data=TARGETS),
    "multi_target, by means": case(
        "multi_target",
        partial(multi_target, by_mean=True),
        multi_target,
        overrides=("streams.targets.advantage.length_norm=true", "streams.targets.aggregation._target_=posttrain.loss.aggregate.GroupSumTokenMean"),
        data=TARGETS,
    ),
    "multi_target, the marginal likelihood": case(
        "multi_target", partial(multi_target, beta=1.0), multi_target, overrides=("streams.targets.advantage.beta=1.0",), data=TARGETS
    ),
    "s3ft": case("s3ft", both, own_likelihood, nll_mean),
    "osft": case("osft", own_likelihood, both),
    "otr": case("otr", lambda seqs: 1.1 * dft_of(seqs), dft_of),
    "loss_reweighting": case(
        "loss_reweighting",
        partial(loss_softmax, f=linupper),
        sequence_sft,
        partial(loss_softmax, f=linupper, detached=False),
        partial(loss_softmax, f=torch.abs),
    ),
    "loss_reweighting, the middle": case(
        "loss_reweighting",
        partial(loss_softmax, f=lambda h: 1 - h**2, temperature=0.4),
        partial(loss_softmax, f=linupper, temperature=0.4),
        overrides=(f"{DEMOS}.advantage.shape=quadratic", f"{DEMOS}.advantage.r=0.4"),
    ),
    "loss_reweighting, both ends": case(
        "loss_reweighting",
        partial(loss_softmax, f=torch.abs, temperature=0.4),
        partial(loss_softmax, f=torch.abs),
        overrides=(f"{DEMOS}.advantage.shape=extremes", f"{DEMOS}.advantage.r=0.4"),
    ),
    "ift": case("ift", suffix_loss, partial(suffix_loss, detached=True), partial(suffix_loss, gamma=0.5)),
    "ift, detached": case("ift", partial(suffix_loss, detached=True), suffix_loss, overrides=(f"{DEMOS}.advantage.detach=true",)),
    "feasible": case("feasible", sequence_sft, nll_mean),
    "world_model": case("world_model", observations, both, data=OBSERVED),
    "relift": case("relift", hpt, partial(hpt, share=0.3), partial(hpt, length=8), advantage=CENTER),
    "srft": case("srft", srft, partial(srft, demo_sign=1.0), partial(srft, detached=False), advantage=NORM),
    "srft, the wrong ones": case(
        "srft",
        lambda seqs: -total([s["l"][t] for s in of(seqs, "policy") if s["reward"] < 1 for t in learnt(s, "policy")]) / 8192,
        lambda seqs: -total([s["l"][t] for s, t in tokens(seqs, "policy")]) / 8192,
        overrides=("streams.rollouts.advantage.right.coef=0.0", "streams.demos=null", "streams.members=null", "regularizers.entropy=null"),
        advantage=NORM,
    ),
    "prefix_rft": case(
        "prefix_rft",
        prefix_rft,
        partial(prefix_rft, share=1.0),
        partial(prefix_rft, share=0.5),
        advantage=CENTER,
        data=PREFIXES,
        spread=0.4,
    ),
    "uft": case("uft", uft, partial(uft, hint=0.1), partial(uft, kl_everywhere=True), advantage=NORM, data=PREFIXES),
    "ahpo": case("ahpo", ahpo, partial(ahpo, joint=False), advantage=NORM, spread=0.4),
    "visurf": case("visurf", visurf, partial(visurf, label=False), advantage=NORM, spread=0.4),
    "kdrl": case("kdrl", kdrl, partial(kdrl, estimator="k3", coef=0.5), clipped_mean, advantage=NORM, spread=0.6),
    "kdrl, a strong teacher": case(
        "kdrl", partial(kdrl, coef=1.0), partial(kdrl, coef=1.0, estimator="k3"), overrides=("regularizers.kl.coef=1.0",), advantage=NORM
    ),
    "rltf": case("rltf", rltf, partial(rltf, share=0.0), nll_mean, data=OBSERVED),
    "leti": case("leti", told_outcome, partial(told_outcome, feedback=0.0), observations, data=OBSERVED),
    "leti, answers alone": case("leti", nll_mean, told_outcome, overrides=("streams.feedback=null",), data=OBSERVED),
    "dpa": case("dpa", partial(raft, coef=0.0), partial(raft, coef=0.5), partial(raft, coef=0.0, count_all=False), advantage=positive),
    "a3t": case("a3t", trajectories, partial(trajectories, negatives=False), partial(trajectories, ratio=True), spread=0.4),
    "score": case("score", turns, partial(turns, alpha=0.0), partial(turns, coefs=(0.1, 0.01)), data=TURNS),
    "score, first stage": case(
        "score",
        partial(turns, first=True, coefs=(0.1, 0.01)),
        turns,
        partial(turns, first=True),
        overrides=("streams.turns.advantage.weights=[[0, 0], [0, 1]]", "streams.turns.advantage.kl=[0.1, 0.01]"),
        data=TURNS,
    ),
    "self_rewarding_ppo": case(
        "self_rewarding_ppo", partial(gae, coef=1.0, earned=True), partial(gae, coef=1.0, each=True), partial(gae, earned=True), partial(gae, lam=1.0, coef=1.0, earned=True), spread=0.4
    ),
    "self_rewarding": case("self_rewarding", self_rewarding, partial(self_rewarding, c=0.0), spread=0.4),
    "offline_kd": case("offline_kd", offline_kd, partial(offline_kd, forward=False)),
    "weak_to_strong": case("weak_to_strong", partial(weak_to_strong, c=0.0), partial(weak_to_strong, c=0.5)),
    "weak_to_strong, after the ramp": case(
        "weak_to_strong",
        partial(weak_to_strong, c=0.4),
        partial(weak_to_strong, c=0.0),
        partial(weak_to_strong, c=0.4, hardened=False),
        overrides=("regularizers.own.coef=0.4",),
    ),
    "think_tuning": case("think_tuning", think_tuning, partial(think_tuning, clamp=True), advantage=NORM, data=PREFIXES, spread=0.6),
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
    "gkd with a forward KL": case("gkd", partial(one_kl, reverse=False), gkd, overrides=(*ONE_KL, f"regularizers.distill={FULL}forward}}")),
}
