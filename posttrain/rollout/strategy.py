"""How a step's groups are made: how many samples a prompt gets, which groups are kept, and what happens when too few are.

A strategy is a set of pure decisions over groups with rewards; ``collect`` is the one loop that carries them out.  Nothing is dropped
without a reason, and every reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from posttrain.records import Group, Prompt, Rollout

SAME = 1e-9
"""Rewards closer than this are equal: a verifier's rounding is not a signal."""


@dataclass(frozen=True)
class StepInfo:
    """``step`` of the run, ``round`` of drawing within it (from 0), ``missing`` groups until the target; ``progress`` of the run in [0, 1]."""

    step: int
    round: int
    missing: int
    progress: float = 0.0


@dataclass(frozen=True)
class Ask:
    """``n`` samples of one prompt, numbered from ``first``; ``greedy`` ones are sampled at temperature 0; all begin with ``prefix``, or go on from
    ``begin``.  ``max_tokens``: of these samples, null for the run's."""

    prompt: Prompt
    n: int
    first: int = 0
    greedy: bool = False
    prefix: tuple[int, ...] = ()
    begin: Rollout | None = None
    max_tokens: int | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What asks must have in common to be one call."""
        return self.n, self.first, self.greedy, bool(self.prefix), self.begin is not None, self.max_tokens


class RolloutStrategy(Protocol):
    """``num_prompts`` says how many to draw now (0 ends the step); ``skip`` refuses a drawn prompt, with a reason; ``plan`` turns
    prompts into samples; ``observe`` asks for more of a scored group; ``admit`` gives the reason a group is dropped, or None to keep it."""

    def num_prompts(self, info: StepInfo) -> int: ...
    def skip(self, prompt: Prompt, info: StepInfo) -> str | None: ...
    def plan(self, prompts: Sequence[Prompt], info: StepInfo) -> list[Ask]: ...
    def observe(self, group: Group, info: StepInfo) -> list[Ask]: ...
    def admit(self, group: Group, info: StepInfo) -> str | None: ...
    def short(self, kept: int, target: int, counts: Counter[str]) -> None: ...


def values(group: Group, metric: str = "reward") -> list[float]:
    """What the scored rollouts got: the combined reward, or the score called ``metric``.  A rollout whose verifier failed has no value."""
    found = [r.reward if metric == "reward" else (r.scores[metric].value if metric in r.scores else None) for r in group.rollouts]
    return [v for v in found if v is not None]


def is_dead(rewards: Sequence[float]) -> bool:
    """All equal up to ``SAME``: the group teaches nothing."""
    return not rewards or max(rewards) - min(rewards) <= SAME


@dataclass(frozen=True)
class Fixed:
    """``n`` samples per prompt, one round; a group is dropped only when no verifier could score any of it.  ``n`` null takes
    ``rollout.n``."""

    n: int | None = None

    def bound(self, n: int) -> Fixed:
        """A copy with the run's group size, when it was given none of its own."""
        return self if self.n is not None else replace(self, n=n)

    def num_prompts(self, info: StepInfo) -> int:
        return info.missing if info.round == 0 else 0

    def skip(self, prompt: Prompt, info: StepInfo) -> str | None:
        return None

    def plan(self, prompts: Sequence[Prompt], info: StepInfo) -> list[Ask]:
        return [Ask(prompt, _size(self.n)) for prompt in prompts]

    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        return []

    def admit(self, group: Group, info: StepInfo) -> str | None:
        return None if values(group) else "unscored"

    def short(self, kept: int, target: int, counts: Counter[str]) -> None:
        if kept == 0:
            raise RuntimeError(
                f"none of {target} groups could be used ({_why(counts)}); look at the reward's errors and at data.max_prompt_tokens"
            )


