"""Strategies are pure decisions over groups with rewards; ``collect`` is run here with a make-believe sampler, no engine."""

import itertools
import random
from dataclasses import replace

import pytest

from posttrain.advantage import GreedyBaseline
from posttrain.records import Group, Prompt, Rollout, Sampling, Score
from posttrain.rollout.strategy import Ask, Dynamic, Fixed, StepInfo, WithGreedy, collect, is_dead, values

INFO = StepInfo(0, 0, 4)


def prompts(*names):
    return [Prompt(name, (1, 2)) for name in names]


def group(name, rewards):
    return Group(Prompt(name, (1,)), tuple(Rollout(f"0/{name}/{i}", Prompt(name, (1,)), (), reward=r) for i, r in enumerate(rewards)))


class World:
    """Prompts in order, over and over; ``rewards[name]`` is what its samples get."""

    def __init__(self, rewards, finish="stop"):
        self.rewards, self.finish = rewards, finish
        self.order = itertools.cycle(prompts(*rewards))
        self.sampled, self.scored = [], []

    def draw(self, count):
        return [next(self.order) for _ in range(count)]

    async def sample(self, asked, n, first=0, greedy=False):
        self.sampled += [(p.id, n, first, greedy) if greedy else (p.id, n, first) for p in asked]
        sampling = Sampling(temperature=0.0) if greedy else Sampling()
        return [
            Group(
                p,
                tuple(
                    Rollout(f"0/{p.id}/{i}", p, (), finish=self.finish if p.id == "bad" else "stop", sampling=sampling)
                    for i in range(first, first + n)
                ),
            )
            for p in asked
        ]

    async def score(self, groups):
        self.scored += [g.id for g in groups]
        return [
            replace(g, rollouts=tuple(replace(r, reward=self.rewards[g.id][int(r.sample_id.split("/")[-1])]) for r in g.rollouts))
            for g in groups
        ]

    async def collect(self, strategy, target, step=0):
        return await collect(strategy, self.draw, self.sample, self.score, target, step)


async def test_fixed_keeps_every_group_once():
    world = World({"a": [1, 1], "b": [0, 1], "c": [0, 0]})
    groups, report = await world.collect(Fixed(2), 3)
    assert [g.id for g in groups] == ["a", "b", "c"] and world.sampled == [("a", 2, 0), ("b", 2, 0), ("c", 2, 0)]
    assert report == {"rollout/generated": 6, "rollout/kept": 3, "rollout/rounds": 1, "rollout/prompts": 3}


async def test_fixed_of_one_is_legal():
    groups, _ = await World({"a": [1]}).collect(Fixed(1), 1)
    assert len(groups[0].rollouts) == 1


async def test_group_size_comes_from_the_run_unless_given():
    assert Fixed().bound(8).n == 8 and Fixed(2).bound(8).n == 2 and Dynamic().bound(16).n == 16
    with pytest.raises(ValueError, match="group size n=None"):
        await World({"a": [1]}).collect(Fixed(), 1)


async def test_dynamic_refills_and_counts_reasons():
    world = World({"a": [1, 1], "b": [0, 1], "c": [0, 0], "d": [1, 0], "e": [None, 1], "f": [None, None]})
    groups, report = await world.collect(Dynamic(2, overdraw=3.0), 2)
    assert [g.id for g in groups] == ["b", "d"]
    assert (
        report["rollout/dropped/no_variance"] == 2 and report["rollout/dropped/one_left"] == 1 and report["rollout/dropped/unscored"] == 1
    )
    assert report["rollout/generated"] == 12 and report["rollout/kept"] == 2 and report["rollout/rounds"] == 1


async def test_dynamic_draws_again_until_full():
    world = World({"a": [1, 1], "b": [0, 1], "c": [0, 0], "d": [1, 0]})
    groups, report = await world.collect(Dynamic(2), 2)
    assert [g.id for g in groups] == ["b", "d"] and report["rollout/rounds"] == 3 and report["rollout/prompts"] == 4


