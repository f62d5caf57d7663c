"""Evaluation numbers against enumeration and by hand; failures are reported and never counted as wrong."""

import json
from itertools import combinations

import numpy as np
import pytest

from posttrain.evaluate import accuracy_report, average_at_n, item_interval, majority_at_k, pass_at_k
from posttrain.records import Group, Prompt, Rollout, Score, Segment, Source
from posttrain.statistics import wilson


def group(name: str, *values: float | None, level: int | None = None, texts: str = "", finish: str = "stop") -> Group:
    prompt = Prompt(name, (1,), level=level)
    segment = Segment((5, 6), Source.policy, logprobs=(0.0, 0.0), version=0)
    scores = [Score(v) if v is not None else Score(None, "timeout") for v in values]
    return Group(
        prompt,
        tuple(
            Rollout(f"{name}.{i}", prompt, (segment,), finish=finish, text=texts[i : i + 1], scores={"right": s}, reward=s.value)
            for i, s in enumerate(scores)
        ),
    )


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_equals_enumeration(n):
    for c in range(n + 1):
        rates = []
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            rates.append(pass_at_k(n, c, k))
            assert rates[-1] == pytest.approx(sum(map(any, subsets)) / len(subsets))
        assert rates == sorted(rates) and rates[0] == pytest.approx(c / n)


@pytest.mark.parametrize("bad", [(2, 1, 3), (2, 3, 1), (2, 1, 0)])
def test_pass_at_k_refuses(bad):
    with pytest.raises(ValueError, match="needs 1 <= k <= n"):
        pass_at_k(*bad)


def test_majority_by_hand():
    assert majority_at_k(list("aab"), [True, True, False]) == 1.0
    assert majority_at_k(list("abb"), [True, False, False]) == 0.0
    assert majority_at_k(list("ab"), [True, False]) == 0.5  # a tie shares the vote
    assert majority_at_k(list("abb"), [True, False, False], k=1) == 1.0
    with pytest.raises(ValueError, match="majority@4"):
        majority_at_k(list("abb"), [True, False, False], k=4)
    with pytest.raises(ValueError, match="no samples"):
        average_at_n([])


def test_report_by_hand():
    groups = [group("a", 1, 0, level=1, texts="xy"), group("b", 1, 1, level=2, texts="zz"), group("c", 0, 0.5, level=2, texts="pq")]
    report = accuracy_report(groups, k=(1, 2), answer_of=lambda r: r.text)
    assert report["accuracy"] == pytest.approx(0.5) and report["pass@1"]["accuracy"] == pytest.approx(0.5)
    assert report["pass@2"]["accuracy"] == pytest.approx(2 / 3) and report["majority"]["accuracy"] == pytest.approx(0.5)
    assert report["n"] == 3 and report["samples"] == 6 and report["failed"] == 0 and report["mean_tokens"] == 2.0
    assert {n: part["accuracy"] for n, part in report["by_level"].items()} == {1: 0.5, 2: 0.5}
    assert report["interval"][0] <= 0.5 <= report["interval"][1] and report["lowest"] == report["highest"] == pytest.approx(0.5)
    json.dumps(report)


def test_one_sample_per_prompt_uses_wilson():
    report = accuracy_report([group(str(i), float(i < 7)) for i in range(10)])
    expected = wilson(7, 10)
    assert report["method"] == "wilson" and report["interval"] == (expected.low, expected.high)
    assert accuracy_report([group("a", 0, 1), group("b", 1, 1)])["method"] == "multi_bootstrap"


def test_failures_leave_the_numbers_and_are_reported():
    report = accuracy_report([group("a", 1, None), group("b", None, None), group("c", 0, 0)])
    assert report["accuracy"] == 0.5 and report["failed"] == 3 and report["unscored_prompts"] == 1 and report["n"] == 2
    assert report["lowest"] == pytest.approx(0.5 / 3) and report["highest"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="every verifier failed"):
        accuracy_report([group("a", None)])


def test_named_score_threshold_and_truncation():
    groups = [group("a", 0.6, finish="length"), group("b", 0.4)]
    assert accuracy_report(groups)["accuracy"] == 0.0
    report = accuracy_report(groups, score="right", threshold=0.5)
    assert report["accuracy"] == 0.5 and report["truncated"] == 0.5
    with pytest.raises(ValueError, match="has no score 'wrong'; it has right"):
        accuracy_report(groups, score="wrong")


def test_duplicates_and_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="more than once"):
        accuracy_report([group("a", 1), group("a", 0)])
    with pytest.raises(ValueError, match="pass@2"):
        accuracy_report([group("a", 1, 1), group("b", 1, None)], k=(2,))


def test_reported_intervals_cover_a_known_policy():
    rng = np.random.default_rng(0)
    covered, repetitions = 0, 100
    for _ in range(repetitions):
        rates = rng.beta(1, 2, size=60)  # accuracy 1/3 over the distribution of prompts
        covered += 1 / 3 in item_interval([float(v) for v in rng.binomial(4, rates) / 4], rng=1)
    assert covered / repetitions >= 0.9
