"""Claims about policy-gradient objectives: BANDIT, ADD, LENGTH, STALE, NOISE and FIXED."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from posttrain.advantage import BestMinusSecond, BetaNorm, Chain, GreedyBaseline, GroupAdvantage, LiveGroups, PositivePart, Reward
from posttrain.rollout.strategy import Fixed, WithGreedy
from tests.outcomes.claims import Claim
from tests.outcomes.toys import END, Policy, Run, Table, one_row, probabilities, values

NORM, CENTER, LOO = GroupAdvantage(), GroupAdvantage(scale="none"), GroupAdvantage(center="loo", scale="none")
OVER_MEAN = GroupAdvantage(scale="mean")
GROUPS = "streams.rollouts"


# -- BANDIT with one right answer --------------------------------------------------------------------------------------------------------------------------
def hit(start: Sequence[float]) -> Policy:
    """Eight answers per prompt, the first of which is right with probability ``start[prompt]``."""
    logits = torch.zeros(len(start), 8, dtype=torch.float64)
    logits[:, 0] = torch.tensor([math.log(7 * p / (1 - p)) for p in start], dtype=torch.float64)
    return Policy([Table(values(len(start), 8, logits), lambda prompt, position, last: prompt)], 8)


def is_first(prompt: int, answer: tuple[int, ...]) -> float:
    return float(answer[0] == 0)


def chances(policy: Policy) -> list[float]:
    return [float(probabilities(policy, p)[0]) for p in range(policy.tables[0].values.shape[0])]


def size_of_step(seed: int) -> dict[str, float]:
    """Move of the right answer's logit relative to the exact gradient of its probability, p(1-p), over 1500 groups of four at p = 0.25."""
    out = {}
    for name, loss, advantage in (("RLOO", "rloo", LOO), ("GRPO", "grpo", NORM)):
        policy = hit([0.25])
        before = float(policy.tables[0].values.detach()[0, 0])
        Run(policy, loss, steps=1, rate=1.0, seed=seed, reward=is_first, prompts=[0] * 1500, n=4, advantage=advantage).go()
        out[name] = (float(policy.tables[0].values.detach()[0, 0]) - before) / (0.25 * 0.75)
    return out


def variance_of(loss: str, advantage: Any, policy: Callable[[], Policy], seed: int, repeats: int = 60, **more: Any) -> float:
    """Variance of one step over its squared mean, summed over parameters: what is left to average away."""
    moves = []
    for i in range(repeats):
        one = policy()
        before = one.tables[0].values.detach().clone()
        Run(one, loss, steps=1, rate=1.0, seed=1000 * seed + i, advantage=advantage, **more).go()
        moves.append((one.tables[0].values.detach() - before).flatten())
    found = torch.stack(moves)
    return float(found.var(0).sum() / found.mean(0).square().sum())


def variances(reward: Callable[[int, tuple[int, ...]], float]) -> Callable[[int], dict[str, float]]:
    common: dict[str, Any] = {"reward": reward, "prompts": [0] * 4, "n": 8}
    return lambda seed: {"REINFORCE": variance_of("reinforce", Reward(), lambda: hit([0.7]), seed, **common), "RLOO": variance_of("rloo", LOO, lambda: hit([0.7]), seed, **common)}


