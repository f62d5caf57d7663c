"""Policy gradients, baselines, trust regions, KL and entropy: the published objectives, one sequence and one token at a time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from posttrain.advantage import (
    BatchScale,
    BatchWhiten,
    BestMinusSecond,
    BetaNorm,
    Chain,
    DropOutliers,
    GreedyBaseline,
    GroupAdvantage,
    LiveGroups,
    PerReward,
)
from posttrain.advantage.group import Estimator
from posttrain.advantage.shape import Diverse, TailRisk, TrustMix
from posttrain.records import Group, Row, Sampling
from tests.loss import naive
from tests.loss.cases import CENTER, MASKS, NORM, REWARD, Case, Data, make
from tests.loss.naive import Sequence, advantage_center, advantage_norm, learnt, of, r, rewards, surrogate, total

Seqs = list[Sequence]
A = Callable[[Seqs, Sequence], float]


def tokens_of(seqs: Seqs) -> list[tuple[Sequence, int]]:
    return [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]


def moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def clipped(seqs: Seqs, advantage: A, mean: str = "token", low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO's surrogate with an advantage of one's own, as a token mean, a mean of answers' means or a sum per group."""
    group, out = of(seqs, "policy"), []
    for s in group:
        length = len(learnt(s, "policy"))
        share = {"token": len(tokens_of(seqs)), "sequence": len(group) * max(length, 1), "group": len({o["question"] for o in group})}[mean]
        out += [surrogate(s, t, advantage(seqs, s), low, high) / share for t in learnt(s, "policy")]
    return total(out)


