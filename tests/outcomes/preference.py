"""Claims about preference objectives: BANDIT, PREF, and LENGTH with preferences for longer answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from posttrain.advantage import GroupAdvantage, Reward
from posttrain.data.seeds import derive
from posttrain.mixture.pairs import BestWorst
from posttrain.records import Demo, Group, Pair
from tests.outcomes import bandit
from tests.outcomes.bandit import ACTIONS, BASE
from tests.outcomes.claims import Claim
from tests.outcomes.toys import Policy, Run, Table, demo_of, one_row, probabilities, prompt_of, values

PAIRED = "streams.pairs.advantage"


def shifted(seed: int) -> Tensor:
    """The start of a run: not the same for every seed."""
    return BASE + 0.5 * torch.randn(ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- PREF ----------------------------------------------------------------------------------------------------------------------------------------------
@cache
def on_pref(name: str, seed: int, flips: float = 0.0, overrides: tuple[str, ...] = (), steps: int = 60, count: int = 60) -> Policy:
    """All pairs at every step."""
    return Run(bandit.policy(), name, overrides, steps=steps, optimizer="adam", seed=seed, fixed=bandit.preferences(seed, count, flips)).go().policy


def flipped(seed: int) -> dict[str, float]:
    """Few pairs, three in ten labels turned round; the debiased loss knows the rate."""
    knows = (f"{PAIRED}.label_smoothing=0.3",)
    return {"robust DPO": bandit.ranked(on_pref("robust_dpo", seed, 0.3, knows, 60, 40)), "DPO": bandit.ranked(on_pref("dpo", seed, 0.3, (), 60, 40))}


def entropy_of(policy: Policy) -> float:
    p = probabilities(policy)
    return float(-(p * p.log()).sum())


def exo_entropy(seed: int) -> dict[str, float]:
    return {"DPO": entropy_of(on_pref("dpo", seed)), "EXO": entropy_of(on_pref("exo", seed))}


def without_pairs(name: str) -> Callable[[int], dict[str, float]]:
    """The same answers, each labelled good or bad, under two prompts that the policy does not tell apart."""

    def measure(seed: int) -> dict[str, float]:
        items: list[Demo] = []
        for i, pair in enumerate(bandit.preferences(seed, 60)):
            prompt = prompt_of(i % 2, ACTIONS)
            for side, label in ((pair.chosen, 1.0), (pair.rejected, 0.0)):
                items.append(demo_of(f"{i}/{label}", prompt, side.segments[-1].ids, rewards={"label": label}))
        alone = Run(bandit.policy(), name, steps=100, optimizer="adam", seed=seed, fixed=items).go().policy
        return {name.upper(): bandit.ranked(alone), "DPO": bandit.ranked(on_pref("dpo", seed, steps=100))}

    return measure


def no_worse(numbers: Mapping[str, float]) -> float:
    own, other = numbers.values()
    return own - other + 0.05


# -- one pair: where its margin goes ---------------------------------------------------------------------------------------------------------------------
RATES = {"ipo": 0.05, "rso": 1.0, "cdpo": 10.0, "dpo": 10.0}
"""Plain gradient steps; the losses' slopes differ by two orders of magnitude."""


def margin(name: str, seed: int, *overrides: str) -> float:
    start = shifted(seed)
    policy = Run(bandit.policy(start), name, overrides, steps=150, rate=RATES[name], fixed=[bandit.pair("p", 7, 0)]).go().policy
    d = bandit.logp(policy) - torch.log_softmax(start, 0)
    return float(d[7] - d[0])


@cache
def dpo_margin(seed: int) -> float:
    return margin("dpo", seed)


