"""Preference objectives: pairs, labelled answers, scored lists.  Every function transcribes a published loss and returns ``J`` = minus it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from posttrain.advantage import Reward
from posttrain.records import Row
from tests.loss import naive
from tests.loss.cases import LOO, Case, Data, advantages
from tests.loss.cases import make as common
from tests.loss.naive import Sequence, total


# -- data --------------------------------------------------------------------------------------------------------------------------
@cache
def make(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """Four pairs with a label, a margin and a score; five labelled answers; three answers under other prompts; scored lists of three, two
    (given) and rollouts of three questions.  Ragged, with holes in what is learnt, the rows in random order."""
    rng = random.Random(1000 + seed)
    model = naive.TinyCausal(seed=seed)
    seqs: list[Sequence] = []

    def add(source: str, longest: int = 6, **more: object) -> None:
        prompt, answer = rng.randint(1, 3), rng.randint(1, longest)
        ids = [rng.randrange(13) for _ in range(prompt + answer)]
        seqs.append({"ids": ids, "sources": ["prompt"] * prompt + [source] * answer, "rewards": {}, "context": "", **more})

    for i in range(4):
        label, margin = round(rng.uniform(0.55, 0.95), 3), round(rng.uniform(0.0, 1.5), 3)
        source = "demo" if i < 3 else "policy"
        for side in ("chosen", "rejected"):
            score = round(rng.gauss(0.3 if side == "chosen" else -0.3, 0.5), 3)
            known = {"score": score, "margin": 0.0}
            if side == "chosen":
                known |= {"label": label, "margin": margin, "deviation": round(rng.random(), 3)}
            add(source, pair=f"p{i}", side=side, rewards=known)
            source = "demo"  # the last pair: the policy's own answer against a given one
    for i in range(2):
        for side in ("chosen", "rejected"):
            add("policy", pair=f"own{i}", side=side)
    for label in (1.0, 0.0, 1.0, 0.25, 0.0):
        add("demo", rewards={"label": label})
    for _ in range(3):
        add("demo", context="mismatched", longest=4)
    for question, rewards in {"list a": (0.5, -1.0, 2.0), "list b": (0.0, 0.3)}.items():
        for reward in rewards:
            add("demo", question=question, rewards={"reward": reward})
    for question, rewards in {"q1": (0.9, 0.2, 0.5), "q2": (0.0, 1.0), "q3": (0.6, 0.6)}.items():
        for reward in rewards:
            add("policy", question=question, reward=reward, rewards={"reward": reward}, untrainable=False, scores={})
    rng.shuffle(seqs)
    values = advantages(seqs, advantage) if advantage else {}
    rows = []
    for i, s in enumerate(seqs):
        length = len(s["ids"])
        answer = [source != "prompt" for source in s["sources"]]
        s["trainable"] = [on and (rng.random() > 0.15 or t == length - 1) for t, on in enumerate(answer)]
        with torch.no_grad():
            logp = [math.nan, *model.alone(s["ids"]).tolist()]
            s["collision"] = [math.nan, *torch.log((model.rows_alone(s["ids"]).exp() ** 2).sum(1)).tolist()]
        # log-ratios on both sides of 0, of different mean: KL estimates above 0, answers above and below the base
        s["base"] = [math.nan, *(x - rng.gauss(0.1, 2 * spread) for x in logp[1:])]
        for name in ("old", "behaviour", "teacher"):
            s[name] = [x - rng.gauss(0.0, spread) if on == "policy" else math.nan for x, on in zip(logp, s["sources"], strict=True)]
        rows.append(
            Row(
                ids=s["ids"],
                sources=s["sources"],
                trainable=s["trainable"],
                logps={name: s[name] for name in ("base", "old", "behaviour", "teacher", "collision")},
                advantage=values.get(i, 1.0),
                group=s.get("question"),
                pair=s.get("pair"),
                side=s.get("side"),
                rewards=s["rewards"],
                context=s["context"],
                sample_id=str(i),
            )
        )
    return Data(seqs, rows, model)


# -- pieces ------------------------------------------------------------------------------------------------------------------------
Pair = tuple[Sequence, Sequence]


def tokens(s: Sequence) -> list[int]:
    return [t for t in range(1, len(s["ids"])) if s["trainable"][t] and s["sources"][t] != "prompt"]


def logp(s: Sequence) -> Tensor:
    return total([s["l"][t] for t in tokens(s)])


def ratio(s: Sequence) -> Tensor:
    return total([s["l"][t] - s["base"][t] for t in tokens(s)])


def mean_logp(s: Sequence) -> Tensor:
    return logp(s) / len(tokens(s))


def mean_ratio(s: Sequence) -> Tensor:
    return ratio(s) / len(tokens(s))


def pairs(seqs: list[Sequence], kind: str = "given") -> list[Pair]:
    """``given``: both answers from data; ``own``: both from the policy; ``mixed``: one of each."""
    wanted = {"given": {"demo"}, "own": {"policy"}, "mixed": {"demo", "policy"}}[kind]
    out = []
    for name in sorted({s["pair"] for s in seqs if "pair" in s}):
        w, r = (next(s for s in seqs if s.get("pair") == name and s["side"] == side) for side in ("chosen", "rejected"))
        if {w["sources"][-1], r["sources"][-1]} == wanted:
            out.append((w, r))
    return out


def labelled(seqs: list[Sequence]) -> list[Sequence]:
    return [s for s in seqs if "demo" in s["sources"] and "pair" not in s and not s["context"] and "label" in s["rewards"]]


def log_sigmoid(x: Tensor | float) -> Tensor:
    return -torch.log1p(torch.exp(-torch.as_tensor(x, dtype=torch.float64)))


def sigmoid(x: Tensor | float) -> Tensor:
    return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=torch.float64)))


def over_pairs(seqs: list[Sequence], loss: Callable[[Sequence, Sequence], Tensor], kind: str = "given") -> Tensor:
    """Minus the mean of ``loss(chosen, rejected)``."""
    found = pairs(seqs, kind)
    return -total([loss(w, r) for w, r in found]) / len(found)


def chosen_nll(seqs: list[Sequence], how: str) -> Tensor:
    """The chosen answers' negative log-likelihood: mean over ``tokens`` of the step, over ``answers`` of their token means, or of their sums."""
    found = [w for w, _ in pairs(seqs)]
    if how == "tokens":
        return -total([logp(w) for w in found]) / sum(len(tokens(w)) for w in found)
    return -total([mean_logp(w) if how == "answers" else logp(w) for w in found]) / len(found)