@cache
def thoughts(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """The rollouts with two given words behind each, the same for a question, and every question's words behind its prompt alone."""
    data, draw = make(seed, advantage, spread), random.Random(seed + 7)
    seqs, rows, words = [], [], {q: [draw.randrange(13) for _ in range(2)] for q in ("q1", "q2", "q3")}
    for s, one in zip(data.seqs, data.rows, strict=True):
        if "question" not in s:
            continue
        more = words[s["question"]]
        ids, sources, trainable = [*s["ids"], *more], [*s["sources"], "tool", "tool"], [*s["trainable"], False, False]
        logps = {name: [*column, math.nan, math.nan] for name, column in one.logps.items()}
        seqs.append({**s, "ids": ids, "sources": sources, "trainable": trainable, **logps, "a": [*s["a"], 0.0, 0.0]})
        rows.append(replace(one, ids=ids, sources=sources, trainable=trainable, logps=logps, advantage=1.0))
    for question, more in words.items():
        prompt = next(s["ids"][: s["sources"].index("policy")] for s in data.seqs if s.get("question") == question)
        ids, n = [*prompt, *more], len(prompt)
        with torch.no_grad():
            base = [math.nan, *(x + draw.gauss(0.0, spread) for x in data.model.alone(ids).tolist())]
        sources, trainable = ["prompt"] * n + ["tool"] * 2, [False] * n + [True] * 2
        seqs.append({"ids": ids, "sources": sources, "trainable": trainable, "base": base, "context": "without_thought", "about": question})
        rows.append(Row(ids=ids, sources=sources, trainable=trainable, logps={"base": base}, group=question, context="without_thought", sample_id=f"{question} alone"))
    return Data(seqs, rows, data.model)


def rlp(seqs: Seqs, centred: bool = True, detached: bool = True, copy: str = "base", words: int = 2, limit: float = math.inf) -> Tensor:
    """Thoughts are worth how much likelier they make the words behind them; the clipped surrogate, a mean over tokens."""
    alone = {s["about"]: s for s in seqs if s.get("context")}

    def gain(s: Sequence) -> Tensor:
        plain = alone[s["question"]]
        own = total([x if detached is False else x.detach() for x in s["l"][-words:]])
        return (own - total([x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in plain["l" if copy == "self" else copy][-words:]])).clamp(-limit, limit)

    group = [s for s in of(seqs, "policy") if not s.get("context")]
    gains = {id(s): gain(s) for s in group if learnt(s, "policy")}

    def worth(_: Seqs, s: Sequence) -> Tensor:
        peers = [gains[id(o)] for o in group if o["question"] == s["question"] and id(o) in gains]
        return gains[id(s)] - (total(peers) / len(peers) if centred else 0.0)

    return clipped(seqs, worth)  # type: ignore[arg-type]


def likelihood(seqs: Seqs, advantage: A, mean: str = "answer") -> Tensor:
    """The weighted log-likelihood: a mean over answers of sums, or over tokens."""
    share = len(of(seqs, "policy")) if mean == "answer" else len(tokens_of(seqs))
    return total([advantage(seqs, s) * s["l"][t] for s, t in tokens_of(seqs)]) / share


def token_baseline(
    seqs: Seqs, alone: str = "own", coef: float = 0.0, running: bool = True, squares: bool = True, ended: bool = False
) -> Tensor:
    """arXiv 2602.07078: at every place the mean of the returns of the answers that get there, weighed by what they have gathered.  Wrong versions: the weight of the
    token by itself, without the squares of the other tokens, and answers that have ended counted on."""

    def returns(s: Sequence) -> list[float]:
        """The reward, less the KL of this token and the later ones."""
        kl = [s["old"][t] - s["base"][t] for t in learnt(s, "policy")]
        return [s["reward"] - coef * sum(kl[n:]) for n in range(len(kl))]

    def gathered(s: Sequence) -> list[float]:
        out: list[float] = []
        for t in learnt(s, "policy"):
            row = s["rows"][t].detach()
            here = float(1 - 2 * row[s["ids"][t]].exp() + (row.exp() ** 2).sum() * squares)
            out.append(here + (out[-1] if out and running else 0.0))
        return out

    out = []
    for s in of(seqs, "policy"):
        group = [o for o in of(seqs, "policy") if o["question"] == s["question"] and learnt(o, "policy")]
        for n, t in enumerate(learnt(s, "policy")):
            there = [(gathered(o)[min(n, len(gathered(o)) - 1)], returns(o)[min(n, len(returns(o)) - 1)]) for o in group if ended or n < len(gathered(o))]
            baseline = sum(w * g for w, g in there) / sum(w for w, _ in there)
            if alone == "zero" and len(there) == 1:
                baseline = 0.0
            out.append((returns(s)[n] - baseline) * s["l"][t])
    return total(out) / len(tokens_of(seqs))


# -- baselines ---------------------------------------------------------------------------------------------------------------------
GREEDY = {"q1": 0.5, "q2": 0.0, "q3": 1.0}


def with_greedy(groups: list[Group]) -> list[Group]:
    """The package's estimator, shown a greedy answer of each prompt beside the samples."""
    shown = []
    for group in groups:
        last = group.rollouts[-1]
        greedy = replace(last, sample_id="greedy", reward=GREEDY[group.id], sampling=Sampling(temperature=0.0))
        shown.append(replace(group, rollouts=(*group.rollouts, greedy)))
    return [replace(g, rollouts=g.rollouts[:-1]) for g in GreedyBaseline()(shown)]


def remax(seqs: Seqs, coef: float = 0.001, baseline: bool = True) -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        tokens = learnt(s, "policy")
        for i, t in enumerate(tokens):
            later = sum(s["old"][u] - s["base"][u] for u in tokens[i:])
            out.append((s["reward"] - baseline * GREEDY[s["question"]] - coef * later) * s["l"][t])
    return total(out) / len(of(seqs, "policy"))


def reinforce_pp(seqs: Seqs, coef: float = 0.01, whiten: bool = True, gamma: float = 1.0) -> Tensor:
    returns = {}
    for s in of(seqs, "policy"):
        running = s["reward"]
        for t in reversed(learnt(s, "policy")):
            running -= coef * (s["old"][t] - s["base"][t])
            returns[id(s), t] = running
            running *= gamma
    mean, std = moments(list(returns.values())) if whiten else (0.0, 1.0)
    return total([surrogate(s, t, (returns[id(s), t] - mean) / (std + 1e-8)) for s, t in tokens_of(seqs)]) / len(returns)


def reinforce_pp_baseline(seqs: Seqs, coef: float = 0.01, whiten: bool = True) -> Tensor:
    each = [advantage_center(seqs, s) for s, _ in tokens_of(seqs)]
    mean, std = moments(each) if whiten else (0.0, 1.0)
    out = []
    for s, t in tokens_of(seqs):
        d = s["l"][t] - s["base"][t]
        out.append(surrogate(s, t, (advantage_center(seqs, s) - mean) / (std + 1e-8)) - coef * d * d / 2)
    return total(out) / len(out)


def gpg(seqs: Seqs, alpha: float = 3 / 2) -> Tensor:
    """Two of the three groups are live."""
    return likelihood(seqs, lambda _, s: alpha * advantage_center(seqs, s), "token")


def advantage_length_weighted(seqs: Seqs, s: Sequence) -> float:
    peers = [o for o in of(seqs, "policy") if o["question"] == s["question"]]
    lengths = [len(learnt(o, "policy")) for o in peers]
    weighted = sum(n * o["reward"] for n, o in zip(lengths, peers, strict=True))
    return 0.0 if max(rewards(seqs, s)) == min(rewards(seqs, s)) else s["reward"] - weighted / sum(lengths)


def binary(groups: list[Group]) -> list[Group]:
    """Every reward above 0 is a success."""
    return [replace(g, rollouts=tuple(replace(x, reward=float(x.reward > 0)) for x in g.rollouts)) for g in groups]  # type: ignore[operator]


def bnpo(seqs: Seqs, third: float = 3.0) -> Tensor:
    def rate(s: Sequence) -> float:
        return sum(x > 0 for x in rewards(seqs, s)) / len(rewards(seqs, s))

    rates = [rate(next(s for s in seqs if s.get("question") == q)) for q in ("q1", "q2", "q3")]
    mean = sum(rates) / 3
    strength = mean * (1 - mean) / (sum((x - mean) ** 2 for x in rates) / 2) - 1
    alpha, beta = max(1.0, 1 + mean * strength / third), max(1.0, 1 + (1 - mean) * strength / third)

    def advantage(_: Seqs, s: Sequence) -> float:
        p = rate(s)
        if p in (0.0, 1.0):
            return 0.0
        density = p ** (alpha - 1) * (1 - p) ** (beta - 1) * math.gamma(alpha + beta) / math.gamma(alpha) / math.gamma(beta)
        return (float(s["reward"] > 0) - p) / density

    return clipped(seqs, advantage, "sequence")


def advantage_over_mean(seqs: Seqs, s: Sequence) -> float:
    mean = sum(rewards(seqs, s)) / len(rewards(seqs, s))
    return (s["reward"] - mean) / mean if mean else 0.0


def gdpo(seqs: Seqs, sum_first: bool = False) -> Tensor:
    def normed(s: Sequence, names: tuple[str, ...]) -> float:
        peers = [sum(o["scores"][n] for n in names) for o in seqs if o.get("question") == s["question"]]
        mean, std = moments(peers)
        return (sum(s["scores"][n] for n in names) - mean) / (std + 1e-6) if std else 0.0

    summed = {
        id(s): normed(s, ("answer", "form")) if sum_first else normed(s, ("answer",)) + normed(s, ("form",)) for s in of(seqs, "policy")
    }
    mean, std = moments(list(summed.values()))
    return clipped(seqs, lambda _, s: (summed[id(s)] - mean) / (std + 1e-8), high=0.28)


def lite_ppo(seqs: Seqs, of_advantages: bool = False) -> Tensor:
    group = of(seqs, "policy")
    _, std = moments([advantage_center(seqs, s) if of_advantages else s["reward"] for s in group])
    return clipped(seqs, lambda _, s: advantage_center(seqs, s) / (std + 1e-8))


def advantage_best(seqs: Seqs, s: Sequence) -> float:
    best, second = sorted(rewards(seqs, s), reverse=True)[:2]
    return best - second if s["reward"] == best else 0.0


# -- trust regions -----------------------------------------------------------------------------------------------------------------
def dual_clip(seqs: Seqs, c: float = 3.0) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        a = advantage_norm(seqs, s)
        for t in learnt(s, "policy"):
            term = surrogate(s, t, a)
            out.append((torch.maximum(term, torch.tensor(c * a, dtype=torch.float64)) if a < 0 else term) / len(learnt(s, "policy")))
    return total(out) / len(group)


def gspo_token(seqs: Seqs) -> Tensor:
    """``s[t] = sg(s) * pi / sg(pi)`` with the advantage ``a`` of every token."""
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        for t in tokens:
            mean = sum(float(s["l"][u]) - s["old"][u] for u in tokens) / len(tokens)
            ratio = math.exp(mean) * torch.exp(s["l"][t] - s["l"][t].detach())
            out.append(torch.minimum(ratio * s["a"][t], torch.clamp(ratio, 1 - 3e-4, 1 + 4e-4) * s["a"][t]) / len(tokens))
    return total(out) / len(group)


def luspo(seqs: Seqs, by_length: bool = True) -> Tensor:
    """Each answer's clipped geometric ratio times its length."""
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        if tokens:
            ratio, a = torch.exp(total([s["l"][t] - s["old"][t] for t in tokens]) / len(tokens)), advantage_norm(seqs, s)
            term = torch.minimum(ratio * a, torch.clamp(ratio, 1 - 2e-3, 1 + 2.5e-3) * a)
            out.append(term * (len(tokens) if by_length else 1))
    return total(out) / len(group)


def sapo(seqs: Seqs, up: float = 1.0, down: float = 1.05) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        a, tokens = advantage_norm(seqs, s), learnt(s, "policy")
        tau = up if a > 0 else down
        out += [4 / tau * torch.sigmoid(tau * (r(s, t) - 1)) * a / len(tokens) for t in tokens]
    return total(out) / len(group)


def gmpo(seqs: Seqs, bound: float = 0.4, token_mask_only: bool = False) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        a, tokens = advantage_norm(seqs, s), learnt(s, "policy")
        if not tokens:
            continue
        each = []
        for t in tokens:
            d = s["l"][t] - s["old"][t]
            held = (
                torch.sign(torch.tensor(a)) * torch.minimum(d * math.copysign(1, a), torch.tensor(bound, dtype=torch.float64)) if a else d
            )
            each.append(d + (held - held.detach()) - (d - d.detach()) if token_mask_only else held)
        out.append(a * torch.exp(total(each) / len(tokens)))
    return total(out) / len(group)


def dppo(seqs: Seqs, kind: str = "tv", bound: float = 0.2, cap: float = 20.0, one_sided: bool = True) -> Tensor:
    out = []
    for s, t in tokens_of(seqs):
        a, p, q = advantage_norm(seqs, s), math.exp(float(s["l"][t])), math.exp(s["behaviour"][t])
        rest_p, rest_q = max(1 - p, 0.0), max(1 - q, 0.0)
        far = abs(p - q) if kind == "tv" else q * math.log(q / p) + rest_q * math.log((rest_q + 1e-8) / (rest_p + 1e-8))
        pushed = (a > 0 and p > q) or (a < 0 and p < q)
        if not (far > bound and (pushed or not one_sided)):
            out.append(min(p / q, cap) * a * s["l"][t])
    return total(out) / len(tokens_of(seqs))


def cpgd(seqs: Seqs, coef: float = 0.01, forward: bool = True) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        a, tokens = advantage_norm(seqs, s), learnt(s, "policy")
        for t in tokens:
            d = s["l"][t] - s["old"][t]
            drift = torch.exp(d) - d - 1 if forward else torch.exp(-d) + d - 1
            out.append((torch.minimum(d * a, torch.clamp(d, math.log(0.8), math.log(1.2)) * a) - coef * drift) / len(tokens))
    return total(out) / len(group)


def stable_reinforce(seqs: Seqs, bound: float = math.log(1000.0), sigmas: float = 3.0) -> Tensor:
    """The answer furthest out stays in the data here: its advantage is 0, and it counts in the mean over answers."""
    group, out = of(seqs, "policy"), []
    mean, std = moments([s["reward"] for s in group])
    for s in group:
        a, tokens = (s["reward"] - mean) / (std + 1e-8), learnt(s, "policy")
        for t in tokens:
            d = torch.clamp(s["l"][t] - s["old"][t], -bound, bound)
            ratio = torch.exp(d)
            out.append((abs(a) <= sigmas) * torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a) / len(tokens))
    return total(out) / len(group)


