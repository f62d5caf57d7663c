"""Small promises of gates, schedules and controllers: defaults, bounds of settings, orders, and who is left alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from posttrain.advantage import GroupAdvantage, RunningBaseline
from posttrain.data.rows import to_rows
from posttrain.learner.lookahead import slope
from posttrain.mixture.buffer import Buffer
from posttrain.mixture.context import Corrupt
from posttrain.mixture.control import LookAhead, Proportional, Threshold, now, pinned, recall, steer
from posttrain.mixture.demos import Demos
from posttrain.mixture.feasible import Feasible
from posttrain.mixture.gate import Add, Inject, InTurn, PassThrough, Unsolved, answer_of, changes
from posttrain.mixture.pairs import BestWorst, GivenAgainstSampled, as_demo
from posttrain.mixture.rejection import Rejection
from posttrain.mixture.route import FirstAccepted, RightOnly
from posttrain.mixture.schedule import Cosine, Linear, WarmupCosine
from posttrain.mixture.steps import FirstBadStep
from posttrain.mixture.tagged import OutcomeTag
from posttrain.mixture.thoughts import BeforeText
from posttrain.mixture.turns import WithoutCritique
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Score, Segment, Source
from tests.mixture.conftest import InOrder, demo, group


def shelf_of(*names: str) -> Demos:
    return Demos([demo(name) for name in names], InOrder(len(names)))


# -- what passes a gate, and in which order things leave it --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "gate",
    [
        BeforeText(), BestWorst(), Buffer(1), Feasible({"honest": 0.5}), FirstBadStep(), GivenAgainstSampled(), OutcomeTag("good", "bad"),
        Rejection(), WithoutCritique(),
    ],
)  # fmt: skip
def test_texts_and_pairs_pass_untouched(gate: Any) -> None:
    """They have no ``dropped`` to look at."""
    items = [demo("a"), Pair("p", demo("b"), demo("c"))]
    assert gate(items, Demos(), 0, 0.0) == items


@pytest.mark.parametrize(
    "gate",
    [BestWorst(), Feasible({"honest": 0.5}), FirstBadStep(), GivenAgainstSampled(), OutcomeTag("good", "bad"), Rejection(), WithoutCritique()],
)
def test_a_group_that_is_out_stays_as_it_is(gate: Any) -> None:
    out = replace(group("a", 1.0, 0.0), dropped="before")
    assert gate([out], shelf_of("a"), 0, 0.0) == [out]


def scored(name: str, *values: float) -> Group:
    """Rewards that are also the score ``honest``, and a passing and a failing one when they lie on the two sides of 1/2."""
    whole = group(name, *values)
    return replace(whole, rollouts=tuple(replace(r, scores={"honest": Score(r.reward)}) for r in whole.rollouts))


@pytest.mark.parametrize("gate", [BestWorst(), Feasible({"honest": 0.5}), GivenAgainstSampled(), Rejection(keep=2, beta=1e9)])
def test_groups_come_first_and_their_pairs_behind_them(gate: Any) -> None:
    """The counts of a step read the groups; the order of both is that of the step."""
    out = gate([scored("a", 1.0, 0.0), demo("x"), scored("b", 0.0, 1.0)], shelf_of("a", "b"), 0, 0.0)
    kinds = [type(item).__name__ for item in out]
    assert kinds[:3] == ["Group", "Demo", "Group"] and set(kinds[3:]) == {"Pair"}
    assert [item.id for item in out[:3]] == ["a", "x", "b"] and [g.dropped for g in (out[0], out[2])] == ["became_pairs"] * 2
    assert sorted({p.chosen.prompt.id for p in out[3:]}) == ["a", "b"] and out[3].chosen.prompt.id == "a"


def test_demonstrations_stand_behind_all_groups() -> None:
    a, b = group("a", 0.0), group("b", 0.0)
    assert Unsolved(rollouts="keep")([a, b], shelf_of("a", "b"), 0, 0.0) == [a, b, demo("a"), demo("b")]


def test_a_gate_that_changes_nothing_hands_back_a_list_of_its_own() -> None:
    items = [group("a", 1.0)]
    out = PassThrough()(items, Demos(), 0, 0.0)
    assert out == items and out is not items


# -- waiting -------------------------------------------------------------------------------------------------------------------------
def test_a_buffer_waits_for_128_demonstrations() -> None:
    gate, demos = Buffer(), shelf_of("a")
    out = gate([group("a", 0.0)] * 127, demos, 0, 0.0)
    assert all(isinstance(item, Group) for item in out) and len(gate.waiting) == 127
    out = gate([group("a", 0.0)], demos, 1, 0.0)
    assert sum(isinstance(item, Demo) for item in out) == 128 and gate.waiting == []


def test_who_waits_stays_unless_it_is_looked_at_again() -> None:
    for recheck, waiting in ((None, ["a"]), (True, [])):
        gate = Buffer() if recheck is None else Buffer(recheck=recheck)
        for reward in (0.0, 1.0):
            gate([group("a", reward)], shelf_of("a"), 0, 0.0)
        assert gate.waiting == waiting


def test_a_group_that_nobody_scored_does_not_wait() -> None:
    gate, unscored = Buffer(size=1), group("a", None, None)
    assert gate([unscored], shelf_of("a"), 0, 0.0) == [unscored] and gate.waiting == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Buffer(rollouts="maybe"), "rollouts='maybe' does not exist; choose from keep, drop"),  # type: ignore[arg-type]
        (lambda: Buffer(missing="drop"), "missing='drop' does not exist; choose from keep, error"),  # type: ignore[arg-type]
        (lambda: Unsolved(missing="drop"), "missing='drop' does not exist; choose from keep, error"),  # type: ignore[arg-type]
        (lambda: Feasible({"honest": 0.5}, gap=-0.1), "gap=-0.1 must not be negative"),
        (lambda: Proportional("a", "m", init=0.0), "init=0.0, target=6.0 and horizon=10000.0 must be above 0"),
        (lambda: Proportional("a", "m", horizon=0.0), "horizon=0.0 must be above 0"),
        (lambda: Proportional("a", "m", clip=0.0), "clip=0.0 between 0 and 1"),
    ],
)
def test_a_setting_beyond_its_bound_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


# -- what the model reads ------------------------------------------------------------------------------------------------------------
def test_two_fifths_of_an_answer_are_corrupted_unless_told_otherwise() -> None:
    long = Demo("a", (Segment(tuple(range(10, 210)), Source.demo),))
    (plain,), (told,) = (gate([long], Demos(), 0, 0.0) for gate in (Corrupt(99), Corrupt(99, rate=0.4, seed=0)))
    assert plain == told and 60 < sum(i == 99 for i in plain.segments[0].inputs or ()) < 100


def test_token_0_is_a_token() -> None:
    (one,) = Corrupt(0, rate=1.0)([demo("a")], Demos(), 0, 0.0)
    assert one.segments[1].inputs == (0, 0, 0)


# -- controllers ---------------------------------------------------------------------------------------------------------------------
def test_a_coefficient_can_be_held_where_one_wants_it() -> None:
    control = Threshold("e", "m", init=0.01)
    held = pinned(control, 0.7)
    assert recall(control, held) == {"value": 0.7, "below": 1.0} and now(control, 0.5, held) == 0.7 and now(control, 0.5, {}) == 0.01


def test_one_metric_of_two_that_counted_nothing_is_enough_to_wait() -> None:
    """A step without a look measures the entropy and no slope."""
    control = LookAhead("mu", entropy_rate=0.5, rate=0.1)
    still = steer({"mu": control}, {}, {"lookahead/mu": (0.0, 0.0), "rollouts/entropy": (6.0, 3.0)}, 8)
    assert recall(control, still) == {"value": 0.5, "entropy": 0.0, "looks": 0.0}
    moved = steer({"mu": control}, {}, {"lookahead/mu": (1.0, 2.0), "rollouts/entropy": (6.0, 3.0)}, 8)
    assert recall(control, moved) == {"value": pytest.approx(0.55), "entropy": 2.0, "looks": 1.0}


def follow(control: Any, measured: float, sequences: int) -> float:
    state: float = control.value(control.step(control.begin(), measured, sequences))
    return state


def test_the_published_numbers_are_the_defaults() -> None:
    """A KL of 6 per answer, within 10000 answers, a fifth at most; an entropy of 0.2, in steps of 0.005 from 0.01."""
    kl = Proportional("kl", "m")
    assert [follow(kl, m, 1000) for m in (6.0, 6.6, 60.0, 0.0)] == pytest.approx([0.2, 0.2 * 1.01, 0.2 * 1.02, 0.2 * 0.98])
    entropy = Threshold("e", "m", only_below=False)
    assert entropy(0.0) == 0.01 and [follow(entropy, m, 8) for m in (0.2, 0.21)] == pytest.approx([0.015, 0.005])


def test_a_coefficient_never_becomes_zero_in_one_step() -> None:
    """With a horizon of 10 and a clip of 1/5, 50 sequences would take all of it."""
    control = Proportional("kl", "m", init=1.0, target=1.0, horizon=10.0, clip=0.2)
    assert follow(control, 0.0, 49) == pytest.approx(0.02)
    with pytest.raises(ValueError, match=r"too short for steps of 50 sequences.*longer than 10$"):
        follow(control, 0.0, 50)


def test_a_blend_may_begin_at_either_end_and_stand_still() -> None:
    assert LookAhead("mu", init=0.2, low=0.2)(0.0) == 0.2 and LookAhead("mu", init=0.8, high=0.8)(0.0) == 0.8
    still = LookAhead("mu", rate=0.0)
    assert still.value(still.step(still.begin(), [1.0], 8)) == 0.5


def test_a_blend_looks_every_tenth_step_moves_by_a_hundredth_and_follows_the_cosine() -> None:
    """Unless told otherwise; two gradients of one direction have the slope 1, however long they are."""
    from posttrain.data.pack import Packer
    from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference
    from posttrain.update import Learn
    from tests.mixture.test_control import Ranks, groups

    control = LookAhead("mu")
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), aggregate.TokenMean(), coef=control)
    loss = Objective({"rollouts": stream})
    along = slope([torch.tensor([3.0, 4.0])], [torch.tensor([30.0, 40.0])], 0.1, control.scale)

    class Looking(Ranks):
        measured: ClassVar[list[int]] = []

        async def look_ahead(self, micro: Any, name: str, measure: bool, keep: bool) -> dict[str, float]:
            self.measured += [step] if measure else []
            return {"slope": along} if measure else {}

    ranks = Looking(loss, 0.0)
    learn, values = Learn(loss, Packer(64), ranks), []
    for step in range(12):
        values.append(asyncio.run(learn.learn(step, groups(), 0.0)).pairs["control/mu"][0])
    assert ranks.measured == [10] and values == pytest.approx([0.5] * 11 + [0.51])


def test_the_entropy_a_blend_aims_at_is_the_mean_of_its_first_looks() -> None:
    """Of 0.25 and 0.75, so 0.5 from the third look on; what is looked at is counted, not added up."""
    control, states = LookAhead("mu", rate=0.0, entropy_rate=0.2, warmup=2), []
    states.append(control.begin())
    for entropy in (0.25, 0.75, 0.0):
        states.append(control.step(states[-1], [0.0, entropy], 8))
    assert [s["looks"] for s in states] == [0.0, 1.0, 2.0, 2.0] and [s["entropy"] for s in states] == [0.0, 0.25, 1.0, 1.0]
    assert [s["value"] for s in states] == pytest.approx([0.5, 0.5, 0.5, 0.6])


# -- constraints and verdicts --------------------------------------------------------------------------------------------------------
def test_one_missing_verdict_of_two_leaves_an_answer_out() -> None:
    whole = group("q", 1.0, 0.5, 0.0)
    verdicts = (Score(1.0), Score(None, "error")), (Score(1.0), Score(1.0)), (Score(0.0), Score(1.0))
    told = [{"honest": honest, "kind": kind} for honest, kind in verdicts]
    whole = replace(whole, rollouts=tuple(replace(r, scores=s) for r, s in zip(whole.rollouts, told, strict=True)))
    _, pair = Feasible({"honest": 0.5, "kind": 0.5})([whole], Demos(), 0, 0.0)
    assert (pair.chosen.id, pair.rejected.id) == ("q/1", "q/2")


def test_who_passes_alone_has_nobody_to_be_compared_with() -> None:
    for gate in (Feasible({"honest": 0.5}), BestWorst()):
        (out,) = gate([scored("q", 1.0)], Demos(), 0, 0.0)
        assert out.dropped == "no_preference"


def test_a_score_that_failed_is_no_reward_of_the_text() -> None:
    (one,) = group("q", 1.0).rollouts
    text = as_demo(replace(one, scores={"honest": Score(None, "timeout"), "kind": Score(0.5)}))
    assert text.rewards == {"kind": 0.5, "reward": 1.0}


# -- demonstrations in a step, or in a group -------------------------------------------------------------------------------------------
def test_a_gate_that_adds_one_demonstration_asks_for_them() -> None:
    assert Add(1).uses_demos is True and Add(0).uses_demos is False


def test_a_label_takes_the_mean_of_the_rollouts_that_have_a_reward() -> None:
    """Of 1 and 0, whatever their advantages; its own advantage is 0 under every estimator."""

    def as_rewarded(groups: Any) -> list[Group]:
        return [replace(g, rollouts=tuple(replace(r, advantage=r.reward) for r in g.rollouts)) for g in groups]

    whole = group("q", 1.0, None, 0.0)
    whole = replace(whole, rollouts=(replace(whole.rollouts[0], advantage=None), replace(whole.rollouts[1], advantage=3.0), whole.rollouts[2]))
    (out,) = Inject(as_rewarded, solved="mean")([whole], shelf_of("q"), 0, 0.0)
    assert [r.advantage for r in out.rollouts] == [1.0, None, 0.0, 0.0] and out.rollouts[-1].reward == 0.5


def test_one_gate_of_several_says_it_for_all() -> None:
    plain, both = PassThrough(), {"plain": PassThrough()}
    assert InTurn({**both, "steps": FirstBadStep()}).needs_continuations and not InTurn(both).needs_continuations
    assert InTurn({**both, "tag": OutcomeTag("good", "bad")}).makes_demos and not InTurn(both).makes_demos
    assert InTurn({**both, "waits": Buffer()}).separate_step and not InTurn(both).separate_step
    assert not InTurn({"plain": plain}).makes_pairs


def test_an_answer_that_begins_inside_a_segment_keeps_what_stands_behind_it() -> None:
    """The prompt 1 2 3 ends in the second of three segments; of what the teacher gave each place the answer's is kept."""
    stored = tuple(((i,), (-0.1,)) for i in (1, 2, 3, 4, 5, 6))
    segments = (Segment((1, 2), Source.demo), Segment((3, 4), Source.demo, stored=stored[2:4]), Segment((5, 6), Source.demo, stored=stored[4:]))
    found = answer_of(Demo("d", segments, prompt=Prompt("q", (1, 2, 3))))
    assert [(s.ids, s.stored) for s in found] == [((4,), stored[3:4]), ((5, 6), stored[4:])]


