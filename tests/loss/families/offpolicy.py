"""Stale and mismatched samples, and regressions on the reward: the published objectives, one sequence and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.advantage import PromptBaseline
from posttrain.records import Group
from tests.loss import naive
from tests.loss.cases import BEHAVIOUR, CENTER, MASKS, NORM, REWARD, Case
from tests.loss.naive import Sequence, advantage_center, advantage_norm, learnt, of, rewards, surrogate, total

Seqs = list[Sequence]


def rho(s: Sequence, level: str, t: int, over: str = "old", to: str = "behaviour") -> float:
    """The ratio of two recorded policies at a level, without gradient."""
    tokens = learnt(s, "policy")
    each = [float(s["l"][u] if over == "self" else s[over][u]) - s[to][u] for u in tokens]
    total_log = {"token": lambda: each[tokens.index(t)], "sequence": lambda: sum(each), "geometric": lambda: sum(each) / len(each)}[level]()
    return math.exp(total_log)


def weighted(seqs: Seqs, weight: Callable[[Sequence, int], float], mean: str = "sequence", kept: bool = False) -> Tensor:
    """GRPO's clipped surrogate times a weight without gradient; ``kept`` counts only tokens whose weight and clip leave something."""
    group, out, survivors = of(seqs, "policy"), [], 0
    tokens = sum(len(learnt(s, "policy")) for s in group)
    for s in group:
        a = advantage_norm(seqs, s)
        for t in learnt(s, "policy"):
            w, r = weight(s, t), float(naive.r(s, t))
            survivors += w != 0 and not ((a > 0 and r > 1.2) or (a < 0 and r < 0.8))
            out.append(w * surrogate(s, t, a) / (len(group) * len(learnt(s, "policy")) if mean == "sequence" else 1))
    return total(out) if mean == "sequence" else total(out) / (survivors if kept else tokens)


def truncated(level: str, most: float = 2.0) -> naive.Objective:
    """The ratio that the reference holds is the token's; what is truncated may be another one."""
    return lambda seqs: weighted(seqs, lambda s, t: rho(s, "token", t) * min(1.0, most / rho(s, level, t)))


def rejected(level: str, least: float, most: float, **more: object) -> naive.Objective:
    return lambda seqs: weighted(seqs, lambda s, t: rho(s, "token", t) * (least <= rho(s, level, t) <= most), **more)  # type: ignore[arg-type]


def disagreeing(statistic: str, per: str, most: float) -> naive.Objective:
    def size(s: Sequence, t: int) -> float:
        d = s["old"][t] - s["behaviour"][t]
        return {"k2": d * d / 2, "k3": math.exp(d) - 1 - d, "abs": abs(d)}[statistic]

    def weight(s: Sequence, t: int) -> float:
        each = [size(s, u) for u in learnt(s, "policy")]
        found = {"token": size(s, t), "mean": sum(each) / len(each), "sum": sum(each), "worst": max(each)}[per]
        return rho(s, "token", t) * (found <= most)

    return lambda seqs: weighted(seqs, weight)


def m2po(seqs: Seqs, tau: float = 0.04, rule: str = "capped", harmful: bool = True) -> Tensor:
    each = {}
    for s in of(seqs, "policy"):
        for t in learnt(s, "policy"):
            d, a = float(s["l"][t]) - s["old"][t], advantage_norm(seqs, s)
            if not harmful or a * d > 0:
                each[id(s), t] = abs(d)
    sizes, bound = sorted(each.values()), 0.0
    for b in sizes:
        squares = [min(x, b) ** 2 for x in sizes] if rule == "capped" else [x**2 for x in sizes if x <= b]
        bound = b if sum(squares) / len(squares) <= tau else bound
    out = []
    for s in of(seqs, "policy"):
        a = advantage_norm(seqs, s)
        for t in learnt(s, "policy"):
            out.append(naive.r(s, t) * a * (each.get((id(s), t), 0.0) <= bound))
    return total(out) / len(out)


def opsm(seqs: Seqs, delta: float = 0.5) -> Tensor:
    def keep(s: Sequence, t: int) -> float:
        away = [s["behaviour"][u] - float(s["l"][u]) for u in learnt(s, "policy")]
        return float(not (advantage_norm(seqs, s) < 0 and sum(away) / len(away) > delta))

    return weighted(seqs, keep)


