"""Known numbers and limits of reward models, critics and the returns they are drawn towards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, load, reference, regularizer, value
from posttrain.records import Row, TokenBatch

NAN = math.nan


def read(numbers: list[list[float]], **columns: list[list[float]]) -> TokenBatch:
    """One sequence per list, every column after the first token read by the head; ``current`` is what it says."""
    rows = []
    for i, own in enumerate(numbers):
        more = {name: values[i] for name, values in columns.items()}
        logps = {"current": [NAN, *own]} | {n: [NAN, *more[n]] for n in more if n in ("value", "old", "base")}
        rows.append(Row(ids=[1] * (len(own) + 1), sources=["prompt"] + ["policy"] * len(own), logps=logps, advantage=[0.0, *more.get("advantage", own)]))
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


def pair(chosen: float, rejected: float) -> TokenBatch:
    rows = [
        Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [NAN, r]}, pair="p", side=side)  # type: ignore[arg-type]
        for r, side in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


def close(got: Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_bradley_terry_at_equal_rewards() -> None:
    """ln 2 and a half on each side; with a margin of 1, sigmoid(1); the two sides of a pair sum to 0."""
    for margin, slope in ((0.0, 0.5), (1.0, 0.7310585786300049)):
        objective = load("reward_model", [f"streams.pairs.advantage.margin={margin}"])
        weights, metrics = objective.weigh(pair(0.3, 0.3))
        close(weights, [slope, -slope])
        assert metrics["pairs/preference_loss"][0] == pytest.approx(math.log1p(math.exp(margin)))
    assert float(load("reward_model").weights(pair(1.7, -0.4)).sum()) == pytest.approx(0.0, abs=1e-15)


def test_an_offset_is_free_until_it_is_centred() -> None:
    plain, centred = load("reward_model"), load("reward_model", ["regularizers.centre.coef=0.01"])
    close(plain.weights(pair(1.0, 0.0)) - plain.weights(pair(6.0, 5.0)), [0.0, 0.0])
    close(centred.weights(pair(1.0, 0.0)) - plain.weights(pair(1.0, 0.0)), [-0.02, -0.02])
    close(centred.weights(pair(6.0, 5.0)) - plain.weights(pair(6.0, 5.0)), [-0.22, -0.22])


def test_the_clipped_value_error() -> None:
    """Known gradients: inside, inside, clipped away, and twice the unclipped error although V is outside."""
    batch = read([[0.0], [0.1], [0.3], [0.5], [-0.4]], value=[[0.0]] * 5, advantage=[[1.0], [1.0], [1.0], [-1.0], [1.0]])
    objective = load("value", ["streams.rollouts.aggregation._target_=posttrain.loss.aggregate.SequenceMeanTokenSum"])
    weights, metrics = objective.weigh(batch)
    close(-5 * weights, [-1.0, -0.9, 0.0, 1.5, -1.4])
    assert metrics["rollouts/value_clipped"] == (1.0, 5.0)
    free = load("value", ["streams.rollouts.advantage.clip=null"])
    close(-5 * free.weights(batch), [-1.0, -0.9, -0.7, 1.5, -1.4])
    wide = load("value", ["streams.rollouts.advantage.clip=100.0"])
    close(wide.weights(batch) - free.weights(batch), [0.0] * 5)


def gae(gamma: float, lam: float, reward: float = 1.0, values: tuple[float, ...] = (0.2, 0.5, 0.4)) -> tuple[Tensor, Tensor]:
    batch = read([[-1.0] * 3], value=[list(values)], advantage=[[reward] * 3])
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.GeneralizedAdvantage(gamma, lam), aggregate.TokenMean())
    view = Objective({"rollouts": stream}).views(batch)["rollouts"]
    return stream.advantage.values(view), stream.advantage.returns(view)


def test_known_advantages_and_returns() -> None:
    for lam, expected in ((0.95, [0.7465, 0.47, 0.6]), (1.0, [0.8, 0.5, 0.6]), (0.0, [0.3, -0.1, 0.6])):
        found, returns = gae(1.0, lam)
        close(found, expected)
        close(returns, [a + v for a, v in zip(expected, (0.2, 0.5, 0.4), strict=True)])
    close(gae(1.0, 1.0)[1], [1.0, 1.0, 1.0])
    close(gae(1.0, 0.3, values=(0.0, 0.0, 0.0))[1], [0.09, 0.3, 1.0])


def test_labels_of_steps() -> None:
    """Cross-entropy pulls by the difference of label and probability; a step alone is binary cross-entropy; labels are probabilities."""
    batch = read([[0.0, 2.0]], advantage=[[1.0, 0.25]])
    batch = batch.replace(source=torch.full_like(batch.source, 2))
    weights, metrics = load("process_reward_model").weigh(batch)
    p = 1 / (1 + math.exp(-2.0))
    close(2 * weights, [0.5, 0.25 - p])
    assert metrics["steps/value_loss"][0] == pytest.approx(math.log(2) - 0.25 * math.log(p) - 0.75 * math.log(1 - p))
    assert metrics["steps/accuracy"] == (0.0, 2.0), "0 is not above 0, and a label of 1/4 is no yes"
    with pytest.raises(ValueError, match=r"a label of sample .* is 3; f=logistic takes labels from 0 to 1"):
        load("process_reward_model").weights(batch.replace(advantage=torch.full_like(batch.advantage, 3.0)))


def test_two_answers_judged_alone_rank_as_their_difference() -> None:
    """Bradley-Terry on the log-odds of independent judgements: the pair's probability is that of r_w - r_l."""
    r = torch.tensor([0.7, -0.2], dtype=torch.float64)
    odds = torch.log(torch.sigmoid(r) / (1 - torch.sigmoid(r)))
    close(load("reward_model").weights(pair(*odds.tolist())), [float(torch.sigmoid(r[1] - r[0])), -float(torch.sigmoid(r[1] - r[0]))])


