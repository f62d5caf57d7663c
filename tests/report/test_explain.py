"""``explain`` prints every number and every idle setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from posttrain.advantage import BatchWhiten, Chain, GroupAdvantage, Reward
from posttrain.loss import load
from posttrain.report.explain import RunFacts, explain, settings_that_cannot_act
from tests.loss.cases import CASES, composed

KL = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, estimator: k3, to: base, coef: 0.04}"


def numbers(term: Any) -> list[Any]:
    """Every plain number below an objective."""
    if dataclasses.is_dataclass(term):
        return [n for f in dataclasses.fields(term) for n in numbers(getattr(term, f.name))]
    if isinstance(term, dict):
        return [n for value in term.values() for n in numbers(value)]
    return [term] if isinstance(term, (int, float)) and not isinstance(term, bool) else []


@pytest.mark.parametrize("name", CASES)
def test_every_number_and_every_word_is_printed(name: str) -> None:
    objective = CASES[name].load()
    text = explain(objective)
    for stream_name, stream in objective.streams.items():
        assert stream_name in text
        for term in stream.terms.values():
            assert type(term).__name__ in text
    for number in numbers(objective):
        assert f"{number:g}" in text
    for reference in objective.needs.references:
        assert f"log-probs {reference}:" in text


def test_the_equation_of_a_clipped_loss() -> None:
    text = explain(load("grpo", [KL]), advantage=GroupAdvantage(), updates_per_batch=1, group_size=8)
    assert "grad = 1/(N_seq T_i) * keep(pi/pi_old in [0.8, 1.2], one-sided) * (pi/pi_old) * A * grad l" in text
    assert "0.04 * (exp(-d) + d - 1)" in text and "log-probs base" in text
    assert "GroupAdvantage(center=mean, scale=std, ddof=0, eps=1e-06" in text
    assert "loss.streams.rollouts.masks.clip: with one update per batch" in text


def test_the_equation_of_a_pair_loss() -> None:
    text = explain(composed("dpo"))
    assert "-log sigmoid(0.1 h)" in text and "in a preference pair" in text
    assert "coupling group: one pass while every pair or group fits in one micro-batch, else two" in text
    assert "cannot act" not in text, "without facts nothing is said about the run"


def test_a_mixture_shows_its_schedule() -> None:
    assert "Linear(start=0.1, end=0.0" in explain(composed("sft_plus_rl")).splitlines()[0]


def idle(name: str, *overrides: str, advantage: Any = None, **facts: Any) -> list[str]:
    return settings_that_cannot_act(composed(name, overrides), advantage, **facts)


def test_a_clip_cannot_act_with_one_on_policy_update() -> None:
    lines = idle("grpo", advantage=GroupAdvantage(), group_size=8)
    assert any("masks.clip" in line and "updates_per_batch" in line for line in lines)
    assert any("streams.rollouts.reference" in line for line in lines)
    assert idle("grpo", advantage=GroupAdvantage(), group_size=8, updates_per_batch=2) == []
    assert idle("grpo", advantage=GroupAdvantage(), run=RunFacts(group_size=8, max_staleness=1)) == []
    assert any("likelihood.ratio" in line for line in idle("gspo"))


def test_a_group_of_one_has_no_baseline() -> None:
    for advantage in (GroupAdvantage(), Chain({"center": GroupAdvantage(scale="none"), "whiten": BatchWhiten()})):
        (line,) = idle("reinforce", advantage=advantage, group_size=1)
        assert "rollout.n=1" in line and "nothing is learnt" in line
    assert idle("reinforce", advantage=Reward(), group_size=1) == []
    assert idle("reinforce", advantage=GroupAdvantage(), group_size=2) == []


def test_coefficients_of_zero() -> None:
    (line,) = idle("sft", "regularizers.kl={_target_: posttrain.loss.regularizer.KL, coef: 0}")
    assert "loss.regularizers.kl.coef=0" in line and "base is still computed" in line
    assert idle("sft", KL) == []
    (line,) = idle("sft", "streams.demos.coef=0")
    assert "loss.streams.demos.coef=0" in line


def test_an_advantage_nobody_reads() -> None:
    (line,) = idle("sft", advantage=GroupAdvantage())
    assert "no stream of this loss reads the advantage column" in line
    assert idle("sft") == []


def test_knobs_of_a_division_that_does_not_happen() -> None:
    lines = idle("reinforce", advantage=GroupAdvantage(scale="none", ddof=1, eps=1e-3), group_size=4)
    assert [line.split("=")[0] for line in lines] == ["advantage.ddof", "advantage.eps"]
    (line,) = idle("reinforce", advantage=GroupAdvantage("loo", "loo_std"), group_size=2)
    assert "one peer has no deviation" in line
    (line,) = idle("reinforce", advantage=GroupAdvantage(singleton="raw"), group_size=4)
    assert "singleton=raw" in line


@pytest.mark.parametrize(
    ("term", "acts"),
    [
        ("{_target_: posttrain.loss.mask.Cap, max: .inf}", False),
        ("{_target_: posttrain.loss.mask.Cap, max: 2.0}", True),
        ("{_target_: posttrain.loss.mask.RatioClip, low: 1.0, high: .inf}", False),
        ("{_target_: posttrain.loss.mask.RatioClip, low: 0.2, high: .inf}", True),
        ("{_target_: posttrain.loss.mask.Reject, min: 0.0, max: .inf}", False),
        ("{_target_: posttrain.loss.mask.Truncate, max: .inf}", False),
        ("{_target_: posttrain.loss.mask.Truncate, max: .inf, apply: weight}", True),
    ],
)
def test_an_unbounded_range_masks_nothing(term: str, acts: bool) -> None:
    lines = idle("grpo", f"streams.rollouts.masks.more={term.replace('.inf', 'inf')}", updates_per_batch=4)
    assert [("masks.more" in line and "unbounded" in line) for line in lines] == ([] if acts else [True])


def test_idle_settings_of_pairs() -> None:
    (line,) = idle("dpo", "streams.pairs.advantage.debias=true")
    assert "label_smoothing is 0" in line
    (line,) = idle("dpo", "streams.pairs.advantage.score=logp_sum", "streams.pairs.advantage.to=teacher")
    assert "compares with no reference" in line