def test_what_a_gate_did_is_counted_beside_texts_too() -> None:
    text, left = demo("x"), group("a", 0.0)
    found = changes([text, left], [text, replace(left, dropped="now"), demo("y")])
    assert found == {"mixture/demonstrations": 1.0, "mixture/groups_left_out": 1.0, "mixture/pairs": 0.0, "mixture/injected": 0.0}


# -- pairs by rejection --------------------------------------------------------------------------------------------------------------
def test_acceptance_is_drawn_at_one_half_unless_told_otherwise() -> None:
    many = scored("q", *(i / 7 for i in range(8)))

    def drawn(**settings: float) -> list[list[str]]:
        gate = Rejection(keep=2, **settings)  # type: ignore[arg-type]
        return [[p.chosen.id + p.rejected.id for p in gate([many], Demos(), step, 0.0)[1:]] for step in range(16)]

    assert drawn() == drawn(beta=0.5) != drawn(beta=1.0)


# -- one text per prompt ---------------------------------------------------------------------------------------------------------------
def test_a_single_kind_is_a_word_and_not_its_letters() -> None:
    """A text of the kind ``old`` is not of the kind ``gold``: where there is none of these the first of the data is taken."""
    texts = [demo("first", "q"), demo("second", "q", kind="old"), demo("third", "q", kind="gold")]
    gate = FirstAccepted(prefer="gold")  # type: ignore[arg-type]
    assert gate == FirstAccepted(prefer=["gold"]) == FirstAccepted(prefer=("gold",))  # type: ignore[arg-type]
    for known, taken in ((texts[:2], "first"), (texts, "third")):
        assert [item.id for item in gate([group("q", 0.0)], Demos(known, None), 0, 0.0)] == ["q", taken]