def vespo(seqs: Seqs, pos: tuple[float, float] = (2.0, 3.0), neg: tuple[float, float] = (3.0, 2.0)) -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        a, tokens = advantage_norm(seqs, s), learnt(s, "policy")
        k, lam = pos if a >= 0 else neg
        w = math.exp(sum(float(s["l"][t]) - s["old"][t] for t in tokens))
        out += [math.exp(lam + k * math.log(w) - lam * w) * a * s["l"][t] for t in tokens]
    return total(out) / len(out)


def signed(seqs: Seqs, s: Sequence) -> float:
    return 2.0 * s["reward"] - 1.0


def plus_minus(groups: list[Group]) -> list[Group]:
    """Rewards from -1 to 1."""
    return REWARD([replace(g, rollouts=tuple(replace(x, reward=2 * x.reward - 1) for x in g.rollouts)) for g in groups])  # type: ignore[operator]


def topr(seqs: Seqs, level: str = "sequence", taper: bool = True) -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        a = signed(seqs, s)
        for t in learnt(s, "policy"):
            w = min(rho(s, level, t, "self"), 1.0) if a < 0 and taper else 1.0
            out.append(w * a * s["l"][t])
    return total(out) / len(of(seqs, "policy"))


def a_lol(seqs: Seqs, low: float = 0.1, high: float = 1.9, floor: bool = True) -> Tensor:
    """Answers of the policy with an advantage over a value of 0.5, and given ones with the advantages ``a`` of their tokens."""
    answers = [(s, "policy") for s in of(seqs, "policy")] + [(s, "demo") for s in of(seqs, "demo", paired=False)]
    out = []
    for s, source in answers:
        tokens = learnt(s, source)
        above = max(s["reward"] - 0.5, 0.0 if floor else -1.0) if source == "policy" else None
        ratio = math.exp(sum(float(s["l"][t]) - s["base"][t] for t in tokens))
        out += [(s["a"][t] if above is None else above) * min(max(ratio, low), high) * s["l"][t] for t in tokens]
    return total(out) / len(answers)


def known(groups: list[Group]) -> list[Group]:
    """Every prompt comes with a value of 0.5."""
    told = [replace(g, prompt=replace(g.prompt, meta={"value": 0.5})) for g in groups]
    return PromptBaseline("value", 0.0)(told)


# -- regressions on the reward -------------------------------------------------------------------------------------------------------
def score(s: Sequence, to: str) -> Tensor:
    return total([s["l"][t] - s[to][t] for t in learnt(s, "policy")])


def learnt_groups(seqs: Seqs) -> list[Seqs]:
    """The answers of each prompt that something is learnt from."""
    group = [s for s in of(seqs, "policy") if learnt(s, "policy")]
    return [[s for s in group if s["question"] == q] for q in ("q1", "q2", "q3")]


def gvpo(seqs: Seqs, beta: float = 0.1, to: str = "base", center: bool = True) -> Tensor:
    """``1/(2(k-1)) sum ((beta D - mean) - (R - mean))**2`` over beta, summed over the answers of a prompt, averaged over prompts."""
    groups, losses = learnt_groups(seqs), []
    for g in groups:
        d, r = [score(s, to) for s in g], [s["reward"] for s in g]
        mean_d, mean_r = total(d) / len(g), sum(r) / len(g)
        each = [(beta * (x - (mean_d if center else 0.0)) - (y - mean_r)) ** 2 for x, y in zip(d, r, strict=True)]
        losses.append(total(each) / (2 * (len(g) - 1) * beta))
    return -total(losses) / len(groups)


def pairs(seqs: Seqs, beta: float, to: str, mean: bool = True) -> Tensor:
    """Squared differences of regularised rewards, averaged over the pairs of a prompt and over prompts."""
    groups, losses = learnt_groups(seqs), []
    for g in groups:
        value = [s["reward"] - beta * score(s, to) for s in g]
        each = [(value[i] - value[j]) ** 2 for i in range(len(g)) for j in range(i)]
        losses.append(total(each) / (len(each) if mean else 1))
    return -total(losses) / len(groups)


