"""Groups become preference pairs: which, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from posttrain.data.report import Report
from posttrain.data.rows import to_rows
from posttrain.loss import load
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import changes
from posttrain.mixture.pairs import PAIRED, TIED, BestWorst, GivenAgainstSampled
from posttrain.records import Group, Pair, Score, TokenBatch
from tests.mixture.conftest import demo, group, prompt


def made(items: list) -> list[Pair]:
    return [item for item in items if isinstance(item, Pair)]


def test_the_best_against_the_worst() -> None:
    out = BestWorst()([group("q", 0.5, 0.1, 0.9, 0.1)], Demos(), 0, 0.0)
    (pair,) = made(out)
    assert (pair.chosen.id, pair.rejected.id) == ("q/2", "q/1")
    assert out[0].dropped == PAIRED and out[0].rollouts[0].reward == 0.5
    assert pair.chosen.rewards == {"reward": 0.9}


@pytest.mark.parametrize("rewards", [(1.0, 1.0), (None, 1.0), (None, None), (1.0,)])
def test_ties_and_failed_judges_make_no_pair(rewards: tuple[float | None, ...]) -> None:
    out = BestWorst()([group("q", *rewards)], Demos(), 0, 0.0)
    assert not made(out) and out[0].dropped == TIED


def test_a_failed_judge_is_not_the_worst() -> None:
    (pair,) = made(BestWorst()([group("q", None, 0.2, 0.7)], Demos(), 0, 0.0))
    assert (pair.chosen.id, pair.rejected.id) == ("q/2", "q/1")


def test_the_gap_is_the_least_preference() -> None:
    items = [group("q", 0.5, 0.7)]
    assert not made(BestWorst(gap=0.2)(items, Demos(), 0, 0.0)) and made(BestWorst(gap=0.1)(items, Demos(), 0, 0.0))
    with pytest.raises(ValueError, match="must not be negative"):
        BestWorst(gap=-1.0)


def test_another_metric_decides() -> None:
    whole = group("q", 1.0, 0.0)
    rollouts = tuple(replace(r, scores={"style": Score(float(i))}) for i, r in enumerate(whole.rollouts))
    (pair,) = made(BestWorst(metric="style")([replace(whole, rollouts=rollouts)], Demos(), 0, 0.0))
    assert pair.chosen.id == "q/1" and pair.chosen.rewards == {"style": 1.0, "reward": 0.0}


def test_sampled_pairs_are_learnt_from_as_sampled() -> None:
    """The rows keep sources, engine log-probs, versions and finish; the objective of sampled pairs finds them."""
    sampled = group("q", 1.0, 0.0)
    sampled = replace(sampled, rollouts=tuple(replace(r, finish="length") for r in sampled.rollouts))
    report = Report()
    rows = to_rows(BestWorst()([sampled, group("tie", 0.0, 0.0)], Demos(), 0, 0.0), report)
    assert [(r.side, r.finish, list(r.version)[-1]) for r in rows] == [("chosen", "length", 0), ("rejected", "length", 0)]
    assert list(rows[0].logps["behaviour"])[-2:] == [-1.0, -2.0] and list(rows[0].ids)[-1] == 6
    assert report.dropped == {PAIRED: 2, TIED: 2}
    batch = TokenBatch.from_sequences(rows)
    batch = batch.with_logps(current=batch.logps["behaviour"], base=batch.logps["behaviour"])
    weights = load("online_dpo").weights(batch)
    assert sorted(weights[weights != 0].tolist()) == pytest.approx([-0.05, -0.05, 0.05, 0.05])


def test_what_is_no_group_or_left_out_already_passes() -> None:
    gone = replace(group("q", 1.0, 0.0), dropped="no_variance")
    given = demo("d")
    assert BestWorst()([gone, given], Demos(), 0, 0.0) == [gone, given]


def test_counts() -> None:
    items = [group("q", 1.0, 0.0), group("tie", 0.0, 0.0)]
    counted = changes(items, BestWorst()(items, Demos(), 0, 0.0))
    assert (counted["mixture/pairs"], counted["mixture/groups_left_out"]) == (1.0, 1.0)


# -- the data's answer against the policy's ------------------------------------------------------------------------------------------
def test_the_given_answer_is_preferred(shelf: Callable[..., Demos]) -> None:
    first, second = made(GivenAgainstSampled()([group("q", 1.0, None)], shelf(demo("q")), 0, 0.0))
    assert (first.chosen.id, first.rejected.id) == ("q", "q/0")
    assert second.rejected.id == "q/1", "no verdict is needed when the side is known"
    rows = to_rows([first])
    assert [str(s) for s in (rows[0].sources[-1], rows[1].sources[-1])] == ["2", "1"]


def test_a_policy_that_says_the_same_gives_no_pair(shelf: Callable[..., Demos]) -> None:
    same = group("q", 1.0)
    answer = replace(same.rollouts[0].segments[0], ids=(7, 8, 9), logprobs=(-1.0,) * 3)
    same = replace(same, rollouts=(replace(same.rollouts[0], segments=(answer,)),))
    out = GivenAgainstSampled()([same], shelf(demo("q")), 0, 0.0)
    assert not made(out) and out[0].dropped == TIED


@pytest.mark.parametrize(("reward", "chosen"), [(0.9, "q/0"), (0.1, "q"), (0.5, None), (None, None)])
def test_the_better_of_the_two(shelf: Callable[..., Demos], reward: float | None, chosen: str | None) -> None:
    given = replace(demo("q"), rewards={"score": 0.5})
    out = made(GivenAgainstSampled(chosen="better")([group("q", reward)], shelf(given), 0, 0.0))
    assert [p.chosen.id for p in out] == ([chosen] if chosen else [])


def test_a_value_left_in_the_row_serves_too(shelf: Callable[..., Demos]) -> None:
    given = demo("q", judged=0.3)
    (pair,) = made(GivenAgainstSampled(chosen="better", given="judged")([group("q", 0.2)], shelf(given), 0, 0.0))
    assert pair.chosen.id == "q"
    with pytest.raises(ValueError, match=r"'q' has no number 'score'"):
        GivenAgainstSampled(chosen="better")([group("q", 0.2)], shelf(given), 0, 0.0)


def test_a_prompt_without_a_given_answer(shelf: Callable[..., Demos]) -> None:
    with pytest.raises(ValueError, match=r"'q' has no given answer.*missing=drop"):
        GivenAgainstSampled()([group("q", 1.0)], shelf(demo("other")), 0, 0.0)
    out = GivenAgainstSampled(missing="drop")([group("q", 1.0)], shelf(demo("other")), 0, 0.0)
    assert isinstance(out[0], Group) and out[0].dropped == TIED and prompt("q").id == "q"
    for bad in ({"chosen": "worse"}, {"missing": "skip"}):
        with pytest.raises(ValueError, match="does not exist"):
            GivenAgainstSampled(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["best_worst", "given_against_sampled"])
def test_the_files_compose(name: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from posttrain.paths import CONFIGS

    gate = instantiate(OmegaConf.load(CONFIGS / "mixture" / f"{name}.yaml").gate)
    assert gate == {"best_worst": BestWorst(), "given_against_sampled": GivenAgainstSampled()}[name]
