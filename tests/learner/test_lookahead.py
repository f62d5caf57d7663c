"""A coefficient that looks one step ahead: its slope against finite differences through a real step, its scales, its cuts, its resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import LearnerConfig, ModelConfig
from posttrain.learner.lookahead import look_ahead
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import Objective, load
from posttrain.records import Row, TokenBatch

LR = 0.05
PLAIN = ("streams.demos.coef.scale=product",)


def batch(seed: int, goal: Objective) -> TokenBatch:
    """Three rollouts, one without a signal, and two demonstrations."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index, (kind, length) in enumerate((("policy", 6), ("policy", 9), ("demo", 8), ("policy", 4), ("demo", 5))):
        ids = torch.randint(5, 90, (length,), generator=draw).tolist()
        own = 0.0 if index == 3 else float(torch.randn((), generator=draw))
        rows.append(Row(ids=ids, sources=["prompt"] * 2 + [kind] * (length - 2), advantage=own))
    whole = TokenBatch.from_sequences(rows)
    return whole.replace(totals=goal.totals(whole))


def engine(tiny: str, goal: Objective, **learner: Any) -> TorchEngine:
    return TorchEngine(ModelConfig(path=tiny, dtype="float64"), LearnerConfig(engine="torch", lr=LR, **learner), goal, total_steps=5, seed=3)


def logp(one: TorchEngine, whole: TokenBatch) -> Tensor:
    """Token log-probs, sequence by sequence, from the model's own logits."""
    out, first = [], 0
    for n in whole.lengths.tolist():
        ids = torch.cat([whole.input_ids[first : first + 1], whole.target_ids[first : first + n]])
        logits = one.module.model(input_ids=ids[None]).logits[0, :-1].double()
        out.append(torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0])
        first += n
    return torch.cat(out)


def demonstrated(whole: TokenBatch, l: Tensor) -> Tensor:  # noqa: E741
    on = (whole.source == 2) & whole.trainable
    return l[on].mean()


def rewarded(whole: TokenBatch, l: Tensor) -> Tensor:  # noqa: E741
    on = (whole.source == 1) & whole.trainable
    return (whole.advantage * l)[on].mean()


def step(one: TorchEngine, gain: Tensor) -> None:
    """Plain gradient ascent."""
    parameters = [p for _, p in one.named]
    for p, g in zip(parameters, torch.autograd.grad(gain, parameters), strict=True):
        p.data.add_(g, alpha=LR)


def utility_after(tiny: str, goal: Objective, mu: float) -> float:
    one, first, second = engine(tiny, goal), batch(1, goal), batch(2, goal)
    l = logp(one, first)  # noqa: E741
    step(one, mu * demonstrated(first, l) + (1 - mu) * rewarded(first, l))
    with torch.no_grad():
        return float(rewarded(second, logp(one, second)))


def looked(tiny: str, goal: Objective, cuts: list[list[int]] | None = None, mu: float = 0.5) -> tuple[float, TorchEngine]:
    one, first, second = engine(tiny, goal), batch(1, goal), batch(2, goal)
    parts = cuts or [[0, 1, 2, 3, 4]]
    assert look_ahead(one, [first.take(p) for p in parts], "mu", measure=True, keep=True) == {}, "nothing was kept before"
    l = logp(one, first)  # noqa: E741
    step(one, mu * demonstrated(first, l) + (1 - mu) * rewarded(first, l))
    return look_ahead(one, [second.take(p) for p in parts], "mu", measure=True, keep=False)["slope"], one