# -- schedules -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [Linear, Cosine])
def test_a_schedule_runs_inside_the_run_and_takes_some_of_it(schedule: Any) -> None:
    for begin, until in ((0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match=f"needs 0 <= begin < until <= 1, not begin={begin}, until={until}"):
            schedule(0.0, 1.0, begin, until)
    assert schedule(0.25, 0.75, 0.0, 1.0)(1.0) == 0.75 and schedule(0.25, 0.75, 0.0, 1.0) == schedule(0.25, 0.75)


def test_without_warm_up_a_schedule_starts_at_its_peak() -> None:
    """One step of decay in a run of one step are the least there may be."""
    short = WarmupCosine(peak=0.8, valley=0.2, warmup=0, decay=1, steps=1)
    assert [short(u) for u in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])


# -- steps -----------------------------------------------------------------------------------------------------------------------------
ASKED = Prompt("q", (1, 2))


def answer(number: int, ids: tuple[int, ...], reward: float | None, prefix: int = 0) -> Rollout:
    begun = (Segment(ids[:prefix], Source.prefix),) if prefix else ()
    own = Segment(ids[prefix:], Source.policy, logprobs=tuple(-0.5 * i for i in ids[prefix:]), version=3)
    return Rollout(f"q/{number}", ASKED, (*begun, own), reward=reward)


