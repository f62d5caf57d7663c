"""Gates on groups with known rewards: what is learnt from, what stays for the report, and what survives a resume."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch

from posttrain.advantage import GroupAdvantage
from posttrain.build import GateStage
from posttrain.data.pack import Packer
from posttrain.data.rows import to_rows
from posttrain.learner.actor import StepReport
from posttrain.loss import load
from posttrain.mixture.buffer import Buffer
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Add, Inject, InTurn, PassThrough, Success, Unsolved, answer_of, as_rollout, changes
from posttrain.mixture.route import FirstAccepted, RightOnly
from posttrain.records import Demo, Group, Pair, Prompt, Row, Score, Segment, Source, TokenBatch
from posttrain.update import Learn
from tests.mixture.conftest import demo, group, prompt

CENTER, NORM1 = GroupAdvantage(scale="none"), GroupAdvantage(ddof=1, eps=0.0)
GROUPS = {"none": (0.0,) * 8, "one": (1.0,) + (0.0,) * 7, "all": (1.0,) * 8}


def groups() -> list[Group]:
    return [group(name, *rewards) for name, rewards in GROUPS.items()]


def learnt(out: list[Any]) -> set[str]:
    """Ids of what reaches the learner: groups that were not left out, and demonstrations."""
    return {f"group {i.id}" for i in out if isinstance(i, Group) and i.dropped is None} | {
        f"demo {i.id}" for i in out if isinstance(i, Demo)
    }


def call(gate: Any, items: list[Any], demos: Demos, step: int = 0) -> list[Any]:
    return gate(items, demos, step, 0.0)


# -- looking up --------------------------------------------------------------------------------------------------------------------
def test_demonstrations_are_found_by_the_id_or_the_tokens_of_their_prompt(shelf) -> None:
    demos = shelf(demo("a"), demo("b1", "b"), demo("b2", "b"))
    assert [d.id for d in demos.of(group("b", 1.0).prompt)] == ["b1", "b2"]
    assert [d.id for d in demos.of(Prompt("another data set's id", prompt("a").ids))] == ["a"]
    assert demos.of(group("c", 1.0).prompt) == ()
    assert [demos.one_of(group("b", 1.0).prompt, step).id for step in (0, 1, 2)] == ["b1", "b2", "b1"]
    assert [d.id for d in demos.draw(4)] == ["a", "b1", "b2", "a"]
    with pytest.raises(KeyError, match="resume with the data"):
        demos.named("z")
    with pytest.raises(ValueError, match=r"data\.demos\.path"):
        Demos().draw(1)


def test_the_answer_of_a_demonstration_is_cut_where_its_prompt_ends() -> None:
    one = demo("a")
    joined = Demo(
        "j", (Segment((*one.prompt.ids, 7), Source.demo, trainable=(False,) * 3 + (True,)), Segment((8,), Source.demo)), prompt=one.prompt
    )
    assert [(s.ids, s.trainable) for s in answer_of(joined)] == [((7,), (True,)), ((8,), True)]
    assert answer_of(one) == (Segment((7, 8, 9), Source.demo),)
    with pytest.raises(ValueError, match="has no prompt"):
        as_rollout(Demo("p", one.segments))


# -- per prompt --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("at_most", "rollouts", "expected"),
    [
        (-1, "drop", {"group none", "group one", "group all"}),
        (0, "drop", {"demo none", "group one", "group all"}),
        (1, "drop", {"demo none", "demo one", "group all"}),
        (8, "drop", {"demo none", "demo one", "demo all"}),
        (0, "keep", {"demo none", "group none", "group one", "group all"}),
        (2, "keep", {"demo none", "demo one", "group none", "group one", "group all"}),
    ],
)
def test_the_switch_follows_the_solved_count(shelf, at_most: int, rollouts: Any, expected: set[str]) -> None:
    out = call(Unsolved(at_most, rollouts), groups(), shelf(*map(demo, GROUPS)))
    assert learnt(out) == expected
    assert sum(isinstance(i, Group) for i in out) == 3, "a group that is left out stays in the report"


def test_success_is_a_predicate_and_a_failed_verifier_is_no_failure(shelf) -> None:
    items = [group("partial", 0.5, 0.5), group("failed", None, None), group("half", None, 1.0), group("unscored", None, 0.0)]
    out = call(Unsolved(), items, shelf(*(demo(i.id) for i in items)))
    assert learnt(out) == {"demo partial", "demo unscored", "group failed", "group half"}
    assert learnt(call(Unsolved(success=Success(threshold=0.5)), items[:1], shelf(demo("partial")))) == {"group partial"}
    form = items[0].rollouts[0].__class__("x", items[0].prompt, (), scores={"form": Score(1.0)}, reward=0.0)
    assert Success("form").of(form) is True and Success().of(form) is False and Success("other").of(form) is None


@pytest.mark.parametrize("make", [Unsolved, Buffer, lambda **k: Inject(CENTER, **k)])
def test_a_prompt_without_a_demonstration_goes_on_or_stops_the_run(shelf, make: Any) -> None:
    demos = shelf(demo("other"))
    assert learnt(call(make(), [group("none", 0.0, 0.0)], demos)) == {"group none"}
    with pytest.raises(ValueError, match="prompt 'none' has no demonstration"):
        call(make(missing="error"), [group("none", 0.0, 0.0)], demos)


def test_a_replayed_data_set_passes_every_gate(shelf) -> None:
    items = [demo("x"), Pair("p", demo("a"), demo("b"))]
    for gate in (PassThrough(), Unsolved(), Inject(CENTER), Buffer(), FirstAccepted(), Add(0)):
        assert call(gate, items, shelf(demo("x"))) == items


# -- into the group ----------------------------------------------------------------------------------------------------------------
def advantages(out: list[Any]) -> list[float | None]:
    return [r.advantage for r in out[0].rollouts]


def test_an_injected_demonstration_shares_the_baseline(shelf) -> None:
    out = call(Inject(CENTER), [group("q", *[0.0] * 7)], shelf(demo("q")))
    assert advantages(out) == [-0.125] * 7 + [0.875]
    rows = to_rows(out)
    assert [row.sources[-1] for row in rows] == [Source.policy] * 7 + [Source.demo]
    assert len({row.group for row in rows}) == 1 and rows[-1].ids == [*demo("q").prompt.ids, 7, 8, 9]
    assert rows[-1].trainable == [False] * 3 + [True] * 3 and "behaviour" not in rows[-1].logps
    assert advantages(call(Inject(CENTER), [group("q", *[1.0] * 7)], shelf(demo("q")))) == [0.0] * 8


def test_the_injected_advantage_of_the_published_example(shelf) -> None:
    """Seven wrong rollouts and the label: 2.4749 and -0.3536 with the sample deviation, 2.6458 with the population's."""
    items, demos = [group("q", *[0.0] * 7)], shelf(demo("q"))
    assert advantages(call(Inject(NORM1), items, demos)) == pytest.approx([-0.35355] * 7 + [2.474874], rel=1e-5)
    assert advantages(call(Inject(GroupAdvantage(eps=0.0)), items, demos))[-1] == pytest.approx(7**0.5)


