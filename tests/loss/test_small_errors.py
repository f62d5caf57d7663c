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
        (advantage.GroupCenter(inner=advantage.Whiten()), True, "batch", True),
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


@pytest.mark.parametrize("kind", [advantage.Pointwise, advantage.Listwise, advantage.Pairwise])
def test_scores_against_another_policy_need_it(kind: Any) -> None:
    assert declared(kind(), "needs") == {"base"} and declared(kind(to="old"), "needs") == {"old"} and declared(kind(score="logp_sum"), "needs") == frozenset()


def test_a_list_says_what_it_is_over() -> None:
    assert advantage.Listwise().formula.endswith("over the group]") and advantage.Listwise(of="side").formula.endswith("over the pair]")


def test_the_best_three_share_a_hard_target_to_the_last_digit() -> None:
    goal = objective(advantage=advantage.Listwise(f="noise_contrastive", temperature=0.0, beta=1.0), aggregation=aggregate.GroupSum())
    data = batch(*(row(-1.0, group="a", rewards={"reward": 1.0}) for _ in range(3)))
    assert goal.weights(data).tolist() == pytest.approx([(1 / 3) * 0.5 - 0.5 / 3] * 3, abs=1e-12)


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
    with pytest.raises(ValueError, match="compares answers, but the stream has side=chosen: it would never see the other"):
        objective(advantage=advantage.Listwise(), side="chosen")
    with pytest.raises(ValueError, match=r"beta=2\.0 is on the scale of a mean over tokens"):
        advantage.Listwise(beta=2.0)
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


@pytest.mark.parametrize("f", ["softmax", "reverse_kl"])
def test_a_list_of_scores_in_the_thousands_has_a_softmax(f: Any) -> None:
    goal = objective(advantage=advantage.Listwise(f=f, beta=1.0), aggregation=aggregate.GroupSum())
    data = batch(*(row(-5000.0 + more, logps={"base": [base]}, group="a", rewards={"reward": 0.0}) for more, base in ((0.0, -9000.0), (1.0, -9000.0))))
    up = 1 / (1 + math.exp(-1))
    gap = up * (1 - up)
    assert goal.weights(data).tolist() == pytest.approx([up - 0.5, 0.5 - up] if f == "softmax" else [gap, -gap])


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


def view_of(*rows: Row, **stream: Any) -> Any:
    return objective(**stream).views(batch(*rows))["s"]


def test_what_shares_a_code_is_added_counted_and_compared() -> None:
    """Four answers of group a, one of which is no member, one of b, one of none."""
    rows = [row(-1.0, group=g) for g in ("b", "a", "a", None, "a")] + [row(-1.0, group="a", sources=["prompt", "policy"])]
    view = view_of(*rows)
    values = torch.tensor([5.0, -2.0, -3.0, 7.0, -4.0, 9.0], dtype=torch.float64)
    group = view.batch.group
    assert view.code_sum(group, values).tolist() == [5.0, -9.0, -9.0, 0.0, -9.0, 0.0]
    assert view.code_max(group, values).tolist() == [5.0, -2.0, -2.0, -math.inf, -2.0, -math.inf]
    assert view.code_count(group, values < 0).tolist() == [0, 3, 3, 0, 3, 3] and view.code_count(group, view.member).tolist() == [1, 3, 3, 0, 3, 3]
    part = objective().views(view.batch.take([3, 0]))["s"]
    assert part.code_sum(part.batch.group, values[:2]).tolist() == [0.0, -2.0] and part.code_max(part.batch.group, values[:2]).tolist() == [-math.inf, -2.0]


def test_nothing_shares_no_code() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    view = objective().views(batch(), empty)["s"]
    assert view.code_sum(view.batch.group, empty).shape == view.code_max(view.batch.group, empty).shape == view.code_count(view.batch.group, view.member).shape == (0,)


# -- aggregations --------------------------------------------------------------------------------------------------------