# -- objectives --------------------------------------------------------------------------------------------------------------------
def dpo(seqs: list[Sequence], beta: float = 0.1, kind: str = "given") -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (ratio(w) - ratio(r))), kind)


def dpo_norm(seqs: list[Sequence], beta: float = 5.0) -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (mean_ratio(w) - mean_ratio(r))))


def robust_dpo(seqs: list[Sequence], beta: float = 0.1, e: float = 0.1) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        h = beta * (ratio(w) - ratio(r))
        return (-(1 - e) * log_sigmoid(h) + e * log_sigmoid(-h)) / (1 - 2 * e)

    return over_pairs(seqs, loss)


def cdpo(seqs: list[Sequence], beta: float = 0.1, e: float = 0.1) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        h = beta * (ratio(w) - ratio(r))
        return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)

    return over_pairs(seqs, loss)


def soft_dpo(seqs: list[Sequence], flipped: bool = False) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        h, y = 0.1 * (ratio(w) - ratio(r)), w["rewards"]["label"]
        y = 1 - y if flipped else y
        return -y * log_sigmoid(h) - (1 - y) * log_sigmoid(-h)

    return over_pairs(seqs, loss)


def rso(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    return over_pairs(seqs, lambda w, r: torch.relu(1 - beta * (ratio(w) - ratio(r))))


def slic(seqs: list[Sequence], delta: float = 1.0, base: bool = False) -> Tensor:
    score = ratio if base else logp
    return over_pairs(seqs, lambda w, r: torch.relu(delta - score(w) + score(r))) - chosen_nll(seqs, "tokens")


def kl_estimate(seqs: list[Sequence], clamp: bool = True) -> Tensor:
    """Mean log-ratio of answers under other prompts, detached, at least 0."""
    found = [ratio(s).detach() for s in seqs if s["context"] == "mismatched"]
    z = total(found) / len(found)
    return z.clamp(min=0) if clamp else z


def kto(seqs: list[Sequence], beta: float = 0.1, good: float = 1.0, bad: float = 1.0, z: Callable = kl_estimate) -> Tensor:
    """arXiv 2402.01306, a soft label counting in both classes."""
    z0, out = z(seqs), []
    for s in labelled(seqs):
        y = s["rewards"]["label"]
        out.append(y * good * (1 - sigmoid(beta * (ratio(s) - z0))) + (1 - y) * bad * (1 - sigmoid(beta * (z0 - ratio(s)))))
    return -total(out) / len(out)


def kto_with_matched_kl(seqs: list[Sequence]) -> Tensor:
    """The bug of a micro-batch of one: the KL estimated on the answers themselves."""
    return kto(seqs, z=lambda seqs: (total([ratio(s).detach() for s in labelled(seqs)]) / len(labelled(seqs))).clamp(min=0))


def kto_with_live_kl(seqs: list[Sequence]) -> Tensor:
    def live(seqs: list[Sequence]) -> Tensor:
        found = [ratio(s) for s in seqs if s["context"] == "mismatched"]
        return (total(found) / len(found)).clamp(min=0)

    return kto(seqs, z=live)


def bco(seqs: list[Sequence], beta: float = 0.1, delta: float | None = None) -> Tensor:
    found = labelled(seqs)
    shift = total([beta * ratio(s).detach() for s in found]) / len(found) if delta is None else delta
    out = []
    for s in found:
        y, r = s["rewards"]["label"], beta * ratio(s) - shift
        out.append(-y * log_sigmoid(r) - (1 - y) * log_sigmoid(-r))
    return -total(out) / len(out)


def implicit_prm(seqs: list[Sequence], beta: float = 0.05) -> Tensor:
    return bco(seqs, beta, delta=0.0)


def bco_pair(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * ratio(w)) - log_sigmoid(-beta * ratio(r)))