def test_a_solved_group_gives_its_label_the_mean_and_advantage_zero(shelf) -> None:
    gate, demos = Inject(NORM1, solved="mean"), shelf(demo("q"))
    some = call(gate, [group("q", 1.0, 0.0, 0.0)], demos)[0].rollouts
    assert some[-1].advantage == 0.0 and some[-1].reward == pytest.approx(1 / 3)
    assert some[0].advantage > 0 > some[1].advantage
    assert advantages(call(gate, [group("q", 0.0, 0.0, 0.0)], demos))[-1] > 0
    assert advantages(call(gate, [group("q", 1.0, 1.0)], demos)) == [0.0] * 3


def test_a_wrong_demonstration_stays_out_or_is_pushed_down(shelf) -> None:
    items, demos = [group("q", 1.0, 0.0)], shelf(demo("q", verdict=0.0))
    assert len(call(Inject(CENTER, reward="verdict"), items, demos)[0].rollouts) == 2
    assert advantages(call(Inject(CENTER, reward="verdict", wrong="join"), items, demos))[-1] == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="no column 'grade'"):
        call(Inject(CENTER, reward="grade"), items, demos)


# -- waiting -----------------------------------------------------------------------------------------------------------------------
def test_the_buffer_fires_exactly_when_full_and_takes_the_newest(shelf) -> None:
    names = ["a", "b", "c", "d", "e"]
    demos, gate = shelf(*map(demo, names)), Buffer(size=2)
    steps = [["a"], ["b", "c"], [], ["d"], ["e"]]
    fired = [
        [i.id for i in call(gate, [group(n, 0.0, 0.0) for n in now] + [group("solved", 1.0, 0.0)], demos) if isinstance(i, Demo)]
        for now in steps
    ]
    assert fired == [[], ["b", "c"], [], ["a", "d"], []] and gate.waiting == ["e"]
    oldest = Buffer(size=2, order="oldest")
    assert [i.id for i in call(oldest, [group(n, 0.0) for n in names], demos) if isinstance(i, Demo)] == ["a", "b"]


