"""Claims about given texts that are weighed, masked, replaced or doubted: noisy labels, chains, tasks that share what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posttrain.advantage import Constant, Reward
from posttrain.data.rows import to_rows
from posttrain.mixture.context import Corrupt
from posttrain.mixture.demos import Demos
from posttrain.mixture.route import FirstAccepted
from posttrain.mixture.schedule import Linear
from posttrain.records import Demo, TokenBatch
from tests.loss.cases import composed
from tests.outcomes.claims import Claim
from tests.outcomes.supervised import noisy, right_after, single
from tests.outcomes.toys import Policy, Run, Table, demo_of, one_row, probabilities, prompt_of, values


# -- C-RLFT: ten expert texts among a hundred, the class stands in the prompt ------------------------------------------------------------------------------------
def conditioned(tags: bool, weights: bool, seed: int) -> float:
    """Probability of the right token under the expert's tag after 60 updates.  What is learnt is shared by the classes, but for a table of each.
    Experts are right in 95 % of cases, the others in 40 % and otherwise wrong in one and the same way."""
    draw, items = torch.Generator().manual_seed(seed), []
    for i in range(100):
        expert, right = i < 10, float(torch.rand(1, generator=draw))
        token = 0 if right < (0.95 if expert else 0.4) else 1
        prompt = prompt_of(0 if expert or not tags else 1, 8)
        items.append(Demo(f"d{i}", demo_of("d", prompt, (token,)).segments, 1.0 if expert or not weights else 0.1, prompt))
    policy = Policy([Table(values(1, 8), one_row), Table(values(2, 8), lambda p, t, last: p)], 8)
    Run(policy, "openchat", steps=60, rate=2.0, fixed=items).go()
    return float(probabilities(policy, 0)[0])


def classes(seed: int) -> dict[str, float]:
    return {"tags and weights": conditioned(True, True, seed), "weights": conditioned(False, True, seed), "tags": conditioned(True, False, seed), "neither": conditioned(False, False, seed)}


# -- S3FT: right answers in two manners, the model's own and the data's --------------------------------------------------------------------------------------------
ON, OFF = 4, 4


def mannered(seed: int) -> Policy:
    """Eight answers: 0 to 3 in the model's manner, 4 to 7 in the data's; prompt p is answered rightly by p % 4 in either.  Manners are shared by all prompts."""
    own = 0.3 * torch.randn(ON + OFF, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    own[torch.arange(ON + OFF), torch.arange(ON + OFF) % 4] += 1.5
    manner = torch.tensor([1.5] * 4 + [-1.5] * 4, dtype=torch.float64)
    return Policy([Table(values(ON + OFF, 8, own), lambda p, t, last: p), Table(values(1, 8, manner), one_row)], 8)


def success_on(policy: Policy, prompts: range) -> float:
    return sum(float(probabilities(policy, p)[[p % 4, p % 4 + 4]].sum()) for p in prompts) / len(prompts)


def own_manner(policy: Policy, prompts: range) -> float:
    """Right and in the model's own manner: what a task judges that knows no other."""
    return sum(float(probabilities(policy, p)[p % 4]) for p in prompts) / len(prompts)