def apo_zero(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    return over_pairs(seqs, lambda w, r: 1 - sigmoid(beta * ratio(w)) + sigmoid(beta * ratio(r)))


def apo_down(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    return over_pairs(seqs, lambda w, r: sigmoid(beta * ratio(w)) + 1 - sigmoid(beta * (ratio(w) - ratio(r))))


def sppo(seqs: list[Sequence], beta: float = 1e-3) -> Tensor:
    return over_pairs(seqs, lambda w, r: (ratio(w) - 1 / (2 * beta)) ** 2 + (ratio(r) + 1 / (2 * beta)) ** 2)


def nca(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        a, b = beta * ratio(w), beta * ratio(r)
        return -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)

    return over_pairs(seqs, loss)


def over_lists(seqs: list[Sequence], loss: Callable[[list[Tensor], list[float]], Tensor]) -> Tensor:
    """Minus the mean over the given lists of ``loss(log-ratios, rewards)``."""
    names = sorted({s["question"] for s in seqs if s.get("question", "").startswith("list")})
    members = [[s for s in seqs if s.get("question") == name] for name in names]
    return -total([loss([ratio(s) for s in m], [s["rewards"]["reward"] for s in m]) for m in members]) / len(members)


def softmax(values: list[Tensor] | list[float], temperature: float = 1.0) -> list[Tensor]:
    exp = [torch.exp(torch.as_tensor(v, dtype=torch.float64) / temperature) for v in values]
    return [e / sum(exp) for e in exp]


def info_nca(seqs: list[Sequence], beta: float = 0.1, temperature: float = 1.0) -> Tensor:
    def loss(ratios: list[Tensor], rewards: list[float]) -> Tensor:
        p = softmax([beta * r for r in ratios])
        return -total([q * torch.log(x) for q, x in zip(softmax(rewards, temperature), p, strict=True)])

    return over_lists(seqs, loss)


def nca_list(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    def loss(ratios: list[Tensor], rewards: list[float]) -> Tensor:
        each = zip(softmax(rewards), ratios, strict=True)
        return -total([q * log_sigmoid(beta * r) + log_sigmoid(-beta * r) / len(ratios) for q, r in each])

    return over_lists(seqs, loss)


def exo_list(seqs: list[Sequence], beta: float = 0.1, temperature: float = 0.5) -> Tensor:
    def loss(ratios: list[Tensor], rewards: list[float]) -> Tensor:
        p, q = softmax([beta * r for r in ratios]), softmax(rewards, temperature)
        return total([x * (torch.log(x) - torch.log(y)) for x, y in zip(p, q, strict=True)])

    return over_lists(seqs, loss)


def exo(seqs: list[Sequence], beta: float = 0.1, e: float = 1e-3) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        p = sigmoid(beta * (ratio(w) - ratio(r)))
        return p * (torch.log(p) - math.log(1 - e)) + (1 - p) * (torch.log(1 - p) - math.log(e))

    return over_pairs(seqs, loss)


def log_odds(s: Sequence) -> Tensor:
    p = torch.exp(mean_logp(s))
    return torch.log(p / (1 - p))


def orpo(seqs: list[Sequence], scale: float = 0.1, how: str = "tokens") -> Tensor:
    return scale * over_pairs(seqs, lambda w, r: -log_sigmoid(log_odds(w) - log_odds(r))) - chosen_nll(seqs, how)


def simpo(seqs: list[Sequence], beta: float = 2.0, gamma: float = 0.5, score: Callable = mean_logp) -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (score(w) - score(r)) - gamma))


def alphapo(seqs: list[Sequence], alpha: float = 0.25) -> Tensor:
    return simpo(seqs, score=lambda s: (1 - torch.exp(-alpha * mean_logp(s))) / alpha)


def cpo(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (logp(w) - logp(r)))) - chosen_nll(seqs, "tokens")