def without_outliers(sigmas: float) -> Estimator:
    both = Chain({"whiten": BatchWhiten("sequences"), "outliers": DropOutliers(sigmas)})
    return lambda groups: [replace(g, rollouts=tuple(replace(x, advantage=x.advantage or 0.0) for x in g.rollouts)) for g in both(groups)]


def top_entropy(seqs: Seqs, share: float = 0.2, kept: bool = False) -> Tensor:
    tokens = tokens_of(seqs)
    entropies = sorted((s["entropy"][t] for s, t in tokens), reverse=True)
    least = entropies[math.ceil(share * len(tokens)) - 1]
    chosen = [(s, t) for s, t in tokens if s["entropy"][t] >= least]
    out = []
    for s, t in chosen:
        a = advantage_norm(seqs, s)
        term = surrogate(s, t, a, 0.2, 0.28)
        out.append(torch.maximum(term, torch.tensor(10.0 * a, dtype=torch.float64)) if a < 0 else term)
    return total(out) / (len(chosen) if kept else len(tokens))


def covariances(seqs: Seqs) -> dict[tuple[int, int], float]:
    tokens = tokens_of(seqs)
    a = {(id(s), t): advantage_norm(seqs, s) for s, t in tokens}
    logp = {(id(s), t): float(s["l"][t]) for s, t in tokens}
    mean_a, mean_l = sum(a.values()) / len(a), sum(logp.values()) / len(a)
    return {k: (a[k] - mean_a) * (logp[k] - mean_l) for k in a}