def dropped(kind: str, seed: int) -> float:
    """What other prompts lose, judged in the model's own manner, when trained ones are first right with probability 0.9; SFT also after half of its steps."""
    policy, found = mannered(seed), []
    before = own_manner(policy, range(ON, ON + OFF))
    gold = [demo_of(f"d{p}", prompt_of(p, 8), (p + 4,)) for p in range(ON)]
    history: list[float] = []

    def watch(run: Run, step: int) -> None:
        history.append(before - own_manner(policy, range(ON, ON + OFF)))
        if not found and success_on(policy, range(ON)) >= 0.9:
            found.append(history[len(history) // 2] if kind == "half" else history[-1])

    if kind == "S3FT":
        more: dict[str, Any] = {"reward": lambda p, a: float(a[0] % 4 == p), "prompts": range(ON), "n": 1, "advantage": Constant(), "gate": FirstAccepted(), "demos": Demos(gold)}
        Run(policy, "s3ft", steps=150, rate=1.0, seed=seed, watch=watch, **more).go()
    else:
        Run(policy, "sft", steps=150, rate=1.0, seed=seed, watch=watch, fixed=gold).go()
    return found[0]


def off_task(seed: int) -> dict[str, float]:
    return {"SFT": dropped("SFT", seed), "S3FT": dropped("S3FT", seed), "SFT, half of the steps": dropped("half", seed)}


# -- masked thought: answers of four tokens that the prompt decides, a quarter of the given tokens is wrong ----------------------------------------------------------
W, L, ASKED = 6, 4, 4
MASK = W


@cache
def recalled(kind: str, seed: int) -> float:
    """Probability that a sampled token is right after 80 updates on three texts a prompt; the model may lean on prompt and place, or on the token before."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(W, (ASKED, L), generator=draw)
    slips, any_token = torch.rand(ASKED, 3, L, generator=draw) < 0.25, torch.randint(W, (ASKED, 3, L), generator=draw)
    items = [demo_of(f"d{p}.{i}", prompt_of(p, W + 1), tuple(torch.where(slips[p, i], any_token[p, i], truth[p]).tolist())) for p in range(ASKED) for i in range(3)]
    before = values(W + 1, W + 1)
    if kind == "dropout":
        keep = torch.ones(W + 1, 1, dtype=torch.float64)
        keep[MASK] = 0.0
        before.register_hook(lambda gradient: gradient * keep)
    start = torch.zeros(W + 1, dtype=torch.float64)
    start[MASK] = -20.0
    place = values(ASKED * L, W + 1, start)
    policy = Policy([Table(place, lambda p, t, last: p * L + t), Table(before, lambda p, t, last: last)], W + 1, L)
    gate = None if kind == "SFT" else Corrupt(MASK, Linear(0.0, 0.4, until=0.66), seed)
    Run(policy, "sft", steps=80, rate=5.0, seed=seed, fixed=items, gate=gate).go()
    total = 0.0
    for p in range(ASKED):
        state = torch.zeros(W + 1, dtype=torch.float64)
        state[0] = 1.0
        for t in range(L):
            state = sum(state[last] * probabilities(policy, p, t, last) for last in range(W + 1))  # type: ignore[assignment]
            total += float(state[truth[p, t]]) / ASKED / L
    return total


def masked(other: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {"masked thought": recalled("masked", seed), other: recalled(other, seed)}


# -- OTR: one token drawn at every given position, paid for being the given one ----------------------------------------------------------------------------------------
@cache
def drawn(seed: int) -> float:
    """Probability of the right token after 60 updates; eight draws at each of 100 labels, paid 1 or -0.1."""
    labels = [d.segments[-1].ids[0] for d in noisy(seed)]
    run = Run(single(0.6), "reinforce", steps=60, rate=1.0, seed=seed, reward=lambda p, a: 1.0 if a[0] == labels[p] else -0.1, prompts=range(100), n=8, advantage=Reward())
    return float(probabilities(run.go().policy)[0])


def ties(seed: int) -> dict[str, float]:
    closed, dft = (Run(single(0.6), loss, steps=60, rate=rate, fixed=noisy(seed)).go().policy for loss, rate in (("otr", 1.0), ("dft", 1.1)))
    return {"drawn": drawn(seed), "in closed form": float(probabilities(closed)[0]), "DFT": float(probabilities(dft)[0])}


# -- a strong student of a weak teacher -------------------------------------------------------------------------------------------------------------------------------
def recovered(seed: int) -> dict[str, float]:
    """Share of the gap between teacher and ceiling that the student closes after 40 updates.  200 questions with two answers; the student begins right
    on 85 %, surely or less so; the teacher is right on 75 %.  The same student on true labels is the ceiling."""
    draw = torch.Generator().manual_seed(seed)
    knows = 1.0 + torch.randn(200, generator=draw, dtype=torch.float64)
    right = torch.rand(200, generator=draw) < 0.75
    start = torch.stack([knows, torch.zeros_like(knows)], 1)

    def after(c: float, labels: Tensor) -> float:
        policy = Policy([Table(values(200, 2, start), lambda p, t, last: p)], 2)
        items = [demo_of(f"d{p}", prompt_of(p, 2), (token,)) for p, token in enumerate(labels.tolist())]
        Run(policy, "weak_to_strong", (f"regularizers.own.coef.end={c}",), steps=40, rate=30.0, fixed=items).go()
        return float((policy.tables[0].values.detach().argmax(1) == 0).double().mean())

    weak, ceiling = float(right.double().mean()), after(0.0, torch.zeros(200, dtype=torch.int64))
    return {f"c = {c:g}": (after(c, (~right).long()) - weak) / (ceiling - weak) for c in (0.0, 0.25, 0.5, 0.75)}


# -- loss-based weights --------------------------------------------------------------------------------------------------------------------------------------------------
def duplicates(seed: int) -> dict[str, float]:
    """Weight of a text that stands 20 times among 40 others, over the mean weight, after 20 updates."""
    draw = torch.Generator().manual_seed(seed)
    others = torch.randint(8, (40,), generator=draw).tolist()
    items = [demo_of(f"d{i}", prompt_of(1 + i, 8), (a,)) for i, a in enumerate(others)] + [demo_of(f"r{i}", prompt_of(0, 8), (3,)) for i in range(20)]
    policy = Policy([Table(values(41, 8, 0.3 * torch.randn(41, 8, generator=draw, dtype=torch.float64)), lambda p, t, last: p)], 8)
    overrides = ("streams.demos.advantage.r=0.4",)
    Run(policy, "loss_reweighting", overrides, steps=20, rate=10.0, fixed=items).go()
    batch = TokenBatch.from_sequences(to_rows(items), dtype=torch.float64)
    logp = policy.rows(batch).gather(1, batch.target_ids[:, None])[:, 0].detach()
    weights = composed("loss_reweighting", overrides).weights(batch, logp)[batch.trainable]
    return {"a repeated text": float(weights[40:].mean() / weights.mean())}


def above_all(first: str, *rest: str) -> Callable[[Any], float]:
    return lambda n: n[first] - max(n[other] for other in rest)


CLAIMS = (
    Claim(
        "C-RLFT: class and weight",
        ("openchat",),
        "2309.11235",
        "Ten expert texts among ninety mixed ones: naming the class and weighing it answers like an expert, more than either alone.",
        "eight answers, 100 texts, 60 updates, asked under the expert's tag",
        "probability of the right token",
        classes,
        "holds",
        effect=above_all("tags and weights", "weights", "tags"),
        effect_is="less the better of the two alone",
    ),
    Claim(
        "S3FT spares other tasks",
        ("s3ft", "sft"),
        "2502.08130",
        "At equal success on the trained task, own right answers as targets cost other tasks less than given ones.",
        "eight answers in two manners, four trained prompts and four others, until the trained ones are right with probability 0.9",
        "loss of the others, judged in the model's own manner",
        off_task,
        "holds",
        effect=lambda n: n["SFT"] - n["S3FT"],
        effect_is="SFT less S3FT",
        note="Half of SFT's steps cost the others as little, but the trained task has then learnt less.",
    ),
    *(
        Claim(
            f"masked thought against {other}",
            ("sft",),
            "2403.02178",
            says,
            "four prompts, three texts each of four tokens, a quarter of them wrong; 80 updates",
            "probability of a right token",
            masked(other),
            "not decided",
            seeds=12,
        )
        for other, says in (
            ("SFT", "Masking what the model reads of given answers makes it better than SFT."),
            ("dropout", "A token to learn in the place of what is masked is better than nothing in its place."),
        )
    ),
    Claim(
        "one-token rollouts are DFT",
        ("otr", "dft", "reinforce"),
        "2509.26313",
        "Drawn rollouts, their closed form and DFT at a rate 1.1 times as high end at one place (within 0.01).",
        "50 tokens, 100 labels of which a fifth is random, rate 1, 60 updates, from p = 0.6",
        "probability of the right token",
        ties,
        "holds",
        effect=lambda n: 0.01 - max(abs(n["drawn"] - n["DFT"]), abs(n["in closed form"] - n["DFT"])),
        effect_is="0.01 - largest distance",
        seeds=3,
    ),
    Claim(
        "one-token rollouts beat SFT",
        ("otr", "sft"),
        "2509.26313",
        "Under noisy labels one-token rollouts end above SFT.",
        "50 tokens, 100 labels of which a fifth is random, rate 1, 120 updates, from p = 0.6",
        "probability of the right token",
        lambda seed: {"OTR": right_after("otr", 0.6, seed), "SFT": right_after("sft", 0.6, seed)},
        "holds",
        seeds=4,
    ),
    Claim(
        "a student that trusts itself",
        ("weak_to_strong",),
        "2312.09390",
        "The student's own choices as half of the label close more of the gap to its ceiling than the weak labels alone.",
        "200 questions with two answers, the teacher right on three quarters; 40 updates",
        "share of the gap closed",
        recovered,
        "holds",
        effect=lambda n: n["c = 0.5"] - n["c = 0"],
        effect_is="c = 0.5 less c = 0",
    ),
    Claim(
        "repeated texts count less",
        ("loss_reweighting",),
        "OpenReview gU4ZgQNsOC",
        "A text that is repeated ends with less than the mean weight.",
        "41 prompts, one text twenty times; 20 updates",
        "its weight over the mean",
        duplicates,
        "holds",
        effect=lambda n: 1.0 - n["a repeated text"],
        effect_is="1 - weight",
        seeds=4,
    ),
)