def bnpo_variance(seed: int) -> dict[str, float]:
    spread_out = [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
    common: dict[str, Any] = {"reward": is_first, "prompts": range(8), "n": 8}
    return {"GRPO": variance_of("grpo", NORM, lambda: hit(spread_out), seed, **common), "BNPO": variance_of("bnpo", BetaNorm(1e6), lambda: hit(spread_out), seed, **common)}


def hard_share(loss: str, advantage: Any, seed: int) -> float:
    """Of what one step adds to the log-odds of a hard prompt (0.05) and an easy one (0.7), the hard one's share."""
    policy = hit([0.05, 0.7])
    before = chances(policy)
    Run(policy, loss, steps=1, rate=0.1, seed=seed, reward=is_first, prompts=[0, 1] * 300, n=8, advantage=advantage).go()
    moved = [math.log(b / (1 - b)) - math.log(a / (1 - a)) for a, b in zip(before, chances(policy), strict=True)]
    return moved[0] / sum(moved)


def wide(loss: str, advantage: Any, seed: int, rate: float) -> float:
    """pass@4 when pass@1, over prompts of five difficulties, first reaches 0.6."""
    found: list[float] = []

    def watch(run: Run, step: int) -> None:
        p = chances(run.policy)
        if not found and sum(p) / len(p) >= 0.6:
            found.append(sum(1 - (1 - x) ** 4 for x in p) / len(p))

    Run(hit([0.03, 0.1, 0.3, 0.5, 0.7]), loss, steps=120, rate=rate, seed=seed, reward=is_first, prompts=[0, 1, 2, 3, 4] * 4, n=4, advantage=advantage, watch=watch).go()
    return found[0] if found else 0.0


@cache
def rare(loss: str, seed: int, *overrides: str) -> float:
    """Probability of a right answer that began at 0.01, after ten batches of eight updates each."""
    policy = hit([0.01])
    Run(policy, loss, overrides, steps=10, rate=1.0, seed=seed, reward=is_first, prompts=[0] * 32, n=8, advantage=NORM, updates=8).go()
    return chances(policy)[0]


def dead(loss: str, advantage: Any, seed: int, count: int) -> float:
    """Probability on one live prompt after 15 steps with ``count`` prompts beside it that nobody solves."""
    policy = hit([0.3] + [0.5] * count)
    Run(policy, loss, steps=15, rate=1.0, seed=seed, reward=lambda p, a: is_first(p, a) if p == 0 else 0.0, prompts=[*[0] * 8, *[1 + i % max(count, 1) for i in range(count)]], n=8,
        advantage=advantage).go()  # fmt: skip
    return chances(policy)[0]


# -- ADD: the second token is the first plus the prompt -------------------------------------------------------------------------------------------------------
def adder(seed: int = 0) -> Policy:
    start = 0.3 * torch.randn(3 * 2 * 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Policy([Table(values(36, 6, start), lambda p, t, last: (p * 2 + t) * 6 + last)], 6, 2)


def sums(prompt: int, answer: tuple[int, ...]) -> float:
    return float((answer[0] + prompt) % 6 == answer[1])


def solved(policy: Policy) -> float:
    answers, logp = policy.all_answers(3)
    right = torch.stack([((answers[:, 0] + p) % 6 == answers[:, 1]).double() for p in range(3)])
    return float((logp.exp() * right).sum(1).mean())


def whole_entropy(policy: Policy) -> float:
    _, logp = policy.all_answers(3)
    return float(-(logp.exp() * logp).sum(1).mean())


@cache
def added(loss: str, overrides: tuple[str, ...], advantage: Any, seed: int, steps: int = 40, **more: Any) -> Run:
    """Ten groups of eight per prompt and step, plain gradient descent."""
    common: dict[str, Any] = {"rate": 10.0, "reward": sums, "prompts": [0, 1, 2] * 4, "n": 8}
    return Run(adder(seed), loss, overrides, steps=steps, seed=seed, advantage=advantage, **(common | more)).go()


def entropy_at(level: float, loss: str, overrides: tuple[str, ...], advantage: Any, seed: int, steps: int, **more: Any) -> float:
    """Of an answer, when the prompts are first solved with probability ``level``; at the end, if never."""
    found: list[float] = []

    def watch(run: Run, step: int) -> None:
        if not found and solved(run.policy) >= level:
            found.append(whole_entropy(run.policy))

    common: dict[str, Any] = {"rate": 10.0, "reward": sums, "prompts": [0, 1, 2] * 4, "n": 8}
    run = Run(adder(seed), loss, overrides, steps=steps, seed=seed, advantage=advantage, watch=watch, **(common | more)).go()
    return found[0] if found else whole_entropy(run.policy)


def clip_higher(seed: int) -> dict[str, float]:
    return {f"clip {high}": entropy_at(0.8, "dapo", (f"{GROUPS}.masks.clip.high={high}",), NORM, seed, 25, updates=8) for high in (0.28, 0.2)}


def raft_entropy(seed: int) -> dict[str, float]:
    good = Chain({"reward": Reward(), "positive": PositivePart()})
    return {"GRPO": entropy_at(0.6, "grpo", (), NORM, seed, 60), "RAFT": entropy_at(0.6, "raft", (), good, seed, 60)}


def uncertain_only(seed: int) -> dict[str, float]:
    return {"top fifth": solved(added("top_entropy", (), NORM, seed).policy), "all tokens": solved(added("dapo", (), NORM, seed).policy)}


def held_entropy(seed: int) -> dict[str, float]:
    """Mean entropy of a token over the last 30 of 100 steps."""
    coef = "regularizers.entropy.coef"
    run = added("adaptive_entropy", (f"{coef}.target=0.8", f"{coef}.rate=0.02", f"{coef}.init=0.02"), NORM, seed, 100)
    plain = added("grpo", (), NORM, seed, 100)
    last = [m["rollouts/entropy"] for m in run.metrics[-30:]]
    return {"controlled": sum(last) / len(last), "not": whole_entropy(plain.policy) / 2}


def greedy_baseline(seed: int) -> dict[str, float]:
    common: dict[str, Any] = {"steps": 100, "rate": 3.0, "seed": seed, "prompts": [0, 1, 2] * 8, "n": 1}
    with_it = Run(adder(seed), "remax", reward=sums, advantage=GreedyBaseline(), strategy=WithGreedy(Fixed(1)), **common).go()
    without = Run(adder(seed), "reinforce", reward=lambda p, a: sums(p, a) + 1.0, advantage=Reward(), **common).go()
    return {"ReMax": solved(with_it.policy), "REINFORCE, reward + 1": solved(without.policy)}


# -- LENGTH ------------------------------------------------------------------------------------------------------------------------------------------------------
def stopper(end: float = 0.25) -> Policy:
    start = torch.tensor([math.log(3 * end / (1 - end)), 0.0, 0.0, 0.0], dtype=torch.float64)
    return Policy([Table(values(1, 4, start), one_row)], 4, length=12, ends=True)


def length_of(policy: Policy) -> float:
    go_on = 1 - float(probabilities(policy)[END])
    return sum(go_on**t for t in range(policy.length))


def coin(seed: int) -> Callable[[int, tuple[int, ...]], float]:
    """A reward that has nothing to do with the answer."""
    rng = random.Random(seed)
    return lambda prompt, answer: float(rng.random() < 0.3)


def drift(loss: str, advantage: Any, seed: int) -> float:
    policy = stopper()
    Run(
        policy,
        loss,
        ("streams.rollouts.aggregation.length=4",) if loss == "dr_grpo" else (),
        steps=40,
        rate=0.3,
        seed=seed,
        reward=coin(seed),
        prompts=[0] * 16,
        n=8,
        advantage=advantage,
    ).go()
    return length_of(policy)


def end_of(policy: Policy) -> float:
    """The logit of the end, less the mean of the others."""
    logits = policy.tables[0].values.detach()[0]
    return float(logits[END] - logits[1:].mean())


def reaction(loss: str, seed: int) -> float:
    """Change of the logit of the end after one small step, where longer answers are right more often."""
    policy = stopper()
    rng = random.Random(seed)
    before = end_of(policy)
    Run(policy, loss, steps=1, rate=0.1, seed=seed, reward=lambda p, a: float(rng.random() < len(a) / 12), prompts=[0] * 400, n=8, advantage=NORM).go()
    return before - end_of(policy)


def opo_variance(seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    common: dict[str, Any] = {"reward": lambda p, a: float(rng.random() < len(a) / 12), "prompts": [0] * 4, "n": 8}
    weighted = GroupAdvantage(center="length_weighted", scale="none")
    return {"group mean": variance_of("opo", CENTER, stopper, seed, **common), "length-weighted": variance_of("opo", weighted, stopper, seed, **common)}


def between(low: float, high: float) -> Callable[[Mapping[str, float]], float]:
    def effect(numbers: Mapping[str, float]) -> float:
        first, second = list(numbers.values())[:2]
        return min(first / second - low, high - first / second)

    return effect


ADD = "ADD, 40 steps of 96 rollouts"
CLAIMS = (
    Claim(
        "RLOO has no bias",
        ("rloo", "grpo"),
        "2402.14740",
        "Leave-one-out is unbiased; division by the group's deviation is not (1.645 times at four samples and p = 0.25).",
        "BANDIT, 1500 groups of 4, one step",
        "step over the exact gradient",
        size_of_step,
        "holds",
        effect=lambda n: min(0.1 - abs(n["RLOO"] - 1), n["GRPO"] - 1.3),
        effect_is="0.1 - |RLOO - 1|, and GRPO - 1.3, the smaller",
    ),
    *(
        Claim(
            f"RLOO against REINFORCE, {kind}",
            ("rloo", "reinforce"),
            "2402.14740",
            "The leave-one-out baseline lowers the gradient's variance.",
            "BANDIT, the best answer at 0.7, 60 steps from one start",
            "variance over squared mean",
            variances(reward),
            found,
            seeds=4,
            note=note,
        )
        for kind, reward, found, note in (
            ("graded rewards", lambda p, a: 4.0 - a[0] / 2, "holds", ""),
            ("rewards of 0 and 1", is_first, "does not hold", "With one right answer, every right sample pushes the same way, and wrong ones only add noise."),
        )
    ),
    Claim(
        "BNPO's variance",
        ("bnpo", "grpo"),
        "2506.02864",
        "Normalising by a fitted beta density gives gradients of less variance than GRPO's.",
        "BANDIT, eight prompts from 0.05 to 0.95, 60 steps from one start",
        "variance over squared mean",
        bnpo_variance,
        "not decided",
        seeds=4,
    ),
    Claim(
        "OPO's baseline",
        ("opo",),
        "2505.23585",
        "The length-weighted baseline lowers the gradient's variance below the group mean's.",
        "LENGTH, longer is better, 60 steps from one start",
        "variance over squared mean",
        opo_variance,
        "not decided",
        seeds=4,
    ),
    Claim(
        "MaxRL favours hard prompts",
        ("maxrl", "grpo"),
        "2602.02710",
        "Hard prompts learn faster than under GRPO, easy ones slower.",
        "BANDIT, p = 0.05 and 0.7, one step of 600 groups",
        "the hard prompt's share of the gain",
        lambda seed: {"MaxRL": hard_share("maxrl", OVER_MEAN, seed), "GRPO": hard_share("grpo", NORM, seed)},
        "holds",
    ),
    Claim(
        "pass@k training",
        ("pass_at_k", "rloo"),
        "2503.19595",
        "At equal pass@1, pass@k is higher than under RLOO.",
        "BANDIT, five prompts from 0.03 to 0.7, until pass@1 is 0.6",
        "pass@4",
        lambda seed: {"best minus second": wide("pass_at_k", BestMinusSecond(), seed, 0.5), "RLOO": wide("rloo", LOO, seed, 2.0)},
        "holds",
    ),
    Claim(
        "GPG and dead groups",
        ("gpg",),
        "2504.02546",
        "Progress per live group does not slow down when prompts nobody solves are added.",
        "BANDIT, 8 live groups, with 24 dead ones or without; 15 steps",
        "success on the live prompt",
        lambda seed: {
            "GPG, dead groups": dead("gpg", Chain({"center": CENTER, "live": LiveGroups()}), seed, 24),
            "GPG, none": dead("gpg", Chain({"center": CENTER, "live": LiveGroups()}), seed, 0),
            "token mean, dead groups": dead("gpg", CENTER, seed, 24),
        },
        "holds",
        effect=lambda n: min(0.1 - abs(n["GPG, dead groups"] - n["GPG, none"]), n["GPG, dead groups"] - n["token mean, dead groups"]),
        effect_is="0.1 - |change|, and the gain over a token mean, the smaller",
    ),
    Claim(
        "Dr. GRPO and length",
        ("dr_grpo", "grpo"),
        "2503.20783",
        "GRPO's division by the answer's length makes answers longer; without it they are not.",
        "LENGTH, the reward is a coin (p = 0.3), 40 steps of 128 answers",
        "mean length",
        lambda seed: {"GRPO": drift("grpo", NORM, seed), "Dr. GRPO": drift("dr_grpo", CENTER, seed)},
        "not decided",
        seeds=8,
        note="To first order no aggregation drifts when the reward does not depend on the length.",
    ),
    Claim(
        "LUSPO and length",
        ("luspo", "gspo"),
        "2602.05261",
        "Counting answers by their length removes a bias against long ones: where longer is better, the policy reacts faster (about 3 times, at a mean length near 4).",
        "LENGTH, longer is better, one step of 3200 answers",
        "change of the end's logit",
        lambda seed: {"LUSPO": reaction("luspo", seed), "GSPO": reaction("gspo", seed)},
        "holds",
        effect=between(2.0, 6.0),
        effect_is="distance of the ratio from leaving (2, 6)",
    ),
    Claim(
        "clip-higher keeps entropy",
        ("dapo",),
        "2503.14476",
        "A wider upper clip keeps the policy's entropy up.",
        "ADD, eight updates a batch, when first solved with probability 0.8",
        "entropy of an answer, nats",
        clip_higher,
        "not decided",
    ),
    Claim(
        "CISPO on rare tokens",
        ("cispo", "dapo"),
        "2506.13585",
        "A capped ratio lets rare useful tokens rise faster than a clip does.",
        "BANDIT, the right answer at 0.01, ten batches of eight updates",
        "its probability",
        lambda seed: {"CISPO": rare("cispo", seed), "clip 0.2": rare("dapo", seed, f"{GROUPS}.masks.clip.high=0.2")},
        "holds",
    ),
    Claim(
        "DPPO on rare tokens",
        ("dppo_tv", "dapo"),
        "2602.04879",
        "A bound on the probability's change lets rare tokens move faster than one on the ratio.",
        "BANDIT, the right answer at 0.01, ten batches of eight updates",
        "its probability",
        lambda seed: {"DPPO": rare("dppo_tv", seed), "clip 0.2": rare("dapo", seed, f"{GROUPS}.masks.clip.high=0.2")},
        "holds",
    ),
    Claim(
        "positives only",
        ("raft", "grpo"),
        "2504.11343",
        "Learning from right answers alone collapses entropy faster.",
        "ADD, when first solved with probability 0.6",
        "entropy of an answer, nats",
        raft_entropy,
        "not decided",
    ),
    Claim(
        "uncertain tokens only",
        ("top_entropy", "dapo"),
        "2506.01939",
        "The most uncertain fifth of the tokens carries the learning: at least 0.95 of the success is kept.",
        ADD,
        "success",
        uncertain_only,
        "does not hold",
        effect=lambda n: n["top fifth"] - 0.95 * n["all tokens"],
        effect_is="less 0.95 of the other",
        note="The uncertain token of this task is the one that is free; the one that must be right is not among the chosen.",
    ),
    Claim(
        "entropy under control",
        ("adaptive_entropy", "grpo"),
        "2505.22312",
        "The controller holds the entropy within a fifth of its target, 0.8.",
        "ADD, 100 steps",
        "entropy of a token, nats",
        held_entropy,
        "holds",
        seeds=4,
        effect=lambda n: 0.16 - abs(n["controlled"] - 0.8),
        effect_is="0.16 - distance",
    ),
    Claim(
        "ReMax",
        ("remax", "reinforce"),
        "2310.10505",
        "With one sample, the greedy answer as baseline learns where the bare reward is much slower.",
        "ADD, 100 steps of 24 samples, the bare reward shifted by 1",
        "success",
        greedy_baseline,
        "not decided",
        seeds=4,
    ),
)
