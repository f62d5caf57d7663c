"""Judges: how verdicts are read, what orders and votes do, what failure is, and that answers cannot open fields of the template."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.data.rows import to_rows
from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.reward.judge import Judge, Labels, PairJudge, Said, fill
from posttrain.reward.pool import RewardBudgetError, RewardPool
from posttrain.reward.serve import bind, frozen, length, num_engines

POINT = "Q: {prompt} A: {answer}"
PAIR = "Q: {prompt} 1: {a} 2: {b}"
GRADES = Labels({"1": 1.0, "2": 2.0, "3": 3.0})
SIDES = Labels({"A": 1.0, "B": 0.0})


class Characters:
    """One token per character, no template: what a question says is its tokens."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class Renderer:
    tokenizer = Characters()

    def prompt(self, text: str) -> Any:
        return SimpleNamespace(ids=tuple(map(ord, text)))


class Model:
    """A judge model by rule: ``grade(question, label)`` is a label's log-prob, ``write(question, vote)`` what it says."""

    def __init__(self, grade: Any = None, write: Any = None, limit: int | None = None) -> None:
        self.grade, self.write, self.config, self.asked = grade, write, SimpleNamespace(max_model_len=limit), []

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        texts = ["".join(map(chr, s)) for s in sequences]
        self.asked += texts
        return [[math.nan] + [0.0] * (len(t) - 2) + [self.grade(t[:-1], t[-1])] for t in texts]

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Any, step: int, first: int = 0) -> list[Group]:
        out = []
        for p in prompts:
            question = "".join(map(chr, p.ids))
            self.asked.append(question)
            out.append(Group(p, tuple(Rollout(f"{p.id}/{i}", p, (), text=self.write(question, i)) for i in range(n))))
        return out


def group(name: str, *texts: str, answer: Any = None, text: str = "why?") -> Group:
    prompt = Prompt(name, (1,), text=text, answer=answer)
    segment = Segment((5,), Source.policy, logprobs=(0.0,), version=0)
    return Group(prompt, tuple(Rollout(f"0/{name}/{i}", prompt, (segment,), text=t) for i, t in enumerate(texts)))


def score(judge: Any, model: Model, *groups: Group, budget: float = 1.0) -> list[float | None]:
    pool = RewardPool({"judge": judge.bound("judge", model, Renderer())}, error_budget=budget)
    done = asyncio.run(pool.score(groups, 0))
    return [r.reward for g in done for r in g.rollouts]


def better(values: dict[str, float], bias: float = 0.0) -> Any:
    """Label log-probs of a judge that believes ``values`` and adds ``bias`` to the log-odds of what stands first."""

    def grade(question: str, label: str) -> float:
        a, b = question.split(" 1: ")[1].split(" 2: ")
        odds = values[a] - values[b] + bias
        return -math.log1p(math.exp(-odds if label == "A" else odds))

    return grade


def test_labels_are_an_expectation() -> None:
    rng = random.Random(0)
    for _ in range(20):
        logps = [rng.uniform(-30, 0) for _ in range(3)]
        p = [math.exp(x) for x in logps]
        assert GRADES.value(logps) == pytest.approx((p[0] + 2 * p[1] + 3 * p[2]) / sum(p), rel=1e-9)
        assert GRADES.value(logps) == pytest.approx(GRADES.value([x - 500 for x in logps]), rel=1e-9)
    assert Labels({"yes": 1.0, "no": 0.0}, form="log_odds").value([-0.1, -2.5]) == pytest.approx(2.4)
    assert Judge(POINT, GRADES)  # a grade from the engine
    model = Model(lambda q, label: math.log({"1": 0.1, "2": 0.2, "3": 0.1}[label]))
    assert score(Judge(POINT, GRADES), model, group("a", "x", "x", "y")) == pytest.approx([2.0] * 3)
    assert len(model.asked) == 6, "equal questions are asked once"


def test_a_text_verdict_is_read_from_the_last_match_and_averaged() -> None:
    said = Said(r"Score: (-?[\d.]+)", low=0, high=5, votes=4, temperature=1.0)
    votes = ["Score: 1, no. Score: 4", "Score: 2.0", "Score: 9", "well"]
    assert [said.value(v) for v in votes] == [4.0, 2.0, None, None]
    judge = Judge(POINT, said)
    assert score(judge, Model(write=lambda q, i: votes[i]), group("a", "x")) == [3.0]
    strict = Judge(POINT, Said(r"Score: (-?[\d.]+)", low=0, high=5, votes=4, min_votes=3, temperature=1.0))
    assert score(strict, Model(write=lambda q, i: votes[i]), group("a", "x")) == [None]