def pairs_of(*answers: Rollout, **settings: Any) -> list[Any]:
    return [item for item in FirstBadStep(**settings)([Group(ASKED, answers)], Demos(), 0, 0.0) if isinstance(item, Pair)]


WRONG, RIGHT = answer(0, (10, 20, 21, 30), 0.0), answer(1, (50,), 1.0)
BEHIND_1 = [answer(2, (10, 60), 1.0, 1), answer(3, (10, 61), 1.0, 1)]
BEHIND_2 = [answer(4, (10, 20, 21, 70), 0.0, 3), answer(5, (10, 20, 21, 71), 0.0, 3)]


def test_two_verdicts_are_enough_for_what_a_step_is_worth() -> None:
    """Q is 1/2 at the start, 1 behind step 1, and 0 behind step 2."""
    (pair,) = pairs_of(WRONG, RIGHT, *BEHIND_1, *BEHIND_2)
    assert [d.segments[-1].ids for d in (pair.chosen, pair.rejected)] == [(60,), (20, 21)]
    assert pairs_of(WRONG, RIGHT, *BEHIND_1, *BEHIND_2, least=3) == []


def test_a_right_answer_that_took_the_bad_step_is_no_good_step() -> None:
    """It got there in spite of it; the next right answer from the same place took another."""
    lucky = answer(6, (10, 20, 21, 62), 1.0, 1)
    (pair,) = pairs_of(WRONG, RIGHT, lucky, *BEHIND_1, *BEHIND_2)
    assert pair.chosen.segments[-1].ids == (60,)
    assert pairs_of(WRONG, RIGHT, lucky, answer(7, (10, 20, 21, 63), 1.0, 1), *BEHIND_2) == [], "both took it"


