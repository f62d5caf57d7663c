"""Edges of terms that no published loss reaches by itself: one list, one group, one side of a pair, a published loss beside its slope."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference
from posttrain.records import Row, TokenBatch

SELF = reference.Current()


def row(*logps: float, base: float = -1.0, **more: Any) -> Row:
    n = len(logps)
    return Row(ids=[1] * (n + 1), sources=["prompt", *["demo"] * n], logps={"current": [0.0, *logps], "base": [0.0, *[base] * n]}, **more)


def batch(*rows: Row) -> TokenBatch:
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


def objective(**stream: Any) -> Objective:
    given = {"source": ["demo"], "likelihood": likelihood.Token(), "reference": SELF, "advantage": advantage.One(), "aggregation": aggregate.PairSum(), **stream}
    return Objective({"s": Stream(**given)}, name="edge")


def test_the_sigmoid_loss_of_a_pair_is_reported_as_it_is_learnt() -> None:
    """1 - sigmoid(beta h), whose slope the weights have: a step along them lowers what is reported."""
    goal = objective(paired=True, advantage=advantage.Pairwise(f="sigmoid", score="log_ratio_sum", to="base", beta=0.5))
    up, down = -0.4, -1.7
    pair = [row(up, pair="p", side="chosen"), row(down, pair="p", side="rejected")]
    found = goal(batch(*pair))
    total, count = found.metrics["s/preference_loss"]
    assert (total, count) == (pytest.approx(1 / (1 + math.exp(0.5 * (up - down)))), 1.0)
    step = 1e-6
    nudged = goal(batch(row(up + step, pair="p", side="chosen"), pair[1])).metrics["s/preference_loss"][0]
    assert float(goal.weights(batch(*pair))[0]) == pytest.approx(-(nudged - total) / step, rel=1e-4)


@pytest.mark.parametrize("f", ["softmax", "noise_contrastive", "reverse_kl"])
def test_lists_are_counted_however_many_answers_they_hold(f: str) -> None:
    goal = objective(advantage=advantage.Listwise(f=f, score="log_ratio_sum", to="base", beta=0.5, of="score"), aggregation=aggregate.GroupSum())
    lists = [row(-0.5, group="a", rewards={"score": 1.0}), row(-0.7, group="b", rewards={"score": 1.0}), row(-0.9, group="b", rewards={"score": 0.0})]
    found = goal(batch(*lists)).metrics
    if f == "noise_contrastive":  # an answer alone is drawn against one of noise, one of two against half of it each
        r, (p, q) = [0.5 * (x + 1.0) for x in (-0.5, -0.7, -0.9)], (1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)))
        up, down = [math.log1p(math.exp(-x)) for x in r], [math.log1p(math.exp(x)) for x in r]
        assert found["s/preference_loss"][0] == pytest.approx(up[0] + down[0] + p * up[1] + q * up[2] + (down[1] + down[2]) / 2)
    assert found["s/preference_loss"][1] == pytest.approx(2.0) and found["s/accuracy"] == (pytest.approx(2.0), pytest.approx(2.0))


def test_one_group_is_one() -> None:
    goal = objective(aggregation=aggregate.GroupSumTokenMean())
    one = [row(-1.0, -1.0, group="a"), row(-1.0, group="a")]
    assert goal.weights(batch(*one)).tolist() == [0.5, 0.5, 1.0]
    assert goal.weights(batch(*one, row(-1.0, group="b"))).tolist() == [0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(("side", "learnt"), [("chosen", [1.0, 0.0, 0.0]), ("rejected", [0.0, 1.0, 0.0])])
def test_a_stream_of_one_side(side: str, learnt: list[float]) -> None:
    goal = objective(side=side, aggregation=aggregate.TokenMean())
    assert goal.weights(batch(row(-1.0, pair="p", side="chosen"), row(-1.0, pair="p", side="rejected"), row(-1.0))).tolist() == learnt


def test_one_reason_may_be_written_as_a_word() -> None:
    assert mask.DropTruncated("length") == mask.DropTruncated(["length"]) == mask.DropTruncated(("length",))
    assert hash(mask.DropTruncated(["length", "aborted"])) == hash(mask.DropTruncated(("length", "aborted")))


def test_an_advantage_of_zero_is_clipped_on_neither_side() -> None:
    """Its weight is 0 whatever the factor; it must not count as a clipped token."""
    goal = objective(advantage=advantage.Column(), reference=reference.Named("old"), masks={"inner": mask.InnerClip(low=0.1, high=0.1)}, likelihood=likelihood.Token(ratio="sequence_geometric"))
    row = Row(ids=[1] * 3, sources=["prompt", "demo", "demo"], logps={"current": [0.0, -3.0, -1.0], "old": [0.0, -1.0, -3.0]}, advantage=0.0, pair="p", side="chosen")
    other = Row(ids=[1] * 2, sources=["prompt", "demo"], logps={"current": [0.0, -3.0], "old": [0.0, -1.0]}, advantage=-1.0, pair="p", side="rejected")
    assert goal(batch(row, other)).metrics["s/inner/masked"] == (1.0, 3.0)


def test_an_empty_answer_is_on_the_list_of_its_pair() -> None:
    goal = objective(paired=True, advantage=advantage.Listwise(f="softmax", score="log_ratio_sum", to="base", beta=0.5, of="side", temperature=0.0))
    empty = Row(ids=[1, 1], sources=["prompt", "prompt"], trainable=[False, False], logps={"current": [0.0, -1.0], "base": [0.0, -1.0]}, pair="p", side="rejected")
    found = goal(batch(row(-0.6, pair="p", side="chosen"), empty))
    p = 1 / (1 + math.exp(-0.5 * 0.4))
    assert goal.weights(batch(row(-0.6, pair="p", side="chosen"), empty)).tolist() == [pytest.approx(0.5 * (1 - p)), 0.0]
    assert found.metrics["s/preference_loss"] == (pytest.approx(-math.log(p)), pytest.approx(1.0))


def test_a_ratio_at_its_limit_is_not_beyond_it() -> None:
    goal = objective(advantage=advantage.LogRatio(num="base", den="self", limit=0.5), aggregation=aggregate.TokenMean())
    assert goal(batch(row(-1.0, -1.5, -1.5001, -0.4999, base=-1.0))).metrics["s/log_ratio_clamped"] == (2.0, 4.0)


def test_an_answer_labelled_by_half_is_not_good_and_a_score_of_nothing_is_not_right() -> None:
    goal = objective(advantage=advantage.Pointwise(f="logistic", score="log_ratio_sum", to="base", beta=0.5), aggregation=aggregate.SequenceMeanTokenSum())
    found = goal(batch(row(-0.5, rewards={"label": 0.5}), row(-1.0, rewards={"label": 1.0}), row(-1.0, rewards={"label": 0.0}), row(-0.5, rewards={"label": 0.51}))).metrics
    assert found["s/good"] == (2.0, 4.0), "1.0 and 0.51"
    assert found["s/accuracy"] == (2.0, 4.0), "the score of 0 is right for the bad one alone"


def test_whitening_without_a_mean_leaves_what_does_not_vary() -> None:
    goal = objective(advantage=advantage.Whiten(advantage.Column(), center=False, eps=0.0), aggregation=aggregate.TokenMean())
    assert goal.weights(batch(row(-1.0, -2.0, advantage=3.0))).tolist() == pytest.approx([1.5, 1.5])


def test_a_penalty_of_one_on_falling_short_is_one() -> None:
    def worth(shortfall: float) -> float:
        goal = objective(paired=True, advantage=advantage.Pairwise(score="log_ratio_sum", to="base", beta=0.5, shortfall=shortfall))
        total, _ = goal(batch(row(-1.6, pair="p", side="chosen"), row(-0.8, pair="p", side="rejected"))).metrics["s/preference_loss"]
        return total

    assert [worth(more) for more in (0.0, 1.0, 2.0)] == [pytest.approx(math.log1p(math.exp(-0.5 * ((1 + more) * -0.6 - 0.2)))) for more in (0.0, 1.0, 2.0)]


def test_rows_under_another_prompt_need_something_to_read() -> None:
    goal = objective(advantage=advantage.Pointwise(f="sigmoid", score="log_ratio_sum", to="base", shift="mismatched"), aggregation=aggregate.SequenceMeanTokenSum())
    empty = Row(ids=[1, 1], sources=["prompt", "demo"], trainable=[False, False], logps={"current": [0.0, -1.0], "base": [0.0, -1.0]}, context="mismatched")
    with pytest.raises(ValueError, match="needs rows whose answer stands under another prompt"):
        goal.weights(batch(row(-1.0, rewards={"label": 1.0}), empty))


def test_what_a_difference_of_two_opinions_is_taken_over() -> None:
    assert mask.Disagreement(per="token").coupling == "token" and mask.Disagreement(per="mean").coupling == "sequence"


def test_a_taper_of_negatives_leaves_an_advantage_of_zero_alone() -> None:
    goal = objective(masks={"taper": mask.NegativeTaper(to="base")}, advantage=advantage.Column(), aggregation=aggregate.TokenMean())
    found = goal(batch(row(-2.0, advantage=0.0), row(-2.0, advantage=-1.0))).metrics
    assert found["s/taper/factor"] == (pytest.approx(1.0 + math.exp(-1.0)), 2.0)


def test_one_stream_of_two_may_read_its_own_choices() -> None:
    own = Stream(["demo"], likelihood.Token(), SELF, advantage.One(), aggregate.TokenMean(), own_input=0.2)
    plain = Stream(["policy"], likelihood.Token(), SELF, advantage.One(), aggregate.TokenMean())
    both, none = Objective({"a": own, "b": plain}), Objective({"b": plain})
    assert both.needs.own_input and not none.needs.own_input
    given = batch(row(-1.0, -2.0))
    assert none.own_input(given) is None and both.own_input(given) is not None


def test_a_hinge_that_is_cleared_costs_nothing() -> None:
    goal = objective(paired=True, advantage=advantage.Pairwise(f="hinge", score="log_ratio_sum", to="base", beta=0.5))
    cleared, short = ([row(up, pair="p", side="chosen"), row(-1.0, pair="p", side="rejected")] for up in (4.0, 0.0))
    assert [goal(batch(*pair)).metrics["s/preference_loss"] for pair in (cleared, short)] == [(0.0, 1.0), (0.5, 1.0)]


def test_settings_of_lists_are_read() -> None:
    for wrong, said in (({"temperature": -1.0}, "temperature=-1.0 must not be negative"), ({"beta": 0.0}, "beta=0"), ({"f": "hinge"}, "f='hinge' does not exist"), ({"score": "sum"}, "score='sum'")):
        with pytest.raises(ValueError, match=said):
            advantage.Listwise(**wrong)  # type: ignore[arg-type]


def test_a_shift_is_reported_where_there_is_one() -> None:
    terms = [advantage.Pointwise(f="logistic", score="log_ratio_sum", to="base", shift=shift) for shift in ("none", "running_mean")]
    rows = [row(-0.5, rewards={"label": 1.0}), row(-1.5, rewards={"label": 0.0})]
    assert ["s/shift" in objective(advantage=term, aggregation=aggregate.SequenceMeanTokenSum())(batch(*rows)).metrics for term in terms] == [False, True]


@pytest.mark.parametrize(("ratio", "masked"), [(80.0, 0.0), (80.5, 1.0), (100.0, 1.0), (200.0, 1.0)])
def test_a_taper_that_has_gone_to_nothing_counts_as_a_mask(ratio: float, masked: float) -> None:
    goal = objective(masks={"taper": mask.GammaTaper(to="base")}, aggregation=aggregate.TokenMean())
    found = goal(batch(row(-1.0, base=-1.0 - ratio)))
    assert found.metrics["s/taper/masked"] == (masked, 1.0) and float(found.loss) == 0.0


def test_lambda_by_length_is_never_below_zero() -> None:
    """lambda = 1 - 1/(a T): with a = 0.25, 0 up to four tokens, then 1/5 and more."""
    def at_start(tokens: int) -> float:
        goal = objective(advantage=advantage.GeneralizedAdvantage(lam_by_length=0.25, coef=0.0), reference=SELF, aggregation=aggregate.PairSum())
        one = Row(ids=[1] * (tokens + 1), sources=["prompt", *["demo"] * tokens], logps={"current": [-1.0] * (tokens + 1), "value": [0.0] * tokens + [0.5]}, advantage=1.0, pair="p", side="chosen")
        return float(goal.weights(batch(one))[0])

    # all values but the last are 0: the reward, 1 - 0.5 at the end and 0.5 before it, is carried back by lambda^(T-1) and lambda^(T-2)
    for tokens in (2, 3, 4, 5, 8):
        lam = max(1 - 1 / (0.25 * tokens), 0.0)
        assert at_start(tokens) == pytest.approx(0.5 * lam ** (tokens - 1) + 0.5 * lam ** (tokens - 2)), tokens


@pytest.mark.parametrize(
    ("level", "values", "fits"),
    [
        ("sequence_geometric", {"low": 0.0999, "high": 0.0999}, True), ("sequence_geometric", {"low": 0.1}, False), ("sequence_geometric", {"high": 0.1}, False),
        ("token", {"low": 0.01, "high": 0.01}, True), ("token", {"low": 0.0099}, False), ("token", {"high": 0.0099}, False), ("token", {"high": 0.999}, True),
        ("token", {"high": 1.0}, False), ("token", {"low": 1.0, "high": math.inf}, True), ("token", {"low": 0.0, "high": 0.0}, True),
    ],
)  # fmt: skip
def test_ranges_at_the_ends_of_their_scale(level: str, values: dict[str, float], fits: bool) -> None:
    given = {"low": {"token": 0.2}.get(level, 3e-4), "high": {"token": 0.2}.get(level, 3e-4), **values}
    stream = Stream(["demo"], likelihood.Token(ratio=level), reference.Named("old"), advantage.One(), aggregate.TokenMean())
    if fits:
        mask.RatioClip(**given).fits(stream)
    else:
        with pytest.raises(ValueError, match=r"mask\.RatioClip"):
            mask.RatioClip(**given).fits(stream)


@pytest.mark.parametrize(("gain", "masked"), [(1.0, 0.0), (0.0, 0.0), (-1.0, 0.0)])
def test_a_probability_at_its_bound_has_not_moved_too_far(gain: float, masked: float) -> None:
    """From one half to 1 and from 1 to one half, bounds of one half; and an advantage of 0 pushes nowhere."""
    goal = objective(masks={"near": mask.Divergence("tv", 0.5, 0.5, to="base")}, advantage=advantage.Column(), aggregation=aggregate.TokenMean())
    half = math.log(0.5)
    assert goal(batch(row(0.0, base=half, advantage=gain), row(half, base=0.0, advantage=gain))).metrics["s/near/masked"] == (masked, 2.0)


def test_an_advantage_of_zero_pushes_nowhere() -> None:
    goal = objective(masks={"near": mask.Divergence("tv", 0.1, 0.1, to="base")}, advantage=advantage.Column(), aggregation=aggregate.TokenMean())
    half = math.log(0.5)
    for gain, masked in ((0.0, 0.0), (1e-9, 1.0), (-1e-9, 1.0)):
        found = goal(batch(row(0.0, base=half, advantage=gain), row(half, base=0.0, advantage=gain))).metrics
        assert found["s/near/masked"] == (masked, 2.0)


def test_classes_weigh_what_they_are_given_and_are_told_by_their_labels() -> None:
    def goal(f: str, good: float, bad: float) -> Objective:
        return objective(advantage=advantage.Pointwise(f=f, score="log_ratio_sum", to="base", beta=0.5, good=good, bad=bad), aggregation=aggregate.SequenceMeanTokenSum())  # type: ignore[arg-type]

    rows = [row(-0.6, rewards={"label": 0.5}), row(-1.4, rewards={"label": 1.0})]
    single, double = goal("squared", 1.0, 1.0).weights(batch(*rows)).tolist(), goal("squared", 2.0, 2.0).weights(batch(*rows)).tolist()
    assert double == pytest.approx([2 * w for w in single]) and single == pytest.approx([-0.4, 1.4])
    quiet = goal("logistic", 0.4, 0.4)(batch(row(-0.6, rewards={"label": 1.0}), row(-1.4, rewards={"label": 1.0}))).metrics
    assert quiet["s/accuracy"] == (1.0, 2.0), "good is the label, not the weight of its class"


def test_the_second_pass_counts_tokens_too() -> None:
    goal, data = objective(aggregation=aggregate.TokenMean()), batch(row(-1.0, -1.0, -1.0), row(-1.0))
    again = goal(data, logp=data.logps["current"].clone().requires_grad_(), weights=goal.weights(data)).metrics
    assert again["s/tokens"] == goal(data).metrics["s/tokens"] == (4.0, 0.0)


def test_a_score_of_nothing_is_right_for_a_bad_answer_alone() -> None:
    goal = objective(advantage=advantage.Pointwise(f="logistic", score="log_ratio_sum", to="base", beta=0.5), aggregation=aggregate.SequenceMeanTokenSum())
    for label, right in ((0.0, 2.0), (1.0, 0.0)):
        assert goal(batch(*[row(-1.0, rewards={"label": label})] * 2)).metrics["s/accuracy"] == (right, 2.0)


def test_bounds_of_a_rejection_are_kept() -> None:
    for low, high in ((0.5, 1.0), (1.0, 2.0)):
        goal = objective(masks={"reject": mask.Reject(low, high, to="base", over="self")}, aggregation=aggregate.TokenMean())
        assert goal(batch(row(-1.0, base=-1.0))).metrics["s/reject/masked"] == (0.0, 1.0)


def test_a_reward_that_is_missing_is_an_error_beside_answers_that_need_none() -> None:
    goal = objective(advantage=advantage.Pairwise(score="log_ratio_sum", to="base", gap="score"))
    with pytest.raises(ValueError, match=r"reads the reward 'score'; the batch has none"):
        rows = [row(x, pair=name, side=side) for name in "pq" for x, side in ((-1.0, "chosen"), (-2.0, "rejected"))]
        alone = Row(ids=[1, 2], sources=["prompt", "tool"], logps={"current": [0.0, -1.0], "base": [0.0, -1.0]})
        goal.weights(batch(*rows, alone))


def test_all_of_what_is_read_may_be_its_own() -> None:
    def share(value: float) -> Any:
        stream = Stream(["demo"], likelihood.Token(), SELF, advantage.One(), aggregate.TokenMean(), own_input=value)
        return Objective({"s": stream}).own_input(batch(row(-1.0, -1.0)))

    assert share(1.0).tolist() == [1.0, 1.0] and share(0.0) is None
    with pytest.raises(ValueError, match="own_input"):
        share(1.1)


def test_pairs_of_another_stream_are_not_counted() -> None:
    goal = objective(source=["policy"], paired=True, advantage=advantage.Pairwise(score="log_ratio_sum", to="base", beta=0.5))

    def pair(name: str, source: str) -> list[Row]:
        return [
            Row(ids=[1, 2], sources=["prompt", source], logps={"current": [0.0, x], "base": [0.0, -1.0]}, pair=name, side=side)  # type: ignore[arg-type]
            for x, side in ((-0.5, "chosen"), (-2.0, "rejected"))
        ]

    own, both = goal(batch(*pair("p", "policy"))).metrics, goal(batch(*pair("p", "policy"), *pair("q", "demo"))).metrics
    assert own["s/preference_loss"] == both["s/preference_loss"] and both["s/preference_loss"][1] == 1.0


def test_what_is_declared_by_settings() -> None:
    told = [advantage.Pointwise(f="sigmoid", score="log_ratio_sum", to="base", shift=shift).contexts for shift in ("none", "mismatched", "running_mean")]
    assert told == [frozenset(), frozenset({"mismatched"}), frozenset()]
    for source in (["demo"], ("demo",)):
        assert Stream(source, likelihood.Token(), SELF, advantage.One(), aggregate.TokenMean()).source == ("demo",)
