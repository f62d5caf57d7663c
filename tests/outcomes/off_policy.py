"""Claims about samples of another policy: STALE, NOISE and FIXED."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from posttrain.advantage import Reward
from posttrain.records import Group, Rollout, Segment, Source
from tests.outcomes.claims import Claim
from tests.outcomes.reinforcement import GROUPS, NORM, added, hit, solved
from tests.outcomes.toys import Run, probabilities, prompt_of, spread

STALE = (f"{GROUPS}.reference.to=behaviour",)


# -- STALE and NOISE: ADD sampled by an older policy, or with log-probs that are not the learner's -----------------------------------------------------------------
def stale(loss: str, seed: int, lag: int, *overrides: str, rate: float = 10.0, steps: int = 60) -> Run:
    return added(loss, overrides, NORM, seed, steps, lag=lag, rate=rate)


AGAINST_SAMPLER = {"grpo": (*STALE, f"{GROUPS}.masks.clip.to=behaviour"), "cispo": (*STALE, f"{GROUPS}.masks.cap.to=behaviour"), "gspo": (*STALE, f"{GROUPS}.masks.clip.to=behaviour"),
                   "sapo": (*STALE, f"{GROUPS}.masks.gate.to=behaviour"), "m2po": (*STALE, f"{GROUPS}.masks.moment.to=behaviour"), "vespo": (f"{GROUPS}.masks.taper.to=behaviour",)}  # fmt: skip


def mean_curve(run: Run, name: str) -> float:
    found = [m[name] for m in run.metrics if name in m]
    return sum(found) / len(found)


@cache
def on_lag(loss: str, seed: int, lag: int) -> float:
    return solved(stale(loss, seed, lag, *AGAINST_SAMPLER.get(loss, ())).policy)


def decoupled(seed: int) -> dict[str, float]:
    return {"decoupled": on_lag("decoupled_ppo", seed, 8), "PPO against the stale policy": on_lag("grpo", seed, 8), "on-policy": solved(stale("grpo", seed, 0).policy)}


def versus(first: str, label: str, lag: int, second: str = "grpo", other: str = "clip 0.2") -> Callable[[int], dict[str, float]]:
    return lambda seed: {label: on_lag(first, seed, lag), other: on_lag(second, seed, lag)}


def masked_share(seed: int) -> dict[str, float]:
    clip = mean_curve(stale("grpo", seed, 32, *AGAINST_SAMPLER["grpo"]), "rollouts/clip/masked")
    return {"clip 0.2": clip, "M2PO": mean_curve(stale("m2po", seed, 32, *AGAINST_SAMPLER["m2po"]), "rollouts/moment/masked")}


def over_inner_seeds(seed: int) -> dict[str, float]:
    """Deviation of the success after 20 steps over six runs."""
    arms = {"clip 0.2": "grpo", "SAPO": "sapo"}
    return {name: spread([solved(stale(loss, 100 * seed + i, 4, *AGAINST_SAMPLER[loss], steps=20).policy) for i in range(6)]) for name, loss in arms.items()}


def heavy(logps: Sequence[float], draw: torch.Generator) -> list[float]:
    """Noise of 0.05, and one token in a hundred that the engine is said to have found e^5 times less likely."""
    noise = 0.05 * torch.randn(len(logps), generator=draw, dtype=torch.float64)
    tail = torch.rand(len(logps), generator=draw) < 0.01
    return [x + float(e) - (5.0 if t else 0.0) for x, e, t in zip(logps, noise, tail.tolist(), strict=True)]


@cache
def on_noise(kind: str, seed: int) -> float:
    loss, overrides = {"none": ("tis", (f"{GROUPS}.masks.tis=null",)), "TIS": ("tis", ()), "MIS": ("mis", ()), "IcePop": ("icepop", ())}[kind]
    return solved(added(loss, overrides, NORM, seed, 60, noise=heavy).policy)


def bounded(kind: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {kind: on_noise(kind, seed), "no bound": on_noise("none", seed)}


# -- FIXED ---------------------------------------------------------------------------------------------------------------------------------------------------------
def fixed_groups(seed: int) -> list[Group]:
    """64 answers of a start that is right in a quarter of cases; three of the wrong answers are the same."""
    start, draw = hit([0.25]), torch.Generator().manual_seed(seed)
    logp, prompt = probabilities(start).log(), prompt_of(0, 8)
    rollouts = []
    for i, a in enumerate(torch.multinomial(logp.exp(), 64, replacement=True, generator=draw).tolist()):
        segment = Segment((a,), Source.policy, logprobs=(float(logp[a]),), version=0)
        rollouts.append(Rollout(f"g/{i}", prompt, (segment,), reward=1.0 if a == 0 else -1.0))
    return Reward()([Group(prompt, tuple(rollouts))])


@cache
def on_fixed(kind: str, seed: int) -> tuple[float, float]:
    """Probability of the right answer and the lowest log-prob, after 200 steps."""
    policy, items = hit([0.25]), fixed_groups(seed)
    if kind == "positives":
        items = [Group(g.prompt, tuple(r for r in g.rollouts if r.reward == 1.0)) for g in items]
    Run(policy, "topr" if kind == "TOPR" else "reinforce", steps=200, rate=3.0, fixed=items).go()
    p = probabilities(policy)
    return float(p[0]), float(torch.log_softmax(policy.tables[0].values.detach()[0], 0).min())


CLAIMS = (
    Claim(
        "decoupled PPO on stale rollouts",
        ("decoupled_ppo", "grpo"),
        "2505.24298",
        "With rollouts eight updates old, decoupled PPO keeps the on-policy result (within 0.05) and PPO against the stale policy does not.",
        "ADD, 60 steps, lag 8",
        "success",
        decoupled,
        "holds",
        effect=lambda n: min(n["decoupled"] - n["on-policy"] + 0.05, n["on-policy"] - 0.05 - n["PPO against the stale policy"]),
        effect_is="the smaller of both margins",
        seeds=3,
    ),
    *(
        Claim(
            f"{label} on stale rollouts",
            (name, "grpo"),
            source,
            f"{label} ends above the clip of 0.2 on stale rollouts.",
            f"ADD, 60 steps, lag {lag}, all against the policy that sampled",
            "success",
            versus(name, label, lag),
            "does not hold" if name == "gspo" else "holds",
            note="Its clip of 3e-4 is made for a few mini-batches of one batch." if name == "gspo" else "",
            seeds=3,
        )
        for name, label, source, lag in (
            ("cispo", "CISPO", "2506.13585", 8),
            ("gspo", "GSPO", "2507.18071", 8),
            ("m2po", "M2PO", "2510.01161", 32),
            ("vespo", "VESPO", "2602.10693", 16),
        )
    ),
    Claim(
        "M2PO masks less",
        ("m2po", "grpo"),
        "2510.01161",
        "On stale rollouts the second moment masks fewer tokens than the clip.",
        "ADD, 60 steps, lag 32",
        "share of tokens masked",
        masked_share,
        "does not hold",
        seeds=3,
    ),
    Claim(
        "SAPO is steadier",
        ("sapo", "grpo"),
        "2511.20347",
        "A soft gate varies less from run to run than the hard clip.",
        "ADD, 20 steps, lag 4, six runs each",
        "deviation of the success over runs",
        over_inner_seeds,
        "not decided",
        seeds=3,
    ),
    *(
        Claim(
            f"{kind} on noisy log-probs",
            (kind.lower(), "tis"),
            source,
            f"With a heavy tail in the engine's log-probs, {kind} goes on learning where unbounded weights stall.",
            "ADD, 60 steps, noise 0.05 and a tail of 1 % at e^5",
            "success",
            bounded(kind),
            "does not hold",
            note="The tail has nothing to do with the answer, so unbounded it mostly makes the steps longer.",
            seeds=3,
        )
        for kind, source in (("TIS", "Yao et al. 2025"), ("MIS", "Yao et al. 2025"), ("IcePop", "2510.18855"))
    ),
    Claim(
        "TOPR against positives only",
        ("topr",),
        "2503.14286",
        "On fixed data, tapered negatives end above imitation of the right answers alone.",
        "FIXED, 64 answers, 200 steps",
        "probability of the right answer",
        lambda seed: {"TOPR": on_fixed("TOPR", seed)[0], "positives": on_fixed("positives", seed)[0]},
        "holds",
        seeds=3,
    ),
    Claim(
        "TOPR against REINFORCE",
        ("topr", "reinforce"),
        "2503.14286",
        "On fixed data, REINFORCE with negatives diverges and TOPR does not.",
        "FIXED, 64 answers, 200 steps",
        "lowest log-prob",
        lambda seed: {"TOPR": on_fixed("TOPR", seed)[1], "REINFORCE": on_fixed("REINFORCE", seed)[1]},
        "holds",
        effect=lambda n: min(n["TOPR"] + 20, -50 - n["REINFORCE"]),
        effect_is="TOPR above -20, REINFORCE below -50, the smaller",
        seeds=3,
    ),
)