def test_the_sources_are_what_the_transcription_takes_them_for(tiny: str) -> None:
    goal = load("amft", PLAIN)
    whole = batch(1, goal)
    assert sorted(set(whole.source[whole.trainable].tolist())) == [1, 2]
    one = engine(tiny, goal)
    l = logp(one, whole)  # noqa: E741
    wanted = torch.autograd.grad(0.5 * demonstrated(whole, l) + 0.5 * rewarded(whole, l), l)[0]
    torch.testing.assert_close(goal.weights(whole, l), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mu", [0.5, 0.1])
def test_the_slope_is_the_derivative_of_the_utility_through_a_step(tiny: str, mu: float) -> None:
    goal = load("amft", (*PLAIN, f"streams.demos.coef.init={mu}"))
    found, _ = looked(tiny, goal, mu=mu)
    h = 0.01  # float32 norms inside the model are the noise, the curvature of the step is the error
    numeric = (utility_after(tiny, goal, mu + h) - utility_after(tiny, goal, mu - h)) / (2 * h)
    assert abs(numeric) > 1e-3
    assert found == pytest.approx(numeric, rel=1e-3)
    unmoved = engine(tiny, goal)
    look_ahead(unmoved, [batch(1, goal)], "mu", measure=False, keep=True)
    here = look_ahead(unmoved, [batch(2, goal)], "mu", measure=True, keep=False)["slope"]
    assert here != pytest.approx(numeric, rel=1e-2), "the utility is that of the policy after the step"


def test_cutting_the_step_does_not_change_it(tiny: str) -> None:
    goal = load("amft", PLAIN)
    whole, cut = looked(tiny, goal)[0], looked(tiny, goal, [[3, 0], [], [4], [1, 2]])[0]
    assert cut == pytest.approx(whole, rel=1e-9) and whole != 0


def test_a_cosine_does_not_depend_on_the_size_of_gradients(tiny: str) -> None:
    goal = load("amft")
    found, one = looked(tiny, goal)
    product, plain = looked(tiny, load("amft", PLAIN))
    (v,) = one.core.directions.values()
    whole = batch(2, goal)
    parameters = [p for _, p in plain.named]
    u = torch.autograd.grad(rewarded(whole, logp(plain, whole)), parameters)
    norm = sum(float(x.square().sum()) for x in u) ** 0.5 * sum(float(x.square().sum()) for x in v) ** 0.5
    assert found == pytest.approx(product / LR / norm, rel=1e-6) and -1 < found < 1


def test_nothing_to_learn_from_is_no_slope(tiny: str) -> None:
    goal = load("amft")
    one, idle = engine(tiny, goal), batch(1, goal)
    idle = idle.replace(trainable=torch.zeros_like(idle.trainable))
    look_ahead(one, [idle], "mu", measure=False, keep=True)
    assert look_ahead(one, [batch(2, goal)], "mu", measure=True, keep=False) == {"slope": 0.0}


def test_looking_leaves_the_step_alone(tiny: str) -> None:
    """The gradient of the step that follows is that of a run that did not look."""
    goal = load("amft")
    with_look, without = engine(tiny, goal), engine(tiny, goal)
    look_ahead(with_look, [batch(1, goal)], "mu", measure=True, keep=True)
    for one in (with_look, without):
        one.forward_backward(batch(1, goal))
    for (_, p), (_, q) in zip(with_look.named, without.named, strict=True):
        assert torch.equal(with_look.grads[p], without.grads[q])


def test_the_direction_travels_in_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    goal = load("amft")
    one, other = engine(tiny, goal), engine(tiny, goal)
    look_ahead(one, [batch(1, goal)], "mu", measure=False, keep=True)
    one.save(tmp_path)
    other.load(tmp_path)
    found = [look_ahead(e, [batch(2, goal)], "mu", measure=True, keep=False)["slope"] for e in (one, other)]
    assert found[0] == found[1] != 0.0


def test_sharded_weights_are_refused(tiny: str) -> None:
    goal = load("amft")
    one = engine(tiny, goal)
    one.cfg.zero_stage = 3
    with pytest.raises(ValueError, match=r"'mu' looks one step ahead.*zero_stage to 0, 1 or 2"):
        look_ahead(one, [batch(1, goal)], "mu", measure=True, keep=True)
