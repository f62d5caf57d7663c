"""What one small error in the view, the streams and the advantages would change, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.contrib.information import PLAIN, InformationGain
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference
from posttrain.loss.unified import declared
from posttrain.records import Row, TokenBatch

SELF = reference.Current()


def row(*logps: float, **more: Any) -> Row:
    n, given = len(logps), {"base": [-1.0] * len(logps), **more.pop("logps", {})}
    return Row(
        ids=[1] * (n + 1),
        sources=more.pop("sources", ["prompt", *["demo"] * n]),
        logps={"current": [0.0, *logps], **{name: [0.0, *values] for name, values in given.items()}},
        **more,
    )


def batch(*rows: Row, **more: Any) -> TokenBatch:
    return TokenBatch.from_sequences(rows, dtype=torch.float64, **more)


def objective(**stream: Any) -> Objective:
    given = {"source": ["demo"], "likelihood": likelihood.Token(), "reference": SELF, "advantage": advantage.One(), "aggregation": aggregate.PairSum(), **stream}
    return Objective({"s": Stream(**given)}, name="small")


# -- information ---------------------------------------------------------------------------------------------------------


def thought(words: list[float], group: str = "g") -> Row:
    """A thought of one token, then the words behind it."""
    return row(-0.5, *words, sources=["prompt", "policy", *["tool"] * len(words)], group=group)


def test_a_thought_without_words_behind_it_has_no_part_in_the_mean_of_its_group() -> None:
    plain = row(-9.0, sources=["prompt", "demo"], logps={"base": [-2.0]}, group="g", context=PLAIN)
    goal = objective(source=["policy"], advantage=InformationGain())
    data = batch(thought([-1.0]), thought([-0.2]), thought([]), plain)
    gains = [2.0 - 1.0, 2.0 - 0.2]
    mean = sum(gains) / 2
    assert goal.weights(data).tolist() == pytest.approx([gains[0] - mean, 0.0, gains[1] - mean, 0.0, 0.0, 0.0])


# -- advantages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "live", "coupling", "column"),
    [
        (advantage.ColumnMinusKL(), False, "sequence", True),
        (advantage.ColumnMinusKL(to="self", over="old"), True, "sequence", True),
        (advantage.ColumnMinusKL(to="base", over="self"), True, "sequence", True),
        (advantage.LogRatio(num="self", den="base"), True, "token", False),
        (advantage.LogRatio(num="teacher", den="self"), True, "token", False),
        (advantage.LogRatio(num="teacher", den="old", credit="to_go"), False, "sequence", False),
        (advantage.Pointwise(), True, "sequence", False),
        (advantage.Pointwise(shift="running_mean"), True, "batch", False),
        (advantage.Whiten(inner=advantage.LogRatio()), True, "batch", False),
        (advantage.Whiten(), True, "batch", True),
        (advantage.GroupCenter(inner=advantage.LogRatio()), True, "group", False),
        (advantage.GroupCenter(), True, "group", True),
    ],
)
def test_what_an_advantage_declares_follows_from_what_it_reads(term: Any, live: bool, coupling: str, column: bool) -> None:
    assert (declared(term, "live"), declared(term, "coupling"), getattr(term, "reads_column", False)) == (live, coupling, column)


def test_a_reward_of_each_token_that_declares_nothing_may_be_earned() -> None:
    class Two:
        def values(self, view: Any) -> torch.Tensor:
            return torch.full_like(view.logp, 2.0)

    goal = objective(advantage=advantage.GeneralizedAdvantage(rewards="each", lam=1.0, earned=Two()))
    assert goal.weights(batch(row(-1.0, -1.0, logps={"value": [0.5, 0.25]}))).tolist() == [4.0 - 0.5, 2.0 - 0.25]


def test_whitening_counts_answers_of_any_length_once() -> None:
    """Answers of 1 and 3 tokens, worth 5 and 1: mean 3, and with one degree of freedom less a variance of 2 * 4 / (2 - 1)."""
    goal = objective(advantage=advantage.Whiten(over="sequences", ddof=1, eps=0.0))
    data = batch(row(-1.0, advantage=5.0), row(-1.0, -1.0, -1.0, advantage=1.0))
    assert goal.weights(data).tolist() == pytest.approx([2 / math.sqrt(8), *[-2 / math.sqrt(8)] * 3])


def test_a_step_of_one_token_is_white() -> None:
    assert objective(advantage=advantage.Whiten()).weights(batch(row(-1.0, advantage=7.0))).tolist() == [0.0]


@pytest.mark.parametrize(("divide", "by"), [("none", 1.0), ("size", 2.0), ("peers", 1.0)])
def test_a_group_of_one_beside_others_has_nothing_to_be_compared_with(divide: Any, by: float) -> None:
    goal = objective(advantage=advantage.GroupCenter(inner=advantage.Column(), divide=divide))
    data = batch(row(-1.0, advantage=7.0, group="a"), row(-1.0, advantage=1.0, group="b"), row(-1.0, advantage=5.0, group="b"))
    assert goal.weights(data).tolist() == [0.0, -2.0 / by, 2.0 / by]


def pairwise(up: float, down: float, **settings: Any) -> tuple[torch.Tensor, dict]:
    goal = objective(paired=True, advantage=advantage.Pairwise(to="base", beta=0.5, **settings))
    data = batch(row(up, pair="p", side="chosen"), row(down, pair="p", side="rejected"))
    return goal.weights(data), goal(data).metrics


def test_a_transformed_score_that_falls_short_keeps_its_slope() -> None:
    weights, _ = pairwise(-3.0, -0.5, transform="log_sigmoid", shortfall=2.0)
    step = 1e-6
    more, less = (pairwise(-3.0 + d, -0.5, transform="log_sigmoid", shortfall=2.0)[1]["s/preference_loss"][0] for d in (step, -step))
    assert float(weights[0]) == pytest.approx(-(more - less) / (2 * step), rel=1e-6)


def test_a_power_is_flat_beyond_its_limit_and_not_at_it() -> None:
    """alpha log(pi/base) = 0.5 * -2 = -1."""
    at, _ = pairwise(-3.0, -1.0, transform="power", alpha=0.5, limit=1.0)
    beyond, found = pairwise(-3.0, -1.0, transform="power", alpha=0.5, limit=0.99)
    score = (1 - math.exp(1)) / 0.5
    assert float(at[0]) == pytest.approx(0.5 * math.exp(1) / (1 + math.exp(0.5 * score))) and float(beyond[0]) == 0.0
    assert found["s/chosen_score"] == (pytest.approx(0.5 * (1 - math.exp(0.99)) / 0.5), 1.0) and found["s/rejected_score"] == (0.0, 1.0)


def test_lists_and_labels_take_the_aggregation_of_their_score() -> None:
    with pytest.raises(ValueError, match=r"advantage\.Listwise: score=log_ratio_sum is a sum over tokens, but PairTokenMean takes their mean"):
        objective(advantage=advantage.Listwise(), aggregation=aggregate.PairTokenMean())
    with pytest.raises(ValueError, match=r"advantage\.Pointwise: score=log_ratio_sum is a sum over tokens, but SequenceMeanTokenMean takes their mean"):
        objective(advantage=advantage.Pointwise(), aggregation=aggregate.SequenceMeanTokenMean())


def test_a_class_is_told_by_its_label_and_not_by_its_weight() -> None:
    """Log-ratios 1 and -1 with beta 1/2, right both times; the good class counts 0.4, the bad one 3."""
    rows = [row(0.0, rewards={"label": 1.0}), row(-2.0, rewards={"label": 0.0})]
    for f, loss in (("logistic", 3.4 * math.log1p(math.exp(-0.5))), ("squared", 0.0)):
        found = objective(advantage=advantage.Pointwise(f=f, beta=0.5, good=0.4, bad=3.0), aggregation=aggregate.SequenceMeanTokenSum())(batch(*rows)).metrics
        assert found["s/preference_loss"] == (pytest.approx(loss), 2.0)
        assert (found["s/good"], found["s/accuracy"]) == ((1.0, 2.0), (2.0, 2.0))
        assert (found["s/good_score"], found["s/bad_score"]) == ((0.5, 1.0), (-0.5, 1.0))


def test_the_favourite_of_each_list_is_looked_for_in_its_own() -> None:
    """Both lists are ranked right, and what is favoured in the second has a lower log-ratio than all of the first."""
    lists = [row(1.0, group="a", rewards={"reward": 3.0}), row(0.5, group="a", rewards={"reward": 2.0})]
    lists += [row(-2.0, group="b", rewards={"reward": 1.0}), row(-3.0, group="b", rewards={"reward": 0.0})]
    for temperature in (0.0, 1.0):
        goal = objective(advantage=advantage.Listwise(temperature=temperature), aggregation=aggregate.GroupSum())
        assert goal(batch(*lists)).metrics["s/accuracy"] == (2.0, 2.0)
        assert goal(batch(*lists[::-1], row(-9.0, sources=["prompt", "policy"]))).metrics["s/accuracy"] == (2.0, 2.0)


def test_a_shift_is_counted_once_for_every_answer() -> None:
    goal = objective(advantage=advantage.Pointwise(beta=0.5, shift="running_mean"), aggregation=aggregate.SequenceMeanTokenSum())
    rows = [row(0.0, rewards={"label": 1.0}), row(-2.0, rewards={"label": 0.0}), row(-2.0, rewards={"label": 0.0})]
    assert goal(batch(*rows)).metrics["s/shift"] == (pytest.approx(3 * 0.5 * -1 / 3), 3.0)


# -- view ----------------------------------------------------------------------------------------------------------------


def test_a_mask_that_gives_no_number_is_named_with_the_first_token_it_gave_none_for() -> None:
    class Broken:
        def factor(self, view: Any, advantage: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, math.nan, 1.0], dtype=view.logp.dtype)

    with pytest.raises(FloatingPointError, match=r"mask 'broken' gave NaN or a negative factor at column 1 \(sample 'mine'\)"):
        objective(masks={"broken": Broken()}).weights(batch(row(-1.0, -2.0, -3.0, sample_id="mine")))


def test_a_stream_of_which_nothing_is_learnt_needs_no_log_probs_of_others() -> None:
    goal = objective(reference=reference.Named("behaviour"))
    assert goal.weights(batch(row(-1.0, -2.0, trainable=[False] * 3))).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="needs the log-prob column 'behaviour'; the batch has"):
        goal.weights(batch(row(-1.0, -2.0)))