def test_a_good_step_ends_where_it_was_continued_however_long_the_bad_one_is() -> None:
    """One token against two; the answer it is taken from goes on, and its step is worth what the continuations earned."""
    good = answer(2, (10, 60, 61, 62), 1.0, 1)
    known = [answer(8 + i, (10, 60, 80 + i), reward, 2) for i, reward in enumerate((1.0, 1.0, 1.0, 0.0))]
    (pair,) = pairs_of(WRONG, RIGHT, good, BEHIND_1[1], *BEHIND_2, *known)
    assert pair.chosen.segments[-1].ids == (60,) and pair.chosen.rewards == {"score": 0.75} and pair.chosen.finish == "stop"
    assert [(s.source, s.ids, s.trainable) for s in pair.chosen.segments[:2]] == [(Source.prompt, (1, 2), False), (Source.prefix, (10,), False)]


def test_only_what_is_not_known_yet_is_continued_and_once() -> None:
    """Two wrong answers share their first two steps; what follows the first is known, what follows the second is not."""
    other = answer(9, (10, 20, 21, 31), 0.0)
    gate = FirstBadStep(answers=2)
    assert gate.wanted(Group(ASKED, (WRONG, other, *BEHIND_1)), lambda ids: [1, 3]) == [(10, 20, 21)]
    assert gate.wanted(Group(ASKED, (WRONG, other)), lambda ids: [1, 3]) == [(10,), (10, 20, 21)]