def cpo_simpo(seqs: list[Sequence]) -> Tensor:
    return simpo(seqs) - chosen_nll(seqs, "tokens")


def iterative_rpo(seqs: list[Sequence], alpha: float = 1.0, how: str = "answers") -> Tensor:
    return dpo(seqs) - alpha * chosen_nll(seqs, how)


def rpo(seqs: list[Sequence], eta: float = 0.005) -> Tensor:
    return dpo(seqs, 0.01) - eta * chosen_nll(seqs, "sums")


def dpop(seqs: list[Sequence], beta: float = 0.1, penalty: float = 50.0) -> Tensor:
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (ratio(w) - ratio(r) - penalty * torch.relu(-ratio(w)))))


def mpo(seqs: list[Sequence], beta: float = 0.1, shifted: bool = True) -> Tensor:
    both = [s for pair in pairs(seqs) for s in pair]
    delta = total([beta * ratio(s).detach() for s in both]) / len(both) if shifted else 0.0
    quality = over_pairs(seqs, lambda w, r: -log_sigmoid(beta * ratio(w) - delta) - log_sigmoid(-(beta * ratio(r) - delta)))
    return 0.8 * dpo(seqs, beta) + 0.2 * quality - chosen_nll(seqs, "answers")


def online_ipo(seqs: list[Sequence], beta: float = 0.1, score: Callable = ratio) -> Tensor:
    return over_pairs(seqs, lambda w, r: (score(w) - score(r) - 1 / (2 * beta)) ** 2, "own")


