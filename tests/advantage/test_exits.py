"""What exits of a chain are worth: ranks, the shared tokens counted once, progress by block; up to the gradient of a step and a toy that learns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.advantage import Chain, GroupAdvantage, Reward
from posttrain.advantage.exits import Progress, RankDecay, Serial, learnt_from, serial_groups, values
from posttrain.checks import needs_group
from posttrain.data.rows import to_rows
from posttrain.records import Group, Prompt, Rollout, Segment, Source, TokenBatch
from posttrain.testing.check import check_slicing
from tests.loss.cases import composed
from tests.loss.naive import TinyCausal

QUESTION = Prompt("q", (1, 2))
WORDS = (11, 12)


def chain(reward: float | None, ids: Sequence[int] = (3, 4, 5, 6, 7), name: str = "c", **more: Any) -> Rollout:
    return Rollout(name, QUESTION, (Segment(tuple(ids), Source.policy, logprobs=(-1.0,) * len(ids), version=0),), reward=reward, **more)


def early(of: Rollout, place: int, reward: float | None, answer: Sequence[int] = (8,), name: str = "") -> Rollout:
    """An exit of a chain of one segment: its beginning, the words, an answer."""
    shared = () if not place else (Segment(of.segments[0].ids[:place], Source.policy, logprobs=(-1.0,) * place, version=0),)
    words = Segment(WORDS, Source.tool, turn=1, trainable=False)
    own = Segment(tuple(answer), Source.policy, turn=1, logprobs=(-1.0,) * len(answer), version=0)
    return Rollout(name or f"{of.sample_id}@{place}", QUESTION, (*shared, words, own), reward=reward, left=(of.sample_id, place))


def group(*rollouts: Rollout) -> Group:
    return Group(QUESTION, rollouts)


def serial(*rewards: float | None, places: Sequence[int] = (1, 3)) -> Group:
    """A chain of five tokens whose reward is the last one, and an exit for each of the others."""
    whole = chain(rewards[-1])
    return group(whole, *(early(whole, place, reward) for place, reward in zip(places, rewards[:-1], strict=True)))


def told(found: Group) -> list[float | None]:
    """Advantages in the order of the exits, the chain last."""
    return [r.advantage for r in serial_groups(found)[0].rollouts]


def column(rollout: Rollout) -> list[float | None]:
    """What every token is learnt with, None where it is not learnt."""
    (row,) = to_rows([group(rollout)])
    at = row.advantage if isinstance(row.advantage, Sequence) else [row.advantage] * len(row.ids)
    return [a if on else None for a, on in zip(at, row.trainable, strict=True)][len(QUESTION.ids) :]  # type: ignore[arg-type]


# -- ranks ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rewards", "worth"),
    [((1, 0, 1), (1, 0, 0.5)), ((0, 0, 0), (0, 0, 0)), ((1, 1, 1), (1, 0.5, 0.25)), ((0, 0, 1), (0, 0, 1)), ((0.4, 0.6, 9), (0, 1, 0.5)), ((None, 1, 1), (None, 1, 0.5))],
)
def test_the_first_right_answer_is_worth_most(rewards: tuple[float | None, ...], worth: tuple[float | None, ...]) -> None:
    (found,) = RankDecay()([serial(*rewards)])
    assert [r.reward for r in serial_groups(found)[0].rollouts] == list(worth)
    (mixed,) = RankDecay()([replace(found := serial(*rewards), rollouts=found.rollouts[::-1])])
    assert [r.reward for r in serial_groups(mixed)[0].rollouts] == list(worth), "whatever the order of sampling"


def test_every_setting_of_the_ranks_acts() -> None:
    def worth(term: RankDecay, *rewards: float) -> list[float | None]:
        return [r.reward for r in serial_groups(term([serial(*rewards)])[0])[0].rollouts]

    assert worth(RankDecay(0.25), 1, 1, 1) == [1, 0.25, 0.0625] and worth(RankDecay(1.0), 1, 1, 0) == [1, 1, 0]
    assert worth(RankDecay(above=0.1), 0.4, 0, 1) == [1, 0, 0.5]
    for base in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="base"):
            RankDecay(base)
    with pytest.raises(ValueError, match="is nan; a reward that cannot be computed must be None"):
        RankDecay()([serial(math.nan, 1, 1)])


# -- the serial group ---------------------------------------------------------------------------------------------------------------
def test_centred_without_a_deviation() -> None:
    assert told(Serial()([serial(1, 0, 1)])[0]) == [0.5, -0.5, 0.0]
    assert told(Serial()([serial(0, 0, 0)])[0]) == [0, 0, 0]
    assert told(Serial()([serial(1, 0, None)])[0]) == [0.5, -0.5, None]


def test_a_shared_token_is_learnt_once_with_the_mean_of_those_that_hold_it() -> None:
    """Exits behind tokens 1 and 3 of 5, A = (.5, -.5, 0): the chain carries them all."""
    (found,) = Serial()([serial(1, 0, 1)])
    whole, one, two = found.rollouts
    assert column(whole) == pytest.approx([0.0, -0.25, -0.25, 0.0, 0.0])
    assert column(one) == [None, None, None, 0.5] and column(two) == [None] * 5 + [-0.5]
    learnt = [i for r in found.rollouts for i, a in zip((i for s in r.segments for i in s.ids), column(r), strict=True) if a is not None]
    assert sorted(learnt) == [3, 4, 5, 6, 7, 8, 8], "each of the chain's tokens once, and the answers"


def test_as_printed_every_member_learns_from_all_its_tokens() -> None:
    (found,) = Serial(shared="every")([serial(1, 0, 1)])
    assert [column(r) for r in found.rollouts] == [[0.0] * 5, [0.5, None, None, 0.5], [-0.5] * 3 + [None, None, -0.5]]


def test_once_is_the_printed_sum_over_those_that_hold_a_token() -> None:
    draw = random.Random(0)
    for _ in range(20):
        whole = chain(float(draw.random() < 0.5), range(20, 20 + draw.randint(3, 9)))
        places = [draw.randrange(0, whole.num_tokens) for _ in range(draw.randint(1, 4))]
        given = group(whole, *(early(whole, p, draw.choice([0.0, 1.0, None]), name=f"e{i}") for i, p in enumerate(places)))
        once, every = (Serial(shared=how)([given])[0] for how in ("once", "every"))
        for t in range(whole.num_tokens):
            copies = [(column(a)[t], column(b)[t]) for a, b in zip(once.rollouts, every.rollouts, strict=True) if (a.left is None or a.left[1] > t) and a.advantage is not None]
            learnt = [a for a, _ in copies if a is not None]
            assert len(learnt) == 1 and learnt[0] * len(copies) == pytest.approx(sum(b for _, b in copies))  # type: ignore[misc]


def test_without_a_verdict_on_the_chain_the_last_exit_carries_what_is_shared() -> None:
    (found,) = Serial()([serial(1, 0, None)])
    whole, one, two = found.rollouts
    assert whole.advantage is None and column(one) == [None, None, None, 0.5]
    assert column(two) == [0.0, -0.5, -0.5, None, None, -0.5]
    (nothing,) = Serial()([serial(None, None, None)])
    assert told(nothing) == [None, None, None]


def test_exits_at_one_place_share_it_once() -> None:
    whole = chain(0.0)
    given = group(whole, early(whole, 2, 1.0, name="a"), early(whole, 2, 0.0, name="b"))
    found = Serial(Reward())([given])[0].rollouts
    assert [column(r) for r in found] == [pytest.approx([1 / 3, 1 / 3, 0, 0, 0]), [None] * 4 + [1.0], [None] * 4 + [0.0]]


def test_chains_of_a_prompt_do_not_meet() -> None:
    one, two = chain(1.0, name="c"), chain(0.0, name="d")
    given = group(one, two, early(one, 1, 1.0), early(two, 1, 0.0))
    (found,) = Serial()([given])
    assert [r.advantage for r in found.rollouts] == [-0.25, 0.0, 0.25, 0.0] and [r.sample_id for r in found.rollouts] == ["c", "d", "c@1", "d@1"]
    dropping = Serial(Chain({"decay": RankDecay(), "center": GroupAdvantage(scale="none", dead_group="drop")}))
    (found,) = dropping([given])
    assert [r.advantage for r in found.rollouts] == [-0.25, None, 0.25, None] and found.dropped is None
    assert dropping([group(two, early(two, 1, 0.0))])[0].dropped == "all rewards equal"


def test_an_exit_without_its_chain_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sample 'c@1' left the chain 'c', which is not in the group"):
        Serial()([group(early(chain(1.0), 1, 1.0))])
    with pytest.raises(ValueError, match="choose once or every"):
        Serial(shared="twice")  # type: ignore[arg-type]


def test_no_token_before_a_place_is_learnt() -> None:
    rollout = replace(chain(1.0), segments=(Segment((3, 4), Source.policy), Segment((5,), Source.tool), Segment((6, 7), Source.policy, trainable=(True, False))), advantage=1.0)
    for start, flags in ((0, [1, 1, 0, 1, 0]), (1, [0, 1, 0, 1, 0]), (3, [0, 0, 0, 1, 0]), (4, [0, 0, 0, 0, 0])):
        found = learnt_from(rollout, start)
        rows = to_rows([group(found)])
        assert (rows[0].trainable[2:] if rows else [0] * 5) == [bool(x) for x in flags], start
    assert learnt_from(rollout, 0) == rollout


# -- progress -----------------------------------------------------------------------------------------------------------------------
def blocks(*at: tuple[int, float | None], reward: float | None = 1.0) -> Group:
    whole = chain(reward)
    return group(whole, *(early(whole, place, r, name=f"e{i}") for i, (place, r) in enumerate(at)))


def test_progress_telescopes() -> None:
    """Forced answers right with .25 before the first block, .75 behind it; in the end the chain is right."""
    given = blocks((0, 0.0), (0, 0.5), (2, 1.0), (2, 0.5), (4, 0.5))
    assert values(given) == [(0, 0.25), (2, 0.75), (4, 0.5), (5, 1.0)]
    (found,) = Progress(inner=None)([given])
    assert column(found.rollouts[0]) == [0.5, 0.5, -0.25, -0.25, 0.5] and all(r.advantage is None for r in found.rollouts[1:])
    assert 0.5 - 0.25 + 0.5 == 1.0 - 0.25, "the sum over blocks is the end less the start"
    (to_go,) = Progress(inner=None, credit="to_go")([given])
    assert column(to_go.rollouts[0]) == [0.75, 0.75, 0.25, 0.25, 0.5], "what is still to come: R - R_termination of the same prefix"


def test_progress_telescopes_for_any_chain() -> None:
    draw = random.Random(1)
    for _ in range(30):
        given = blocks(*((p, draw.choice([0.0, 1.0])) for p in [0, *sorted(draw.choices(range(1, 5), k=3))]), reward=float(draw.random() < 0.5))
        ends = values(given)
        (block,), (to_go,) = (Progress(None, alpha=0.7, credit=how)([given]) for how in ("block", "to_go"))
        one, all_of_it = column(block.rollouts[0]), column(to_go.rollouts[0])
        firsts = [place for place, _ in ends[:-1]]
        assert sum(one[p] for p in firsts) == pytest.approx(0.7 * (ends[-1][1] - ends[0][1]))  # type: ignore[misc]
        for i, p in enumerate(firsts):
            assert all_of_it[p] == pytest.approx(sum(one[q] for q in firsts[i:]))  # type: ignore[misc]


def test_a_forced_answer_at_the_end_that_agrees_adds_nothing() -> None:
    (short,), (long,) = (Progress(None)([blocks((0, 0.0), (2, 1.0), *more)]) for more in ((), ((4, 1.0),)))
    assert column(short.rollouts[0]) == column(long.rollouts[0]) == [1.0, 1.0, 0.0, 0.0, 0.0], "a useless block has advantage 0"


def test_the_bonus_joins_the_outcome() -> None:
    one, two = chain(1.0, name="c"), chain(0.0, name="d")
    given = group(one, two, early(one, 0, 0.0), early(one, 2, 1.0), early(two, 0, 0.0))
    (found,) = Progress(GroupAdvantage(scale="none"), alpha=0.5)([given])
    assert [column(r) for r in found.rollouts[:2]] == [[1.0, 1.0, 0.5, 0.5, 0.5], [-0.5] * 5]
    (plain,) = Progress(GroupAdvantage(scale="none"), alpha=0.0)([given])
    (outcome,) = GroupAdvantage(scale="none")([group(one, two)])
    assert [column(r) for r in plain.rollouts[:2]] == [[r.advantage] * 5 for r in outcome.rollouts]
    assert found.rollouts[0].advantage == pytest.approx(0.7), "the mean over its tokens, for the report"


def test_exits_nobody_could_judge() -> None:
    (found,) = Progress(None)([blocks((0, 0.0), (2, None), (4, 0.5))])
    assert column(found.rollouts[0]) == [0.5, 0.5, 0.5, 0.5, 0.5], "two blocks become one"
    (late,) = Progress(None)([blocks((0, None), (2, 0.5))])
    assert column(late.rollouts[0]) == [None, None, 0.5, 0.5, 0.5], "before the first exit nothing is known"
    (none,) = Progress(GroupAdvantage("none", "none", singleton="raw"))([blocks((0, None))])
    assert column(none.rollouts[0]) == [1.0] * 5, "the outcome alone"
    (failed,) = Progress(None)([blocks((0, 1.0), reward=None)])
    assert [r.advantage for r in failed.rollouts] == [None, None] and to_rows([failed]) == []
    (alone,) = Progress(None)([blocks()])
    assert column(alone.rollouts[0]) == [0.0] * 5


def test_progress_says_what_it_compares_and_refuses_what_it_cannot() -> None:
    assert needs_group(Progress()) and not needs_group(Progress(None)) and not needs_group(Serial())
    for wrong in ({"credit": "all"}, {"alpha": math.inf}):
        with pytest.raises(ValueError, match="advantage Progress"):
            Progress(**wrong)


# -- up to the gradient ---------------------------------------------------------------------------------------------------------------
def step(seed: int, places: Callable[[random.Random, int], list[int]]) -> list[Group]:
    """Three prompts of two chains with exits; every answer with a length of its own."""
    draw, out = random.Random(seed), []
    for name in ("q1", "q2", "q3"):
        prompt = Prompt(name, tuple(draw.randrange(13) for _ in range(draw.randint(1, 3))))
        members: list[Rollout] = []
        for c in "cd":
            whole = replace(chain(float(draw.random() < 0.5), [draw.randrange(13) for _ in range(draw.randint(3, 7))], f"{name}{c}"), prompt=prompt)
            members.append(whole)
            for i, place in enumerate(places(draw, whole.num_tokens)):
                answer = [draw.randrange(13) for _ in range(draw.randint(1, 3))]
                members.append(replace(early(whole, place, float(draw.random() < 0.5), answer, f"{name}{c}{i}"), prompt=prompt))
        out.append(Group(prompt, tuple(members)))
    return out


def gradients(loss: str, estimator: Any, groups: list[Group], objective: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The package's and the transcription's, of ``-J``, on a causal model, with log-probs of an older policy beside it."""
    model, noise = TinyCausal(seed=5), random.Random(7)
    older: dict[tuple[int, ...], float] = {}

    def old(ids: Sequence[int], logp: float) -> float:
        return older.setdefault(tuple(ids), logp + noise.gauss(0, 0.25))

    rows = to_rows(estimator(groups))
    for row in rows:
        with torch.no_grad():
            lines = model.rows_alone(list(row.ids))
        row.logps = {"old": [math.nan, *(old(row.ids[: t + 1], float(lines[t - 1][row.ids[t]])) for t in range(1, len(row.ids)))]}
    batch = TokenBatch.from_sequences(rows, fresh=False, dtype=torch.float64)
    logp = model.packed(batch.input_ids, batch.positions, batch.seq).gather(1, batch.target_ids[:, None])[:, 0]
    check_slicing(composed(loss), batch.with_logps(current=logp.detach()))
    ours = torch.autograd.grad(composed(loss)(batch.with_logps(current=logp.detach()), logp).loss, list(model.parameters()), allow_unused=True)

    def surrogate(ids: Sequence[int], t: int, a: float) -> Tensor:
        line = model.rows_alone(list(ids))[t - 1]
        ratio = torch.exp(line[ids[t]] - old(ids[: t + 1], math.nan))
        return torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)

    theirs = torch.autograd.grad(-objective(groups, surrogate), list(model.parameters()), allow_unused=True)
    return tuple(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, model.parameters(), strict=True)]) for grads in (ours, theirs))  # type: ignore[return-value]