def clip_cov(seqs: Seqs, low: float = 0.3, high: float = 5.0, share: float = 1.0) -> Tensor:
    """With a share of 1 every token of the window is dropped, so no draw is needed; tokens the clip dropped cannot be drawn."""
    cov = covariances(seqs)
    out = [surrogate(s, t, advantage_norm(seqs, s)) for s, t in tokens_of(seqs) if not (share and low < cov[id(s), t] < high)]
    return total(out) / len(cov)


def kl_cov(seqs: Seqs, coef: float = 1.0, share: float = 2e-4) -> Tensor:
    cov = covariances(seqs)
    top = sorted(cov, key=lambda k: -cov[k])[: max(1, int(share * len(cov)))]
    out = []
    for s, t in tokens_of(seqs):
        out.append(r(s, t) * advantage_norm(seqs, s))
        if (id(s), t) in top:
            out.append(-coef * (s["l"][t] - s["old"][t]).abs())
    return total(out) / len(cov)


def fipo(seqs: Seqs, half_life: float = 32.0, low: float = 1.0, ignore: float = 10.0, spare: float = 4.0) -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        a, tokens = advantage_norm(seqs, s), learnt(s, "policy")
        for i, t in enumerate(tokens):
            later = [(j, float(s["l"][u]) - s["old"][u]) for j, u in enumerate(tokens[i:])]
            factor = min(max(math.exp(sum(0.5 ** (j / half_life) * d for j, d in later if d <= math.log(ignore))), low), 1.2)
            if a < 0 and float(r(s, t)) > spare:
                factor = min(max(factor, 0.8), 1.0)
            term = surrogate(s, t, a, 0.2, 0.28)
            term = torch.maximum(term, torch.tensor(10.0 * a, dtype=torch.float64)) if a < 0 else term
            out.append(factor * term)
    return total(out) / len(out)