def residual(seqs: Seqs, tau: float, to: str, baseline: Callable[[Seqs, Sequence], float], level: str = "sequence") -> Tensor:
    """``A * sum l - tau/2 D**2`` per answer, the squared log-ratio of the whole answer or of its tokens."""
    out = []
    for s in of(seqs, "policy"):
        each = [s["l"][t] - s[to][t] for t in learnt(s, "policy")]
        square = total(each) ** 2 if level == "sequence" else total([d**2 for d in each])
        out.append(baseline(seqs, s) * total([s["l"][t] for t in learnt(s, "policy")]) - tau / 2 * square)
    return total(out) / len(out)


def regression(seqs: Seqs, beta: float, to: str, value: float) -> Tensor:
    """``-(beta D - (R - V))**2`` per answer, whose V was known before."""
    return -total([(beta * score(s, to) - max(s["reward"] - value, 0.0)) ** 2 for s in of(seqs, "policy")]) / len(of(seqs, "policy"))


def real(seqs: Seqs, tau: float = 0.5, mean: bool = True) -> Tensor:
    groups, losses = learnt_groups(seqs), []
    for g in groups:
        if max(s["reward"] for s in g) == min(s["reward"] for s in g):
            continue
        average = sum(rewards(seqs, g[0])) / len(rewards(seqs, g[0]))
        z = [score(s, "old") / (len(learnt(s, "policy")) if mean else 1) / tau for s in g]
        right = [torch.exp(-x) for x, s in zip(z, g, strict=True) if s["reward"] > average]
        wrong = [torch.exp(x) for x, s in zip(z, g, strict=True) if s["reward"] <= average]
        losses.append(torch.log(1 + total(wrong)) + torch.log(1 + total(right)))
    return -total(losses) / len(groups)


REJECT = f"{MASKS}.reject"
TIS = f"{MASKS}.tis"
DISAGREE = f"{MASKS}.disagree={{_target_: posttrain.loss.mask.Disagreement, "
MOMENT = f"{MASKS}.moment"
KEPT = "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.TokenMean, denominator: kept}"

