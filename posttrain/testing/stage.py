"""Checks for a gate or a reward of your own, as for a term: functions that raise :class:`CheckFailed` with the reason.

``posttrain.testing.check.check_term`` calls them for what is no term of the loss.  CPU, no model, no engine.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Group, Prompt, Rollout, Score, Segment, Source
from posttrain.reward.base import Signature, read
from posttrain.reward.worker import dump
from posttrain.testing.check import CheckFailed, _pickled, _require

COMPLETIONS = (
    "",
    " ",
    "4",
    "the answer is 4",
    "\n\n",
    "((((((",
    "9" * 2000,
    "-1e309",
    "\x00\ufffd\u202e",
    "\U0001f600 vier",
    "<answer></answer>",
    "4 " * 5000,
)
"""What models say, once in a million samples."""


class InOrder:
    """Hands out 0, 1, 2, ... and begins anew."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, 0

    def next(self, count: int) -> list[int]:
        self.given += count
        return [i % self.size for i in range(self.given - count, self.given)]


def example_step() -> list[Any]:
    """What a gate is given: groups that are solved by some, all and none, one whose verifier failed once and one whose verifier always did, one that is left
    out already, and two given texts."""
    rewards: dict[str, tuple[float | None, ...]] = {
        "mixed": (1.0, 0.0, 0.25, 0.0),
        "solved": (1.0, 1.0, 1.0, 1.0),
        "unsolved": (0.0, 0.0, 0.0, 0.0),
        "in doubt": (None, 1.0, 0.0, 0.5),
        "unknown": (None, None, None, None),
        "left out": (0.0, 0.0, 0.0, 0.0),
    }
    groups = [_group(name, values, "all rewards equal" if name == "left out" else None) for name, values in rewards.items()]
    return [*groups, _demo("given 1", _prompt("given 1")), _demo("given 2", _prompt("given 2"))]


def example_demos() -> Demos:
    """Demonstrations of three of the prompts of :func:`example_step`, and a fourth one."""
    found = [_demo(f"demonstration of {name}", _prompt(name)) for name in ("mixed", "solved", "unsolved", "another")]
    return Demos(found, InOrder(len(found)))


def _prompt(name: str) -> Prompt:
    return Prompt(name, ids=(1, 2, *map(ord, name)), text=name, answer="4", env="example")


def _group(name: str, rewards: Sequence[float | None], dropped: str | None) -> Group:
    usable = [r for r in rewards if r is not None]
    rollouts = tuple(
        Rollout(
            f"{name}/{i}",
            _prompt(name),
            (Segment((5, 6 + i), Source.policy, logprobs=(-1.0, -2.0), version=0),),
            text=f"answer {i}",
            scores={"answer": Score(r) if r is not None else Score(None, "error", "an example")},
            reward=r,
            advantage=None if r is None else r - sum(usable) / len(usable),
        )
        for i, r in enumerate(rewards)
    )
    return Group(_prompt(name), rollouts, dropped=dropped)


def _demo(name: str, of: Prompt) -> Demo:
    rewards = {"reward": 1.0, "score": 0.75}
    return Demo(name, (Segment(of.ids, Source.prompt, trainable=False), Segment((7, 8, 9), Source.demo)), prompt=of, rewards=rewards)


def check_gate(gate: Any) -> None:
    """Everything a gate must satisfy.  Raises :class:`CheckFailed` with the first rule it breaks.

    1. it says whether it ``uses_demos``, and without them it must not need any;  2. it takes a step, an empty one too, and returns a list;  3. what it
    is given stays as it is;  4. no group and no given text vanishes: a group is left out by a ``dropped`` reason, so that its rewards stay in the
    report;  5. the same after pickling;  6. what it remembers is fit for JSON and a gate that was given it goes on alike.
    """
    name = type(gate).__name__
    _require(isinstance(getattr(gate, "uses_demos", None), bool), f"{name}.uses_demos must be True or False")
    first, second = _pickled(gate), _pickled(gate)
    demos = [example_demos() if gate.uses_demos else Demos() for _ in range(3)]
    for step in range(3):
        given = example_step()
        out = _let_through(first, given, demos[0], step)
        _require(isinstance(out, list), f"{name} returns a {type(out).__name__}, not a list")
        _require(given == example_step(), f"{name} changes the list or the records it is given; make new ones with dataclasses.replace")
        _nothing_vanished(name, given, out)
        again = _let_through(second, example_step(), demos[1], step)
        _require(again == out, f"{name} gives another step the second time; draw from the seed and the step, not from a global generator")
    _require(isinstance(_let_through(_pickled(gate), [], demos[2], 0), list), f"{name} does not return a list for an empty step")
    if hasattr(gate, "state_dict") or hasattr(gate, "load_state_dict"):
        _check_state(gate, first, demos[0])