def nash_md(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    """The released update: per token ``(P - 1/2) - beta (l - l_base)``, detached, times ``l``; sums over tokens, mean over answers."""
    found = [s for s in seqs if "policy" in s["sources"] and "pair" not in s]
    out = []
    for s in found:
        out += [((s["reward"] - 0.5) - beta * (s["l"][t] - s["base"][t]).detach()) * s["l"][t] for t in tokens(s)]
    return total(out) / len(found)


@cache
def compared(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """Rollouts that were compared with each other, in circles too; one comparison failed."""
    data, draw = common(seed, advantage, spread), random.Random(seed + 11)
    place: dict[str, int] = {}
    for s in data.seqs:
        if "question" in s:
            s["place"] = place.setdefault(s["question"], 0)
            place[s["question"]] += 1
    seqs, rows = [], []
    for s, one in zip(data.seqs, data.rows, strict=True):
        if "question" in s:
            draw.seed(f"{seed} {s['question']} {s['place']}")
            beats = {k: draw.random() for k in range(place[s["question"]]) if k != s["place"] and (s["question"], s["place"], k) != ("q2", 0, 1)}
            seqs.append({**s, "beats": beats})
            rows.append(replace(one, rewards={f"judge/against/{k}": p for k, p in beats.items()}, sample_id=f"0/{s['question']}/{s['place']}", advantage=1.0))
    return Data(seqs, rows, data.model)


def mixture_game(seqs: list[Sequence], mix: float = 0.5, beta: float = 0.1, to: str = "base", mean: bool = False) -> Tensor:
    """The update above, the opponent the other answers weighed by ``(base/pi)^mix``."""
    found, out = [s for s in seqs if tokens(s)], []
    for s in found:
        others = [o for o in found if o["question"] == s["question"] and o["place"] in s["beats"]]
        weigh = [float(torch.exp(-mix * (total([o["l"][t].detach() - o[to][t] for t in tokens(o)]) / (len(tokens(o)) if mean else 1)))) for o in others]
        won = sum(w * s["beats"][o["place"]] for w, o in zip(weigh, others, strict=True)) / sum(weigh) - 0.5 if others else 0.0
        out += [(won - beta * (s["l"][t] - s["base"][t]).detach()) * s["l"][t] for t in tokens(s)]
    return total(out) / len(seqs)


def xpo(seqs: list[Sequence], alpha: float = 1e-5) -> Tensor:
    """The loss adds ``alpha * log pi`` of the base's sample, the given side of the pair."""
    found = [s for pair in pairs(seqs, "mixed") for s in pair if s["sources"][-1] == "demo"]
    return dpo(seqs, kind="mixed") - alpha * total([logp(s) for s in found]) / len(found)


def f_dpo(seqs: list[Sequence], derivative: Callable[[Tensor], Tensor], beta: float = 0.1) -> Tensor:
    """arXiv 2309.16240: ``h`` is the difference of ``f'(ratio)``, the ratio that of whole answers."""
    return over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (derivative(torch.exp(ratio(w))) - derivative(torch.exp(ratio(r))))))


def forward_kl(u: Tensor) -> Tensor:
    return -1 / u


def jensen_shannon(u: Tensor) -> Tensor:
    return torch.log(2 * u / (1 + u))


def alpha_divergence(u: Tensor, alpha: float = 0.5) -> Tensor:
    return (1 - u**-alpha) / alpha


def wpo(seqs: list[Sequence], one_sided: bool = False) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        weight = torch.exp(mean_logp(w) + (0.0 if one_sided else mean_logp(r))).detach()
        return -weight * log_sigmoid(0.1 * (ratio(w) - ratio(r)))

    return over_pairs(seqs, loss)


def wpo_aligned(seqs: list[Sequence], limit: float = 1.0, alignment: str = "sampled") -> Tensor:
    """As released: a token against ``log sum_v p_v^2``, the weight of a pair cut at 1, both constants; ``greedy`` takes the likeliest token in its place."""

    def mean_aligned(s: Sequence) -> Tensor:
        rows = {t: s["rows"][t] for t in tokens(s)}
        against = {t: torch.log((row.exp() ** 2).sum()) if alignment == "sampled" else row.max() for t, row in rows.items()}
        return total([s["l"][t] - against[t] for t in tokens(s)]) / len(tokens(s))

    def loss(w: Sequence, r: Sequence) -> Tensor:
        weight = torch.exp(mean_aligned(w) + mean_aligned(r)).clamp(max=limit).detach()
        return -weight * log_sigmoid(0.1 * (ratio(w) - ratio(r)))

    return over_pairs(seqs, loss)


def wpo_with_live_weight(seqs: list[Sequence]) -> Tensor:
    return over_pairs(seqs, lambda w, r: -torch.exp(mean_logp(w) + mean_logp(r)) * log_sigmoid(0.1 * (ratio(w) - ratio(r))))