async def test_surplus_groups_are_counted_not_hidden():
    world = World({name: [0, 1] for name in "abcdef"})
    groups, report = await world.collect(Dynamic(2, overdraw=3.0), 2)
    assert [g.id for g in groups] == ["a", "b"] and report["rollout/dropped/surplus"] == 4


async def test_all_prompts_dead_stops_at_the_cap():
    world = World({f"p{i}": [1, 1] for i in range(100)})
    with pytest.raises(RuntimeError, match=r"kept 0 of 4 groups in 3 rounds \(12 no_variance\).*on_cap"):
        await world.collect(Dynamic(2, max_rounds=3), 4)
    with pytest.raises(RuntimeError, match="kept 0 of 4"):
        await world.collect(Dynamic(2, max_rounds=3, on_cap="train_smaller"), 4)


async def test_cap_can_train_smaller():
    world = World({"a": [0, 1]} | {f"p{i}": [1, 1] for i in range(100)})
    groups, report = await world.collect(Dynamic(2, max_rounds=2, on_cap="train_smaller"), 3)
    assert [g.id for g in groups] == ["a"] and report["rollout/kept"] == 1 and report["rollout/dropped/no_variance"] == 4


async def test_no_prompt_twice_in_a_step():
    """A prompt with p = 0 or 1 would never leave; a small data set ends the step instead of looping."""
    world = World({"a": [1, 1], "b": [0, 1]})
    groups, report = await world.collect(Dynamic(2, on_cap="train_smaller", max_rounds=50), 2)
    assert [g.id for g in groups] == ["b"] and world.sampled == [("a", 2, 0), ("b", 2, 0)] and report["rollout/dropped/repeat"] > 0


async def test_cooldown_over_steps_survives_a_checkpoint():
    strategy = Dynamic(2, cooldown=2, on_cap="train_smaller")
    rewards = {"a": [1, 1], "b": [0, 1], "c": [0, 1]}
    await World(rewards).collect(strategy, 2, step=5)
    again = Dynamic(2, cooldown=2, on_cap="train_smaller")
    again.load_state_dict(strategy.state_dict())
    for step, rested in ((6, True), (7, True), (8, False)):
        world = World(rewards)
        _, report = await world.collect(again if rested else replace(again), 1, step)
        assert (("a", 2, 0) not in world.sampled) == rested
        assert report.get("rollout/dropped/cooldown", 0) == rested


def test_equal_up_to_rounding_is_dead():
    assert is_dead([0.3, 0.1 + 0.2, 0.3 + 1e-10]) and not is_dead([0.3, 0.3 + 1e-8])
    assert Dynamic(3).admit(group("g", [0.3, 0.1 + 0.2, 0.3 + 1e-10]), INFO) == "no_variance"


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [([0, 0, 0, 1], None), ([0, 0, 0, 0], "below_band"), ([1, 1, 1, 1], "above_band"), ([1, 1, 0, 1], "above_band"), ([0.5] * 4, None)],
)
def test_exclusive_band(rewards, reason):
    assert Dynamic(4, band=(0.0, 0.75)).admit(group("g", rewards), INFO) == reason


def test_metric_names_a_score():
    made = group("g", [1.0, 1.0])
    scored = replace(made, rollouts=tuple(replace(r, scores={"acc": Score(float(i))}) for i, r in enumerate(made.rollouts)))
    assert Dynamic(2).admit(scored, INFO) == "no_variance" and Dynamic(2, metric="acc").admit(scored, INFO) is None
    assert values(scored, "acc") == [0.0, 1.0] and values(scored, "absent") == []


@pytest.mark.parametrize(
    "setting", [{"n": 1}, {"max_rounds": 0}, {"on_cap": "ignore"}, {"band": (1.0, 0.0)}, {"overdraw": 0.5}, {"cooldown": -1}]
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError):
        Dynamic(**{"n": 4} | setting)
    if "n" in setting:
        with pytest.raises(ValueError, match="group of one"):
            Dynamic().bound(1)