AGGREGATIONS = {
    "token mean": (aggregate.TokenMean(), [1 / 3] * 3),
    "token mean, weight": (aggregate.TokenMean("weight_sum"), [1 / 3] * 3),
    "token mean, joint": (aggregate.TokenMean("joint"), [1 / 3] * 3),
    "token mean, kept": (aggregate.TokenMean("kept"), [1 / 3] * 3),
    "mean of means": (aggregate.SequenceMeanTokenMean(), [1 / 3] * 3),
    "mean of means, weight": (aggregate.SequenceMeanTokenMean("weight_sum"), [1 / 3] * 3),
    "mean of sums": (aggregate.SequenceMeanTokenSum(), [1.0] * 3),
    "constant": (aggregate.Constant(4), [1 / 4] * 3),
    "constant, step": (aggregate.Constant(4, "step"), [1 / 4] * 3),
    "group mean": (aggregate.GroupMeanTokenMean(), [1 / 3] * 3),
    "group sum": (aggregate.GroupSum(), [1.0] * 3),
    "group sum of means": (aggregate.GroupSumTokenMean(), [1 / 3] * 3),
    "pair sum": (aggregate.PairSum(), [1.0] * 3),
    "pair mean": (aggregate.PairTokenMean(), [1 / 3] * 3),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_one_answer_alone_and_none_at_all(name: str) -> None:
    """One answer of three tokens in a group and a pair of its own; then one token; then only what belongs to no stream."""
    aggregation, expected = AGGREGATIONS[name]
    goal = objective(aggregation=aggregation)
    mine = {"group": "g", "pair": "p", "side": "chosen"}
    assert goal.weights(batch(row(-1.0, -1.0, -1.0, **mine))).tolist() == pytest.approx(expected)
    assert goal.weights(batch(row(-1.0, **mine))).tolist() == pytest.approx([0.25 if isinstance(aggregation, aggregate.Constant) else 1.0])
    assert goal.weights(batch(row(-1.0, sources=["prompt", "policy"], **mine))).tolist() == [0.0]


def test_what_belongs_to_nothing_that_is_counted_counts_one() -> None:
    """An answer of two tokens in no group and no pair."""
    for aggregation, expected in ((aggregate.GroupSumTokenMean(), 0.5), (aggregate.PairTokenMean(), 0.5), (aggregate.GroupSum(), 1.0), (aggregate.PairSum(), 1.0)):
        assert objective(aggregation=aggregation).weights(batch(row(-1.0, -1.0))).tolist() == [expected] * 2


@pytest.mark.parametrize("aggregation", [aggregate.TokenMean("weight_sum"), aggregate.SequenceMeanTokenMean("weight_sum")])
def test_answers_of_no_weight_are_not_regularised_either(aggregation: Any) -> None:
    class Two:
        coef = 1.0

        def gradient(self, view: Any) -> torch.Tensor:
            return torch.full_like(view.logp, 2.0)

    goal = Objective({"s": objective(aggregation=aggregation).streams["s"]}, {"two": Two()})
    assert goal.weights(batch(row(-1.0, -1.0, weight=0.0))).tolist() == [0.0, 0.0]
    assert goal.weights(batch(row(-1.0, -1.0, weight=0.0), row(-1.0, weight=1.0))).tolist()[-1] == 1.0 - 2.0


def test_each_token_of_two_answers_of_a_group_counts_the_same() -> None:
    goal = objective(aggregation=aggregate.GroupMeanTokenMean())
    data = batch(row(-1.0, group="a"), row(-1.0, -1.0, -1.0, group="a"), row(-1.0, group="b"))
    assert goal.weights(data).tolist() == [0.125] * 4 + [0.5]


def test_a_regulariser_counts_what_no_mask_keeps() -> None:
    """Of two tokens one is masked: the other counts 1, and a penalty's derivative of 2 on both is halved."""

    class Never:
        def factor(self, view: Any, advantage: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 0.0], dtype=view.logp.dtype)

    class Two:
        coef = 1.0

        def gradient(self, view: Any) -> torch.Tensor:
            return torch.full_like(view.logp, 2.0)

    stream = objective(aggregation=aggregate.TokenMean("kept"), masks={"never": Never()}).streams["s"]
    assert Objective({"s": stream}, {"two": Two()}).weights(batch(row(-1.0, -1.0))).tolist() == [1.0 - 1.0, -1.0]


# -- streams and objectives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_what_is_read_may_be_nothing_or_everything(share: float) -> None:
    assert objective(own_input=share).needs.own_input == (share > 0)


@pytest.mark.parametrize("share", [-1e-9, 1 + 1e-9])
def test_shares_of_what_is_read_end_there(share: float) -> None:
    with pytest.raises(ValueError, match="is the share of the model's own choice in what it reads, between 0 and 1"):
        objective(own_input=share)
    with pytest.raises(ValueError, match=f"stream 's': own_input is {share:g} at progress 0; it is a share"):
        objective(own_input=lambda progress: share).own_input(batch(row(-1.0)))