def test_the_buffer_admits_whom_the_switch_would_switch(shelf) -> None:
    demos, gate = shelf(*map(demo, GROUPS)), Buffer(size=1)
    waits, switches = call(gate, groups(), demos), call(Unsolved(), groups(), demos)
    assert [i.id for i in waits if isinstance(i, Demo)] == [i.id for i in switches if isinstance(i, Demo)] == ["none"]
    assert learnt(waits) == {"demo none", "group none", "group one", "group all"}


def test_repeats_rechecks_and_resume(shelf) -> None:
    demos = shelf(demo("a"), demo("b"))
    twice, once = Buffer(size=9), Buffer(size=9, repeats=False, recheck=True, rollouts="drop")
    for gate in (twice, once):
        for name in ("a", "b", "a"):
            out = call(gate, [group(name, 0.0)], demos)
    assert (twice.waiting, once.waiting) == (["a", "b", "a"], ["b", "a"]) and out[0].dropped
    call(once, [group("b", 1.0)], demos)
    assert once.waiting == ["a"]
    stage, fresh = GateStage(once, demos), GateStage(Buffer(size=9), demos)
    demos.sampler = None
    fresh.load(json.loads(json.dumps(stage.state)))
    assert fresh.gate.waiting == ["a"]


# -- routes and chains -------------------------------------------------------------------------------------------------------------
def test_the_first_accepted_text_is_imitated(shelf) -> None:
    gate = FirstAccepted(prefer=("paraphrase", "gold"))
    demos = shelf(demo("g1", "q1", kind="gold"), demo("p1", "q1", kind="paraphrase"), demo("g2", "q2", kind="gold"))
    out = call(gate, [group("q1", 0.0, 1.0, 1.0), group("q1", 0.0), group("q2", None, 0.0), group("q3", 0.0)], demos)
    assert [[r.advantage for r in i.rollouts] if isinstance(i, Group) and not i.dropped else getattr(i, "dropped", i.id) for i in out] == [
        [None, 1.0, None],
        "replaced_by_demonstration",
        "p1",
        "replaced_by_demonstration",
        "g2",
        "nothing_accepted",
    ]
    assert [row.sample_id for row in to_rows(out)] == ["q1/1", "p1", "g2"]
    nothing = FirstAccepted(prefer=("gold",), success=Success(threshold=2.0))
    assert [i.id for i in call(nothing, [group("q1", 1.0)], demos) if isinstance(i, Demo)] == ["g1"]


def test_right_answers_share_a_group(shelf) -> None:
    """Own answers have the tokens 5 6, 5 7, 5 8; a given one that repeats an own one counts once."""
    twin = Demo("twin", (Segment(prompt("q").ids, Source.prompt), Segment((5, 7), Source.demo)), prompt=prompt("q"))
    demos, items = shelf(demo("q"), twin), [group("q", 1.0, 1.0, 0.0), group("none", 0.0)]
    out = call(RightOnly(), items, demos)
    assert [r.advantage for r in out[0].rollouts] == [1.0, None, None, 1.0, 1.0] and out[1].dropped == "nothing_accepted"
    rows = to_rows(out)
    assert [row.sample_id for row in rows] == ["q/0", "q/given", "twin/given"] and len({row.group for row in rows}) == 1
    assert [r.advantage for r in call(RightOnly(repeats=True), items, demos)[0].rollouts] == [1.0, 1.0, None, 1.0, 1.0]


