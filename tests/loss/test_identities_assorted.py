"""What must hold of objectives that stand alone: matrices, log-partitions, windows of several objectives, logits as values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.contrib.contrast import MatrixContrast
from posttrain.contrib.soft_q import TemporalDifference
from posttrain.contrib.windowed import Windowed
from posttrain.mixture.control import recall, steer
from posttrain.records import Row, TokenBatch
from tests.loss.cases import NORM, composed, make
from tests.loss.families.assorted import ANCHORS, matrix


# -- a matrix ---------------------------------------------------------------------------------------------------------------------------
def entries(scores: list[list[float]], numbers: list[int] | None = None) -> TokenBatch:
    """One token per entry; ``numbers`` renames instructions and answers alike."""
    n = len(scores)
    numbers = numbers or list(range(n))
    rows = [
        Row(
            ids=[1, 2],
            sources=["prompt", "demo"],
            logps={"current": [-1.0, scores[i][j]]},
            group="q",
            rewards={"reward": float(i == j), "instruction": float(numbers[i]), "answer": float(numbers[j])},
            sample_id=f"{i} {j}",
        )
        for i in range(n)
        for j in range(n)
    ]
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


SCORES = [[-1.0, -2.0, -0.5], [-3.0, -0.2, -1.5], [-2.5, -1.0, -0.7]]


def test_matrix_weights_are_twice_the_diagonal_less_both_softmaxes() -> None:
    s, batch = torch.tensor(SCORES, dtype=torch.float64), entries(SCORES)
    expected = (2 * torch.eye(3, dtype=torch.float64) - s.softmax(1) - s.softmax(0)) / 6
    got = composed("sami").weights(batch)[batch.trainable].reshape(3, 3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert abs(float(got.sum())) < 1e-15


def test_a_matrix_of_one_entry_teaches_nothing_and_names_are_only_names() -> None:
    assert not bool(composed("sami").weights(entries([[-1.0]])).any())
    assert torch.equal(composed("sami").weights(entries(SCORES, [7, 1, 4])), composed("sami").weights(entries(SCORES)))


def test_a_line_without_a_right_entry_teaches_nothing_and_a_missing_number_is_an_error() -> None:
    batch = entries(SCORES)
    none = replace(batch, rewards={**batch.rewards, "reward": torch.zeros(9, dtype=torch.float64)})
    assert not bool(composed("sami").weights(none).any())
    lost = replace(batch, rewards={k: v for k, v in batch.rewards.items() if k != "answer"})
    with pytest.raises(ValueError, match=r"needs the reward column 'answer'.*instruction"):
        composed("sami").weights(lost)
    with pytest.raises(ValueError, match="score='log_ratio_sum' does not exist"):
        MatrixContrast(score="log_ratio_sum")


def test_how_often_the_right_entry_leads_is_reported() -> None:
    metrics = composed("sami").weigh(entries(SCORES))[1]
    assert metrics["matrix/right_by_row"] == (2.0, 3.0)  # the last two rows
    assert metrics["matrix/right_by_column"] == (2.0, 3.0)  # the first two columns
    assert matrix(0).batch().num_sequences == 13


# -- a log-partition, two anchors ---------------------------------------------------------------------------------------------------------
def test_a_policy_at_its_target_is_at_rest_whatever_the_partition() -> None:
    """``mean log(pi/base) = 15 A + a constant of the prompt``."""
    batch = make(0, NORM).batch()
    policy = batch.trainable & (batch.source == 1)
    constant = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)[batch.group.clamp(min=0)[batch.seq]]
    base = torch.where(policy, batch.logps["current"] - 15 * batch.advantage - constant, torch.nan)
    there = batch.with_logps(base=base, old=batch.logps["current"])
    assert float(composed("flowrl").weights(there).abs().max()) < 1e-12
    assert float(composed("flowrl").weights(batch).abs().max()) > 1e-3


def test_without_anchors_on_policy_it_is_grpo() -> None:
    none = ("regularizers.kl.coef=0.0", "regularizers.kl_previous.coef=0.0")
    batch = make(0, NORM).batch()
    same = batch.with_logps(behaviour=batch.logps["old"])
    assert torch.equal(composed("remix", none).weights(same), composed("grpo").weights(same))
    assert not torch.equal(composed("remix", ANCHORS).weights(same), composed("grpo").weights(same))


def test_the_anchor_moves_from_the_base_to_the_policy_before() -> None:
    batch = make(0, NORM).batch()
    at = {p: composed("remix").weights(batch.replace(progress=p)) for p in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(at[0.5], (at[0.0] + at[1.0]) / 2, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(at[0.0], at[1.0], rtol=1e-6, atol=0)


# -- windows --------------------------------------------------------------------------------------------------------------------------
def shares(first: list[float], second: list[float], temperature: float = 5.0, most: float = 10.0) -> tuple[float, float]:
    both = {n: Windowed(n, ("a", "b"), i, len(first) // 2, temperature, most) for i, n in enumerate(("x", "y"))}
    memory: dict[str, float] = {}
    for a, b in zip(first, second, strict=True):
        memory = {**memory, **steer(both, memory, {"a": (2 * a, 2.0), "b": (b, 1.0)}, 8)}
    x, y = (both[n].value(recall(both[n], memory)) for n in ("x", "y"))
    return x, y


SATURATED, NOISY = [0.01] * 4, [0.5, 0.5, 0.1, 0.9]  # means 0.5 and 0.5, deviation 0.4


@pytest.mark.parametrize(
    ("first", "second", "temperature", "expected"),
    [
        (SATURATED, NOISY, 5.0, (0.960, 1.040)),
        (SATURATED, NOISY, 0.5, (0.620, 1.380)),
        ([0.4, 0.4, 0.2, 0.2], [0.5] * 4, 5.0, (0.950, 1.050)),
        ([0.4, 0.4, 0.25, 0.15], [0.5, 0.5, 0.55, 0.45], 5.0, (0.953, 1.047)),  # means .2/.4 against .5/.5, deviations .05
        ([0.0] * 4, [0.0] * 4, 5.0, (1.0, 1.0)),
    ],
)
def test_published_shares(first: list[float], second: list[float], temperature: float, expected: tuple[float, float]) -> None:
    got = shares(first, second, temperature)
    assert sum(got) == pytest.approx(1.0)
    assert tuple(2 * x for x in got) == pytest.approx(expected, abs=6e-4)


def test_shares_are_equal_until_two_windows_are_full_and_bounded_after() -> None:
    control = Windowed("x", ("a", "b"), 1, 2)
    memory: dict[str, float] = {}
    for a, b in zip(SATURATED[:3], NOISY[:3], strict=True):
        memory = {**memory, **steer({"x": control}, memory, {"a": (a, 1.0), "b": (b, 1.0)}, 8)}
        assert control.value(recall(control, memory)) == control(0.0) == 0.5
    unmoved = steer({"x": control}, memory, {"a": (0.0, 0.0), "b": (1.0, 1.0)}, 8)
    assert recall(control, {**memory, **unmoved}) == recall(control, memory)
    grown = shares([0.0, 0.0, 1.0, 1.0], [0.5] * 4, 1.0, most=3.0)
    assert grown[0] / grown[1] == pytest.approx(math.exp(2.0))


def test_signals_without_a_meaning_and_settings_without_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"controller 'x': b is -1; a signal below 0"):
        steer({"x": Windowed("x", ("a", "b"))}, {}, {"a": (1.0, 1.0), "b": (-1.0, 1.0)}, 8)
    with pytest.raises(ValueError, match=r"follows the metric 'b', which this loss does not report"):
        steer({"x": Windowed("x", ("a", "b"))}, {}, {"a": (1.0, 1.0)}, 8)
    with pytest.raises(ValueError, match="of=2 names none of the 2 metrics"):
        Windowed("x", ("a", "b"), 2)
    for bad in ({"window": 0}, {"temperature": 0.0}, {"most": 0.5}):
        with pytest.raises(ValueError, match="must be at least 1, temperature"):
            Windowed("x", ("a", "b"), **bad)


def test_both_shares_of_the_shipped_loss_see_their_metrics() -> None:
    objective, batch = composed("recap"), make(0, NORM).batch()
    metrics = objective.weigh(batch)[1]
    memory = steer(objective.controls, {}, metrics, 8)
    assert memory["control/rollouts_share.seen"] == memory["control/demos_share.seen"] == 1.0
    assert memory["control/demos_share.1.19"] > 0 and memory["control/demos_share.0.19"] > 0


# -- logits as values ------------------------------------------------------------------------------------------------------------------
def test_without_the_penalty_it_is_sft_and_only_the_penalty_feels_a_shift_of_logits() -> None:
    batch = make(0).batch()
    assert torch.equal(composed("td_mle").weights(batch), composed("sft").weights(batch))
    value = torch.linspace(-1.0, 1.0, batch.num_tokens, dtype=torch.float64)
    for coef, same in ((0.0, True), (0.5, False)):
        objective = composed("td_mle", (f"regularizers.td.coef={coef}",))
        before, after = (float(objective(batch, columns={"logsumexp": v}).loss) for v in (value, value + 1.0))
        assert (before == after) is same


def test_the_value_behind_the_last_token_is_zero_and_no_value_crosses_to_the_next_text() -> None:
    logp, value = [-0.5, -0.25, -2.0], [3.0, 1.0, 2.0]
    rows = [Row(ids=[1, *range(n)], sources=["prompt", *["demo"] * n], sample_id=str(n)) for n in (2, 1)]
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    view = composed("td_mle").views(batch, torch.tensor([0.0, *logp[:2], 0.0, logp[2]], dtype=torch.float64)[-batch.num_tokens :])["demos"]
    on = view.on.nonzero()[:, 0]
    v, x = torch.zeros(batch.num_tokens, dtype=torch.float64), torch.zeros(batch.num_tokens, dtype=torch.float64)
    v[on], x[on] = torch.tensor(value, dtype=torch.float64), torch.tensor(logp, dtype=torch.float64)
    got = TemporalDifference(gamma=0.5).of_column(view, x, v)[on].tolist()
    assert got == pytest.approx([(3.0 - 0.5 - 0.5 * 1.0) ** 2, (1.0 - 0.25) ** 2, (2.0 - 2.0) ** 2])
    with pytest.raises(ValueError, match=r"gamma=1\.5 must lie between 0 and 1"):
        TemporalDifference(gamma=1.5)