def test_each_stream_reads_its_own_share_of_its_choices() -> None:
    mine, other = (objective(own_input=x, source=[s]).streams["s"] for x, s in ((0.25, "demo"), (0.0, "policy")))
    goal, data = Objective({"a": mine, "b": other}), batch(row(-1.0, -1.0), row(-1.0, sources=["prompt", "policy"]), row(-1.0, trainable=[False, False]))
    assert goal.own_input(data).tolist() == [0.25, 0.25, 0.0, 0.0] and Objective({"b": other}).own_input(data) is None


def test_sides_and_sources_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="stream side='better' does not exist; choose chosen or rejected"):
        objective(side="better")
    with pytest.raises(ValueError, match="stream side=chosen is empty with paired=false"):
        objective(side="chosen", paired=False)
    assert objective(side="chosen", paired=True).streams["s"].side == objective(side="chosen").streams["s"].side == "chosen"
    with pytest.raises(ValueError, match="stream source 'demos' does not exist; choose from"):
        objective(source=["policy", "demos", "others"])


def test_which_tokens_a_stream_takes() -> None:
    rows = [row(-1.0, pair="p", side="chosen"), row(-1.0, pair="p", side="rejected"), row(-1.0), row(-1.0, context="plain"), row(-1.0, sources=["prompt", "policy"])]
    data = batch(*rows)

    def taken(**stream: Any) -> list[int]:
        view = objective(**stream).views(data)["s"]
        assert view.on.tolist() == view.member.tolist()
        return view.on.nonzero()[:, 0].tolist()

    assert taken() == [0, 1, 2] and taken(context="plain") == [3] and taken(context="other") == [] and taken(source=["policy"]) == [4] and taken(source=["demo", "policy"]) == [0, 1, 2, 4]
    assert taken(paired=True) == [0, 1] and taken(paired=False) == [2] and taken(side="chosen") == [0] and taken(side="rejected", paired=True) == [1]


def test_what_a_step_is_counted_in() -> None:
    rows = [
        row(-1.0, -1.0, group="g", weight=2.0),
        row(-1.0, -1.0, -1.0, group="g", weight=[9.0, 1.0, 0.5, 3.0], trainable=[False, True, True, False]),
        row(-1.0, group="h", trainable=[False, False], weight=7.0),
        row(-1.0, pair="p", side="chosen"),
        row(-1.0, pair="p", side="rejected"),
        row(-1.0, pair="q", side="chosen", sources=["prompt", "policy"], weight=5.0),
    ]
    counted = objective().totals(batch(*rows))["s"]
    assert (counted.tokens, counted.sequences, counted.groups, counted.pairs) == (6, 5, 2, 1)
    assert (counted.weight, counted.sequence_weight) == (2 * 2.0 + 1.5 + 2.0, 2.0 + 0.75 + 0.0 + 2.0)


def test_a_part_of_a_step_is_told_by_its_tokens_and_by_its_answers() -> None:
    goal = objective(aggregation=aggregate.TokenMean("kept"))
    whole = batch(row(-1.0), row(-1.0), row(-1.0, trainable=[False, False]))
    whole = whole.replace(totals=goal.totals(whole))
    for part in ([0, 1], [0, 2]):  # two tokens of two and an answer too few; one token of two
        with pytest.raises(ValueError, match=rf"must see the whole optimizer step, but this batch has {2 if part[1] == 1 else 1} of 2 tokens"):
            goal.weights(whole.take(part))
    assert goal.weights(whole).tolist() == [0.5, 0.5, 0.0] and goal.weights(whole.take([2])).tolist() == [0.0]


def test_a_log_prob_that_is_absent_is_named_where_it_first_is() -> None:
    goal = objective(reference=reference.Named("behaviour"), source=["demo", "policy"])
    rows = [row(-1.0, -1.0, sample_id="first", logps={"behaviour": [-1.0, -1.0]}), row(-1.0, -1.0, -1.0, sample_id="second", logps={"behaviour": [-1.0, math.nan, math.nan]})]
    with pytest.raises(ValueError, match=r"stream 's': log-prob 'behaviour' is absent \(NaN\) on 2 of 5 tokens, first at column 3 of sample 'second'"):
        goal.weights(batch(*rows))


