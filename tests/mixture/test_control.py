"""Coefficients that follow a metric: the published numbers, their place in a loss, and what they remember."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any, ClassVar

import pytest
import torch

from posttrain.data.pack import Packer
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference, regularizer
from posttrain.loss import load as load_loss
from posttrain.mixture.control import LookAhead, Proportional, Threshold, controls_in, recall, steer
from posttrain.records import Demo, Group, Prompt, Rollout, Segment, Source, TokenBatch
from posttrain.testing.check import check_slicing, example_batch
from posttrain.update import Learn

KL = Proportional("kl", "rollouts/reward_kl", init=0.2, target=6.0, horizon=10_000.0)
ENTROPY = Threshold("entropy", "rollouts/entropy", init=0.01, target=0.2, rate=0.005)


def after(control: Any, *measured: float, sequences: int = 256) -> dict[str, float]:
    memory: dict[str, float] = {}
    for value in measured:
        memory |= steer({control.name: control}, memory, {control.metric: (value, 1.0)}, sequences)
    return recall(control, memory)


@pytest.mark.parametrize(
    ("measured", "expected"), [(3.0, 0.198976), (6.0, 0.2), (7.0, 0.200853), (60.0, 0.201024), (0.0, 0.198976), (-4.0, 0.198976)]
)
def test_proportional_numbers(measured: float, expected: float) -> None:
    assert after(KL, measured)["value"] == pytest.approx(expected, abs=5e-7)


def test_proportional_settles_at_its_target() -> None:
    """A KL that falls as the coefficient grows, ``kl = 1 / b``: the fixed point is ``b = 1 / target``."""
    control, memory = Proportional("kl", "kl", init=0.2, target=6.0, horizon=1000.0), {}
    for _ in range(400):
        memory = steer({"kl": control}, memory, {"kl": (1.0 / control.value(recall(control, memory)), 1.0)}, 256)
    assert control.value(recall(control, memory)) == pytest.approx(1 / 6, rel=1e-3)


def test_a_horizon_shorter_than_a_step_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"horizon=10 is too short for steps of 256 sequences.*longer than 51.2"):
        after(Proportional("kl", "kl", horizon=10.0), 0.0)


def test_threshold_steps_and_switches() -> None:
    up, down = after(ENTROPY, 0.2), after(ENTROPY, 0.3)
    assert ENTROPY.value(up) == pytest.approx(0.015)
    assert down["value"] == pytest.approx(0.005) and ENTROPY.value(down) == 0.0
    assert Threshold("e", "e", 0.01, 0.2, 0.005, only_below=False).value(down) == pytest.approx(0.005)
    assert after(ENTROPY, 0.3, 0.3, 0.3, 0.3)["value"] == 0.0
    assert after(Threshold("e", "rollouts/entropy", 0.01, 0.2, 0.005, high=0.018), 0.1, 0.1, 0.1)["value"] == 0.018
    assert ENTROPY.value(after(ENTROPY, 0.3, 0.1)) == pytest.approx(0.01)


def test_a_metric_that_counted_nothing_moves_nothing() -> None:
    memory = steer({"kl": KL}, {}, {KL.metric: (0.0, 0.0)}, 256)
    assert recall(KL, memory) == {"value": 0.2}


def test_a_missing_metric_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"controller 'kl' follows the metric 'rollouts/reward_kl'.*reports rollouts/nll$"):
        steer({"kl": KL}, {}, {"rollouts/nll": (1.0, 1.0), "loss": (1.0, 0.0)}, 8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Proportional("a", "m", target=0.0), "target=0.0 and horizon"),
        (lambda: Proportional("a", "m", clip=1.0), "clip=1.0 between 0 and 1"),
        (lambda: Threshold("a", "m", init=2.0), "init=2.0 must lie between"),
        (lambda: Threshold("a", "m", rate=0.0), "rate=0.0 be above 0"),
    ],
)
def test_impossible_settings_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


# -- inside a loss -----------------------------------------------------------------------------------------------------------------
def objective(coef: Any, penalty: Any = None) -> Objective:
    kl = advantage.Whiten(advantage.ColumnMinusKL(coef, over="behaviour"), eps=0.1)
    stream = Stream(("policy",), likelihood.Token(), reference.Named("behaviour"), kl, aggregate.TokenMean())
    return Objective({"rollouts": stream}, {"entropy": penalty} if penalty else {})


def test_a_controlled_coefficient_is_read_from_memory_at_any_depth() -> None:
    batch = example_batch()
    remembered = batch.replace(memory={"control/kl.value": 0.7})
    torch.testing.assert_close(objective(KL).weights(remembered), objective(0.7).weights(batch), rtol=0, atol=0)
    torch.testing.assert_close(objective(KL).weights(batch), objective(0.2).weights(batch), rtol=0, atol=0)
    assert objective(KL, regularizer.Entropy(ENTROPY)).controls == {"kl": KL, "entropy": ENTROPY}
    assert pickle.loads(pickle.dumps(objective(KL))).controls == {"kl": KL}
    check_slicing(objective(KL), remembered)
    assert remembered.take([0, 3]).memory == remembered.memory


def test_the_slices_of_a_step_measure_what_the_whole_does() -> None:
    """The metric a controller follows is a sum over micro-batches."""
    term, batch = advantage.ColumnMinusKL(0.2, over="behaviour"), example_batch()
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), term, aggregate.TokenMean())
    both = Objective({"rollouts": stream})
    batch = batch.replace(totals=both.totals(batch))
    parts = [both.weigh(batch.take(part))[1]["rollouts/reward_kl"] for part in ([0, 1, 2], [3], [4, 5, 6, 7, 8])]
    whole = both.weigh(batch)[1]["rollouts/reward_kl"]
    assert (sum(p[0] for p in parts), sum(p[1] for p in parts)) == (pytest.approx(whole[0]), whole[1])
    d = batch.logps["behaviour"] - batch.logps["base"]
    on = both.views(batch)["rollouts"].on
    assert whole == (pytest.approx(float(d[on].sum())), 8.0)


def test_two_settings_under_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two controllers are called 'kl' but differ"):
        objective(KL, regularizer.Entropy(Proportional("kl", "rollouts/entropy")))
    assert objective(KL, regularizer.Entropy(KL)).controls == {"kl": KL}
    assert controls_in({"a": [1.0], "b": None}) == {}


def test_it_can_be_written_in_a_file() -> None:
    setting = "{_target_: posttrain.mixture.control.Threshold, name: entropy, metric: rollouts/entropy, init: 0.02, target: 0.3}"
    loss = load_loss("dapo", [f"regularizers.entropy={{_target_: posttrain.loss.regularizer.Entropy, coef: {setting}}}"])
    assert loss.controls == {"entropy": Threshold("entropy", "rollouts/entropy", 0.02, 0.3)}


# -- inside a run ------------------------------------------------------------------------------------------------------------------
class Ranks:
    """A learner that measures: one micro-batch after the other through the objective, with ``base`` at a fixed distance."""

    def __init__(self, loss: Objective, distance: float) -> None:
        self.loss, self.distance, self.seen = loss, distance, []

    async def score(self, micro: list[TokenBatch], policy: str, entropy: bool = False) -> list[dict[str, torch.Tensor]]:
        shift = self.distance if policy == "base" else 0.0
        return [{"logp": torch.full((b.num_tokens,), -1.0 - shift)} for b in micro]

    async def step(self, micro: list[TokenBatch], weights: Any = None) -> Any:
        metrics: dict[str, tuple[float, float]] = {}
        for batch in micro:
            out = self.loss(batch, torch.full((batch.num_tokens,), -1.0).requires_grad_())
            for key, (total, count) in out.metrics.items():
                before = metrics.get(key, (0.0, 0.0))
                metrics[key] = (before[0] + total, before[1] + count)
            self.seen.append(dict(batch.memory))
        return type("Report", (), {"metrics": metrics, "scalars": {}})()


def groups() -> list[Group]:
    prompt = Prompt("q", (1, 2))
    segment = Segment((3, 4, 5), Source.policy, logprobs=(-1.0,) * 3, version=0)
    return [Group(prompt, tuple(Rollout(str(i), prompt, (segment,), reward=float(i), advantage=i - 1.5) for i in range(4)))]


def test_the_learner_carries_the_value_from_step_to_step_and_over_a_resume() -> None:
    control = Proportional("kl", "rollouts/reward_kl", init=0.2, target=1.0, horizon=40.0)
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.ColumnMinusKL(control), aggregate.TokenMean())
    loss = Objective({"rollouts": stream})

    def learn(distance: float) -> Learn:
        return Learn(loss, Packer(micro_batch_tokens=8), Ranks(loss, distance))

    first = learn(2.0)
    used = [asyncio.run(first.learn(step, groups(), 0.0)).result()["control/kl"] for step in range(3)]
    growth = 1 + 0.2 * 4 / 40  # four answers, each with a KL of 6 against a target of 1
    assert used == pytest.approx([0.2, 0.2 * growth, 0.2 * growth**2])
    assert all(
        seen.get("control/kl.value", 0.2) in (0.2, pytest.approx(0.2 * growth), pytest.approx(0.2 * growth**2))
        for seen in first.learner.seen
    )
    second = learn(0.0)
    second.load(pickle.loads(pickle.dumps(first.state)))
    assert asyncio.run(second.learn(3, groups(), 0.0)).result()["control/kl"] == pytest.approx(0.2 * growth**3)
    assert recall(control, second.memory)["value"] == pytest.approx(0.2 * growth**3 * (1 - 0.2 * 4 / 40))


def test_entropy_held_at_its_target_by_the_controller() -> None:
    """A policy of one token whose entropy drifts down by itself and up with the bonus stays near the target; without a bonus it collapses."""

    def run(coef: float | Threshold) -> list[float]:
        logits, memory, track = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64), {}, []
        for _ in range(4000):
            p = torch.softmax(logits, 0)
            entropy = float(-(p * p.log()).sum())
            value = coef.value(recall(coef, memory)) if isinstance(coef, Threshold) else coef
            reward = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
            logits = logits + 0.5 * (p * (reward - (p * reward).sum()) - value * p * (p.log() + entropy))
            if isinstance(coef, Threshold):
                memory = steer({coef.name: coef}, memory, {coef.metric: (entropy, 1.0)}, 1)
            track.append(entropy)
        return track

    held = run(Threshold("e", "e", init=0.01, target=0.6, rate=0.002, only_below=False))
    assert 0.48 < sum(held[-1000:]) / 1000 < 0.72 and run(0.0)[-1] < 0.1


# -- a blend that looks ahead --------------------------------------------------------------------------------------------------------
A = "posttrain.loss.advantage"
AHEAD = LookAhead("mu", init=0.5, rate=0.1, low=0.05, high=0.9)


def looks(control: LookAhead, *measured: Any) -> list[float]:
    state, out = control.begin(), []
    for one in measured:
        state = control.step(state, one, 8)
        out.append(control.value(state))
    return out


def test_a_blend_follows_its_slope_within_its_bounds() -> None:
    assert looks(AHEAD, [0.5], [-1.0], [-20.0], [100.0]) == pytest.approx([0.55, 0.45, 0.05, 0.9])
    assert AHEAD(0.3) == 0.5 and AHEAD.metrics == ("lookahead/mu",)


@pytest.mark.parametrize(("sign", "expected"), [(1, [0.5, 0.5, 0.4, 0.6]), (-1, [0.5, 0.5, 0.6, 0.4])])
def test_the_entropy_pulls_towards_its_mean_of_the_first_looks(sign: int, expected: list[float]) -> None:
    """H* is 1.5 after two looks; above it the published sign imitates less."""
    control = LookAhead("mu", entropy_rate=0.2, entropy_sign=sign, warmup=2)
    assert looks(control, [0.0, 1.0], [0.0, 2.0], [0.0, 2.0], [0.0, 0.5]) == pytest.approx(expected)
    assert control.metrics == ("lookahead/mu", "rollouts/entropy")


def test_the_other_share_follows() -> None:
    loss, batch = load_loss("amft"), example_batch()
    batch = batch.replace(totals=loss.totals(batch))
    moved = batch.replace(memory={"control/mu.value": 0.9})
    half, most = loss.weights(batch), loss.weights(moved)
    views = loss.views(batch)
    for name, factor in (("demos", 1.8), ("rollouts", 0.2)):
        on = views[name].on
        assert float(half[on].abs().sum()) > 0
        torch.testing.assert_close(most[on], factor * half[on])
    assert loss.controls["mu"].value({"value": 0.3}) == 0.3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: LookAhead("mu", init=0.0, low=0.1), r"init=0.0 must lie between low=0.1"),
        (lambda: LookAhead("mu", high=1.5), "between 0 and 1"),
        (lambda: LookAhead("mu", rate=-0.1), "rate=-0.1 and entropy_rate=0.0 must not be negative"),
        (lambda: LookAhead("mu", entropy_rate=-1.0), "must not be negative"),
        (lambda: LookAhead("mu", every=0), "every=0 and warmup=5 at least 1"),
        (lambda: LookAhead("mu", warmup=0), "warmup=0 at least 1"),
        (lambda: LookAhead("mu", entropy_sign=0), r"entropy_sign=0 is \+1"),
        (lambda: LookAhead("mu", scale="sum"), "scale='sum' does not exist"),  # type: ignore[arg-type]
        (lambda: load_loss("amft", ["streams.demos.coef.utility=others"]), "no stream utility='others'; the objective has rollouts, demos"),
        (lambda: objective(0.1, regularizer.Entropy(AHEAD)), "must stand in the coefficient of a stream"),
        (lambda: load_loss("amft", [f"streams.rollouts.advantage={{_target_: {A}.Whiten, inner: {{_target_: {A}.ColumnMinusKL, over: self}}}}"]), "read more than that"),
        (lambda: Learn(load_loss("amft"), Packer(64), None, separate_demos=True), "takes the demonstrations in a step of their own"),
    ],
)  # fmt: skip
def test_blends_that_cannot_look_ahead_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_every_so_many_steps_a_run_keeps_a_direction_and_measures_it_in_the_next() -> None:
    loss = load_loss("amft", ["streams.demos.coef.every=3", "streams.demos.coef.rate=0.1"])

    class Looking(Ranks):
        calls: ClassVar[list[tuple[str, bool, bool]]] = []

        async def look_ahead(self, micro: list[TokenBatch], name: str, measure: bool, keep: bool) -> dict[str, float]:
            self.calls.append((name, measure, keep))
            return {"slope": 0.5} if measure else {}

    ranks = Looking(loss, 0.0)
    one, values = Learn(loss, Packer(64), ranks), []
    for step in range(7):
        found = asyncio.run(one.learn(step, [*groups(), Demo("d", (Segment((3, 4), Source.demo),))], 0.0)).pairs
        values.append(found["control/mu"][0])
        assert found["lookahead/mu"] == ((0.5, 1.0) if step in (3, 6) else (0.0, 0.0))
    assert ranks.calls == [("mu", False, True), ("mu", True, False), ("mu", False, True), ("mu", True, False)]
    assert values == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.55, 0.55, 0.55])