@dataclass
class Dynamic:
    """Dynamic sampling (DAPO, arXiv 2503.14476): drop groups that teach nothing and draw new prompts until the target is reached.

    ``band``      null keeps groups whose values differ; ``[low, high]`` keeps those with ``low < mean < high`` (both exclusive)
    ``metric``    the value looked at: ``reward``, or the name of a score
    ``overdraw``  prompts drawn per group still missing (the published recipe draws 3); surplus groups are dropped and counted
    ``max_rounds``  the cap; with ``on_cap=raise`` reaching it stops the run, with ``train_smaller`` the step uses what there is
    ``cooldown``  steps for which the prompt of a dead group is not drawn again; within a step no prompt is drawn twice

    With success probability p a group of n is dead with probability s = p^n + (1-p)^n, so 1/(1-s) groups are drawn for each that is kept.
    Needs ``n >= 2``.  The accuracy of kept groups is not the policy's accuracy.
    """

    n: int | None = None
    max_rounds: int = 10
    on_cap: Literal["raise", "train_smaller"] = "raise"
    band: tuple[float, float] | None = None
    metric: str = "reward"
    overdraw: float = 1.0
    cooldown: int = 0
    resting: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 2:
            raise ValueError(
                f"rollout.n={self.n}: a group of one has no variance, so dynamic sampling would drop everything; use n >= 2 or "
                "strategy Fixed"
            )
        if self.max_rounds < 1 or self.overdraw < 1 or self.cooldown < 0:
            raise ValueError(
                f"dynamic sampling needs max_rounds >= 1, overdraw >= 1, cooldown >= 0, not {self.max_rounds}, {self.overdraw}, "
                f"{self.cooldown}"
            )
        if self.on_cap not in ("raise", "train_smaller"):
            raise ValueError(f"on_cap={self.on_cap!r}: choose raise or train_smaller")
        if self.band is not None and not self.band[0] < self.band[1]:
            raise ValueError(f"band={tuple(self.band)}: the lower end must be below the upper")

    def bound(self, n: int) -> Dynamic:
        """A copy with the run's group size, when it was given none of its own."""
        return self if self.n is not None else replace(self, n=n)

    def num_prompts(self, info: StepInfo) -> int:
        return -int(-info.missing * self.overdraw // 1) if info.round < self.max_rounds else 0

    def skip(self, prompt: Prompt, info: StepInfo) -> str | None:
        return "cooldown" if info.step < self.resting.get(prompt.id, -1) else None

    def plan(self, prompts: Sequence[Prompt], info: StepInfo) -> list[Ask]:
        return [Ask(prompt, _size(self.n)) for prompt in prompts]

    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        return []

    def admit(self, group: Group, info: StepInfo) -> str | None:
        found = values(group, self.metric)
        reason = None
        if len(found) < 2:
            return "unscored" if not found else "one_left"
        if self.band is None:
            reason = "no_variance" if is_dead(found) else None
        elif not self.band[0] < (mean := sum(found) / len(found)) < self.band[1]:
            reason = "below_band" if mean <= self.band[0] else "above_band"
        if reason and self.cooldown:
            self.resting[group.id] = info.step + 1 + self.cooldown
        return reason

    def short(self, kept: int, target: int, counts: Counter[str]) -> None:
        if self.on_cap == "raise" or kept == 0:
            raise RuntimeError(
                f"dynamic sampling kept {kept} of {target} groups in {self.max_rounds} rounds ({_why(counts)}); the prompts are too "
                "easy or too hard for this model: change the data, widen the band, raise max_rounds or n, or set on_cap=train_smaller"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"resting": dict(self.resting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resting = dict(state["resting"])


class Around:
    """A strategy around another one, ``inner``: what a subclass does not say, the inner strategy does."""

    inner: Any

    def num_prompts(self, info: StepInfo) -> int:
        return self.inner.num_prompts(info)

    def skip(self, prompt: Prompt, info: StepInfo) -> str | None:
        return self.inner.skip(prompt, info)

    def plan(self, prompts: Sequence[Prompt], info: StepInfo) -> list[Ask]:
        return self.inner.plan(prompts, info)

    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        return self.inner.observe(group, info)

    def admit(self, group: Group, info: StepInfo) -> str | None:
        return self.inner.admit(group, info)

    def short(self, kept: int, target: int, counts: Counter[str]) -> None:
        self.inner.short(kept, target, counts)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state)


@dataclass(frozen=True)
class WithGreedy(Around):
    """Another strategy, and one greedy answer more for every prompt: a baseline that costs one sample (ReMax, arXiv 2310.10505).

    The greedy answer is scored like the others and joins its group last; ``inner`` (``Fixed`` by default) decides on the samples alone.
    """

    inner: Any = field(default_factory=Fixed)
    adds_greedy = True

    def bound(self, n: int) -> WithGreedy:
        return replace(self, inner=self.inner.bound(n))

    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        if any(r.sampling.temperature == 0 for r in group.rollouts):
            return []
        return self.inner.observe(group, info) or [Ask(group.prompt, 1, len(group.rollouts), greedy=True)]

    def admit(self, group: Group, info: StepInfo) -> str | None:
        return self.inner.admit(replace(group, rollouts=tuple(r for r in group.rollouts if r.sampling.temperature > 0)), info)


def _size(n: int | None) -> int:
    if n is None or n < 1:
        raise ValueError(f"the strategy has group size n={n}; call bound(n) with rollout.n, which must be at least 1")
    return n


def _why(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing was drawn"


async def collect(
    strategy: RolloutStrategy,
    sampler_next: Callable[[int], Sequence[Prompt]],
    sample: Callable[..., Awaitable[Sequence[Group]]],
    score: Callable[[Sequence[Group]], Awaitable[Sequence[Group]]],
    target_groups: int,
    step: int,
    progress: float = 0.0,
) -> tuple[list[Group], dict[str, float]]:
    """Draw, sample, score and admit until there are ``target_groups`` or the strategy ends the step.

    ``sample(prompts, n)`` returns one group per prompt, in order (``sample(prompts, n, first=k)`` continues a group at sample ``k``,
    ``greedy=True`` asks for temperature 0, ``prefixes`` has the tokens with which the answers to each prompt begin, ``begins`` the rollouts that they go on
    from, and ``max_tokens`` the length of these answers).
    Returns the kept groups in the order they were drawn, and the counts ``rollout/{generated,kept,dropped/REASON,...}``.  No prompt is
    used twice in a step: a repeated draw is counted as ``repeat`` and drawn again.  Raises what ``strategy.short`` raises.
    """
    kept: list[Group] = []
    dropped: Counter[str] = Counter()
    generated = rounds = 0
    used: set[str] = set()
    while missing := target_groups - len(kept):
        info = StepInfo(step, rounds, missing, progress)
        prompts = _draw(strategy, sampler_next, info, used, dropped)
        if not prompts:
            break
        rounds += 1
        groups = await _sample(sample, strategy.plan(prompts, info))
        scored = await _scored(score, groups, dropped)
        waiting = scored
        while asks := [ask for group in waiting for ask in strategy.observe(group, info)]:
            more = {g.id: g for g in await _scored(score, await _sample(sample, asks), dropped)}
            scored = [replace(g, rollouts=g.rollouts + more[g.id].rollouts) if g.id in more else g for g in scored]
            waiting = [group for group in scored if group.id in more]
        for group in scored:
            _check_ids(group.rollouts)
            generated += len(group.rollouts)
            reason = strategy.admit(group, info) or ("surplus" if len(kept) == target_groups else None)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(group)
    if len(kept) < target_groups:
        strategy.short(len(kept), target_groups, dropped)
    report = {
        "rollout/generated": float(generated),
        "rollout/kept": float(len(kept)),
        "rollout/rounds": float(rounds),
        "rollout/prompts": float(len(used)),
    }
    return kept, report | {f"rollout/dropped/{reason}": float(count) for reason, count in sorted(dropped.items())}


def _draw(
    strategy: RolloutStrategy, sampler_next: Callable[[int], Sequence[Prompt]], info: StepInfo, used: set[str], dropped: Counter[str]
) -> list[Prompt]:
    """Prompts not used in this step and not skipped by the strategy.  Gives up when several draws in a row bring nothing new."""
    wanted = strategy.num_prompts(info)
    fresh: list[Prompt] = []
    barren = 0
    while len(fresh) < wanted and barren < 3:
        before = len(fresh)
        for prompt in sampler_next(wanted - len(fresh)):
            reason = "repeat" if prompt.id in used else strategy.skip(prompt, info)
            if reason:
                dropped[reason] += 1
            else:
                used.add(prompt.id)
                fresh.append(prompt)
        barren = barren + 1 if len(fresh) == before else 0
    return fresh


async def _sample(sample: Callable[..., Awaitable[Sequence[Group]]], asks: Sequence[Ask]) -> list[Group]:
    """One call per group size; one group per prompt comes back, in the order of the asks, with the answers of all asks for it."""
    answered: dict[str, Group] = {}
    for shape in dict.fromkeys(ask.shape for ask in asks):
        alike = [ask for ask in asks if ask.shape == shape]
        n, first, greedy, prefixed, begun, max_tokens = shape
        extra: dict[str, Any] = ({"first": first} if first else {}) | ({"greedy": True} if greedy else {})
        extra |= {"prefixes": [ask.prefix for ask in alike]} if prefixed else {}
        extra |= ({"begins": [ask.begin for ask in alike]} if begun else {}) | ({"max_tokens": max_tokens} if max_tokens else {})
        for group in await sample([ask.prompt for ask in alike], n, **extra):
            before = answered.get(group.id)
            answered[group.id] = group if before is None else replace(before, rollouts=before.rollouts + group.rollouts)
    order = dict.fromkeys(ask.prompt.id for ask in asks)
    if lost := [name for name in order if name not in answered]:
        raise RuntimeError(f"no group came back for {len(lost)} of {len(order)} prompts, first {lost[0]!r}")
    return [answered[name] for name in order]


async def _scored(
    score: Callable[[Sequence[Group]], Awaitable[Sequence[Group]]], groups: Sequence[Group], dropped: Counter[str]
) -> list[Group]:
    """Score what was really sampled.  A prompt that no engine could sample never reaches a verifier, which would call it wrong."""
    sampled = [g for g in groups if g.rollouts and not all(r.finish == "env_error" for r in g.rollouts)]
    dropped["not_sampled"] += len(groups) - len(sampled)
    if not dropped["not_sampled"]:
        del dropped["not_sampled"]
    return list(await score(sampled)) if sampled else []


def _check_ids(rollouts: Sequence[Rollout]) -> None:
    repeated = [name for name, count in Counter(r.sample_id for r in rollouts).items() if count > 1]
    if repeated:
        raise ValueError(
            f"sample id {repeated[0]!r} occurs more than once in its group; a retried request must replace the first, not join it"
        )