def test_what_cannot_be_read_is_no_zero_and_spends_the_budget() -> None:
    judge = Judge(POINT, Said(r"Score: (\d)", low=0, high=5))
    model = Model(write=lambda q, i: "I refuse" if "bad" in q else "Score: 0")
    assert score(judge, model, group("a", "good", "bad")) == [0.0, None]
    with pytest.raises(RewardBudgetError, match=r"cannot be read.*I refuse"):
        score(judge, model, group("a", "bad", "bad"), budget=0.01)


def test_words_have_values() -> None:
    judge = PairJudge(PAIR, Said(r"\[\[(\w+)\]\]", values={"A": 1.0, "B": 0.0, "C": 0.5}))
    model = Model(write=lambda q, i: "[[A]]" if q.index("good") < q.index("poor") else "[[B]]")
    assert score(judge, model, group("a", "poor", "good")) == [0.0, 1.0]
    assert score(judge, Model(write=lambda q, i: "[[A]]"), group("a", "poor", "good")) == [0.5, 0.5], "always the first: a tie"
    assert score(judge, Model(write=lambda q, i: "[[D]]"), group("a", "poor", "good")) == [None, None]


def test_orders() -> None:
    """Planted bias of position: the mean of log-odds removes it exactly, agreement makes ties of it, one order keeps it."""
    values = {"x": 0.3, "y": 0.0, "z": -0.4}
    sigmoid = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    true = [(sigmoid(values[a] - values[b]) + sigmoid(values[a] - values[c])) / 2 for a, b, c in ("xyz", "yxz", "zxy")]
    rewards = {o: score(PairJudge(PAIR, SIDES, orders=o), Model(better(values, 2.0)), group("a", "x", "y", "z")) for o in ("log_odds", "mean", "agree", "one")}
    assert rewards["log_odds"] == pytest.approx(true, rel=1e-9)
    assert rewards["agree"] == [0.5, 0.5, 0.5]
    assert rewards["one"] != pytest.approx(true, abs=0.1)
    for found in rewards.values():
        assert sum(found) / 3 == pytest.approx(0.5), "rows of a matrix with P + P^T = 1"
    calm = score(PairJudge(PAIR, SIDES), Model(better(values)), group("a", "x", "y", "z"))
    assert calm == [1.0, 0.5, 0.0]
    assert score(PairJudge(PAIR, SIDES), Model(better(values)), group("a", "z", "x", "y")) == [0.0, 1.0, 0.5], "permutation"


def test_every_comparison_can_be_kept() -> None:
    values = {"x": 0.3, "y": 0.0, "z": -0.4}
    judge = PairJudge(PAIR, SIDES, orders="log_odds", each=True).bound("judge", Model(better(values)), Renderer())
    (done,) = asyncio.run(RewardPool({"judge": judge}).score([group("a", "x", "y", "z")], 0))
    won = [{name.removeprefix("judge/against/"): s.value for name, s in r.scores.items() if name != "judge"} for r in done.rollouts]
    assert [sorted(w) for w in won] == [["1", "2"], ["0", "2"], ["0", "1"]], "by the number of the sample"
    assert won[0]["1"] == pytest.approx(1 / (1 + math.exp(-0.3))) and won[0]["2"] + won[2]["0"] == pytest.approx(1.0)
    assert [r.reward for r in done.rollouts] == [pytest.approx(sum(w.values()) / 2) for w in won], "the reward is their mean, and counts them once"
    row = to_rows([replace(done, rollouts=tuple(replace(r, advantage=1.0) for r in done.rollouts))])[0]
    assert row.rewards["judge/against/2"] == won[0]["2"]
    with pytest.raises(ValueError, match="set against=group"):
        PairJudge(PAIR, SIDES, against="reference", each=True)


def test_cycles_and_equal_texts() -> None:
    beats = {("r", "s"), ("s", "p"), ("p", "r")}

    def grade(question: str, label: str) -> float:
        a, b = question.split(" 1: ")[1].split(" 2: ")
        return math.log(0.9 if ((a, b) in beats) == (label == "A") else 0.1)

    model = Model(grade)
    assert score(PairJudge(PAIR, SIDES), model, group("a", "r", "p", "s")) == [0.5, 0.5, 0.5]
    model.asked.clear()
    assert score(PairJudge(PAIR, SIDES), model, group("a", "r", "r")) == [0.5, 0.5] and not model.asked


def test_a_failed_order_fails_the_match_only() -> None:
    def write(question: str, vote: int) -> str:
        a, b = question.split(" 1: ")[1].split(" 2: ")
        return "?" if (a, b) == ("x", "y") else "[[A]]" if a > b else "[[B]]"

    judge = PairJudge(PAIR, Said(r"\[\[(\w)\]\]", values={"A": 1.0, "B": 0.0}))
    assert score(judge, Model(write=write), group("a", "x", "y", "z")) == [0.0, 0.0, 1.0], "x and y are known against z alone"
    assert score(judge, Model(write=write), group("a", "x", "y")) == [None, None]
    assert score(judge, Model(write=write), group("a", "x")) == [None], "nobody to compare with"


