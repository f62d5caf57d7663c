"""Every shipped gate and reward keeps the rules for those of a user's own, and every rule catches who breaks it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from posttrain.advantage import GroupAdvantage
from posttrain.data.worlds.composition import Composition
from posttrain.mixture import buffer, context, gate, pairs, route, steps, tagged, turns
from posttrain.records import Demo, Group, Score
from posttrain.reward.math import MathVerify
from posttrain.reward.rules import Choice, Exact, Format, Numeric, SoftOverlong, WorldVerifier
from posttrain.testing.check import CheckFailed, check_term, role_of
from posttrain.testing.stage import COMPLETIONS, check_gate, check_reward, example_demos, example_step


def one_token(text: str) -> list[int]:
    return [1 if text == "a" else 9]


GATES: dict[str, Any] = {
    "PassThrough": gate.PassThrough(),
    "Add": gate.Add(2),
    "Unsolved": gate.Unsolved(),
    "Unsolved, kept": gate.Unsolved(rollouts="keep"),
    "Inject": gate.Inject(GroupAdvantage()),
    "InTurn": gate.InTurn({"buffer": buffer.Buffer(size=2), "add": gate.Add(1)}),
    "Buffer": buffer.Buffer(size=2),
    "BestWorst": pairs.BestWorst(),
    "GivenAgainstSampled": pairs.GivenAgainstSampled(missing="drop"),
    "FirstAccepted": route.FirstAccepted(),
    "RightOnly": route.RightOnly(),
    "Corrupt": context.Corrupt(token=9),
    "FirstBadStep": steps.FirstBadStep(),
    "OutcomeTag": tagged.OutcomeTag("a", "b", encode=one_token),
    "WithoutCritique": turns.WithoutCritique("answer", "answer"),
}
REWARDS: dict[str, Any] = {
    "Exact": Exact(),
    "Numeric": Numeric(),
    "Format": Format(),
    "SoftOverlong": SoftOverlong(100, 50),
    "MathVerify": MathVerify(),
}


@pytest.mark.parametrize("name", GATES)
def test_every_shipped_gate(name: str) -> None:
    check_gate(GATES[name])
    assert role_of(GATES[name]) == "gate"


def test_no_shipped_gate_is_forgotten() -> None:
    modules = (buffer, context, gate, pairs, route, steps, tagged, turns)
    shipped = {
        n
        for m in modules
        for n, c in vars(m).items()
        if isinstance(c, type) and c.__module__ == m.__name__ and "__call__" in vars(c) and hasattr(c, "uses_demos")
    }
    assert shipped - {"Gate"} == {type(each).__name__ for each in GATES.values()}


def test_the_example_reaches_the_branches() -> None:
    """What the gates above are tried on makes them act."""
    out = buffer.Buffer(size=1)(example_step(), example_demos(), 0, 0.0)
    assert out != example_step() and gate.Unsolved()(example_step(), example_demos(), 0, 0.0) != example_step()
    groups = [item for item in example_step() if isinstance(item, Group)]
    assert any(r.reward is None for g in groups for r in g.rollouts) and any(g.dropped for g in groups)


@pytest.mark.parametrize("name", REWARDS)
def test_every_shipped_reward(name: str) -> None:
    check_reward(REWARDS[name], completions=[c for c in COMPLETIONS if len(c) < 3000])
    assert role_of(REWARDS[name]) == "reward"


def test_rewards_with_answers_of_their_own() -> None:
    check_reward(Choice(), answer="B")
    world = Composition(split="train", num=4, seed=0)
    check_reward(WorldVerifier(world), answer=world.rows(num=1)[0]["answer"])


async def patient(completion: str) -> float:
    return float(len(completion) > 3)


def several(completions: Sequence[str], answers: Sequence[str]) -> list[dict[str, float]]:
    return [{"value": float(c == a), "length": len(c)} for c, a in zip(completions, answers, strict=True)]


def honest(completion: str, scale: float) -> Score:
    return Score(scale) if completion.strip() else Score(None, "error", "there is nothing to read")


@pytest.mark.parametrize("reward", [patient, several, partial(honest, scale=2.0)], ids=["async", "lists", "score"])
def test_every_form_of_a_reward(reward: Any) -> None:
    check_term(reward)


@dataclass(frozen=True)
class Broken:
    """A gate with one fault."""

    fault: str = ""
    uses_demos = False

    def __call__(self, items: Any, demos: Any, step: int, progress: float) -> Any:
        groups = [item for item in items if isinstance(item, Group)]
        if self.fault == "loses":
            return [item for item in items if item not in groups[:1]]
        if self.fault == "loses a text":
            return groups
        if self.fault == "changes":
            items.reverse()
        if self.fault == "draws":
            import random

            return random.sample(items, len(items))
        if self.fault == "needs demos":
            return [*items, *demos.draw(1)]
        if self.fault == "tuple":
            return tuple(items)
        if self.fault == "slash":
            return [replace(item, dropped="a/b") if isinstance(item, Group) else item for item in items]
        if self.fault == "empty" and groups[0]:
            return list(items)
        return list(items)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loses", "loses the group 'mixed'; leave it out with dataclasses.replace"),
        ("loses a text", "loses the given text 'given 1'"),
        ("changes", "changes the list or the records it is given"),
        ("draws", "gives another step the second time"),
        ("needs demos", "fails on step 0 of an example: ValueError: a gate asks for demonstrations"),
        ("tuple", "returns a tuple, not a list"),
        ("slash", "must be a reason in words, without a slash"),
        ("empty", "fails on an empty step: IndexError"),
    ],
)
def test_a_gate_with_a_fault(fault: str, message: str) -> None:
    check_gate(Broken())
    with pytest.raises(CheckFailed, match=message):
        check_term(Broken(fault))


class Forgetful:
    """Learns from every second step, and forgets where it is."""

    uses_demos = False

    def __init__(self, said: Any = None) -> None:
        self.seen, self.said = 0, said

    def __call__(self, items: Any, demos: Any, step: int, progress: float) -> Any:
        self.seen += 1
        return [replace(item, dropped="every second step") if isinstance(item, Group) and self.seen % 2 else item for item in items]

    def state_dict(self) -> Any:
        return self.said if self.said is not None else {}

    def load_state_dict(self, state: Any) -> None: ...


class Remembers(Forgetful):
    def state_dict(self) -> Any:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


class Half(Remembers):
    load_state_dict = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "load_state_dict":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_what_a_gate_remembers() -> None:
    check_gate(Remembers())
    for gate_, message in (
        (Forgetful(), "goes on differently after a restart"),
        (Forgetful({"a set": {1}}), "is not fit for JSON"),
        (Forgetful({1: "number"}), "goes on differently|does not bring back"),
        (Half(), "needs both state_dict and load_state_dict"),
    ):
        with pytest.raises(CheckFailed, match=message):
            check_gate(gate_)


def test_a_gate_must_say_whether_it_needs_demonstrations() -> None:
    class Silent(Broken):
        uses_demos = None  # type: ignore[assignment]

    with pytest.raises(CheckFailed, match="uses_demos must be True or False"):
        check_gate(Silent())


COUNT: list[int] = []


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completion, wish: 1.0, "asks for wish"),
        (lambda completion: float(completion), "raises ValueError: could not convert"),
        (lambda completion: None, "returned None"),
        (lambda completion: float("nan"), "returned nan"),
        (lambda completion: "good", "returned a str"),
        (lambda completion: {"value": 1.0, "part": None}, "has a part part: returned None"),
        (lambda completion: COUNT.append(1) or float(len(COUNT)), "gives another number the second time"),
        (lambda completions: [1.0], "returns 1 results for 13 answers"),
        (lambda completion: len(completion.encode("ascii")), "raises UnicodeEncodeError"),
    ],
)
def test_a_reward_with_a_fault(reward: Any, message: str) -> None:
    with pytest.raises(CheckFailed, match=message):
        check_term(reward)


def test_a_reward_that_cannot_travel() -> None:
    class Holds:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, completion: str) -> float:
            return 1.0

    with pytest.raises(CheckFailed, match="cannot be sent to a worker process"):
        check_reward(Holds())
    Holds.execution = "inline"  # type: ignore[attr-defined]
    check_reward(Holds())


def test_a_thing_that_is_nothing() -> None:
    with pytest.raises(CheckFailed, match="no term"):
        check_term(object())
    assert isinstance(example_step()[-1], Demo)
