"""Per-step negatives: which step is the first bad one, what is continued to find out, what the pair holds, and what is learnt from it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.build import Engines
from posttrain.checks import check
from posttrain.cli import _build, _compose
from posttrain.config import ConfigError
from posttrain.data.rows import to_rows
from posttrain.loss import load
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import InTurn, Success
from posttrain.mixture.pairs import PAIRED, TIED, BestWorst
from posttrain.mixture.steps import FirstBadStep
from posttrain.records import Group, Pair, Prompt, Rollout, Sampling, Score, Segment, Source, TokenBatch
from posttrain.rollout.continued import Continued
from posttrain.rollout.strategy import Dynamic, Fixed, StepInfo, WithGreedy
from tests.outcomes.toys import Policy, Run, Table, values

ASKED = Prompt("q", (1, 2))
INFO = StepInfo(0, 0, 1)


def answer(number: int, ids: Sequence[int], reward: float | None, prefix: int = 0, finish: Any = "stop") -> Rollout:
    """An answer whose first ``prefix`` tokens were given."""
    begun = (Segment(tuple(ids[:prefix]), Source.prefix),) if prefix else ()
    own = Segment(tuple(ids[prefix:]), Source.policy, logprobs=tuple(-0.1 * i for i in ids[prefix:]), version=3)
    return Rollout(f"q/{number}", ASKED, (*begun, own), finish=finish, reward=reward)


Values = Sequence[float | None]


def tree(*more: Rollout, q1: Values = (1, 1, 0, 1), q2: Values = (0, 0, 0, 1), good: Values = (1, 1, 1, 0)) -> Group:
    """Steps of two tokens.  The answer 10 11 | 20 21 | 30 31 is wrong; what it is worth behind its steps is the mean of q1 and of q2.  The first of q1
    goes on with 40 41, which is worth ``good``."""
    bad = (10, 11, 20, 21, 30, 31)
    out = [answer(0, bad, 0.0), answer(1, (50, 51), 1.0), answer(2, (52, 53), 1.0), answer(3, (54, 55), 1.0)]
    out += [answer(10 + i, (10, 11, 40 + i, 41, 60, 61), r, 2) for i, r in enumerate(q1)]
    out += [answer(20 + i, (10, 11, 20, 21, 70 + i), r, 4) for i, r in enumerate(q2)]
    out += [answer(30 + i, (10, 11, 40, 41, 80 + i), r, 4) for i, r in enumerate(good)]
    return Group(ASKED, (*out, *more))


def made(gate: FirstBadStep, group: Group) -> list[Pair]:
    out = gate([group], Demos(), 0, 0.0)
    pairs = [i for i in out if isinstance(i, Pair)]
    assert out[0].dropped == (PAIRED if pairs else TIED)
    return pairs


# -- which step --------------------------------------------------------------------------------------------------------------------
def test_the_first_step_that_lowers_q_against_a_step_that_goes_on_well() -> None:
    """Q is 3/4 at the start and behind step 1, 1/4 behind step 2; step 3 only ends what is lost."""
    (pair,) = made(FirstBadStep(), tree())
    assert (pair.id, pair.chosen.id, pair.rejected.id) == ("q/0", "q/10/2-4", "q/0/2-4")
    assert (pair.chosen.rewards, pair.rejected.rewards) == ({"score": 0.75}, {"score": 0.25})
    for side, ids in ((pair.chosen, (40, 41)), (pair.rejected, (20, 21))):
        assert [(s.source, s.ids) for s in side.segments] == [(Source.prompt, (1, 2)), (Source.prefix, (10, 11)), (Source.policy, ids)]
        assert side.segments[-1].logprobs == tuple(-0.1 * i for i in ids) and side.segments[-1].version == 3 and side.finish == "stop"


def test_nothing_is_learnt_of_the_prefix_or_behind_the_step() -> None:
    """Wrong: the whole answers, whose other tokens carry weight too."""
    rows = to_rows([tree(), *FirstBadStep()([tree()], Demos(), 0, 0.0)[1:]][1:])
    assert [(list(r.ids), list(r.trainable or ())) for r in rows] == [
        ([1, 2, 10, 11, 40, 41], [False] * 4 + [True] * 2),
        ([1, 2, 10, 11, 20, 21], [False] * 4 + [True] * 2),
    ]
    batch = scored(rows)
    weights = load("per_step_negatives").weights(batch)
    assert (weights != 0).tolist() == [False, False, False, True, True] * 2


def test_the_gradient_is_dpo_on_the_step_given_its_prefix() -> None:
    """Against a naive transcription in float64; the prefix would cancel in a sum and not in a mean."""
    rows = to_rows(FirstBadStep()([tree()], Demos(), 0, 0.0)[1:])
    batch = scored(rows)
    logp = batch.logps["current"].clone().requires_grad_()
    load("per_step_negatives")(batch, logp).loss.backward()
    free = batch.logps["current"].clone().requires_grad_()
    ratio = free - batch.logps["base"]

    def naive(first: int) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (ratio[first:5].sum() - ratio[5 + first : 10].sum()))

    (found,) = torch.autograd.grad(naive(3), free, retain_graph=True)
    torch.testing.assert_close(logp.grad, found, rtol=1e-9, atol=0)
    assert not torch.allclose(torch.autograd.grad(naive(1), free)[0], found)
    learnt = [replace(r, trainable=[False, False] + [True] * 4) for r in rows]
    shared = scored(learnt)
    shared.logps["current"][6:8], shared.logps["base"][6:8] = shared.logps["current"][1:3], shared.logps["base"][1:3]
    own, whole = (load("per_step_negatives").weights(b) for b in (batch, shared))
    assert float(own[3]) == pytest.approx(float(whole[3]), rel=1e-12), "the margin does not know a prefix that both sides share"
    assert float((whole[1:3] + whole[6:8]).abs().max()) < 1e-15, "and what one side gives its tokens the other takes"
    mean, mean_of_all = (load("dpo_norm", [f"streams.pairs.source={s}"]).weights(b) for s, b in (("[policy]", batch), ("[policy,prefix]", shared)))
    assert mean[3] != mean_of_all[3]


def scored(rows: Sequence[Any]) -> TokenBatch:
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    return batch.with_logps(**{name: -torch.rand(batch.num_tokens, generator=draw, dtype=torch.float64) - 0.1 for name in ("current", "base")})


@pytest.mark.parametrize(
    ("gate", "group"),
    [
        (FirstBadStep(gap=0.5), tree()),  # the drop is 1/2, and not more
        (FirstBadStep(), tree(good=(1, 0, 0, 0))),  # the other step is worth as little
        (FirstBadStep(), Group(ASKED, (tree().rollouts[0], *tree().rollouts[4:]))),  # one answer says nothing of the start
        (FirstBadStep(), tree(q1=(None, None, None, 1))),  # one verdict is not enough to say which step is first
        (FirstBadStep(), tree(q2=(None, None, None, None))),
        (FirstBadStep(), tree(good=(None, None, None, 1))),
        (FirstBadStep(), Group(ASKED, tree().rollouts[1:4])),  # nothing is wrong
        (FirstBadStep(), Group(ASKED, (answer(0, (10, 11), None), answer(1, (5, 6), 1.0)))),
        (FirstBadStep(), Group(ASKED, (answer(0, (10, 11, 12), 0.0), answer(1, (10, 11, 12), 0.0)))),
    ],
)
def test_where_no_step_can_be_named_there_is_no_pair(gate: FirstBadStep, group: Group) -> None:
    assert made(gate, group) == []


def test_equal_q_is_dropped_at_every_gap() -> None:
    """The good step is worth exactly what the bad one is."""
    assert not made(FirstBadStep(gap=0.0), tree(good=(0, 0, 0, 1))) and made(FirstBadStep(gap=0.0), tree(good=(0, 0, 1, 1)))


def test_every_setting_acts() -> None:
    assert made(FirstBadStep(least=4), tree()) and not made(FirstBadStep(least=5), tree())
    two = tree(answer(40, (10, 11, 20, 21, 33), 0.0))
    assert len(made(FirstBadStep(), two)) == 1 and [p.id for p in made(FirstBadStep(answers=2), two)] == ["q/0", "q/1"]
    half = Group(ASKED, tuple(replace(r, reward=None if r.reward is None else r.reward / 2) for r in tree().rollouts))
    assert not made(FirstBadStep(), half) and made(FirstBadStep(Success(threshold=0.5), gap=0.2), half)
    named = Group(ASKED, tuple(replace(r, reward=0.0, scores={"right": Score(r.reward)}) for r in tree().rollouts))
    assert not made(FirstBadStep(), named) and made(FirstBadStep(Success("right")), named)
    for bad in ({"gap": -0.1}, {"answers": 0}, {"gap": math.nan}):
        with pytest.raises(ValueError, match="must"):
            FirstBadStep(**bad)  # type: ignore[arg-type]


def test_a_q_from_one_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="noise would select the step"):
        FirstBadStep(least=1)
    with pytest.raises(ValueError, match="never from one"):
        Continued(FirstBadStep(), continuations=1)
    with pytest.raises(ValueError, match=r"strategy.n=1"):
        Continued(FirstBadStep()).bound(1)
    with pytest.raises(ValueError, match="mixture=first_bad_step"):
        Continued()
    with pytest.raises(ValueError, match="level='token' does not exist"):
        Continued(FirstBadStep(), level="token")  # type: ignore[arg-type]


def test_the_last_step_is_worth_what_the_answer_earned() -> None:
    """It is the first bad one here, and cut off for its length; the good one ends its answer too."""
    answers = answer(0, (10, 11, 20), 0.0, finish="length"), answer(1, (7,), 1.0), answer(2, (10, 11, 21), 1.0, 2), answer(3, (10, 11, 22), 1.0, 2)
    (pair,) = made(FirstBadStep(), Group(ASKED, answers))
    found = [(d.segments[-1].ids, d.rewards["score"], d.finish) for d in (pair.chosen, pair.rejected)]
    assert found == [((21,), 1.0, "stop"), ((20,), 0.0, "length")]


def test_the_very_first_step_may_be_the_bad_one() -> None:
    """Against another first step, of which only the prompt is read; the good answer has steps of its own, and the first of them is asked for."""
    group = tree(answer(40, (90, 91, 92, 93, 94, 95), 1.0), q1=(0, 0, 0, 0), good=())
    group = replace(group, rollouts=tuple(r for r in group.rollouts if r.sample_id not in ("q/1", "q/2", "q/3")))
    assert FirstBadStep().wanted(group, lambda ids: range(2, len(ids), 2)) == [(90, 91)]
    group = replace(group, rollouts=(*group.rollouts, *(answer(50 + i, (90, 91, 96), 1.0, 2) for i in range(2))))
    (pair,) = made(FirstBadStep(), group)
    assert [[(s.source, s.ids) for s in d.segments] for d in (pair.chosen, pair.rejected)] == [
        [(Source.prompt, (1, 2)), (Source.policy, ids)] for ids in ((90, 91), (10, 11))
    ]


def test_what_was_left_out_and_what_is_no_group_passes() -> None:
    gone = replace(tree(), dropped="no_variance")
    assert FirstBadStep()([gone, "other"], Demos(), 0, 0.0) == [gone, "other"]


# -- what is continued ---------------------------------------------------------------------------------------------------------------
LETTERS = {0: "", 1: "a", 2: "b", 3: ".", 4: "\n", 5: " ", 6: "c\n", 7: "1.5", 8: "\nd"}


def decode(ids: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


@pytest.mark.parametrize(
    ("level", "ids", "ends"),
    [
        ("line", (1, 4, 2, 4, 1), [2, 4]),
        ("line", (1, 6, 6, 1, 4, 0), [2, 3]),  # a line break before the end is no step
        ("line", (4, 1, 4, 4, 2), [4]),  # nor is one before the beginning; an empty line is not one of its own
        ("line", (1, 8, 1), [2]),  # a token that holds the break and what follows it belongs to the step it ends
        ("line", (1, 2, 3), []),
        ("sentence", (1, 3, 5, 2, 7, 3, 5, 1), [2, 6]),
        ("sentence", (1, 4, 2, 3), [2]),
    ],
)
def test_where_steps_end(level: Any, ids: tuple[int, ...], ends: list[int]) -> None:
    assert Continued(FirstBadStep(), level=level, decode=decode).ends(ids) == ends


def test_first_every_step_of_the_wrong_answer_then_the_good_step() -> None:
    one = Continued(FirstBadStep(), decode=lambda ids: "".join(f"{i}\n" if i % 2 else f"{i} " for i in ids)).bound(4)
    whole = tree()
    begun = Group(ASKED, whole.rollouts[:4])
    assert [(a.prefix, a.n, a.first) for a in one.observe(begun, INFO)] == [((10, 11), 4, 4), ((10, 11, 20, 21), 4, 4)]
    known = Group(ASKED, whole.rollouts[:12])
    assert [(a.prefix, a.n, a.first) for a in one.observe(known, INFO)] == [((10, 11, 40, 41), 4, 12)]
    assert one.observe(whole, INFO) == [] and one.observe(Group(ASKED, whole.rollouts[1:4]), INFO) == []
    assert one.observe(tree(q1=(1, 0, 0, 0), q2=(1, 0, 0, 0), good=()), INFO) == [], "step 1 is bad: what took its place ends with it"


def test_it_stands_around_another_strategy_which_sees_the_first_answers_alone() -> None:
    inner = Dynamic(band=(0.0, 0.75), cooldown=2)
    one = Continued(FirstBadStep(), inner=inner).bound(4)
    assert one.admit(tree(), INFO) == "above_band" and Continued(FirstBadStep(), inner=Dynamic()).bound(4).admit(tree(), INFO) is None
    again = Continued(FirstBadStep(), inner=Dynamic()).bound(4)
    again.load_state_dict(one.state_dict())
    assert again.skip(ASKED, INFO) == "cooldown" and Continued(FirstBadStep()).bound(4).state_dict() == {}
    greedy = Continued(FirstBadStep(), inner=WithGreedy(), decode=lambda ids: "").bound(4)
    assert [a.greedy for a in greedy.observe(Group(ASKED, tree().rollouts[:4]), INFO)] == [True]
    assert one.plan([ASKED], INFO) == Fixed(4).plan([ASKED], INFO) and one.num_prompts(INFO) == inner.num_prompts(INFO)


class Pool:
    """Engines whose first answer has the step 2 in its middle, all others the step 1 alone, each a token and a line; answers of three steps are right without
    a 2."""

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, ...], int, int]] = []

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i}\n" for i in ids)

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        self.read += [(p.ids, n, first) for p in prompts]
        seen: dict[str, int] = {}
        groups = []
        for p in prompts:
            start = first + n * seen.setdefault(p.id, 0)
            seen[p.id] += 1
            have = len(p.ids) - 2
            rollouts = []
            for i in range(start, start + n):
                own = [1] * (3 - have)
                if i == 0:
                    own[1] = 2
                rollouts.append(Rollout(f"{p.id}/{i}", p, (Segment(tuple(own), Source.policy, logprobs=(-1.0,) * len(own), version=0),)))
            groups.append(Group(p, tuple(rollouts)))
        return groups

    def metrics(self) -> dict[str, float]:
        return {}


class Verifier:
    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        return {}

    async def score(self, groups: Sequence[Group], step: int, progress: float) -> list[Group]:
        def scored(r: Rollout) -> Rollout:
            return replace(r, reward=float(all(i != 2 for s in r.segments for i in s.ids)))

        return [replace(g, rollouts=tuple(map(scored, g.rollouts))) for g in groups]


def test_the_run_s_stage_samples_scores_and_joins_the_continuations() -> None:
    pool, gate = Pool(), FirstBadStep()
    sampler = type("S", (), {"next": lambda self, count: [0]})()
    one = Continued(gate, continuations=3).bound(4).with_decode(pool.decode)
    groups, report = asyncio.run(Engines(pool, Verifier(), sampler, [Prompt("q", (8, 9))], one, Sampling(), 1, 10).collect(0))
    assert pool.read == [((8, 9), 4, 0), ((8, 9, 1), 3, 4), ((8, 9, 1, 2), 3, 4), ((8, 9, 1, 1), 3, 10)]
    assert report["rollout/generated"] == 13 and len({r.sample_id for r in groups[0].rollouts}) == 13 and groups[0].prompt.ids == (8, 9)
    (pair,) = made(gate, groups[0])
    assert [d.segments[-1].ids for d in (pair.chosen, pair.rejected)] == [(1,), (2,)] and pair.chosen.segments[1].ids == (1,)
    assert (pair.chosen.rewards["score"], pair.rejected.rewards["score"]) == (1.0, 0.0)


# -- the files -----------------------------------------------------------------------------------------------------------------------
WORDS = ["rollout=continued", "mixture=first_bad_step", "loss=per_step_negatives", "advantage=none"]


def test_the_files_compose_and_what_does_not_go_together_is_refused() -> None:
    from posttrain.cli import build_stages, compose_stages
    from posttrain.words import Words

    more = ["model=tiny", "data.train.path=x.jsonl", "reward.fn.mine._target_=builtins.len"]

    def built(*words: str) -> Any:
        (config,) = build_stages(compose_stages(Words([*WORDS, *more, *words]))).values()
        check(config)
        return config

    config = built("rollout.strategy.level=sentence", "mixture.gate.gap=0.5")
    assert config.rollout.strategy == Continued(FirstBadStep(gap=0.5), level="sentence") and config.mixture.gate == FirstBadStep(gap=0.5)
    for words, message in (
        (["rollout.strategy=null"], "choose rollout=continued"),
        (["rollout.n=1"], "needs a worst"),
        (["rollout.max_model_len=600", "rollout.max_tokens=128", "data.max_prompt_tokens=256"], "three times rollout.max_tokens"),
        (["rollout.environment={_target_: posttrain.rollout.environment.Retry, text: again, max_turns: 2}"], "do not go together"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(*words)
    with pytest.raises(ValueError, match="mixture=first_bad_step"):
        built("mixture=best_worst")
    assert InTurn({"steps": FirstBadStep()}).needs_continuations and not InTurn({"best": BestWorst()}).needs_continuations
    assert _build({"g": dict(_compose("train", WORDS).mixture.gate)}, "")


# -- the toy -------------------------------------------------------------------------------------------------------------------------
SPURIOUS = 4


class Whole(FirstBadStep):
    """The same pairs as whole answers: what the steps are compared with."""

    def _pairs(self, group: Group) -> list[Pair]:
        from posttrain.mixture.pairs import as_demo

        sampled = {r.sample_id: r for r in group.rollouts}
        whole = [(as_demo(sampled[d.id.rsplit("/", 1)[0]]) for d in (p.chosen, p.rejected)) for p in super()._pairs(group)]
        return [Pair(f"{group.id}/{i}", *sides) for i, sides in enumerate(whole)]


def spurious(gate: Any, seed: int, steps: int = 40) -> tuple[float, float]:
    """Three steps; the answer is right when the last is a 0: with probability 3/4, and with 1/4 behind the spurious second step, which is taken half the
    time, so right answers hold it too.  Probability of the spurious step after so many updates, and that of a right answer."""
    start = torch.zeros(15, 5, dtype=torch.float64)
    start[5:10, SPURIOUS] = math.log(4.0)
    start[10:, 0] = math.log(12.0)
    start[14, 0] = math.log(4 / 3)
    policy = Policy([Table(values(15, 5, start), lambda p, t, last: t * 5 + last)], 5, 3)
    strategy = Continued(FirstBadStep(), continuations=8, decode=lambda ids: "".join(f"{i}\n" for i in ids)).bound(8)
    Run(
        policy, "per_step_negatives", ("streams.pairs.advantage.beta=1.0",), steps=steps, rate=2.0, seed=seed, reward=lambda p, a: float(a[2] == 0),
        prompts=range(8), strategy=strategy, gate=gate,
    ).go()  # fmt: skip
    answers, logp = policy.all_answers(1)
    p = logp[0].exp()
    return float(p[answers[:, 1] == SPURIOUS].sum()), float(p[answers[:, 2] == 0].sum())


@pytest.mark.slow
def test_a_spurious_step_is_unlearned_and_whole_answers_leave_it() -> None:
    """From one half.  Both learn the last step, and are right equally often."""
    own, whole = ([spurious(gate, seed) for seed in range(3)] for gate in (FirstBadStep(), Whole()))
    assert max(p for p, _ in own) < 0.45 < 0.5 < min(p for p, _ in whole)
    assert min(right for _, right in (*own, *whole)) > 0.9