def test_against_the_reference() -> None:
    values = {"x": 1.0, "gold": 0.0}
    judge = PairJudge(PAIR, SIDES, against="reference", orders="log_odds")
    assert score(judge, Model(better(values, 1.5)), group("a", "x", "gold", answer="gold")) == pytest.approx([1 / (1 + math.exp(-1.0)), 0.5])
    assert score(judge, Model(better(values)), group("a", "x")) == [None], "no reference"
    grade = {"x": 3.0, "gold": 1.0}
    words = Said(r"(\d)", low=0, high=9)
    calibrated = Judge(POINT, words, against="reference", scale=2.0)
    model = Model(write=lambda q, i: str(int(grade[q.split(" A: ")[1]])))
    assert score(calibrated, model, group("a", "x", "gold", answer="gold"), group("b", "x")) == [pytest.approx(1 / (1 + math.exp(-1.0))), 0.5, None]


def test_answers_cannot_open_fields_and_principles_are_told() -> None:
    rollout = group("a", "{reference} {prompt} {answer}", answer="SECRET", text="{answer}").rollouts[0]
    question = fill("{principles}|{prompt}|{answer}|{other}", ["be brief", "be kind"], rollout, answer=rollout.text)
    assert question == "- be brief\n- be kind|{answer}|{reference} {prompt} {answer}|{other}"

    def grade(question: str, label: str) -> float:  # likes what the principle names
        principle, answer = question.split("#")
        return 0.0 if (label == "3") == (answer in principle) else -9.0

    for principle, expected in (("long", [True, False]), ("short", [False, True])):
        a, b = score(Judge("{principles}#{answer}{prompt}", GRADES, principles=[principle]), Model(grade), group("a", "long", "short", text=""))
        assert [a > b, b > a] == expected


def test_too_long_a_question_fails_alone() -> None:
    model = Model(lambda q, label: -1.0, write=lambda q, i: "2", limit=30)
    for verdict in (GRADES, Said(r"(\d)", low=0, high=5, max_tokens=4)):
        assert score(Judge(POINT, verdict), model, group("a", "x", "y" * 50)) == [2.0, None]


def test_groups_in_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="in pieces"):
        score(PairJudge(PAIR, SIDES), Model(better({"x": 0.0, "y": 0.0})), group("a", "x"), group("a", "y"))


def test_engines_of_a_run() -> None:
    fn = {"a": Judge(POINT, GRADES, model="m", num_engines=2), "b": PairJudge(PAIR, SIDES, model="m"), "c": Judge(POINT, GRADES), "d": len}
    assert num_engines(fn) == 2 and list(frozen(fn)) == ["m"] and len(frozen(fn)["m"]) == 2
    engines = {"m": (Model(), Renderer()), "policy": (Model(), Renderer())}
    bound = bind(fn, engines)
    assert bound["d"] is len and bound["a"].bench.engines is bound["b"].bench.engines is engines["m"][0] is not bound["c"].bench.engines
    assert length(fn["b"], Renderer(), 100, 50) >= 100 + 2 * 50 > length(fn["a"], Renderer(), 100, 20) - len(POINT) - 60
    assert length(Judge(POINT, GRADES, max_model_len=77), Renderer(), 100, 50) == 77


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Judge("{prompt}", GRADES), r"lacks the field \{answer\}"),
        (lambda: Judge(None, GRADES), "template"),
        (lambda: Judge(POINT), "needs verdict"),
        (lambda: Judge(template_file="nowhere.txt", verdict=GRADES), "no such file"),
        (lambda: Judge(POINT, GRADES, principles=["x"]), "principles"),
        (lambda: Judge(POINT, GRADES, scale=0.0), "scale"),
        (lambda: Judge(POINT, GRADES, against="group"), "choose reference"),
        (lambda: PairJudge(PAIR, GRADES), "between 0 and 1"),
        (lambda: PairJudge(PAIR, SIDES, orders="both"), "choose agree"),
        (lambda: PairJudge(PAIR, SIDES, against="all"), "choose group"),
        (lambda: Labels({"A": 1.0}), "two labels"),
        (lambda: Labels({"1": 1.0, "10": 10.0}).labels(Characters()), "begin those of"),
        (lambda: Labels({"a": 1.0, "b": 0.0, "c": 0.5}, form="log_odds"), "two labels"),
        (lambda: Said("(x"), "regular expression"),
        (lambda: Said("x"), "group"),
        (lambda: Said("(x)", votes=3), "temperature"),
        (lambda: Said("(x)", low=1.0, high=1.0), "below"),
        (lambda: Judge(POINT, GRADES, model="/no/such/folder").check(Characters()), "no judge can be loaded"),
        (lambda: asyncio.run(Judge(POINT, GRADES)([])), "no engines"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