def members_of(groups: list[Group]) -> list[list[Rollout]]:
    """Chains with their exits, earliest first."""
    found = []
    for g in groups:
        for whole in (r for r in g.rollouts if r.left is None):
            exits = sorted((r for r in g.rollouts if r.left and r.left[0] == whole.sample_id), key=lambda r: r.left[1])  # type: ignore[index]
            found.append([*exits, whole])
    return found


def whole_ids(r: Rollout) -> list[int]:
    return [*r.prompt.ids, *(i for s in r.segments for i in s.ids)]


def ranked(members: list[Rollout], base: float = 0.5) -> list[float]:
    right, rewards = 0, []
    for r in members:
        rewards.append(base**right if r.reward == 1.0 else 0.0)
        right += r.reward == 1.0
    return [x - sum(rewards) / len(rewards) for x in rewards]


def serial_objective(groups: list[Group], surrogate: Callable[..., Tensor], base: float = 0.5, once: bool = True) -> Tensor:
    """J: the clipped surrogate, a mean over tokens, each of the chain's tokens once with the mean advantage of those that hold it."""
    terms: list[Tensor] = []
    for members in members_of(groups):
        a = ranked(members, base)
        whole = members[-1]
        start = len(whole.prompt.ids)
        for t in range(whole.num_tokens):
            holding = [x for x, r in zip(a, members, strict=True) if r.left is None or r.left[1] > t]
            if start + t:
                terms += [surrogate(whole_ids(whole), start + t, sum(holding) / len(holding))] if once else [surrogate(whole_ids(whole), start + t, x) for x in holding]
        for x, r in zip(a, members, strict=True):
            if r.left is not None:
                ids = whole_ids(r)
                own = len(r.segments[-1].ids)
                terms += [surrogate(ids, t, x) for t in range(len(ids) - own, len(ids))]
    return torch.stack(terms).mean()