def test_gates_in_turn_keep_their_states(shelf) -> None:
    demos = shelf(demo("a"), demo("b"))
    gate = InTurn({"buffer": Buffer(size=5), "off": None, "add": Add(1)})
    assert gate.uses_demos and gate.separate_step and not InTurn({"none": PassThrough()}).uses_demos
    assert learnt(call(gate, [group("b", 0.0)], demos)) == {"group b", "demo a"}
    again = InTurn({"buffer": Buffer(size=5), "add": Add(1)})
    again.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    assert again.gates["buffer"].waiting == ["b"]


def test_the_stage_reports_what_the_gate_did(shelf) -> None:
    demos = shelf(*map(demo, GROUPS))
    stage = GateStage(InTurn({"switch": Unsolved(), "inject": Inject(CENTER)}), demos, steps=10)
    stage(groups(), step=0)
    assert stage.metrics == {"mixture/demonstrations": 1.0, "mixture/groups_left_out": 1.0, "mixture/pairs": 0.0, "mixture/injected": 2.0}
    assert changes(groups(), groups())["mixture/demonstrations"] == 0.0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Unsolved(rollouts="maybe"), "rollouts='maybe' does not exist"),
        (lambda: Unsolved(at_most=-2), "-1 switches the gate off"),
        (lambda: Inject(None), r"\$\{advantage\}"),
        (lambda: Inject(CENTER, solved="smooth"), "choose from keep, mean"),
        (lambda: Buffer(size=0), "at least 1"),
        (lambda: Buffer(order="random"), "choose from newest, oldest"),
        (lambda: Add(-1), "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


# -- the step of its own -----------------------------------------------------------------------------------------------------------
class Recorder:
    """A learner that writes down which sources each optimizer step held."""

    def __init__(self) -> None:
        self.steps: list[tuple[set[str], bool]] = []

    async def step(self, micro: list[TokenBatch], weights: Any) -> StepReport:
        sources = {Source(int(s)).name for b in micro for s in b.source[b.trainable]}
        self.steps.append((sources, any(b.fresh for b in micro)))
        return StepReport({}, {})

    async def score(self, micro: list[TokenBatch], policy: str) -> list[dict[str, torch.Tensor]]:
        return [{"logp": torch.zeros(b.num_tokens)} for b in micro]


@pytest.mark.parametrize(
    ("separate", "updates", "expected"),
    [
        (False, 1, [({"policy", "demo"}, True)]),
        (True, 1, [({"policy"}, True), ({"demo"}, False)]),
        (True, 2, [({"policy"}, True), ({"policy"}, False), ({"demo"}, False)]),
    ],
)
def test_demonstrations_can_have_an_optimizer_step_of_their_own(separate: bool, updates: int, expected: list[Any]) -> None:
    learner = Recorder()
    learn = Learn(load("sft_plus_rl"), Packer(64, updates_per_batch=updates), learner, separate_demos=separate)
    items = [group("a", 1.0, 0.0), group("b", 1.0, 0.0), demo("x"), demo("y")]
    asyncio.run(learn.learn(0, items, 0.5))
    assert learner.steps == expected
    learner.steps.clear()
    asyncio.run(learn.learn(0, [demo("x")], 0.5))
    assert learner.steps == [({"demo"}, True)], "a step without rollouts"


def test_a_step_without_a_stream_asks_for_no_column_of_it() -> None:
    objective = load("sft_plus_rl", ["streams.rollouts.reference.to=behaviour"])
    batch = TokenBatch.from_sequences([Row(ids=[1, 2, 3])]).with_logps(current=torch.tensor([-1.0, -2.0]))
    assert objective.weights(batch).tolist() == pytest.approx([0.05, 0.05])