# -- tags ------------------------------------------------------------------------------------------------------------------------------
WORDS = {"good": (40, 41), "bad": (50, 51, 52)}


@pytest.mark.parametrize(("ids", "swapped"), [((1, 40, 41), (1, 50, 51, 52)), ((40, 41, 1), (50, 51, 52, 1)), ((40, 41), (50, 51, 52))])
def test_a_tag_may_stand_anywhere_in_a_prompt_and_be_longer_than_the_other(ids: tuple[int, ...], swapped: tuple[int, ...]) -> None:
    asked = Prompt("q", ids)
    failed = Group(asked, (Rollout("q/0", asked, (Segment((7,), Source.policy, logprobs=(-1.0,), version=0),), reward=0.0),))
    (out,) = OutcomeTag("good", "bad", encode=lambda text: WORDS[text])([failed], Demos(), 0, 0.0)
    assert out.rollouts[0].prompt.ids == swapped


def test_neither_tag_may_be_empty() -> None:
    for good, bad in (("good", ""), ("", "bad"), ("", "")):
        with pytest.raises(ValueError, match="must be two different words"):
            OutcomeTag(good, bad)


# -- thoughts and turns ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("said", ["", 5, None])
def test_next_words_are_a_text_that_says_something(said: Any) -> None:
    asked = Prompt("t", (1,), answer=said)
    one = Group(asked, (Rollout("t/0", asked, (), text="hm"),))
    with pytest.raises(ValueError, match=r"prompt 't' has no next words"):
        BeforeText("", "", encode=lambda text: (9,))([one], Demos(), 0, 0.0)