def progress_objective(groups: list[Group], surrogate: Callable[..., Tensor], alpha: float = 1.0, outcome: bool = True, to_go: bool = False) -> Tensor:
    """J: a mean over chains of means over their tokens, with a bonus for every block."""
    terms: list[Tensor] = []
    for g in groups:
        rewards = [r.reward for r in g.rollouts if r.left is None]
        mean = sum(rewards) / len(rewards)  # type: ignore[arg-type]
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / len(rewards))  # type: ignore[operator]
        for members in members_of([g]):
            *exits, whole = members
            ends = [r.left[1] for r in exits] + [whole.num_tokens]  # type: ignore[index]
            worth = [r.reward for r in members]
            base = (whole.reward - mean) / (std + 1e-6) if outcome and std else 0.0  # type: ignore[operator]
            own = []
            for j, begin in enumerate(ends[:-1]):
                gain = (whole.reward if to_go else worth[j + 1]) - worth[j]  # type: ignore[operator]
                own += [surrogate(whole_ids(whole), len(whole.prompt.ids) + t, base + alpha * gain) for t in range(begin, ends[j + 1])]
            terms.append(torch.stack(own).mean())
    return torch.stack(terms).mean()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_step_of_a_serial_group_is_the_published_one(seed: int) -> None:
    groups = step(seed, lambda draw, n: sorted(draw.sample(range(1, n), 2)))
    ours, theirs = gradients("s_grpo", Serial(), groups, serial_objective)
    assert far(ours, theirs) < 1e-9
    every, printed = gradients("s_grpo", Serial(shared="every"), groups, lambda g, s: serial_objective(g, s, once=False))
    assert far(every, printed) < 1e-9 and far(ours, printed) > 1e-2, "counted m times it is another step"
    assert far(ours, gradients("s_grpo", Serial(), groups, lambda g, s: serial_objective(g, s, base=1.0))[1]) > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_step_of_a_progress_reward_is_the_published_one(seed: int) -> None:
    groups = step(seed, lambda draw, n: [0, *sorted(draw.sample(range(1, n), 2))])
    ours, theirs = gradients("mrt", Progress(), groups, progress_objective)
    assert far(ours, theirs) < 1e-9
    guide, released = gradients("mrt", Progress(None, credit="to_go"), groups, lambda g, s: progress_objective(g, s, outcome=False, to_go=True))
    assert far(guide, released) < 1e-9 and far(ours, released) > 1e-2, "the guide has the termination baseline alone"
    assert far(ours, gradients("mrt", Progress(), groups, lambda g, s: progress_objective(g, s, alpha=0.0))[1]) > 1e-2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("advantage/serial", "Needs rollout=exits"),
        ("advantage/progress", "Needs rollout=blocks"),
        ("advantage/termination", "Needs rollout=blocks"),
        ("loss/s_grpo", "our reading"),
        ("loss/mrt", "alpha is not confirmed"),
    ],
)
def test_the_files_say_what_they_need(name: str, says: str) -> None:
    assert says in (Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text()


# -- the card's toy ---------------------------------------------------------------------------------------------------------------------
THOUGHT, STOP, MOST, NEEDED = 3, 4, 12, 3


def shortened(seed: int, estimator: Any, steps: int = 300) -> tuple[tuple[float, float], tuple[float, float]]:
    """(mean length, accuracy) before and after: a policy with one logit per position that ends the thought there; an answer is right after three thoughts."""
    draw, logits = random.Random(seed), [-3.0] * MOST

    def length() -> int:
        return next((t for t in range(MOST) if draw.random() < 1 / (1 + math.exp(-logits[t]))), MOST)

    def measured() -> tuple[float, float]:
        found = [length() for _ in range(2000)]
        return sum(found) / 2000, sum(n >= NEEDED for n in found) / 2000

    before = measured()
    for _ in range(steps):
        groups = []
        for n in (length() for _ in range(16)):
            ids = [THOUGHT] * n + ([STOP] if n < MOST else [])
            whole = chain(float(n >= NEEDED), ids)
            groups.append(group(whole, *(early(whole, p, float(p >= NEEDED)) for p in sorted(draw.sample(range(1, len(ids)), min(3, len(ids) - 1))))))
        step, learnt = [0.0] * MOST, 0
        for r in (r for found in estimator(groups) for r in found.rollouts):
            for t, (i, a) in enumerate(zip((i for s in r.segments for i in s.ids), column(r), strict=True)):
                learnt += a is not None
                if a is not None and i in (THOUGHT, STOP) and (r.left is None or t < r.left[1]):
                    step[t] += a * ((i == STOP) - 1 / (1 + math.exp(-logits[t])))
        logits = [x + 16 * g / max(learnt, 1) for x, g in zip(logits, step, strict=True)]
    return before, measured()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chains_get_shorter_and_answers_stay_right(seed: int) -> None:
    (long, right), (short, still) = shortened(seed, Serial())
    assert long > 8 and short < 6 and still > right - 0.01
    if seed == 0:
        assert shortened(seed, Serial(shared="every"))[1][0] > 8, "not here where shared tokens count once for each exit: the comparison can fail"
