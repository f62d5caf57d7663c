"""What is reported beside the gradient is the published number: the transcription's own value, where a loss is one stream of one kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.loss import Objective, load
from posttrain.records import TokenBatch
from tests.loss.cases import CASES, Data, composed

LOSSES = ("preference_loss", "value_loss")
PER_PAIR = {"bco_pair": 2.0, "sppo": 2.0, "apo_zero": 2.0}
"""Losses of labelled answers are reported per answer, and published per pair."""
OTHERWISE = {"wpo", "wpo, aligned", "wpo, aligned, without a limit", "ddpo", "reward_model_pointwise", "reward_model_pointwise, squared"}
"""Reported without the weights of pairs, or per column where all of an answer's columns are read here."""
TOKENWISE = {"sft", "reinforce", "rloo", "remax", "opo", "otb", "maxrl", "gpg", "openchat", "weak_to_strong", "osft", "topr", "a_lol", "vespo"}


def alone(objective: Objective) -> bool:
    return len(objective.streams) == 1 and not any(getattr(r, "coef", 0) != 0 for r in objective.regularizers.values())


def measured(name: str, seed: int = 1) -> tuple[dict[str, float], float]:
    """Metrics as means (or sums), and the transcription's value."""
    data: Data = CASES[name].make(seed)
    batch, objective = data.batch(), CASES[name].load()
    rows = data.rows_of(batch).detach()
    for i, s in enumerate(data.seqs):
        at = batch.seq == i
        s["l"], s["rows"] = [None, *rows.gather(1, batch.target_ids[:, None])[:, 0][at].unbind()], [None, *rows[at].unbind()]
    found = objective.weigh(batch)[1]
    (stream,) = objective.streams
    return {k.removeprefix(f"{stream}/"): v / n if n else v for k, (v, n) in found.items()}, float(case_value(name, data))


def case_value(name: str, data: Data) -> torch.Tensor:
    return CASES[name].objective(data.seqs)


REPORTED = """
dpo; cdpo; robust dpo; hinge; ipo; ipo with sums; dpo_norm; robust_dpo; dpo with soft labels; rso; kto; kto with weights; bco;
bco_pair; implicit_prm; nca; nca of lists; info_nca; exo; exo of lists; sppo; simpo; alphapo; apo_zero; dpop; tr_dpo; online_dpo;
per_step_negatives; online_ipo; spin; f_dpo; f_dpo, Jensen-Shannon; f_dpo, alpha divergence; aot; aot of sides; ld_dpo; discopop; step_apo; ids;
reward_model; reward_model with margins of the pairs; process_reward_model; process_reward_model, squared; value; value, not clipped
"""
"""Cases whose loss is one number of one stream, by name: composing all objectives while tests are collected would take half a minute."""


@pytest.mark.parametrize("name", " ".join(REPORTED.split()).split("; "))
def test_the_reported_loss_is_the_published_one(name: str) -> None:
    metrics, value = measured(name)
    (loss,) = (metrics[k] for k in LOSSES if k in metrics)
    assert PER_PAIR.get(name, 1.0) * loss == pytest.approx(-value, rel=1e-9)


def test_no_loss_is_missing_among_them() -> None:
    """A new one belongs on the list, or into ``OTHERWISE`` with its reason."""
    named = set(" ".join(REPORTED.split()).split("; "))
    there = {n for n, c in CASES.items() if c.loss not in ("real", "sami") and alone(c.load()) and any(hasattr(s.advantage, "objective") for s in c.load().streams.values())}
    assert there - OTHERWISE == named and len(named) >= 35 and set(PER_PAIR) <= named and set(CASES) >= OTHERWISE


@pytest.mark.parametrize("name", sorted(TOKENWISE))
def test_the_reported_objective_is_the_published_one(name: str) -> None:
    """Where the objective is linear in what is differentiated."""
    metrics, value = measured(name)
    assert metrics["objective"] == pytest.approx(value, rel=1e-9)


def row_of_pairs(scores: list[tuple[float, float]]) -> TokenBatch:
    from posttrain.records import Row

    rows = []
    for i, pair in enumerate(scores):
        for side, score in zip(("chosen", "rejected"), pair, strict=True):
            rows.append(Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [float("nan"), score], "base": [float("nan"), 0.0]}, pair=i, side=side))  # type: ignore[arg-type]
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