def aot(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    found = pairs(seqs)
    now = sorted((logp(w) - logp(r) for w, r in found), key=float)
    was = sorted(sum(w["base"][t] for t in tokens(w)) - sum(r["base"][t] for t in tokens(r)) for w, r in found)
    return total([log_sigmoid(beta * (u - v)) for u, v in zip(now, was, strict=True)]) / len(found)


def aot_of_sides(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    found = pairs(seqs)
    up, down = (sorted((ratio(pair[side]) for pair in found), key=float) for side in (0, 1))
    return total([log_sigmoid(beta * (u - v)) for u, v in zip(up, down, strict=True)]) / len(found)


def ld_dpo(seqs: list[Sequence], beyond: float = 0.5, beta: float = 0.1) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        shared = min(len(tokens(w)), len(tokens(r)))

        def score(s: Sequence) -> Tensor:
            return total([(s["l"][t] - s["base"][t]) * (1.0 if n < shared else beyond) for n, t in enumerate(tokens(s))])

        return -log_sigmoid(beta * (score(w) - score(r)))

    return over_pairs(seqs, loss)


def discopop(seqs: list[Sequence], beta: float = 0.1, tau: float = 0.05) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        x = beta * (ratio(w) - ratio(r))
        g = sigmoid(x / tau)
        return -(1 - g) * log_sigmoid(x) + g * torch.exp(-x)

    return over_pairs(seqs, loss)


def ddpo(seqs: list[Sequence], weight: Callable[[float], float] = lambda d: 1 + d) -> Tensor:
    return over_pairs(seqs, lambda w, r: -weight(w["rewards"]["deviation"]) * log_sigmoid(0.1 * (ratio(w) - ratio(r))))


def dorpo(seqs: list[Sequence], inside: bool = True) -> Tensor:
    def loss(w: Sequence, r: Sequence) -> Tensor:
        weight, h = 1 + w["rewards"]["deviation"], log_odds(w) - log_odds(r)
        return -log_sigmoid(weight * h) if inside else -weight * log_sigmoid(h)

    found = [w for w, _ in pairs(seqs)]
    nll = -total([(1 + w["rewards"]["deviation"]) * logp(w) for w in found]) / sum(len(tokens(w)) for w in found)
    return 0.1 * over_pairs(seqs, loss) - nll


def step_apo(seqs: list[Sequence], beta: float = 0.3, sign: float = 1.0) -> Tensor:
    return over_pairs(
        seqs, lambda w, r: -log_sigmoid(beta * (ratio(w) - ratio(r)) - sign * (w["rewards"]["score"] - r["rewards"]["score"]))
    )


def tpo(seqs: list[Sequence], beta: float = 0.01, coef: float = 1.0) -> Tensor:
    gold = labelled(seqs)
    preference = over_pairs(seqs, lambda w, r: -log_sigmoid(beta * (logp(w) - logp(r))))
    return preference + coef * total([logp(s) for s in gold]) / sum(len(tokens(s)) for s in gold)


def prime(seqs: list[Sequence], outcome: float = 5.0, process: float = 5.0, beta: float = 0.05, whiten: bool = True) -> Tensor:
    """The released advantage: leave-one-out rewards of tokens, summed from the end, plus the outcome's, whitened; then the clipped surrogate."""
    rollouts = [s for s in seqs if s.get("question", "").startswith("q")]
    advantage: dict[tuple[int, int], float] = {}
    for i, s in enumerate(rollouts):
        group = [o for o in rollouts if o["question"] == s["question"]]
        k = len(group)

        def reward(o: Sequence, t: int) -> float:
            return beta * (o["teacher"][t] - o["base"][t])

        baseline = sum(sum(reward(o, t) for t in tokens(o)) / len(tokens(o)) for o in group) / (k - 1)
        for n, t in enumerate(tokens(s)):
            later = sum(reward(s, u) * k / (k - 1) - baseline for u in tokens(s)[n:])
            advantage[i, t] = outcome * naive.advantage_loo(seqs, s) + process * later
    values = list(advantage.values())
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) + 1e-8)
    out = []
    for (i, t), a in advantage.items():
        out.append(naive.surrogate(rollouts[i], t, (a - mean) / deviation if whiten else a))
    return total(out) / len(out)


# -- what is compared ----------------------------------------------------------------------------------------------------------------
KINDS = ("given", "own", "mixed", "gold")


@cache
def only(seed: int, advantage: Callable | None = None, spread: float = 0.25, *, kind: str = "given") -> Data:
    """:func:`make` with what one kind of stream learns from, because streams select by source alone: ``given``, ``own`` or ``mixed`` pairs,
    ``labelled`` answers, ``gold`` ones beside given pairs, or ``lists``; with it rollouts and answers under other prompts."""
    data = make(seed, advantage, spread)
    wanted = {id(s) for pair in pairs(data.seqs, "given" if kind == "gold" else kind) for s in pair} if kind in KINDS else set()

    def keep(s: Sequence) -> bool:
        if s["context"] or s.get("question", "").startswith("q"):
            return True
        if "pair" in s:
            return id(s) in wanted
        return kind in ("labelled", "gold") if "label" in s["rewards"] else kind == "lists"

    here = [i for i, s in enumerate(data.seqs) if keep(s)]
    return Data([data.seqs[i] for i in here], [data.rows[i] for i in here], data.model)