# -- entropy -----------------------------------------------------------------------------------------------------------------------
def entropy(seqs: Seqs) -> Tensor:
    return total([-(s["rows"][t].exp() * s["rows"][t]).sum() for s, t in tokens_of(seqs)]) / len(tokens_of(seqs))


def answer_entropy(seqs: Seqs) -> Tensor:
    """Mean over answers of token means, as the policy term of GRPO is."""
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        out += [-(s["rows"][t].exp() * s["rows"][t]).sum() / len(tokens) for t in tokens]
    return total(out) / len(group)


def adaptive_kl(seqs: Seqs, coef: float = 0.2) -> Tensor:
    """Before anything was measured, with the advantages ``a`` of a critic."""
    out = []
    for s in of(seqs, "policy"):
        tokens = learnt(s, "policy")
        for i, t in enumerate(tokens):
            out.append(surrogate(s, t, s["a"][t] - coef * sum(s["old"][u] - s["base"][u] for u in tokens[i:])))
    return total(out) / len(out)


def gae(
    seqs: Seqs, gamma: float = 1.0, lam: float = 0.95, coef: float = 0.0, each: bool = False, by_length: float = 0.0, whiten: bool = False, ddof: int = 0,
    earned: bool = False, per_answer: bool = False,
) -> Tensor:
    """PPO with the recursion of arXiv 1506.02438, backwards over the tokens that are learnt from."""
    advantage = {}
    for s in of(seqs, "policy"):
        tokens, ahead, value = learnt(s, "policy"), 0.0, 0.0
        own = max(1 - 1 / (by_length * len(tokens)), 0.0) if by_length and tokens else lam
        for t in reversed(tokens):
            paid = s["teacher"][t] - s["base"][t] if earned else s["a"][t] if each or t == tokens[-1] else 0.0
            reward = paid - coef * (s["old"][t] - s["base"][t])
            ahead = reward + gamma * value - s["value"][t] + gamma * own * ahead
            advantage[id(s), t], value = ahead, s["value"][t]
    mean, std = moments(list(advantage.values())) if whiten else (0.0, 1.0 - 1e-8)
    std *= math.sqrt(len(advantage) / (len(advantage) - ddof))
    if per_answer:
        answers = of(seqs, "policy")
        return total([total([surrogate(s, t, advantage[id(s), t]) for t in w]) / len(w) for s in answers if (w := learnt(s, "policy"))]) / len(answers)
    return total([surrogate(s, t, (advantage[id(s), t] - mean) / (std + 1e-8)) for s, t in tokens_of(seqs)]) / len(advantage)


def sampled_entropy(seqs: Seqs) -> Tensor:
    return total([-s["l"][t] for s, t in tokens_of(seqs)]) / len(tokens_of(seqs))


ENTROPY = "regularizers.entropy={_target_: posttrain.loss.regularizer.Entropy, coef: 0.05}"
LONG_KL = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, estimator: k2, to: base, coef: 0.05, level: sequence}"


def dapo_with_entropy(seqs: Seqs, sign: float = 1.0) -> Tensor:
    return naive.dapo(seqs) + sign * 0.05 * entropy(seqs)


def sequence_k2(seqs: Seqs, level: str = "sequence") -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        d = [s["l"][t] - s["base"][t] for t in learnt(s, "policy")]
        out += [total(d) ** 2 / 2] if level == "sequence" and d else [x * x / 2 for x in d]
    return likelihood(seqs, lambda _, s: s["reward"]) - 0.05 * total(out) / len(of(seqs, "policy"))


def chain(**steps: Estimator) -> Estimator:
    """Estimators one after the other; data is remembered by its estimator, so it must have an identity."""
    return Chain(steps).__call__


def shaped_by_group(seqs: Seqs, s: Sequence, floor: float = 0.1) -> float:
    """Right answers share what they say with others of their ``form``; the form is the class here."""
    peers = [o for o in of(seqs, "policy") if o["question"] == s["question"]]

    def worth(o: Sequence) -> float:
        right = [x for x in peers if x["reward"] > 0]
        if o["reward"] <= 0 or len(right) == 1:
            return floor * o["reward"]
        same = sum(x["scores"]["form"] == o["scores"]["form"] for x in right)
        return max((len(right) - same) / (len(right) - 1), floor) * o["reward"]

    return worth(s) - sum(map(worth, peers)) / len(peers)