def test_a_weight_that_is_no_number_is_named_where_it_first_is() -> None:
    goal = objective(advantage=advantage.Column())
    data = batch(row(-1.0, -2.0, -3.0, sample_id="mine", advantage=[1.0, 1.0, math.inf, math.inf]))
    with pytest.raises(FloatingPointError, match=r"stream 's': the weight is inf at column 1 \(sample 'mine'\): log-prob -2, advantage inf, recorded log-probs:"):
        goal.weights(data)


def test_what_is_reported_of_a_stream() -> None:
    """Two tokens of three weigh something; the second pass repeats what a part can know."""
    goal = objective(advantage=advantage.Column())
    data = batch(row(-1.0, -2.0, -3.0, advantage=[0.0, 2.0, 0.0, -4.0]))
    found = goal(data).metrics
    assert found["s/tokens"] == (3.0, 0.0) and found["s/nll"] == (6.0, 3.0) and found["s/advantage_abs"] == (6.0, 3.0) and found["s/zero_weight"] == (1.0, 3.0)
    assert found["s/objective"] == (2.0 * -1.0 + -4.0 * -3.0, 0.0) and found["loss"] == (pytest.approx(-(2.0 * -1.0 + -4.0 * -3.0)), 0.0)
    again = goal(data, weights=torch.tensor([1.0, 0.0, 1.0]))
    assert set(again.metrics) == {"s/tokens", "s/nll", "loss"} and again.metrics["loss"] == (4.0, 0.0)


def test_what_masks_take_away_is_reported() -> None:
    class Some:
        def factor(self, view: Any, advantage: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.5, 0.0, 2.0, math.nan], dtype=view.logp.dtype)  # outside the stream anything

    found = objective(masks={"some": Some()})(batch(row(-1.0, -1.0, -1.0), row(-1.0, sources=["prompt", "policy"]))).metrics
    assert found["s/some/masked"] == (1.0, 3.0) and found["s/some/factor"] == (pytest.approx(2.5), 3.0)


class Column:
    """A regulariser on a full-vocabulary column."""

    coef, sign = 1.0, 1

    def __init__(self, column: str) -> None:
        self.column = column


def test_what_needs_the_tokens_as_they_were_given_refuses_other_inputs() -> None:
    def made(regularizer: Any = None, **stream: Any) -> Objective:
        mine = objective(own_input=0.5, **stream).streams["s"]
        return Objective({"s": mine}, {"r": regularizer}, name="small")

    assert made(Column("entropy")).needs.own_input and made(aggregation=aggregate.SequenceMeanTokenMean()).needs.own_input
    head = r"objective 'small': own_input changes what the model reads in the pass that is learnt from, and {} is computed where the given tokens are read"
    for what, given in {
        "'base'": {"advantage": advantage.LogRatio(num="base", den="self")},
        "'kl_reverse:base'": {"regularizer": Column("kl_reverse:base")},
        "coupling group": {"aggregation": aggregate.GroupMeanTokenMean()},
        "a scalar head": {"likelihood": likelihood.Score()},
    }.items():
        with pytest.raises(ValueError, match=head.format(what)):
            made(**given)

    class Beside(advantage.One):
        contexts = frozenset({"plain"})

    with pytest.raises(ValueError, match=head.format("other contexts")):
        made(advantage=Beside())


def test_nothing_of_a_plain_objective_is_live_or_coupled() -> None:
    assert (objective(likelihood=likelihood.Score(at="marked")).needs.at, objective(likelihood=likelihood.Score()).needs.head) == ("marked", "scalar")
    needs = objective().needs
    assert (needs.live, needs.coupling, needs.keep_whole, needs.head, needs.temperature, needs.own_input) == (False, "token", None, "lm", 1.0, False)
    assert needs.references == needs.columns == needs.contexts == frozenset()
    assert Objective(objective().streams, {"none": None}).regularizers == {}
    assert objective(aggregation=aggregate.GroupMeanTokenMean()).needs.keep_whole == "group" and objective(aggregation=aggregate.TokenMean("kept")).needs.keep_whole == "batch"