def test_heads_do_not_mix() -> None:
    """Every term that reads the other head is refused, with its name and what to change."""
    score = likelihood.Score()
    words = {"source": ("demo",), "reference": reference.Current(), "advantage": advantage.One(), "aggregation": aggregate.TokenMean()}
    scalar, token = Stream(likelihood=score, **words), Stream(likelihood=likelihood.Token(), **words)
    with pytest.raises(ValueError, match="all streams share one forward, so one head"):
        Objective({"a": scalar, "b": token})
    with pytest.raises(ValueError, match="one head, read at one place"):
        Objective({"a": scalar, "b": replace(scalar, likelihood=likelihood.Score("before"))})
    with pytest.raises(ValueError, match="advantage: Towards reads the number of a scalar head; set the stream's likelihood"):
        replace(token, advantage=value.Towards())
    with pytest.raises(ValueError, match="reference: Named compares with the log-probs 'old', and a scalar head has none"):
        replace(scalar, reference=reference.Named("old"))
    with pytest.raises(ValueError, match="regulariser 'kl': KL compares with the log-probs 'base'"):
        Objective({"a": scalar}, {"kl": regularizer.KL()})
    with pytest.raises(ValueError, match="regulariser 'centre': PairCentre reads the number of a scalar head"):
        Objective({"a": token}, {"centre": regularizer.PairCentre()})
    with pytest.raises(ValueError, match="a scalar head has no probabilities, so no full-vocabulary regulariser"):
        Objective({"a": scalar}, {"entropy": regularizer.Entropy()})
    for words_, like, why in ((advantage.Pairwise(score="value", beta=1.0), token, "score=value"), (advantage.Pairwise(score="logp_sum", beta=1.0), scalar, "score=logp_sum")):
        with pytest.raises(ValueError, match=f"{why}: score=value is what a scalar head gives"):
            replace(like, advantage=words_, paired=True, aggregation=aggregate.PairSum())
    with pytest.raises(ValueError, match="at='start' does not exist; choose from end, marked, before"):
        likelihood.Score("start")  # type: ignore[arg-type]