def test_nothing_but_the_thought_may_be_learnt() -> None:
    """What asks for it, what closes it and what the text says next are only read; without words around it there is nothing before it."""
    thought, words = Segment((7,), Source.policy, logprobs=(-1.0,), version=0), {"<": (5,), ">": (6,), "next": (8, 9)}

    def segments(gate: BeforeText, *ids: int) -> tuple[Segment, ...]:
        asked = Prompt("t", ids, answer="next")
        (out,) = gate([Group(asked, (Rollout("t/0", asked, (thought,), text="hm"),))], Demos(), 0, 0.0)
        assert out.rollouts[0].prompt.ids == (1,)
        return tuple(out.rollouts[0].segments)

    said = Segment((8, 9), Source.tool, trainable=False)
    around = Segment((5,), Source.tool, trainable=False), Segment((6,), Source.prompt, trainable=False)
    assert segments(BeforeText("<", ">", encode=lambda text: words[text]), 1, 5) == (around[0], thought, around[1], said)
    assert segments(BeforeText("", "", encode=lambda text: words[text]), 1) == (thought, said)


def test_of_three_answers_the_last_is_learnt_and_the_last_critique() -> None:
    """Everything between them is read before the critique; the last answer stands right behind the prompt, as if it were the first turn."""
    asked = Prompt("q", (1, 2))
    said = [
        Segment((5 + turn,), Source.tool, turn) if turn % 2 else Segment((5 + turn,), Source.policy, turn, logprobs=(-1.0,), version=7)
        for turn in range(5)
    ]
    one = Rollout("q/0", asked, tuple(said), scores={"turn_1": Score(0.25), "turn_2": Score(1.0)})
    learnt, critique = WithoutCritique()([Group(asked, (one,))], Demos(), 0, 0.0)
    assert learnt.rollouts[0].segments == (Segment((9,), Source.demo),) and learnt.rollouts[0].advantage == 0.75
    read = [Segment((i,), Source.prompt, turn, trainable=False) for turn, i in enumerate((5, 6, 7))]
    assert critique.segments == (Segment((1, 2), Source.prompt, trainable=False), *read, Segment((8,), Source.tool, 3, trainable=(True,)))
    for turns in (2, 4):
        (out,) = WithoutCritique()([Group(asked, (replace(one, segments=tuple(said[:turns])),))], Demos(), 0, 0.0)
        assert out.dropped == "no_second_answer" and out.rollouts[0].segments == tuple(said[:turns]), "the last critique was never answered"


@pytest.mark.parametrize("gate", [FirstAccepted(), RightOnly()])
def test_an_answer_that_counts_1_counts_it_on_every_token(gate: Any) -> None:
    """What an estimator gave each of its tokens stands no more."""
    whole = group("a", 1.0, 0.0)
    whole = replace(whole, rollouts=tuple(replace(r, paid=(0.25, 0.75), placed=True) for r in whole.rollouts))
    assert [row.advantage for row in to_rows(gate([whole], Demos(), 0, 0.0))] == [1.0]


def test_what_nothing_joins_is_a_list_of_its_own() -> None:
    items = [group("a", 1.0, 0.0)]
    out = Inject(GroupAdvantage(), missing="keep")(items, Demos(), 0, 0.0)
    assert out == items and out is not items


def test_an_estimator_of_joint_groups_hands_back_all_of_them() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Inject(lambda groups: groups[1:])([group("a", 0.0), group("b", 0.0)], shelf_of("a", "b"), 0, 0.0)  # type: ignore[arg-type]


def test_what_the_estimator_of_joint_groups_remembers_is_kept_over_a_restart() -> None:
    gate = Inject(RunningBaseline())
    gate([group("a", 0.0, 1.0)], shelf_of("a"), 0, 0.0)
    state = gate.state_dict()
    again = Inject(RunningBaseline())
    again.load_state_dict(state)
    assert state and again.state_dict() == state != Inject(RunningBaseline()).state_dict()
    plain = Inject(GroupAdvantage(), reward=1.0)
    plain.load_state_dict({})
    assert plain.state_dict() == {}


def test_what_is_looked_ahead_for_is_a_stream_of_the_objective() -> None:
    from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference

    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), aggregate.TokenMean(), coef=LookAhead("mu"))
    with pytest.raises(ValueError, match="controller 'mu': there is no stream utility='rollouts'; the objective has samples"):
        Objective({"samples": stream})
