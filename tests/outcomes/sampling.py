"""Claims about penalties to the start, about which groups a step is made of, and about normalising over a step: TREE, BANDIT, ADD."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posttrain.advantage import BatchWhiten, Chain, PerReward, Reward
from posttrain.records import Group, Prompt, Rollout, Row, Score, Segment, Source, TokenBatch
from posttrain.rollout.strategy import Dynamic, collect
from tests.loss.cases import composed
from tests.outcomes.claims import Claim
from tests.outcomes.reinforcement import (
    CENTER,
    GROUPS,
    NORM,
    added,
    adder,
    chances,
    hit,
    is_first,
    solved,
    variance_of,
)
from tests.outcomes.toys import Policy, Run, Table, prompt_of, values

# -- TREE: all 27 answers of three tokens, every history with a row of its own; expectations are sums ----------------------------------------------------------------
V, T = 3, 3
COEF = 0.4
TO_GO = (f"{GROUPS}.advantage={{_target_: posttrain.loss.advantage.ColumnMinusKL, coef: {COEF}, over: self, credit: to_go}}",)


def as_loss(estimator: str) -> tuple[str, ...]:
    return (f"regularizers.kl={{_target_: posttrain.loss.regularizer.KL, estimator: {estimator}, to: base, coef: {COEF}}}",)


def tree(start: Tensor) -> tuple[Callable[[Tensor], Tensor], TokenBatch]:
    """A function from the rows ``[13, 3]`` to the log-probs of all columns, and the columns."""
    answers = torch.cartesian_prod(*[torch.arange(V)] * T).tolist()
    node = [[0, 1 + a, 1 + V + a * V + b] for a, b, _ in answers]
    index = torch.tensor([row * V + token for rows, answer in zip(node, answers, strict=True) for row, token in zip(rows, answer, strict=True)])
    rows = [Row(ids=[V, *a], sources=[Source.prompt, *[Source.policy] * T], group=0, sample_id=str(i)) for i, a in enumerate(answers)]
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)

    def logp(table: Tensor) -> Tensor:
        return torch.log_softmax(table, 1).flatten()[index]

    return logp, batch.with_logps(base=logp(start))


@cache
def tree_distance(overrides: tuple[str, ...], seed: int, steps: int = 300) -> float:
    """Total variation to the KL-regularised optimum after exact gradient ascent: every answer's weights, times its probability."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(1 + V + V * V, V, generator=draw, dtype=torch.float64)
    reward = torch.rand(V**T, generator=draw, dtype=torch.float64)
    logp, batch = tree(start)
    batch = batch.replace(advantage=reward.repeat_interleave(T))
    objective, table = composed("reinforce", overrides), start.clone().requires_grad_()
    for _ in range(steps):
        columns = logp(table)
        chance = columns.detach().view(-1, T).sum(1).exp()
        weights = objective.weights(batch, columns.detach()) * V**T * chance.repeat_interleave(T)
        (gradient,) = torch.autograd.grad((weights * columns).sum(), table)
        table = (table.detach() + 5.0 * gradient).requires_grad_()
    goal = torch.softmax(batch.logps["base"].view(-1, T).sum(1) + reward / COEF, 0)
    return float((logp(table).detach().view(-1, T).sum(1).exp() - goal).abs().sum() / 2)


def penalties(estimator: str) -> Callable[[int], dict[str, float]]:
    return lambda seed: {"in the reward": tree_distance(TO_GO, seed), f"{estimator} as a loss": tree_distance(as_loss(estimator), seed)}