OWN, MIXED, ANSWERS, SCORED, GOLD = (partial(only, kind=kind) for kind in ("own", "mixed", "labelled", "lists", "gold"))
PAIRS, LABELLED, LISTS = "streams.pairs.advantage", "streams.labelled.advantage", "streams.lists.advantage"
WEIGHT = "streams.pairs.masks.probability"
ALIGNED = f"{WEIGHT}.alignment=sampled"


def case(loss: str, objective: naive.Objective, *wrong: naive.Objective, overrides: tuple[str, ...] = (), **more: object) -> Case:
    return Case(loss, objective, overrides=overrides, wrong=wrong, **{"data": only, **more})  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "dpo_norm": case("dpo_norm", dpo_norm, dpo, partial(dpo_norm, beta=0.1)),
    "robust_dpo": case("robust_dpo", robust_dpo, dpo, cdpo),
    "dpo with soft labels": case("dpo", soft_dpo, dpo, partial(soft_dpo, flipped=True), overrides=(f"{PAIRS}.label=label",)),
    "rso": case("rso", rso, dpo, slic, spread=1.5),
    "slic": case("slic", slic, rso, partial(slic, base=True), partial(slic, delta=10.0)),
    "slic with delta": case("slic", partial(slic, delta=5.0), slic, overrides=(f"{PAIRS}.beta=0.2", "streams.pairs.coef=5.0"), spread=1.0),
    "kto": case("kto", kto, kto_with_matched_kl, kto_with_live_kl, partial(kto, z=lambda _: 0.0), bco, data=ANSWERS),
    "kto with weights": case(
        "kto",
        partial(kto, beta=0.3, good=0.5, bad=2.0),
        kto,
        overrides=(f"{LABELLED}.good=0.5", f"{LABELLED}.bad=2.0", f"{LABELLED}.beta=0.3"),
        data=ANSWERS,
    ),
    "bco": case("bco", bco, partial(bco, delta=0.0), kto, spread=1.0, data=ANSWERS),
    "bco_pair": case("bco_pair", bco_pair, dpo, apo_zero),
    "implicit_prm": case("implicit_prm", implicit_prm, bco, partial(implicit_prm, beta=0.1), spread=1.0, data=ANSWERS),
    "nca": case("nca", nca, dpo, bco_pair),
    "nca of lists": case("info_nca", nca_list, info_nca, overrides=(f"{LISTS}.f=noise_contrastive",), data=SCORED),
    "info_nca": case("info_nca", info_nca, nca_list, partial(info_nca, temperature=2.0), data=SCORED),
    "exo": case("exo", exo, dpo, cdpo, partial(exo, e=4.5e-5)),
    "exo of lists": case(
        "info_nca",
        exo_list,
        info_nca,
        partial(exo_list, temperature=1.0),
        overrides=(f"{LISTS}.f=reverse_kl", f"{LISTS}.temperature=0.5"),
        data=SCORED,
    ),
    "sppo": case("sppo", sppo, partial(sppo, beta=2e-3), bco_pair),
    "orpo": case("orpo", orpo, partial(orpo, how="answers"), partial(orpo, scale=1.0)),
    "simpo": case("simpo", simpo, partial(simpo, gamma=0.25), partial(simpo, score=mean_ratio), partial(simpo, score=logp)),
    "alphapo": case("alphapo", alphapo, simpo, partial(alphapo, alpha=-0.25)),
    "cpo": case("cpo", cpo, iterative_rpo, cpo_simpo),
    "cpo_simpo": case("cpo_simpo", cpo_simpo, simpo, cpo),
    "apo_zero": case("apo_zero", apo_zero, apo_down, bco_pair),
    "apo_down": case("apo_down", apo_down, apo_zero, dpo),
    "iterative_rpo": case("iterative_rpo", iterative_rpo, dpo, partial(iterative_rpo, how="tokens")),
    "rpo": case("rpo", rpo, partial(rpo, eta=0.01), iterative_rpo),
    "dpop": case("dpop", dpop, dpo, partial(dpop, penalty=5.0)),
    "mpo": case("mpo", mpo, partial(mpo, shifted=False), iterative_rpo, spread=1.0),
    "tr_dpo": case("tr_dpo", partial(dpo, beta=0.05), dpo),
    "online_dpo": case("online_dpo", partial(dpo, kind="own"), online_ipo, partial(dpo, kind="own", beta=0.2), data=OWN),
    "per_step_negatives": case("per_step_negatives", partial(dpo, kind="own"), online_ipo, partial(dpo, kind="own", beta=0.2), data=OWN),
    "online_ipo": case("online_ipo", online_ipo, partial(online_ipo, score=mean_ratio), partial(dpo, kind="own"), data=OWN),
    "spin": case("spin", partial(dpo, kind="mixed"), partial(dpo, kind="mixed", beta=0.2), data=MIXED),
    "nash_md_mixture": Case(
        "nash_md_mixture",
        mixture_game,
        wrong=(partial(mixture_game, mix=0.0), partial(mixture_game, mix=-0.5), partial(mixture_game, mean=True), partial(mixture_game, to="old")),
        data=compared,
        spread=1.0,
    ),
    "nash_md against itself": Case("nash_md_mixture", partial(mixture_game, mix=0.0), overrides=("streams.rollouts.advantage.mix=0.0",), wrong=(mixture_game,), data=compared, spread=1.0),
    "nash_md": Case("nash_md", nash_md, Reward(0.5), wrong=(partial(nash_md, beta=0.0), partial(nash_md, beta=-0.1)), data=only),
    "xpo": case(
        "xpo",
        partial(xpo, alpha=0.1),
        partial(xpo, alpha=-0.1),
        partial(xpo, alpha=0.0),
        overrides=("streams.optimism.coef=0.1",),
        data=MIXED,
    ),
    "f_dpo": case("f_dpo", partial(f_dpo, derivative=forward_kl), dpo, partial(f_dpo, derivative=alpha_divergence)),
    "f_dpo, Jensen-Shannon": case(
        "dpo", partial(f_dpo, derivative=jensen_shannon), dpo, overrides=(f"{PAIRS}.transform=log_sigmoid",), spread=0.5
    ),
    "f_dpo, alpha divergence": case(
        "f_dpo", partial(f_dpo, derivative=alpha_divergence), dpo, overrides=(f"{PAIRS}.alpha=0.5",), spread=0.5
    ),
    "wpo": case("wpo", wpo, dpo, wpo_with_live_weight, partial(wpo, one_sided=True)),
    "wpo, aligned": case(
        "wpo",
        wpo_aligned,
        wpo,
        dpo,
        partial(wpo_aligned, alignment="greedy"),
        partial(wpo_aligned, limit=math.inf),
        overrides=(ALIGNED, f"{WEIGHT}.limit=1"),
    ),
    "wpo, aligned, without a limit": case(
        "wpo", partial(wpo_aligned, limit=math.inf), wpo, wpo_aligned, partial(wpo_aligned, alignment="greedy"), overrides=(ALIGNED,)
    ),
    "aot": case("aot", aot, dpo, aot_of_sides, spread=1.0),
    "aot of sides": case("aot", aot_of_sides, aot, dpo, overrides=(f"{PAIRS}.of=sides",), spread=1.0),
    "ld_dpo": case("ld_dpo", ld_dpo, dpo, partial(ld_dpo, beyond=0.0)),
    "discopop": case("discopop", discopop, dpo, partial(discopop, tau=0.1)),
    "ddpo": case("ddpo", ddpo, dpo, partial(ddpo, weight=lambda d: d)),
    "dorpo": case("dorpo", dorpo, orpo, partial(dorpo, inside=False)),
    "step_apo": case("step_apo", step_apo, partial(step_apo, sign=-1.0), partial(step_apo, sign=0.0)),
    "tpo": case("tpo", tpo, cpo, partial(tpo, coef=0.5), data=GOLD),
    "ids": case("ids", dpo, cdpo, partial(dpo, beta=0.2)),
    "prime": Case("prime", prime, LOO, wrong=(partial(prime, process=0.0), partial(prime, whiten=False)), spread=0.3, data=only),
}