CASES: dict[str, Case] = {
    "tis": Case("tis", truncated("token"), NORM, wrong=(truncated("token", 1.0), truncated("sequence"), naive.grpo), spread=0.5),
    "tis of the product": Case(
        "tis", truncated("sequence"), NORM, (f"{TIS}.level=sequence",), (truncated("token"), truncated("geometric")), 0.5
    ),
    "tis of the geometric mean": Case(
        "tis", truncated("geometric", 1.1), NORM, (f"{TIS}.level=sequence_geometric", f"{TIS}.max=1.1"), (truncated("token", 1.1),), 0.5
    ),
    "mis": Case("mis", rejected("sequence", 0.0, 3.0), NORM, wrong=(rejected("token", 0.0, 3.0), truncated("sequence", 3.0)), spread=0.5),
    "mis of the geometric mean": Case(
        "mis",
        rejected("geometric", 0.8, 1.2),
        NORM,
        (f"{REJECT}.level=sequence_geometric", f"{REJECT}.min=0.8", f"{REJECT}.max=1.2"),
        (rejected("sequence", 0.8, 1.2), rejected("token", 0.8, 1.2)),
        0.5,
    ),
    "icepop": Case("icepop", naive.icepop, NORM, wrong=(truncated("token", 5.0), rejected("token", 0.2, 2.0)), spread=0.5),
    "icepop with kept tokens counted": Case(
        "icepop",
        rejected("token", 0.5, 5.0, mean="token", kept=True),
        NORM,
        (KEPT,),
        (rejected("token", 0.5, 5.0, mean="token"), naive.icepop),
        0.5,
    ),
    **{
        f"rejection by {statistic} per {per}": Case(
            "grpo",
            disagreeing(statistic, per, most),
            NORM,
            (BEHAVIOUR, f"{DISAGREE}statistic: {statistic}, per: {per}, max: {most}}}"),
            (disagreeing(statistic, per, 1e6), disagreeing(statistic, "sum" if per != "sum" else "token", most)),
            0.3,
        )
        for statistic, per, most in (("k3", "token", 0.1), ("k2", "mean", 0.15), ("abs", "worst", 0.9), ("k3", "sum", 0.8))
    },
    "decoupled_ppo": Case(
        "decoupled_ppo",
        lambda s: weighted(s, lambda q, t: min(rho(q, "token", t), 2.0), "token"),
        NORM,
        wrong=(naive.decoupled_ppo, lambda s: weighted(s, lambda q, t: 1.0, "token")),
        spread=0.5,
    ),
    "m2po": Case("m2po", m2po, NORM, wrong=(lambda s: m2po(s, 1e6), lambda s: m2po(s, harmful=False)), spread=0.4),
    "m2po, remaining tokens": Case(
        "m2po", lambda s: m2po(s, 0.1, "remaining"), NORM, (f"{MOMENT}.rule=remaining", f"{MOMENT}.tau=0.1"), (lambda s: m2po(s, 0.1),), 0.6
    ),
    "m2po, all tokens": Case("m2po", lambda s: m2po(s, harmful=False), NORM, (f"{MOMENT}.tokens=all",), (m2po,), 0.4),
    "opsm": Case("opsm", lambda s: opsm(s, 0.1), NORM, (f"{MASKS}.stale.delta=0.1",), (naive.grpo, lambda s: opsm(s, -9.0)), 0.5),
    "vespo": Case("vespo", vespo, NORM, wrong=(lambda s: vespo(s, (3.0, 2.0), (2.0, 3.0)), lambda s: vespo(s, (1e-9, 1e-9), (1e-9, 1e-9)))),
    "topr": Case("topr", topr, plus_minus, wrong=(lambda s: topr(s, "token"), lambda s: topr(s, taper=False)), spread=0.4),
    "topr of the token": Case("topr", lambda s: topr(s, "token"), plus_minus, (f"{MASKS}.taper.level=token",), (topr,), 0.4),
    "a_lol": Case("a_lol", a_lol, known, wrong=(lambda s: a_lol(s, 0.0, 1e9), lambda s: a_lol(s, floor=False)), spread=0.8),
    "gvpo": Case("gvpo", gvpo, REWARD, wrong=(lambda s: gvpo(s, center=False), lambda s: gvpo(s, 0.2), lambda s: gvpo(s, to="old"))),
    "gvpo with centred rewards": Case("gvpo", gvpo, CENTER, wrong=(lambda s: gvpo(s, center=False),)),
    "copg": Case("copg", lambda s: pairs(s, 0.1, "base"), REWARD, wrong=(lambda s: pairs(s, 0.1, "base", mean=False), gvpo)),
    "rebel": Case("rebel", lambda s: pairs(s, 1.0, "old"), REWARD, wrong=(lambda s: pairs(s, 1.0, "base"), lambda s: pairs(s, 0.1, "old"))),
    "kimi_k15": Case(
        "kimi_k15",
        lambda s: residual(s, 0.1, "old", advantage_center),
        CENTER,
        wrong=(lambda s: residual(s, 0.1, "old", advantage_center, "token"), lambda s: residual(s, 0.1, "base", advantage_center)),
        spread=0.5,
    ),
    "kimi_k15 per token, as released": Case(
        "kimi_k15",
        lambda s: residual(s, 0.1, "old", advantage_center, "token"),
        CENTER,
        ("streams.rollouts.advantage.credit=own",),
        (lambda s: residual(s, 0.1, "old", advantage_center),),
        0.5,
    ),
    "dro": Case(
        "dro",
        lambda s: residual(s, 0.1, "base", lambda _, x: max(x["reward"] - 0.5, 0.0)),
        known,
        wrong=(
            lambda s: residual(s, 0.1, "base", advantage_center),
            lambda s: residual(s, 0.2, "base", lambda _, x: max(x["reward"] - 0.5, 0.0)),
        ),
        spread=0.5,
    ),
    "a_star_po": Case(
        "a_star_po",
        lambda s: regression(s, 0.5, "base", 0.5),
        known,
        ("streams.rollouts.advantage.coef=0.5", "streams.rollouts.coef=1.0"),
        (lambda s: regression(s, 0.1, "base", 0.5), lambda s: regression(s, 0.5, "old", 0.5)),
    ),
    "real": Case("real", real, CENTER, wrong=(lambda s: real(s, 1.0), lambda s: real(s, mean=False)), spread=0.5),
    "topr with advantages in [0, 1] is imitation": Case(
        "topr", lambda s: naive.reinforce(s), REWARD, wrong=(lambda s: naive.reinforce(s, advantage_center),)
    ),
}