# -- groups nobody solves: half of the prompts -----------------------------------------------------------------------------------------------------------------------
def now(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


@cache
def refilled(dynamic: bool, seed: int, generated: int = 0) -> tuple[float, int]:
    """Success on the live prompt, and rollouts generated, after 15 steps of eight groups; with ``generated`` after as many rollouts at the latest."""
    policy, draw, made = hit([0.3, 0.5]), torch.Generator().manual_seed(seed), {"prompts": 0, "rollouts": 0}
    strategy = Dynamic(8, overdraw=3.0, max_rounds=40, on_cap="train_smaller")

    def prompts(count: int) -> list[Prompt]:
        start = made["prompts"]
        made["prompts"] += count
        return [Prompt(f"q{start + i}", (8 + (start + i) % 2,), answer=(start + i) % 2) for i in range(count)]

    async def sample(asked: Sequence[Prompt], n: int) -> list[Group]:
        made["rollouts"] += n * len(asked)
        answers = iter(policy.sample([int(p.answer) for p in asked for _ in range(n)], draw))
        return [Group(p, tuple(one(p, i, next(answers)) for i in range(n))) for p in asked]

    def one(prompt: Prompt, i: int, answer: list[tuple[int, float]]) -> Rollout:
        (token, logp), right = answer[0], answer[0][0] == 0 and prompt.answer == 0
        return Rollout(f"{prompt.id}/{i}", prompt, (Segment((token,), Source.policy, logprobs=(logp,), version=0),), reward=float(right))

    async def score(groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def step(number: int) -> list[Group]:
        if not dynamic:
            return NORM(now(sample(prompts(8), 8)))
        return NORM(now(collect(strategy, prompts, sample, score, 8, number))[0])

    for number in range(15 if not generated else 1000):
        if generated and made["rollouts"] >= generated:
            break
        Run(policy, "dapo", steps=1, rate=1.0, seed=seed, fixed=lambda _, number=number: step(number)).go()
    return chances(policy)[0], made["rollouts"]


def per_step(seed: int) -> dict[str, float]:
    return {"dynamic": refilled(True, seed)[0], "every group": refilled(False, seed)[0]}


def per_rollout(seed: int) -> dict[str, float]:
    success, used = refilled(True, seed)
    return {"dynamic": success, "every group": refilled(False, seed, used)[0]}


# -- normalising over the step ---------------------------------------------------------------------------------------------------------------------------------------
WHITE = Chain({"center": CENTER, "whiten": BatchWhiten()})


def share(loss: str, advantage: Any, seed: int) -> float:
    """Of what one step adds to the log-odds of a hard prompt (0.05) and an easy one (0.7), the hard one's share."""
    policy = hit([0.05, 0.7])
    before = chances(policy)
    Run(policy, loss, steps=1, rate=0.1, seed=seed, reward=is_first, prompts=[0, 1] * 300, n=8, advantage=advantage).go()
    moved = [math.log(b / (1 - b)) - math.log(a / (1 - a)) for a, b in zip(before, chances(policy), strict=True)]
    return moved[0] / sum(moved)


def shares(seed: int) -> dict[str, float]:
    return {"GRPO": share("grpo", NORM, seed), "REINFORCE++": share("reinforce_pp", Reward(), seed), "-baseline": share("reinforce_pp_baseline", WHITE, seed)}


def baseline_variance(seed: int) -> dict[str, float]:
    start, common = [0.05, 0.3, 0.7, 0.95], {"reward": is_first, "prompts": [0, 1, 2, 3], "n": 8}
    return {
        "REINFORCE++": variance_of("reinforce_pp", Reward(), lambda: hit(start), seed, **common),
        "-baseline": variance_of("reinforce_pp_baseline", WHITE, lambda: hit(start), seed, **common),
    }


# -- GRPO itself, a controller, an outlier -------------------------------------------------------------------------------------------------------------------------------
def from_little(seed: int) -> dict[str, float]:
    return {"GRPO": solved(added("grpo", (), NORM, seed).policy), "start": solved(adder(seed))}


def moved_without_success(seed: int) -> dict[str, float]:
    """Largest change of a logit after ten steps in which nothing is right."""
    out = {}
    for name, loss, advantage in (("GRPO", "grpo", NORM), ("REINFORCE", "reinforce", Reward()), ("REINFORCE, reward - 1/2", "reinforce", Reward(0.5))):
        policy = adder(seed)
        before = policy.tables[0].values.detach().clone()
        Run(policy, loss, steps=10, rate=1.0, seed=seed, reward=lambda p, a: 0.0, prompts=[0, 1, 2], n=8, advantage=advantage).go()
        out[name] = float((policy.tables[0].values.detach() - before).abs().max())
    return out


def settled(seed: int) -> dict[str, float]:
    """Mean KL of an answer to the start over the last 30 of 120 steps, the target 1 nat."""
    coef = f"{GROUPS}.advantage.coef"
    run = added("adaptive_kl", (f"{coef}.target=1.0", f"{coef}.horizon=500.0"), Reward(0.5), seed, 120)
    last = [m["rollouts/reward_kl"] for m in run.metrics[-30:]]
    plain = [m["rollouts/reward_kl"] for m in added("adaptive_kl", (f"{coef}=0.0",), Reward(0.5), seed, 120).metrics[-30:]]
    return {"controlled": sum(last) / len(last), "not": sum(plain) / len(plain)}


def outlier(seed: int) -> dict[str, float]:
    """Length of a step in which one wrong answer is fifty times likelier now than when it was sampled, over that of the step without it."""
    draw, out = torch.Generator().manual_seed(seed), {}
    policy = hit([0.3])
    logp = torch.log_softmax(policy.tables[0].values.detach()[0], 0)
    answers = torch.multinomial(logp.exp(), 64, replacement=True, generator=draw).tolist()
    answers[0] = 5

    def group(strange: bool) -> Group:
        rollouts = []
        for i, a in enumerate(answers):
            behaviour = float(logp[a]) - (math.log(50.0) if strange and i == 0 else 0.0)
            rollouts.append(Rollout(f"g/{i}", prompt_of(0, 8), (Segment((a,), Source.policy, logprobs=(behaviour,), version=0),), reward=float(a == 0)))
        return Group(prompt_of(0, 8), tuple(rollouts))

    to = tuple(f"{GROUPS}.{x}.to=behaviour" for x in ("reference", "masks.clip"))
    for name, loss, more in (("dual clip", "dual_clip", (*to, f"{GROUPS}.masks.dual.to=behaviour")), ("PPO's clip", "grpo", to)):
        length = []
        for strange in (True, False):
            one = hit([0.3])
            Run(one, loss, more, steps=1, rate=1.0, fixed=NORM([group(strange)])).go()
            length.append(float((one.tables[0].values.detach() - policy.tables[0].values.detach()).norm()))
        out[name] = length[0] / length[1]
    return out


# -- two rewards of different size ---------------------------------------------------------------------------------------------------------------------------------------
def two_rewards(loss: str, advantage: Any, seed: int) -> float:
    """How often the second token has the wanted form, a reward a tenth of the size of the other, after 20 steps."""
    start = torch.zeros(2 * 6, 6, dtype=torch.float64)
    policy = Policy([Table(values(12, 6, start), lambda p, t, last: t * 6 + last)], 6, 2)
    draw = torch.Generator().manual_seed(seed)

    def step(number: int) -> list[Group]:
        groups = []
        for g in range(8):
            rollouts = []
            for i, answer in enumerate(policy.sample([0] * 8, draw)):
                right, form = float(answer[0][0] == 0), 0.1 * float(answer[1][0] == 1)
                segment = Segment(tuple(t for t, _ in answer), Source.policy, logprobs=tuple(x for _, x in answer), version=0)
                scores = {"right": Score(right), "form": Score(form)}
                rollouts.append(Rollout(f"q{g}/{i}", prompt_of(0, 6), (segment,), reward=right + form, scores=scores))
            groups.append(Group(prompt_of(0, 6), tuple(rollouts)))
        return advantage(groups)

    Run(policy, loss, steps=20, rate=1.0, seed=seed, fixed=step).go()
    rows = torch.softmax(policy.tables[0].values.detach(), 1)
    return float((rows[0] * rows[6:, 1]).sum())


def both(seed: int) -> dict[str, float]:
    separate = Chain({"rewards": PerReward({"right": 1.0, "form": 1.0}, NORM), "whiten": BatchWhiten(over="sequences")})
    return {"GDPO": two_rewards("gdpo", separate, seed), "GRPO on the sum": two_rewards("dapo", NORM, seed)}


CLAIMS = (
    *(
        Claim(
            f"a {estimator} loss against a KL in the reward",
            ("reinforce",),
            source,
            says,
            f"TREE, three tokens, random rewards and start, coefficient {COEF}, exact gradients",
            "total variation to the KL-regularised optimum",
            penalties(estimator),
            "does not hold",
            effect=lambda n: 0.005 - list(n.values())[1],
            effect_is="0.005 - distance of the loss",
            note=note,
        )
        for estimator, source, says, note in (
            ("k2", "2510.01555", "k2 as a loss is k1 in the reward: the optimum is the same (within 0.005).", "It holds for answers of one token: later tokens' KL is credited to no earlier one."),
            ("k3", "2402.03300", "A k3 loss is a penalty by the reverse KL: the optimum is the same (within 0.005).", "Its gradient is that of the forward KL."),
        )
    ),
    Claim(
        "a KL in the reward finds the optimum",
        ("reinforce",),
        "expected",
        "k1 in the reward, summed to go, ends at the KL-regularised optimum.",
        f"TREE, three tokens, random rewards and start, coefficient {COEF}, exact gradients",
        "total variation to it",
        lambda seed: {"in the reward": tree_distance(TO_GO, seed)},
        "holds",
        effect=lambda n: 0.005 - n["in the reward"],
        effect_is="0.005 - distance",
    ),
    Claim(
        "dynamic sampling, by steps",
        ("dapo",),
        "2503.14476",
        "Refilling groups that teach nothing gets further in as many steps.",
        "BANDIT, half of the prompts beyond reach, 15 steps of eight groups of eight",
        "success on the live prompt",
        per_step,
        "holds",
    ),
    Claim(
        "dynamic sampling, by rollouts",
        ("dapo",),
        "2503.14476",
        "Refilling costs nothing in the end: as far with as many rollouts generated (within 0.05).",
        "BANDIT, half of the prompts beyond reach, until the rollouts of 15 refilled steps are spent",
        "success on the live prompt",
        per_rollout,
        "holds",
        effect=lambda n: n["dynamic"] - n["every group"] + 0.05,
        effect_is="difference + 0.05",
    ),
    Claim(
        "REINFORCE++ and hard prompts",
        ("reinforce_pp", "reinforce_pp_baseline", "grpo"),
        "expected",
        "Normalising over the step leaves hard prompts a smaller share of the step than GRPO's groups do.",
        "BANDIT, p = 0.05 and 0.7, one step of 600 groups",
        "the hard prompt's share of the gain",
        shares,
        "holds",
        effect=lambda n: n["GRPO"] - max(n["REINFORCE++"], n["-baseline"]),
        effect_is="GRPO less the larger of the others",
    ),
    Claim(
        "REINFORCE++'s group baseline",
        ("reinforce_pp", "reinforce_pp_baseline"),
        "2501.03262",
        "With prompts of different difficulty, the group mean as baseline makes the gradient vary less.",
        "BANDIT, four difficulties, groups of eight, 60 steps from one start",
        "variance over squared mean",
        baseline_variance,
        "holds",
        seeds=4,
    ),
    Claim(
        "GRPO solves ADD",
        ("grpo",),
        "2402.03300",
        "From a sixth right, GRPO passes 0.9.",
        "ADD, 40 steps of 96 rollouts",
        "success",
        from_little,
        "holds",
        effect=lambda n: n["GRPO"] - 0.9,
        effect_is="above 0.9",
        seeds=4,
    ),
    Claim(
        "nothing right, nothing learnt",
        ("grpo", "reinforce"),
        "expected",
        "Where every answer is wrong, GRPO and REINFORCE without a baseline stand still, and REINFORCE with one does not.",
        "ADD, ten steps",
        "largest change of a logit",
        moved_without_success,
        "holds",
        seeds=3,
        effect=lambda n: min(1e-9 - n["GRPO"], 1e-9 - n["REINFORCE"], n["REINFORCE, reward - 1/2"]),
        effect_is="1e-9 - change of the first two, and change of the third, the smallest",
    ),
    Claim(
        "KL under control",
        ("adaptive_kl",),
        "1909.08593",
        "The controller holds the KL to the start within a fifth of its target, 1 nat.",
        "ADD, 120 steps",
        "KL of an answer, nats",
        settled,
        "holds",
        seeds=4,
        effect=lambda n: 0.2 - abs(n["controlled"] - 1.0),
        effect_is="0.2 - distance",
    ),
    Claim(
        "one outlier and the dual clip",
        ("dual_clip", "grpo"),
        "1912.09729",
        "A wrong answer fifty times likelier now than when it was sampled does not lengthen the step (within a tenth); without the dual clip it does.",
        "BANDIT, one step of 64 answers",
        "length of the step, relative",
        outlier,
        "holds",
        effect=lambda n: min(0.1 - abs(n["dual clip"] - 1), n["PPO's clip"] - 1.1),
        effect_is="0.1 - |dual clip - 1|, and PPO's clip - 1.1, the smaller",
    ),
    Claim(
        "GDPO and a small reward",
        ("gdpo", "dapo"),
        "2601.05242",
        "Normalising every reward by itself learns a small reward that the sum drowns.",
        "two tokens, two rewards, one ten times the other; 20 steps of 64 answers",
        "success by the small reward",
        both,
        "holds",
    ),
)