def test_what_is_counted_of_pairs_and_labels() -> None:
    """Two pairs ranked right, one wrong, one tied: a tie is not right; scores and margins are in units of reward."""
    batch = row_of_pairs([(-1.0, -2.0), (-0.5, -1.5), (-3.0, -1.0), (-2.0, -2.0)])
    found = {k: v / n for k, (v, n) in load("dpo").weigh(batch)[1].items() if n}
    assert found["pairs/accuracy"] == 0.5 and found["pairs/margin"] == pytest.approx(0.1 * (1 + 1 - 2 + 0) / 4)
    assert found["pairs/chosen_score"] == pytest.approx(-0.1 * 6.5 / 4) and found["pairs/rejected_score"] == pytest.approx(-0.1 * 6.5 / 4)


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.75), (10.0, 0.5)])
def test_labelled_answers_on_their_side(shift: float, expected: float) -> None:
    """Right is above 0 for a label above a half, and not above 0 for the rest; a label of exactly a half counts as bad."""
    from posttrain.records import Row

    rows = [
        Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [float("nan"), -x - shift], "base": [float("nan"), 0.0]}, rewards={"label": y})
        for x, y in ((-2.0, 1.0), (-3.0, 0.8), (4.0, 0.0), (-1.0, 0.5))
    ]
    metrics = load("implicit_prm").weigh(TokenBatch.from_sequences(rows, dtype=torch.float64))[1]
    found = {k.split("/")[1]: v / n for k, (v, n) in metrics.items() if n}
    assert found["accuracy"] == expected and found["good"] == 0.5
    assert found["good_score"] == pytest.approx(0.05 * (2.5 - shift)) and found["bad_score"] == pytest.approx(0.05 * (-1.5 - shift))


def test_the_favourite_of_a_list() -> None:
    """Right where the policy's favourite has the highest reward; lists of one kind of reward have several best."""
    from posttrain.records import Row

    lists = [((-1.0, 0.1), (-2.0, 0.9), (-3.0, 0.0)), ((-2.0, 0.3), (-1.0, 0.7)), ((-1.0, 0.5), (-4.0, 0.5)), ((-1.0, 0.2), (-2.0, 0.8))]
    rows = [
        Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [float("nan"), l], "base": [float("nan"), 0.0]}, group=i, rewards={"reward": r})
        for i, answers in enumerate(lists)
        for l, r in answers  # noqa: E741
    ]
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    for overrides in ((), ("streams.lists.advantage.f=noise_contrastive",), ("streams.lists.advantage.f=reverse_kl",)):
        value, count = composed("info_nca", overrides).weigh(batch)[1]["lists/accuracy"]
        assert (value, count) == (pytest.approx(2.0), pytest.approx(4.0))


def test_a_list_holds_the_stream_s_answers_only() -> None:
    """Another source's answer to the same question is not on the list."""
    from posttrain.records import Row

    rows = [
        Row(ids=[1, 2], sources=["prompt", s], logps={"current": [float("nan"), -x], "base": [float("nan"), 0.0]}, group=0, rewards={"reward": x})
        for x, s in ((1.0, "demo"), (2.0, "demo"), (3.0, "policy"))
    ]
    both, own = (TokenBatch.from_sequences(r, dtype=torch.float64) for r in (rows, rows[:2]))
    for overrides in ((), ("streams.lists.advantage.f=noise_contrastive",), ("streams.lists.advantage.f=reverse_kl",)):
        objective = composed("info_nca", overrides)
        torch.testing.assert_close(objective.weights(both)[:2], objective.weights(own), rtol=1e-12, atol=0)


def test_ties_share_the_target_at_temperature_zero() -> None:
    """Two best answers of three: each is wanted half the time."""
    from posttrain.records import Row

    rows = [
        Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [float("nan"), -1.0], "base": [float("nan"), -1.0]}, group=0, rewards={"reward": r})
        for r in (1.0, 1.0, 0.0)
    ]
    objective = load("info_nca", ["streams.lists.advantage.temperature=0.0"])
    weights = objective.weights(TokenBatch.from_sequences(rows, dtype=torch.float64))
    beta = objective.streams["lists"].advantage.beta
    torch.testing.assert_close(weights, beta * torch.tensor([1 / 6, 1 / 6, -1 / 3], dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_reported_share_of_a_power_of_p() -> None:
    """``p**a / a`` for a power, its logarithm at 0."""
    batch = CASES["dft"].make(2).batch()
    for a, value in ((2.0, lambda p: p**2 / 2), (0.0, torch.log), (-0.5, lambda p: -2 * p**-0.5)):
        objective = load("probability_power", [f"streams.demos.reference.a={a}", "streams.demos.masks={}"] + (["streams.demos.reference.most=1e9"] if a < 0 else []))
        view = objective.views(batch)["demos"]
        expected = float((value(torch.exp(view.logp))[view.on] * view.batch.weight[view.on]).sum() / view.on.sum())
        assert objective.weigh(batch)[1]["demos/objective"][0] == pytest.approx(expected, rel=1e-9)


def test_defaults_of_terms_are_those_that_are_documented() -> None:
    """The generated page says every default; see ``tests/report/test_terms_doc.py``.  Here: what the shipped files rely on without saying it."""
    from posttrain.loss.advantage import GroupCenter, LogRatio
    from posttrain.loss.reference import Power
    from posttrain.mixture.gate import Add

    assert (GroupCenter().divide, LogRatio().credit, Power().a, Add().demos_per_step) == ("peers", "own", 1.0, 8)
    assert replace(LogRatio(), credit="to_go").coupling == replace(LogRatio(), credit="sequence").coupling == "sequence" and LogRatio().coupling == "token"