async def test_what_no_engine_could_sample_never_reaches_a_verifier():
    world = World({"bad": [0, 0], "a": [0, 1]}, finish="env_error")
    groups, report = await world.collect(Fixed(2), 2)
    assert [g.id for g in groups] == ["a"] and world.scored == ["a"] and report["rollout/dropped/not_sampled"] == 1
    with pytest.raises(RuntimeError, match="none of 1 groups could be used"):
        await World({"bad": [0, 0]}, finish="env_error").collect(Fixed(2), 1)


async def test_lost_groups_and_repeated_ids_are_errors():
    world = World({"a": [0, 1], "b": [0, 1]})

    async def lossy(asked, n):
        return (await world.sample(asked, n))[:1]

    with pytest.raises(RuntimeError, match="no group came back for 1 of 2 prompts, first 'b'"):
        await collect(Fixed(2), world.draw, lossy, world.score, 2, 0)

    async def repeating(asked, n):
        return [replace(g, rollouts=g.rollouts[:1] * n) for g in await world.sample(asked, n)]

    with pytest.raises(ValueError, match="'0/a/0' occurs more than once"):
        await collect(Fixed(2), world.draw, repeating, world.score, 2, 0)


async def test_a_strategy_may_ask_for_more_of_a_prompt():
    """The staged variant, from outside the package: two samples at a time until one is right."""

    class Staged(Fixed):
        def observe(self, group, info):
            wanting = len(group.rollouts) < 6 and not any(values(group))
            return [Ask(group.prompt, 2, len(group.rollouts))] if wanting else []

    world = World({"a": [1, 0], "b": [0, 0, 0, 1], "c": [0] * 6})
    groups, report = await world.collect(Staged(2), 3)
    assert [len(g.rollouts) for g in groups] == [2, 4, 6] and report["rollout/generated"] == 12
    assert [r.sample_id for r in groups[1].rollouts] == [f"0/b/{i}" for i in range(4)]


async def test_draws_per_kept_group_follow_the_formula():
    """P(dead) = p^n + (1-p)^n, and 1/(1-P) groups are drawn for each kept: 1.76 at p=.1, n=8."""
    p, n, target = 0.1, 8, 2000
    rng = random.Random(1)
    names = [f"p{i}" for i in range(10_000)]
    world = World({name: [float(rng.random() < p) for _ in range(n)] for name in names})
    _, report = await world.collect(Dynamic(n, max_rounds=100), target)
    expected = 1 / (1 - p**n - (1 - p) ** n)
    assert expected == pytest.approx(1.756, abs=1e-3)
    assert report["rollout/prompts"] / target == pytest.approx(expected, rel=0.06)


async def test_a_greedy_answer_joins_every_group_and_becomes_its_baseline():
    world = World({"a": [1, 0, 0.5], "b": [0, 0, 1]})
    groups, report = await world.collect(WithGreedy().bound(2), 2)
    assert world.sampled == [("a", 2, 0), ("b", 2, 0), ("a", 1, 2, True), ("b", 1, 2, True)]
    assert [r.sampling.temperature for g in groups for r in g.rollouts] == [1.0, 1.0, 0.0] * 2
    assert report["rollout/generated"] == 6
    assert [r.advantage for g in GreedyBaseline()(groups) for r in g.rollouts] == [0.5, -0.5, None, -1.0, -1.0, None]


async def test_the_greedy_answer_does_not_make_a_dead_group_live():
    world = World({"a": [1, 1, 0], "b": [0, 1, 1]})
    groups, report = await world.collect(WithGreedy(Dynamic(2)), 1)
    assert [g.id for g in groups] == ["b"] and report["rollout/dropped/no_variance"] == 1


def test_a_wrapped_strategy_keeps_its_state():
    inner = Dynamic(2, cooldown=3, resting={"a": 5})
    assert WithGreedy(inner).state_dict() == {"resting": {"a": 5}} and WithGreedy().state_dict() == {}
    fresh = Dynamic(2, cooldown=3)
    WithGreedy(fresh).load_state_dict({"resting": {"a": 5}})
    WithGreedy().load_state_dict({})
    assert fresh.resting == {"a": 5} and WithGreedy(fresh).skip(prompts("a")[0], INFO) == "cooldown"