def test_a_regulariser_remembers_the_streams_it_acts_on() -> None:
    class Counts:
        coupling, live, remembers, coef, streams = "batch", True, True, 1.0, ("a",)

        def gradient(self, view: Any) -> torch.Tensor:
            assert view.name == "a"
            return torch.full_like(view.logp, view.recall(self, "tokens"))

        def remember(self, view: Any) -> dict[str, float]:
            return {"tokens": view.recall(self, "tokens") + float(view.on.sum())}

    class Still:
        coef = 0.0

        def gradient(self, view: Any) -> torch.Tensor:
            return torch.ones_like(view.logp)

    goal = Objective({name: objective(source=[s]).streams["s"] for name, s in (("a", "demo"), ("b", "policy"))}, {"r": Counts(), "still": Still()})
    data = batch(row(-1.0, -1.0), row(-1.0, sources=["prompt", "policy"])).replace(memory=(others := {"elsewhere": 3.0, "b/One.more": 1.0, "a/Still.more": 2.0}))
    memory = goal.remember(data)
    assert goal.remembers and memory == {**others, "a/Counts.tokens": 2.0}
    assert goal.memory_for_parts(memory) == others, "terms that remember nothing keep nothing to be left out"
    assert goal.weights(data).tolist() == [1.0] * 3 and goal.weights(data.replace(memory=memory)).tolist() == [-1.0, -1.0, 1.0]
    assert goal.remember(data.replace(memory=memory))["a/Counts.tokens"] == 4.0

    class Others(Counts):
        streams = ("b",)

    Others.__name__ = "Counts"
    assert Objective(goal.streams, {"a": Counts(), "b": Others()}).remembers
    with pytest.raises(ValueError, match="stream 'a' has Counts more than once, and what they remember would be one"):
        Objective(goal.streams, {"a": Counts(), "b": Counts()})


def test_an_infinite_ratio_that_is_masked_or_worth_nothing_weighs_nothing() -> None:
    class First:
        def factor(self, view: Any, advantage: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0, 1.0], dtype=view.logp.dtype)

    goal = objective(reference=reference.Named("behaviour"), advantage=advantage.Column(), masks={"first": First()})
    data = batch(row(-1.0, -1.0, -1.0, advantage=[0.0, 2.0, 0.0, 3.0], logps={"behaviour": [-math.inf, -math.inf, -1.0]}))
    assert goal.weights(data).tolist() == [0.0, 0.0, pytest.approx(3.0)]


def test_a_likelihood_multiplies_by_its_derivative() -> None:
    class Twice(likelihood.Token):
        def derivative(self, view: Any) -> torch.Tensor:
            return torch.full_like(view.logp, 2.0)

    assert objective(likelihood=Twice()).weights(batch(row(-1.0, -1.0))).tolist() == [2.0, 2.0]


def test_recorded_log_probs_are_read_in_the_precision_of_the_policys() -> None:
    data = batch(row(-1.0, logps={"behaviour": [-2.0]}))
    for kind in (torch.float32, torch.float64):
        assert objective().views(data, torch.tensor([-1.0], dtype=kind))["s"].reference("behaviour").dtype == kind


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_sums_over_what_comes_and_what_was_stay_in_their_sequence(length: int) -> None:
    rows = [row(*[-1.0] * length), row(-1.0, sources=["prompt", "policy"]), row(*[-1.0] * length)]
    rows[2] = row(*[-1.0] * length, sources=["prompt", *["demo"] * (length - 1), "policy"]) if length > 1 else rows[2]
    view = view_of(*rows)
    values = torch.arange(1.0, 2 * length + 2, dtype=torch.float64)
    for decay in (0.0, 0.5, 1.0):
        come, was, after = [], [], []
        for i in range(len(values)):
            here = [j for j in range(len(values)) if view.batch.seq[j] == view.batch.seq[i] and view.on[j]]
            ahead = [j for j in here if j >= i]
            come.append(sum(decay**n * float(values[j]) for n, j in enumerate(ahead)))
            was.append(sum(float(values[j]) for j in here if j <= i))
            after.append(float(values[min(j for j in here if j > i)]) if any(j > i for j in here) else 0.0)
        assert view.discounted(values, decay).tolist() == pytest.approx(come)
        assert view.running(values).tolist() == was and view.following(values).tolist() == after


def test_no_tokens_have_no_sums() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    view = objective().views(batch(), empty)["s"]
    assert view.discounted(empty).shape == view.running(empty).shape == view.following(empty).shape == (0,)


def test_a_regulariser_asks_for_its_column() -> None:
    goal = Objective(objective().streams, {"r": Column("entropy")})
    for given, got in ((None, "none"), ({}, "none"), ({"other": torch.zeros(1)}, r"\['other'\]")):
        with pytest.raises(ValueError, match=f"regulariser 'r' needs the column 'entropy' from the forward; got {got}"):
            goal(batch(row(-1.0)), columns=given)