def trusted(seqs: Seqs, s: Sequence, alpha: float = 0.3) -> float:
    """The second reward is the form; an outcome above 0.1 is right."""
    peers = [o for o in of(seqs, "policy") if o["question"] == s["question"]]
    right, wrong = ([o["scores"]["form"] for o in peers if (o["reward"] > 0.1) == kind] for kind in (True, False))
    trust = min(math.exp(sum(right) / len(right) - sum(wrong) / len(wrong)), 1.0) if right and wrong else 0.0
    mixed = [o["reward"] + alpha * trust * o["scores"]["form"] * (o["reward"] > 0.1) for o in peers]
    mean, std = moments(mixed)
    return (mixed[peers.index(s)] - mean) / (std + 1e-6) if std else 0.0


def trust_grpo(seqs: Seqs, alpha: float = 0.3) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        for t in learnt(s, "policy"):
            d = s["l"][t] - s["base"][t]
            out.append((surrogate(s, t, trusted(seqs, s, alpha)) - 0.04 * (torch.exp(-d) + d - 1)) / len(learnt(s, "policy")))
    return total(out) / len(group)


def fresh_trust(groups: list[Group]) -> list[Group]:
    return Chain({"shape": TrustMix("form", above=0.1), "norm": NORM})(groups)


def placed_by_answer(seqs: Seqs) -> Tensor:
    """The clipped surrogate with an advantage for every token, a mean over answers of their tokens' means."""
    group = of(seqs, "policy")
    return total([surrogate(s, t, s["a"][t]) / len(learnt(s, "policy")) for s in group for t in learnt(s, "policy")]) / len(group)


def tail_risk(seqs: Seqs, s: Sequence, w: float = 1.5) -> float:
    """Bundles of one question, against quantiles of 0.25 and 0.8: the bundle's deviation is the question's, and both divide."""
    x, group = s["reward"], rewards(seqs, s)
    tail, middle = -max(0.25 - x, 0.0) / 0.2, (max(x - 0.25, 0.0) - max(x - 0.8, 0.0) + 0.25 - 0.8) / 0.6
    spread = statistics.stdev(group) if len(group) > 1 else 0.0
    return (w * tail + middle) / (w + 1) / (spread**2 if spread > 1e-3 else 1.0)


def fresh_tail(groups: list[Group]) -> list[Group]:
    return TailRisk(bundle=1, quantiles=[0.25, 0.8])(groups)