def stops(name: str, label: str, at: float, *overrides: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {label: margin(name, seed, *overrides), "DPO": dpo_margin(seed), "where it should stop": at}


def stopped(numbers: Mapping[str, float]) -> float:
    """Within a tenth of where it should, and DPO beyond: the smaller of the two distances."""
    own, dpo, at = numbers.values()
    return min(0.1 * at - abs(own - at), dpo - 1.1 * at)


# -- answers that share features: does the chosen one stay likely? ---------------------------------------------------------------------------------------
@cache
def chosen_after(name: str, seed: int) -> float:
    """Mean log-ratio of chosen answers, each paired with the answer most like it; three features for eight answers."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(3, ACTIONS, generator=draw, dtype=torch.float64)
    features = features / features.norm(dim=0)
    start = torch.randn(1, 3, generator=draw, dtype=torch.float64)
    total = []
    for chosen in range(4):
        like = (features.T @ features)[chosen].clone()
        like[chosen] = -2
        policy = Policy([Table(values(1, 3, start), one_row, features)], ACTIONS)
        before = bandit.logp(policy)
        after = bandit.logp(Run(policy, name, steps=40, rate=0.05, optimizer="adam", fixed=[bandit.pair("p", chosen, int(like.argmax()))]).go().policy)
        total.append(float(after[chosen] - before[chosen]))
    return sum(total) / len(total)


def keeps(name: str, label: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {label: chosen_after(name, seed), "DPO": chosen_after("dpo", seed)}


# -- LENGTH: a judge that likes length -------------------------------------------------------------------------------------------------------------------
def length_pairs(seed: int, count: int = 48) -> tuple[Policy, list[Pair]]:
    """Answers of one to twelve tokens, ended with probability 1/4 at each; the longer one is preferred with probability sigmoid(difference / 2)."""
    policy = Policy([Table(values(1, 4), one_row)], 4, length=12, ends=True)
    draw, coin, out = torch.Generator().manual_seed(seed), random.Random(derive("length", seed)), []
    prompt = prompt_of(0, 4)
    answers = [tuple(t for t, _ in a) for a in policy.sample([0] * 2 * count, draw)]
    for i, (a, b) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
        first = coin.random() < 1 / (1 + math.exp(-(len(a) - len(b)) / 2))
        won, lost = (a, b) if first else (b, a)
        out.append(Pair(f"p{i}", demo_of(f"p{i}+", prompt, won), demo_of(f"p{i}-", prompt, lost)))
    return policy, out


def mean_length(policy: Policy) -> float:
    """Exact: one minus the chance to have ended, summed over positions."""
    end = float(probabilities(policy)[0])
    return sum((1 - end) ** t for t in range(policy.length))


@cache
def length_after(name: str, seed: int, overrides: tuple[str, ...] = ()) -> float:
    policy, items = length_pairs(seed)
    return mean_length(Run(policy, name, overrides, steps=40, rate=0.02, optimizer="adam", fixed=items).go().policy)


SUMS = (f"{PAIRED}.score=logp_sum", f"{PAIRED}.beta=0.4", "streams.pairs.aggregation={_target_: posttrain.loss.aggregate.PairSum}")


# -- sampling now --------------------------------------------------------------------------------------------------------------------------------------
FAR = torch.linspace(3.0, -3.0, ACTIONS, dtype=torch.float64)


def pairs_of(policy: Policy, seed: int, count: int = 16) -> list[Pair]:
    draw = torch.Generator().manual_seed(seed)
    found = [a[0][0] for a in policy.sample([0] * 2 * count, draw)]
    order = [(a, b) if bandit.REWARDS[a] > bandit.REWARDS[b] else (b, a) for a, b in zip(found[::2], found[1::2], strict=True) if a != b]
    return [bandit.pair(f"p{i}", a, b) for i, (a, b) in enumerate(order)]


@cache
def far(kind: str, seed: int, steps: int = 80) -> float:
    """Expected reward after so many updates, from a start to which the best answer is rare."""
    policy = bandit.policy(FAR)
    fixed = pairs_of(policy, seed)
    if kind == "online DPO":
        run = Run(
            policy,
            "online_dpo",
            steps=steps,
            optimizer="adam",
            seed=seed,
            reward=lambda p, a: float(bandit.REWARDS[a[0]]),
            prompts=[0] * 16,
            n=2,
            advantage=Reward(),
            gate=BestWorst(),
        )
    elif kind == "SFT on the chosen":
        run = Run(policy, "sft", steps=steps, optimizer="adam", fixed=[p.chosen for p in fixed])
    elif kind == "online SFT on the chosen":
        run = Run(policy, "sft", steps=steps, optimizer="adam", fixed=lambda step: [p.chosen for p in pairs_of(policy, seed + 1000 * step)])
    elif kind == "TR-DPO":
        run = Run(policy, "tr_dpo", steps=steps, optimizer="adam", fixed=fixed, base_every=16, base_mix=0.6)
    else:
        run = Run(policy, "tr_dpo" if kind == "DPO at beta 0.05" else "dpo", steps=steps, optimizer="adam", fixed=fixed)
    return bandit.expected(run.go().policy)


def farther(first: str, second: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {first: far(first, seed), second: far(second, seed)}


def win_rate(seed: int) -> dict[str, float]:
    """Against the start, with ties counted half, after every round of 25 updates; the reference is the policy a round begins with."""
    policy, out = bandit.policy(shifted(seed)), {}
    start = probabilities(policy)
    better = torch.ones(ACTIONS, ACTIONS, dtype=torch.float64).tril(-1) + 0.5 * torch.eye(ACTIONS, dtype=torch.float64)

    def watch(run: Run, step: int) -> None:
        if step % 25 == 24:
            out[f"round {len(out) + 1}"] = float(probabilities(policy) @ better @ start)

    Run(
        policy,
        "sppo",
        ("streams.labelled.source=[policy]", "streams.labelled.advantage.beta=0.5"),
        steps=75,
        rate=0.05,
        optimizer="adam",
        seed=seed,
        reward=lambda p, a: float(bandit.REWARDS[a[0]]),
        prompts=[0] * 16,
        n=2,
        advantage=Reward(),
        gate=BestWorst(),
        base_every=25,
        watch=watch,
    ).go()
    return out


# -- regression on rewards -----------------------------------------------------------------------------------------------------------------------------------
def regressed(name: str, seed: int, skewed: bool, advantage: object, overrides: tuple[str, ...], base_every: int = 0) -> float:
    """Distance to the KL-regularised optimum at beta 1, from groups of four that another policy sampled, uniformly or with a preference for bad answers."""
    sampler = torch.softmax(torch.linspace(1.5, -1.5, ACTIONS, dtype=torch.float64) if skewed else torch.zeros(ACTIONS, dtype=torch.float64), 0)
    draw, start = torch.Generator().manual_seed(seed), shifted(seed)

    def batch(step: int) -> list[Group]:
        found = torch.multinomial(sampler, 32, replacement=True, generator=draw).view(8, 4).tolist()
        return advantage([bandit.group(answers, logps=sampler.log(), name=f"g{i}") for i, answers in enumerate(found)])  # type: ignore[operator]

    policy = bandit.policy(start)
    Run(policy, name, overrides, steps=200, rate=1.0, seed=seed, fixed=batch, base_every=base_every).go()
    return bandit.distance(policy, bandit.optimum(1.0, start))


INNER, BETA = "streams.rollouts.advantage.inner.coef=1.0", "streams.rollouts.advantage.coef=1.0"
TO_BASE = ("streams.rollouts.advantage.to=base", BETA)


@cache
def gvpo(seed: int, skewed: bool = False) -> float:
    return regressed("gvpo", seed, skewed, Reward(), (INNER,))


def reaches(skewed: bool) -> Callable[[int], dict[str, float]]:
    k3 = ("regularizers.kl={_target_: posttrain.loss.regularizer.KL, estimator: k3, to: base, coef: 1.0}",)
    return lambda seed: {"policy gradient with a k3 loss": regressed("rloo", seed, skewed, GroupAdvantage(center="loo", scale="none"), k3), "GVPO": gvpo(seed, skewed)}


def one_sided(seed: int) -> dict[str, float]:
    center = GroupAdvantage(scale="none", dead_group="formula")
    return {"Kimi k1.5": regressed("kimi_k15", seed, True, center, TO_BASE), "GVPO": gvpo(seed, True)}


def contrastive(seed: int) -> dict[str, float]:
    return {"CoPG": regressed("copg", seed, True, Reward(), (INNER, "streams.rollouts.coef=1.0"))}


CLAIMS = (
    Claim(
        "robust DPO under flipped labels",
        ("robust_dpo",),
        "2403.00409",
        "When labels are flipped, the debiased loss ranks better than DPO.",
        "PREF, 40 pairs, 30 % of the labels flipped, the rate known; 60 updates",
        "share of the answers ordered by reward",
        flipped,
        "does not hold",
        seeds=8,
    ),
    Claim(
        "EXO seeks modes",
        ("exo",),
        "2402.00856",
        "The reverse KL seeks modes: its policy has a lower entropy than DPO's.",
        "PREF, 60 pairs, 60 updates",
        "entropy, nats",
        exo_entropy,
        "does not hold",
        note="At equal updates; on pairs it ranks wrongly its slope is smaller than DPO's.",
    ),
    *(
        Claim(
            f"{name.upper()} needs no pairs",
            (name,),
            source,
            f"{name.upper()} on answers labelled good or bad matches DPO on the same answers in pairs (within 0.05).",
            "PREF, 60 pairs or their 120 labelled answers, 100 updates",
            "share of the answers ordered by reward",
            without_pairs(name),
            "not decided",
            effect=no_worse,
            effect_is="difference + 0.05",
        )
        for name, source in (("kto", "2402.01306"), ("bco", "2404.04656"))
    ),
    *(
        Claim(
            f"{label}: the margin of one pair stops",
            (name,),
            source,
            f"The margin of a pair that is always preferred stops at {at:g}; under DPO it goes on.",
            "BANDIT, one pair, 150 updates from random starts",
            "log-ratio margin",
            stops(name, label, at, *more),
            "holds",
            seeds=3,
            effect=stopped,
            effect_is="0.1 * stop - distance, and DPO's excess over 1.1 * stop, the smaller",
        )
        for name, label, source, at, more in (
            ("ipo", "IPO", "2310.12036", 5.0, ()),
            ("rso", "normalised hinge", "2309.06657", 10.0, ()),
            ("cdpo", "cDPO", "expected", math.log(4) / 0.1, (f"{PAIRED}.label_smoothing=0.2",)),
        )
    ),
    *(
        Claim(
            f"{label} keeps the chosen answer likely",
            (name,),
            source,
            "The chosen answer's likelihood does not fall as it may under DPO.",
            "BANDIT with three features for eight answers, each chosen answer against the one most like it; 40 updates",
            "log-ratio of the chosen answer",
            keeps(name, label),
            "holds",
        )
        for name, label, source in (
            ("dpop", "DPOP", "2402.13228"),
            ("iterative_rpo", "iterative RPO", "2404.19733"),
            ("nca", "NCA", "2402.05369"),
            ("orpo", "ORPO", "2403.07691"),
            ("cpo", "CPO", "2401.08417"),
        )
    ),
    Claim(
        "SimPO and length",
        ("simpo",),
        "2405.14734",
        "Mean log-probs keep answers shorter than summed ones when the judge likes length.",
        "LENGTH, 48 pairs, 40 updates; the summed score at the same beta per token of the mean length",
        "mean length",
        lambda seed: {"summed": length_after("simpo", seed, SUMS), "SimPO": length_after("simpo", seed)},
        "holds",
    ),
    Claim(
        "length-normalised DPO and length",
        ("dpo_norm",),
        "2411.15124",
        "Length-normalised DPO grows answers less than DPO when the judge likes length.",
        "LENGTH, 48 pairs, 40 updates",
        "mean length",
        lambda seed: {"DPO": length_after("dpo", seed), "length-normalised": length_after("dpo_norm", seed)},
        "holds",
    ),
    Claim(
        "sampling now",
        ("online_dpo",),
        "2404.14367",
        "With the best answers rare at the start, on-policy pairs get further than fixed ones in as many updates.",
        "BANDIT, the best answer at 0.1 %; 16 pairs per update, 80 updates",
        "expected reward",
        farther("online DPO", "DPO"),
        "holds",
    ),
    Claim(
        "a negative gradient",
        ("dpo",),
        "2404.14367",
        "Pushing rejected answers down gets further than imitating the chosen ones in as many updates.",
        "BANDIT, the best answer at 0.1 %; 16 fixed pairs, 80 updates",
        "expected reward",
        farther("DPO", "SFT on the chosen"),
        "not decided",
        seeds=12,
    ),
    Claim(
        "sampling now, without a negative gradient",
        ("sft",),
        "2404.14367",
        "Imitating the chosen of on-policy pairs gets further than that of fixed ones.",
        "BANDIT, the best answer at 0.1 %; 16 pairs per update, 80 updates",
        "expected reward",
        farther("online SFT on the chosen", "SFT on the chosen"),
        "holds",
    ),
    Claim(
        "a moving reference",
        ("tr_dpo",),
        "2404.09656",
        "A reference that follows the policy gets further than a fixed one.",
        "BANDIT, the best answer at 0.1 %; 16 fixed pairs, 80 updates, the reference moved 0.6 of the way every 16",
        "expected reward",
        farther("TR-DPO", "DPO at beta 0.05"),
        "does not hold",
        seeds=10,
        note="With few fixed pairs, further is further into the pairs' own mistakes.",
    ),
    Claim(
        "SPPO iterated",
        ("sppo",),
        "2405.00675",
        "Every round of self-play raises the win rate over the start.",
        "BANDIT, three rounds of 25 updates on 16 sampled pairs, beta 0.5",
        "win rate over the start",
        win_rate,
        "holds",
        effect=lambda n: min(b - a for a, b in zip((0.5, *n.values()), n.values(), strict=False)),
        effect_is="smallest rise of a round",
    ),
    Claim(
        "GVPO off-policy, uniform samples",
        ("gvpo",),
        "2504.19599",
        "The optimum is the KL-regularised one whatever sampled the answers.",
        "BANDIT, 8 groups of 4 uniform answers, 200 updates, beta 1",
        "total variation to the optimum",
        reaches(False),
        "holds",
    ),
    Claim(
        "GVPO off-policy, skewed samples",
        ("gvpo",),
        "2504.19599",
        "The optimum is the KL-regularised one whatever sampled the answers.",
        "BANDIT, 8 groups of 4 answers from a policy that likes the bad ones, 200 updates, beta 1",
        "total variation to the optimum",
        reaches(True),
        "holds",
    ),
    Claim(
        "centring on one side",
        ("kimi_k15", "gvpo"),
        "expected",
        "Centring the reward but not the log-ratio is biased when another policy sampled; centring both is not.",
        "BANDIT, 8 groups of 4 answers from a policy that likes the bad ones, 200 updates, beta 1, penalty to the start",
        "total variation to the optimum",
        one_sided,
        "holds",
    ),
    Claim(
        "CoPG off-policy",
        ("copg",),
        "2406.19185",
        "The optimum is the KL-regularised one whatever sampled the answers.",
        "BANDIT, 8 groups of 4 answers from a policy that likes the bad ones, 200 updates, beta 1",
        "total variation to the optimum",
        contrastive,
        "holds",
        effect=lambda n: 0.05 - n["CoPG"],
        effect_is="0.05 - distance",
    ),
)
