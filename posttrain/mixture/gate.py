"""Which data a step learns from: a gate takes the scored groups and the demonstrations and returns what is packed.

A gate is called as ``gate(items, demos, step, progress)``.  It may leave groups out (``Group.dropped`` keeps their rewards in the report),
let demonstrations in, or put one into a group.  Items that are no groups pass.  ``reward`` decides what is *solved*, by a predicate, so a
partial credit is no success; a rollout whose verifier failed is neither solved nor failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from posttrain.mixture.demos import Demos
from posttrain.mixture.pairs import PAIRED
from posttrain.records import Demo, Group, Pair, Rollout, Segment, Source

REPLACED, WAITS = "replaced_by_demonstration", "waits_for_demonstration"
"""Why a gate left a group out, for the counts; the rewards of such a group stay in the report."""


class Gate(Protocol):
    """``uses_demos``: whether demonstrations must be there.  Optional: ``separate_step`` (demonstrations get an optimizer step of their own,
    after the others), ``makes_pairs`` (it turns groups into preference pairs), ``with_encode(encode)`` (a copy that can tokenise text), and
    ``state_dict()`` / ``load_state_dict(state)``, plain values fit for JSON, for a gate that remembers."""

    uses_demos: bool

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]: ...


@dataclass(frozen=True)
class PassThrough:
    """The items as they are; demonstrations are not used."""

    uses_demos = False

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return list(items)


@dataclass(frozen=True)
class Add:
    """Every step also learns from ``demos_per_step`` demonstrations: SFT and RL in one batch, each stream with its own terms."""

    demos_per_step: int = 8

    def __post_init__(self) -> None:
        if self.demos_per_step < 0:
            raise ValueError(f"mixture.gate.demos_per_step={self.demos_per_step} must not be negative")

    @property
    def uses_demos(self) -> bool:
        return self.demos_per_step > 0

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return [*items, *demos.draw(self.demos_per_step)]


@dataclass(frozen=True)
class Success:
    """A rollout is solved when its combined reward, or the score called ``metric``, is at least ``threshold``."""

    metric: str = "reward"
    threshold: float = 1.0

    def of(self, rollout: Rollout) -> bool | None:
        """Whether a rollout is solved; None when nobody could say."""
        score = rollout.scores.get(self.metric)
        value = rollout.reward if self.metric == "reward" else score.value if score else None
        return None if value is None else value >= self.threshold

    def count(self, group: Group) -> tuple[int, int]:
        """(solved, scored) rollouts of a group."""
        verdicts = [v for r in group.rollouts if (v := self.of(r)) is not None]
        return sum(verdicts), len(verdicts)


@dataclass(frozen=True)
class Unsolved:
    """A prompt solved at most ``at_most`` times is learnt from its demonstration.

    Equation: with ``c`` solved rollouts, ``c <= at_most``: the demonstration, and the rollouts too if they are kept; else the rollouts.
    Source: the switch of HPT, arXiv 2509.04419 (``rollouts="drop"``); the added expert term of AHPO, arXiv 2510.08540 (``"keep"``).

    ``at_most``: -1 is never (pure reinforcement learning), the group size always.  ``rollouts``: what happens to those of such a prompt.
    ``missing``: such a prompt without a demonstration keeps its rollouts (``keep``) or stops the run (``error``).  ``success``: what
    counts as solved.

    Wrong when: the reward is dense, and no ``success.threshold`` separates right from wrong.
    """

    at_most: int = 0
    rollouts: Literal["drop", "keep"] = "drop"
    missing: Literal["keep", "error"] = "keep"
    success: Success = field(default_factory=Success)
    uses_demos = True

    def __post_init__(self) -> None:
        _choose("rollouts", self.rollouts, ("drop", "keep"))
        _choose("missing", self.missing, ("keep", "error"))
        if self.at_most < -1:
            raise ValueError(f"mixture.gate.at_most={self.at_most} is a number of solved rollouts; -1 switches the gate off")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        kept, let_in = [], []
        for item in items:
            demo = self._demo(item, demos, step) if isinstance(item, Group) else None
            if demo is not None:
                let_in.append(demo)
                item = replace(item, dropped=REPLACED) if self.rollouts == "drop" else item
            kept.append(item)
        return [*kept, *let_in]

    def _demo(self, group: Group, demos: Demos, step: int) -> Demo | None:
        solved, scored = self.success.count(group)
        if not scored or solved > self.at_most:
            return None
        demo = demos.one_of(group.prompt, step)
        if demo is None and self.missing == "error":
            raise ValueError(_without_demo(group))
        return demo


@dataclass(frozen=True)
class Inject:
    """A demonstration joins the group of its prompt, and the advantages are estimated over the joint group.

    Its tokens keep the source ``demo``, so they have a stream of their own; its advantage is in the column, as for a rollout.
    Source: LUFFY, arXiv 2504.14945; ViSurf, arXiv 2510.10606 (``solved="mean"``).

    ``advantage``: the estimator, usually ``${advantage}``.  ``reward``: what the demonstration earns, or the name of a column of its row
    that says it.  ``solved``: once a rollout is right the demonstration keeps its reward (``keep``) or is given the mean of the rollouts and
    advantage 0 (``mean``).  ``wrong``: a demonstration whose own reward is no success joins all the same and is pushed down (``join``), or
    stays out (``leave``).  ``missing``, ``success``: as in :class:`Unsolved`.

    Wrong when: the estimator divides by the deviation and the demonstrations are always right: a solved group of one mistake is stretched.
    """

    advantage: Any
    reward: float | str = 1.0
    solved: Literal["keep", "mean"] = "keep"
    wrong: Literal["join", "leave"] = "leave"
    missing: Literal["keep", "error"] = "keep"
    success: Success = field(default_factory=Success)
    uses_demos = True

    def __post_init__(self) -> None:
        _choose("solved", self.solved, ("keep", "mean"))
        _choose("wrong", self.wrong, ("join", "leave"))
        _choose("missing", self.missing, ("keep", "error"))
        if not callable(self.advantage):
            raise ValueError("mixture.gate.advantage is not set: give the estimator of the joint group, e.g. ${advantage}")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        """All groups of the step are estimated in one call, for an estimator may compare them; those that nothing joined stay as they were."""
        given = {i: demo for i, item in enumerate(items) if isinstance(item, Group) and (demo := self._given(item, demos, step)) is not None}
        if not given:
            return list(items)
        flat = {i for i in given if self._is_flat(items[i])}
        places = [i for i, item in enumerate(items) if isinstance(item, Group)]
        joint = [replace(items[i], rollouts=(*items[i].rollouts, given[i]), dropped=None) if i in given else items[i] for i in places]
        found = dict(zip(places, self.advantage(joint), strict=True))
        return [(_without_push(found[i]) if i in flat else found[i]) if i in given else item for i, item in enumerate(items)]

    def _given(self, group: Group, demos: Demos, step: int) -> Rollout | None:
        """What joins a group."""
        if group.dropped in (REPLACED, WAITS):
            return None
        demo = demos.one_of(group.prompt, step)
        if demo is None:
            if self.missing == "error":
                raise ValueError(_without_demo(group))
            return None
        given = as_rollout(demo, self._reward(demo))
        if self.wrong == "leave" and not self.success.of(given):
            return None
        if self._is_flat(group):
            usable = [r.reward for r in group.rollouts if r.reward is not None]
            given = replace(given, reward=sum(usable) / len(usable))
        return given

    def _is_flat(self, group: Group) -> bool:
        return self.solved == "mean" and self.success.count(group)[0] > 0

    def state_dict(self) -> dict[str, Any]:
        """What the estimator remembers: it is another one than that of the run."""
        return self.advantage.state_dict() if hasattr(self.advantage, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if hasattr(self.advantage, "load_state_dict"):
            self.advantage.load_state_dict(state)

    def _reward(self, demo: Demo) -> float:
        if not isinstance(self.reward, str):
            return self.reward
        meta = demo.prompt.meta if demo.prompt else {}
        if self.reward not in meta:
            raise ValueError(f"demonstration {demo.id!r} has no column {self.reward!r} to take its reward from (mixture.gate.reward)")
        return float(meta[self.reward])


@dataclass(frozen=True)
class InTurn:
    """Gates one after the other, in the order of the map."""

    gates: Mapping[str, Any]

    @property
    def _given(self) -> dict[str, Any]:
        return {name: gate for name, gate in self.gates.items() if gate is not None}

    @property
    def uses_demos(self) -> bool:
        return any(gate.uses_demos for gate in self._given.values())

    @property
    def makes_pairs(self) -> bool:
        return any(getattr(gate, "makes_pairs", False) for gate in self._given.values())

    @property
    def needs_continuations(self) -> bool:
        return any(getattr(gate, "needs_continuations", False) for gate in self._given.values())

    @property
    def makes_demos(self) -> bool:
        return any(getattr(gate, "makes_demos", False) for gate in self._given.values())

    def with_encode(self, encode: Callable[[str], Sequence[int]]) -> InTurn:
        """A copy whose gates have it that ask for it."""
        return InTurn({name: gate.with_encode(encode) if hasattr(gate, "with_encode") else gate for name, gate in self._given.items()})

    @property
    def separate_step(self) -> bool:
        return any(getattr(gate, "separate_step", False) for gate in self._given.values())

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out = list(items)
        for gate in self._given.values():
            out = gate(out, demos, step, progress)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {name: gate.state_dict() for name, gate in self._given.items() if hasattr(gate, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, own in state.items():
            self._given[name].load_state_dict(own)


def as_rollout(demo: Demo, reward: float | None = None) -> Rollout:
    """A demonstration in the form of a rollout: what stands after its prompt, with no log-probabilities.  Raises ``ValueError`` without a
    prompt."""
    if demo.prompt is None:
        raise ValueError(
            f"demonstration {demo.id!r} has no prompt, so it cannot join a group; give rows with prompt and completion, or messages"
        )
    return Rollout(f"{demo.id}/given", demo.prompt, answer_of(demo), finish="given", reward=reward)


def answer_of(demo: Demo) -> tuple[Segment, ...]:
    """The segments of a demonstration after its prompt; a segment that begins in the prompt is cut."""
    skip, out = len(demo.prompt.ids) if demo.prompt else 0, []
    for segment in demo.segments:
        n = len(segment.ids)
        if skip < n:
            flags = segment.trainable
            inputs = None if segment.inputs is None else segment.inputs[skip:]
            stored = None if segment.stored is None else segment.stored[skip:]
            cut = replace(segment, ids=segment.ids[skip:], inputs=inputs, stored=stored, trainable=flags[skip:] if isinstance(flags, tuple) else flags)
            out.append(cut)
        skip = max(skip - n, 0)
    return tuple(out)


def is_given(rollout: Rollout) -> bool:
    """Whether a rollout was put into its group, and not sampled."""
    return not any(s.source == Source.policy for s in rollout.segments) and rollout.finish == "given"


def changes(items: Sequence[Any], out: Sequence[Any]) -> dict[str, float]:
    """What a gate did to a step, as metrics: demonstrations let in, groups it left out, demonstrations inside groups, pairs made of groups."""
    before = {id(item) for item in items}
    groups = [item for item in out if isinstance(item, Group)]
    were_out = sum(item.dropped is not None for item in items if isinstance(item, Group))
    paired = sum(group.dropped == PAIRED for group in groups)
    found = {
        "mixture/demonstrations": sum(isinstance(item, Demo) and id(item) not in before for item in out),
        "mixture/groups_left_out": sum(group.dropped is not None for group in groups) - were_out - paired,
        "mixture/pairs": sum(isinstance(item, Pair) and id(item) not in before for item in out),
        "mixture/injected": sum(is_given(r) for group in groups for r in group.rollouts),
    }
    return {name: float(count) for name, count in found.items()}


def _without_push(joint: Group) -> Group:
    """The group, whose last member, the given one, has advantage 0."""
    *own, given = joint.rollouts
    return replace(joint, rollouts=(*own, replace(given, advantage=0.0)))


def _without_demo(group: Group) -> str:
    return f"prompt {group.id!r} has no demonstration; give one in data.demos, or set mixture.gate.missing=keep to go on with its rollouts"


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"mixture.gate.{name}={value!r} does not exist; choose from {', '.join(known)}")