GAE = "streams.rollouts.advantage={_target_: posttrain.loss.advantage.GeneralizedAdvantage"
WHITE_GAE = (
    "streams.rollouts.advantage={_target_: posttrain.loss.advantage.Whiten, inner: {_target_: posttrain.loss.advantage.GeneralizedAdvantage"
)
COV = f"{MASKS}.covariance"
RETURNS = "streams.rollouts.advantage.inner.gamma=0.9"
CASES: dict[str, Case] = {
    "rlp": Case("rlp", rlp, wrong=(partial(rlp, centred=False), partial(rlp, detached=False), partial(rlp, words=1)), data=thoughts),
    "rlp uncentred": Case(
        "rlp",
        partial(rlp, centred=False, limit=1.0),
        overrides=("streams.rollouts.advantage.center=none", "streams.rollouts.advantage.limit=1.0"),
        wrong=(rlp, partial(rlp, centred=False), partial(rlp, centred=False, copy="self", limit=1.0)),
        data=thoughts,
    ),
    "remax": Case("remax", remax, with_greedy, wrong=(lambda s: remax(s, baseline=False), lambda s: remax(s, coef=-0.1))),
    "reinforce_pp": Case(
        "reinforce_pp", reinforce_pp, REWARD, wrong=(lambda s: reinforce_pp(s, whiten=False), lambda s: reinforce_pp(s, -0.05))
    ),
    "reinforce_pp, discounted": Case(
        "reinforce_pp", lambda s: reinforce_pp(s, gamma=0.9), REWARD, (RETURNS,), (reinforce_pp, lambda s: reinforce_pp(s, gamma=0.8))
    ),
    "reinforce_pp_baseline": Case(
        "reinforce_pp_baseline",
        reinforce_pp_baseline,
        chain(center=CENTER, whiten=BatchWhiten()),
        wrong=(lambda s: reinforce_pp_baseline(s, whiten=False), lambda s: reinforce_pp_baseline(s, -0.01), naive.dapo),
    ),
    "gpg": Case(
        "gpg", gpg, chain(center=CENTER, live=LiveGroups()), wrong=(lambda s: gpg(s, 1.0), lambda s: likelihood(s, advantage_center))
    ),
    "opo": Case(
        "opo",
        lambda s: likelihood(s, advantage_length_weighted),
        GroupAdvantage("length_weighted", "none"),
        wrong=(lambda s: likelihood(s, advantage_center),),
    ),
    "otb": Case(
        "otb",
        token_baseline,
        REWARD,
        wrong=(
            naive.reinforce,
            lambda s: likelihood(s, advantage_center, "token"),
            lambda s: likelihood(s, advantage_length_weighted, "token"),
            lambda s: token_baseline(s, running=False),
            lambda s: token_baseline(s, squares=False),
            lambda s: token_baseline(s, alone="zero"),
            lambda s: token_baseline(s, ended=True),
        ),
    ),
    "otb, no baseline for one answer alone": Case(
        "otb", lambda s: token_baseline(s, alone="zero"), REWARD, ("streams.rollouts.advantage.alone=zero",), (token_baseline,)
    ),
    "otb, returns with a KL": Case(
        "otb",
        lambda s: token_baseline(s, coef=0.05),
        REWARD,
        ("streams.rollouts.advantage.inner={_target_: posttrain.loss.advantage.ColumnMinusKL, coef: 0.05}",),
        (token_baseline, lambda s: token_baseline(s, coef=-0.05)),
    ),
    "bnpo": Case(
        "bnpo",
        bnpo,
        lambda groups: BetaNorm()(binary(groups)),
        wrong=(lambda s: bnpo(s, 1.0), lambda s: clipped(s, advantage_norm), naive.grpo),
    ),
    "maxrl": Case(
        "maxrl",
        lambda s: likelihood(s, advantage_over_mean),
        GroupAdvantage("mean", "mean"),
        wrong=(lambda s: likelihood(s, advantage_norm), lambda s: likelihood(s, advantage_over_mean, "token")),
    ),
    "gdpo": Case(
        "gdpo",
        gdpo,
        chain(rewards=PerReward(), whiten=BatchWhiten("sequences")),
        wrong=(lambda s: gdpo(s, sum_first=True), naive.dapo),
    ),
    "lite_ppo": Case(
        "lite_ppo",
        lite_ppo,
        chain(center=CENTER, scale=BatchScale()),
        wrong=(lambda s: lite_ppo(s, of_advantages=True), naive.dapo),
    ),
    "pass_at_k": Case(
        "pass_at_k",
        lambda s: clipped(s, advantage_best, "group"),
        BestMinusSecond(),
        wrong=(lambda s: clipped(s, advantage_best, "token"), lambda s: clipped(s, advantage_center, "group")),
    ),
    "dual_clip": Case("dual_clip", dual_clip, NORM, wrong=(naive.grpo,), spread=1.5),
    "gspo_token": Case("gspo_token", gspo_token, wrong=(naive.ppo, lambda s: naive.gspo(s)), spread=0.01),
    "gspo_token of equal advantages": Case("gspo_token", naive.gspo, NORM, wrong=(naive.grpo,), spread=0.01),
    "luspo": Case("luspo", luspo, NORM, wrong=(lambda s: luspo(s, by_length=False), naive.gspo), spread=0.01),
    "sapo": Case("sapo", sapo, NORM, wrong=(lambda s: sapo(s, 1.05, 1.0), naive.grpo), spread=0.5),
    "gmpo": Case("gmpo", gmpo, NORM, wrong=(lambda s: gmpo(s, token_mask_only=True), lambda s: gmpo(s, 0.2), naive.gspo), spread=0.5),
    "dppo_tv": Case("dppo_tv", dppo, NORM, wrong=(lambda s: dppo(s, one_sided=False), lambda s: dppo(s, bound=0.1)), spread=0.5),
    "dppo_tv, cap reached": Case("dppo_tv", lambda s: dppo(s, cap=1.2), NORM, (f"{MASKS}.cap.max=1.2",), (dppo,), spread=0.5),
    "dppo_tv, both sides": Case(
        "dppo_tv", lambda s: dppo(s, one_sided=False), NORM, (f"{MASKS}.divergence.one_sided=false",), (dppo,), spread=0.5
    ),
    "dppo_kl": Case("dppo_kl", lambda s: dppo(s, "kl"), NORM, wrong=(dppo, lambda s: dppo(s, "kl", one_sided=False)), spread=0.8),
    "cpgd": Case("cpgd", cpgd, NORM, wrong=(lambda s: cpgd(s, forward=False), lambda s: cpgd(s, 0.0), naive.grpo), spread=0.4),
    "stable_reinforce": Case(
        "stable_reinforce",
        lambda s: stable_reinforce(s, sigmas=1.2),
        without_outliers(1.2),
        wrong=(stable_reinforce, naive.grpo),
    ),
    "stable_reinforce, log-ratios bounded": Case(
        "stable_reinforce",
        lambda s: stable_reinforce(s, math.log(1.1)),
        without_outliers(3.0),
        (f"{MASKS}.bound.max=1.1", f"{MASKS}.bound.min={1 / 1.1}"),
        (stable_reinforce,),
    ),
    "top_entropy": Case(
        "top_entropy", top_entropy, NORM, wrong=(lambda s: top_entropy(s, 0.5), naive.dapo, lambda s: top_entropy(s, kept=True))
    ),
    "top_entropy, kept tokens counted": Case(
        "top_entropy",
        lambda s: top_entropy(s, kept=True),
        NORM,
        ("streams.rollouts.aggregation.denominator=kept", f"{MASKS}.clip=null", f"{MASKS}.dual=null"),
        (top_entropy,),
        spread=0.01,
    ),
    "clip_cov": Case(
        "clip_cov", clip_cov, NORM, (f"{COV}.share=1.0", f"{COV}.low=0.3"), (lambda s: clip_cov(s, share=0.0), lambda s: clip_cov(s, 0.0))
    ),
    "clip_cov without a window is PPO": Case(
        "clip_cov", lambda s: clipped(s, advantage_norm), NORM, (f"{COV}.low=90.0", f"{COV}.high=91.0"), (lambda s: clip_cov(s, share=1.0),)
    ),
    "kl_cov": Case("kl_cov", kl_cov, NORM, wrong=(lambda s: kl_cov(s, -1.0), lambda s: kl_cov(s, share=0.5))),
    "fipo": Case("fipo", fipo, NORM, wrong=(naive.dapo, lambda s: fipo(s, 1.0)), spread=0.1),
    "fipo, both ways and with its guards": Case(
        "fipo",
        lambda s: fipo(s, 2.0, 0.8, 1.2, 1.05),
        NORM,
        (f"{MASKS}.future.half_life=2.0", f"{MASKS}.future.low=0.8", f"{MASKS}.future.ignore=1.2", f"{MASKS}.future.spare=1.05"),
        (lambda s: fipo(s, 2.0, 0.8), lambda s: fipo(s, 2.0, 0.8, 1.2), lambda s: fipo(s, 2.0, 1.0, 1.2, 1.05)),
    ),
    "entropy_min": Case("entropy_min", lambda s: -entropy(s), wrong=(entropy, sampled_entropy)),
    "adaptive_kl": Case("adaptive_kl", adaptive_kl, wrong=(lambda s: adaptive_kl(s, 0.0), lambda s: adaptive_kl(s, -0.2))),
    "adaptive_entropy": Case(
        "adaptive_entropy",
        lambda s: naive.grpo(s) + 0.01 * answer_entropy(s),
        NORM,
        wrong=(naive.grpo, lambda s: naive.grpo(s) - 0.01 * answer_entropy(s)),
    ),
    "ppo with generalised advantages": Case(
        "ppo", lambda s: gae(s), None, (f"{GAE}}}",), (naive.ppo, lambda s: gae(s, lam=1.0), lambda s: gae(s, each=True))
    ),
    "ppo with generalised advantages and a KL, whitened": Case(
        "ppo",
        lambda s: gae(s, 0.9, 0.8, 0.05, whiten=True),
        None,
        (f"{WHITE_GAE}, gamma: 0.9, lam: 0.8, coef: 0.05}}}}",),
        (lambda s: gae(s, 0.9, 0.8, 0.05), lambda s: gae(s, 0.9, 0.8, whiten=True), lambda s: gae(s, 1.0, 0.8, 0.05, whiten=True)),
    ),
    "ppo with a reward for each token, lambda by length": Case(
        "ppo",
        lambda s: gae(s, 0.9, each=True, by_length=0.5),
        None,
        (f"{GAE}, gamma: 0.9, rewards: each, lam_by_length: 0.5}}",),
        (lambda s: gae(s, 0.9, each=True), lambda s: gae(s, 0.9, by_length=0.5)),
    ),
    "darling": Case(
        "darling",
        lambda s: clipped(s, shaped_by_group),
        chain(shape=Diverse("form", 0.1), center=CENTER),
        wrong=(lambda s: clipped(s, advantage_center), lambda s: clipped(s, lambda q, x: shaped_by_group(q, x, 1.0))),
    ),
    "trust_grpo": Case("trust_grpo", trust_grpo, fresh_trust, wrong=(lambda s: trust_grpo(s, 0.0), naive.grpo_with_k3)),
    "s_grpo": Case("s_grpo", naive.ppo, wrong=(naive.ppo_without_min, placed_by_answer)),
    "mrt": Case("mrt", placed_by_answer, wrong=(naive.ppo, naive.grpo)),
    "riskpo": Case(
        "riskpo",
        lambda s: clipped(s, tail_risk, "sequence"),
        fresh_tail,
        wrong=(naive.grpo, lambda s: clipped(s, lambda q, x: tail_risk(q, x, 0.0), "sequence")),
    ),
    "coach": Case(
        "coach",
        lambda s: likelihood(s, lambda _, x: x["reward"], "token"),
        REWARD,
        wrong=(naive.reinforce, lambda s: likelihood(s, advantage_center, "token")),
    ),
    "dapo with entropy": Case("dapo", dapo_with_entropy, NORM, (ENTROPY,), (naive.dapo, lambda s: dapo_with_entropy(s, -1.0))),
    "reinforce with the squared log-ratio of answers": Case(
        "reinforce", sequence_k2, REWARD, (LONG_KL,), (lambda s: sequence_k2(s, "token"), naive.reinforce)
    ),
}