def _let_through(gate: Any, items: list[Any], demos: Demos, step: int) -> Any:
    try:
        return gate(items, demos, step, step / 3)
    except Exception as error:
        what = "an empty step" if not items else f"step {step} of an example"
        raise CheckFailed(f"{type(gate).__name__} fails on {what}: {type(error).__name__}: {error}") from error


def _nothing_vanished(name: str, given: Sequence[Any], out: Sequence[Any]) -> None:
    for kind, what in ((Group, "group"), (Demo, "given text")):
        gone = {x.id for x in given if isinstance(x, kind)} - {x.id for x in out if isinstance(x, kind)}
        hint = "; leave it out with dataclasses.replace(group, dropped='why')" if kind is Group else ""
        _require(not gone, f"{name} loses the {what} {sorted(gone)[0] if gone else ''!r}{hint}")
    for group in (x for x in out if isinstance(x, Group)):
        fits = group.dropped is None or (isinstance(group.dropped, str) and group.dropped and "/" not in group.dropped)
        _require(
            bool(fits), f"{name}: dropped={group.dropped!r} must be a reason in words, without a slash: it becomes the name of a metric"
        )


def _check_state(gate: Any, used: Any, demos: Demos) -> None:
    name = type(gate).__name__
    _require(
        hasattr(gate, "state_dict") and hasattr(gate, "load_state_dict"), f"{name} needs both state_dict and load_state_dict, or neither"
    )
    state = used.state_dict()
    try:
        travelled = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"{name}.state_dict() is not fit for JSON: {error}") from error
    fresh = _pickled(gate)
    fresh.load_state_dict(travelled)
    _require(fresh.state_dict() == state, f"{name}.load_state_dict does not bring back what state_dict said")
    shelf = [example_demos() if gate.uses_demos else Demos() for _ in range(2)]
    outs = [_let_through(each, example_step(), own, 3) for each, own in zip((used, fresh), shelf, strict=True)]
    _require(outs[0] == outs[1], f"{name} goes on differently after a restart: something it remembers is not in state_dict")


def check_reward(reward: Any, answer: Any = "4", completions: Sequence[str] = COMPLETIONS) -> None:
    """Everything a reward must satisfy.  Raises :class:`CheckFailed` with the first rule it breaks.

    1. it asks for nothing nobody can supply;  2. it can be sent to a worker process, where it runs in one;  3. whatever the model said, it returns a
    number, or a ``Score`` that says why there is none: an exception costs the run's error budget;  4. the same again.

    ``answer``: a reference answer of the kind your data has.  ``completions``: texts to try beside it.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        signature = Signature.of(name, reward)
    except ValueError as error:
        raise CheckFailed(str(error)) from error
    if signature.execution == "process":
        try:
            dump({name: reward})
        except ValueError as error:
            raise CheckFailed(str(error)) from error
    rollouts = [_said(text, answer) for text in (str(answer), *completions)]
    calls = [rollouts, rollouts[:1]] if signature.batched else [[rollout] for rollout in rollouts]
    for call in calls:
        values = _scores(name, reward, signature, call)
        _require(values == _scores(name, reward, signature, call), f"reward {name!r} gives another number the second time")


def _said(text: str, answer: Any) -> Rollout:
    prompt = Prompt("example", ids=(1, 2), text="2 + 2 =", answer=answer, env="example", level=1)
    ids = tuple(range(5, 5 + min(len(text), 50)))
    return Rollout("example/0", prompt, (Segment(ids, Source.policy, logprobs=(-1.0,) * len(ids), version=0),), text=text)


def _scores(name: str, reward: Any, signature: Signature, rollouts: Sequence[Rollout]) -> list[Any]:
    where = f"reward {name!r} on {rollouts[0].text[:40]!r}"
    try:
        result = reward(**signature.arguments(rollouts, 0.5))
        result = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        results = list(result) if signature.batched else [result]
    except Exception as error:
        raise CheckFailed(f"{where} raises {type(error).__name__}: {error}; return 0, or a Score with status='error'") from error
    _require(len(results) == len(rollouts), f"{where} returns {len(results)} results for {len(rollouts)} answers")
    for each in results:
        score, parts = read(each)
        meant = isinstance(each, Score) or (isinstance(each, Mapping) and each.get("status") in ("error", "timeout"))
        _require(score.value is not None or meant, f"{where} {score.detail}")
        unread = next((f"{k}: {s.detail}" for k, s in parts.items() if s.value is None and not isinstance(each[k], Score)), None)
        _require(unread is None, f"{where} has a part {unread}")
    return [read(each) for each in results]


async def _awaited(result: Any) -> Any:
    return await result
