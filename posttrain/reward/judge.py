"""A language model as the judge: it grades an answer, or says which of two is better, and its words or its label probabilities become the reward.

The judge is a frozen model with engines of its own, or the policy itself as it is now (``model: policy``).  A verdict that cannot be read is a
failed score: masked, counted and budgeted, never 0.  What is judged is hostile: it is filled into the template in one pass, so that no answer
can open a field of the template, and it is rendered so that none of it becomes a control token.  It can still talk to the judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from posttrain.records import Prompt, Rollout, Sampling, Score

POLICY = "policy"
"""``model`` of a judge that is the policy itself."""
FIELD = re.compile(r"\{(prompt|answer|a|b|reference|principles)\}")
SURE = 1e-6
"""How near to 0 and 1 a probability may come before its log-odds are taken."""


class Engines(Protocol):
    """What a judge asks: the pool of a model's engines."""

    config: Any

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Any]: ...

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class Bench:
    """A judge's engines and the tokens of its questions.  ``name`` keeps the requests of several judges apart."""

    name: str
    engines: Engines
    renderer: Any

    def ids(self, question: str) -> tuple[int, ...]:
        return tuple(self.renderer.prompt(question).ids)

    def too_long(self, ids: Sequence[int], answer: int) -> str:
        limit = self.engines.config.max_model_len
        if limit is None or len(ids) + answer <= limit:
            return ""
        return f"a question of {len(ids)} tokens and a verdict of {answer} do not fit the judge's {limit}; raise reward.fn.{self.name}.max_model_len"


@dataclass(frozen=True)
class Question:
    """``key`` is unique among the questions of a step and the same in a run that is repeated: it seeds the verdict."""

    key: str
    text: str


@dataclass(frozen=True)
class Labels:
    """Reads the verdict from the probabilities of the labels, which always gives one: ``r = sum_v v p(v) / sum_v p(v)``.

    ``values``: label -> its value; a label may be several tokens.  ``form="log_odds"``: ``r = log p(first) - log p(second)`` of exactly two
    labels, an entailment judge's score of one principle (our reading of arXiv 2509.21319).

    Wrong when: the judge would begin with other words: the labels then share a sliver of probability, and their ratio is noise.
    """

    values: Mapping[str, float]
    form: Literal["mean", "log_odds"] = "mean"
    max_tokens: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(f"verdict.values={dict(self.values)}: a choice needs two labels or more")
        if self.form not in ("mean", "log_odds"):
            raise ValueError(f"verdict.form={self.form!r} does not exist; choose mean or log_odds")
        if self.form == "log_odds" and len(self.values) != 2:
            raise ValueError(f"verdict.form=log_odds compares two labels, and verdict.values has {len(self.values)}")
        if not all(math.isfinite(float(v)) for v in self.values.values()):
            raise ValueError(f"verdict.values={dict(self.values)}: every label needs a finite value")

    @property
    def span(self) -> tuple[float, float]:
        return (-math.inf, math.inf) if self.form == "log_odds" else (min(self.values.values()), max(self.values.values()))

    def value(self, logps: Sequence[float]) -> float:
        """The verdict from the labels' log-probs, in the order of ``values``."""
        if self.form == "log_odds":
            return logps[0] - logps[1]
        top = max(logps)
        shares = [math.exp(x - top) for x in logps]
        return math.fsum(s * float(v) for s, v in zip(shares, self.values.values(), strict=True)) / math.fsum(shares)

    def labels(self, tokenizer: Any) -> dict[str, tuple[int, ...]]:
        """Label -> its tokens.  Raises ``ValueError`` where one begins another."""
        out = {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in map(str, self.values)}
        for short, long in ((a, b) for a in out for b in out if a != b and out[b][: len(out[a])] == out[a]):
            raise ValueError(f"verdict.values: the tokens of label {short!r} begin those of {long!r}, so one would count the other's probability; rename one")
        return out

    async def read(self, bench: Bench, questions: Sequence[Question]) -> list[Score]:
        """Equal questions are asked once."""
        labels = self.labels(bench.renderer.tokenizer)
        asked = {q.text: bench.ids(q.text) for q in questions}
        longest = max(map(len, labels.values()))
        fits = [text for text, ids in asked.items() if not bench.too_long(ids, longest + 1)]
        sequences = [(*asked[text], *label) for text in fits for label in labels.values()]
        rows = await bench.engines.logprobs(sequences) if sequences else []
        found: dict[str, Score] = {}
        for i, text in enumerate(fits):
            mine = rows[i * len(labels) : (i + 1) * len(labels)]
            logps = [math.fsum(row[len(asked[text]) :]) for row in mine]
            bad = not all(math.isfinite(x) for x in logps)
            found[text] = Score(None, "error", f"the labels' log-probs are {logps}") if bad else Score(self.value(logps))
        return [found.get(q.text) or Score(None, "error", bench.too_long(asked[q.text], longest + 1)) for q in questions]


@dataclass(frozen=True)
class Said:
    """Reads the verdict from what the judge writes: the last match of ``pattern``, averaged over ``votes`` samples.

    ``pattern``: a regular expression whose first group is the verdict: a number from ``low`` to ``high``, or one of the words of ``values``
    (word -> value).  A vote without a match, with a number out of range or with an unknown word is not counted; an answer with fewer than
    ``min_votes`` readable votes has no score.

    Wrong when: ``pattern`` also finds what the judge merely quotes: ask for a form that no answer has.
    """

    pattern: str
    values: Mapping[str, float] | None = None
    low: float = 0.0
    high: float = 1.0
    votes: int = 1
    min_votes: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"verdict.pattern={self.pattern!r} is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"verdict.pattern={self.pattern!r} needs a group in parentheses around the verdict itself")
        if not self.low < self.high:
            raise ValueError(f"verdict.low={self.low} must be below verdict.high={self.high}")
        if not 1 <= self.min_votes <= self.votes or self.max_tokens < 1:
            raise ValueError(f"verdict: 1 <= min_votes <= votes and max_tokens >= 1 must hold, not min_votes={self.min_votes}, votes={self.votes}, max_tokens={self.max_tokens}")
        if self.votes > 1 and self.temperature <= 0:
            raise ValueError(f"verdict.votes={self.votes} at temperature {self.temperature} are one vote repeated; set verdict.temperature above 0")

    @property
    def span(self) -> tuple[float, float]:
        return (min(self.values.values()), max(self.values.values())) if self.values else (self.low, self.high)

    def value(self, text: str) -> float | None:
        """What one text says, or None when it says nothing that can be read."""
        matches = re.findall(self.pattern, text)
        if not matches:
            return None
        word = (matches[-1] if isinstance(matches[-1], str) else matches[-1][0]).strip()
        if self.values is not None:
            return float(self.values[word]) if word in self.values else None
        try:
            number = float(word)
        except ValueError:
            return None
        return number if self.low <= number <= self.high else None

    async def read(self, bench: Bench, questions: Sequence[Question]) -> list[Score]:
        prompts = [Prompt(f"{bench.name}:{q.key}", bench.ids(q.text)) for q in questions]
        long = {p.id: text for p in prompts if (text := bench.too_long(p.ids, self.max_tokens))}
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens, stop=tuple(self.stop))
        groups = await bench.engines.sample([p for p in prompts if p.id not in long], self.votes, sampling, 0) if len(long) < len(prompts) else []
        texts = {g.prompt.id: [r.text for r in g.rollouts] for g in groups}
        return [Score(None, "error", long[p.id]) if p.id in long else self.score(texts[p.id]) for p in prompts]

    def score(self, texts: Sequence[str]) -> Score:
        """The mean of the readable votes; the texts are its detail."""
        read = [v for v in map(self.value, texts) if v is not None]
        said = " | ".join(texts)[:2000]
        if len(read) < self.min_votes:
            return Score(None, "error", f"{len(texts) - len(read)} of {len(texts)} verdicts cannot be read by {self.pattern!r}: {said}")
        return Score(math.fsum(read) / len(read), "ok", said)


Verdict = Labels | Said


@dataclass(frozen=True)
class Judge:
    """The judge grades every answer by itself.

    With ``against="reference"``: ``r = sigmoid((g(answer) - g(reference)) / scale)``, ``g`` the grade: calibrated by the data's own answer, which
    scores 0.5 itself.  Source: grading by the model itself, arXiv 2401.10020; calibration, arXiv 2409.20370, section 4.1.1.

    ``model``: a folder or id of the frozen judge, or ``policy``.  ``template`` (or a file of it, ``template_file``) is one user turn with the fields
    ``{prompt}``, ``{answer}`` and, where wanted, ``{reference}`` (the prompt's ``answer``) and ``{principles}``.  ``verdict``: how it is read, ``Labels``
    or ``Said``.  ``dtype`` and ``max_model_len``, null: as the policy's engines, and long enough for the run's prompts and answers.  ``num_engines``
    is a frozen judge's own.  ``timeout_s``: for all answers of a step.

    Wrong when: the policy judges itself and nothing else holds it: it learns to please itself.
    """

    template: str | None = None
    verdict: Verdict | None = None
    model: str = POLICY
    template_file: str | None = None
    principles: Sequence[str] = ()
    against: Literal["reference"] | None = None
    scale: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    num_engines: int = 1
    max_model_len: int | None = None
    timeout_s: float = 1800.0
    bench: Bench | None = field(default=None, repr=False, compare=False)

    scope: ClassVar[str] = "batch"
    asks: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    answers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check(self)
        if self.against not in (None, "reference"):
            raise ValueError(f"against={self.against!r} does not exist; choose reference or null")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be above 0")

    def check(self, tokenizer: Any) -> None:
        """Whether the judge can be asked at all.  Called before anything starts."""
        _ready(self, tokenizer)

    def bound(self, name: str, engines: Engines, renderer: Any) -> Judge:
        """The same judge with engines to ask."""
        return replace(self, bench=Bench(name, engines, renderer))

    @property
    def uses_reference(self) -> bool:
        return self.against == "reference" or "{reference}" in text_of(self)

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        bench, verdict = _bench(self)
        template = text_of(self)
        asked: list[tuple[int, Question]] = []
        for i, r in enumerate(rollouts):
            if self.uses_reference and r.prompt.answer is None:
                continue
            asked.append((i, Question(r.sample_id, fill(template, self.principles, r, answer=r.text))))
        references = {r.prompt.id: r for r in rollouts if r.prompt.answer is not None} if self.against else {}
        last = [Question(f"reference/{r.sample_id}", fill(template, self.principles, r, answer=str(r.prompt.answer))) for r in references.values()]
        scores = await verdict.read(bench, [q for _, q in asked] + last)
        known = dict(zip(references, scores[len(asked) :], strict=True))
        out = [Score(None, "error", "the prompt has no answer to compare with (the column answer of data.train)") for _ in rollouts]
        for (i, _), score in zip(asked, scores, strict=False):
            out[i] = self._calibrated(score, known[rollouts[i].prompt.id]) if self.against else score
        return out

    def _calibrated(self, own: Score, reference: Score) -> Score:
        if own.value is None or reference.value is None:
            return own if own.value is None else Score(None, "error", f"the reference's verdict failed: {reference.detail}"[:2000])
        return Score(_sigmoid((own.value - reference.value) / self.scale), "ok", own.detail)


@dataclass(frozen=True)
class PairJudge:
    """The judge says which of two answers is better, in both orders: ``r(y) = mean over opponents of P(y > opponent)``.

    ``against="group"``: the other answers to the prompt, so that rewards are rows of a matrix with ``P(a > b) + P(b > a) = 1``, and cycles are no harm;
    ``"reference"``: the prompt's own answer (arXiv 2504.04950, the centring of which is our reading: advantage=win_probability subtracts 1/2).
    ``orders``: ``agree``, a win where both orders name the same answer, else a tie (0.5); ``mean``, ``(p1 + 1 - p2) / 2`` of the two probabilities that the
    answer shown first is better; ``log_odds``, the mean of their log-odds, which removes an additive bias of position exactly; ``one``, a single order,
    whose bias stays.  A comparison fails when one of its orders does; an answer all of whose comparisons fail has no score.  Equal texts tie unasked.
    ``each`` also reports the comparison with every other answer, as ``NAME/against/i``, ``i`` the number of that sample (``contrib.game``).
    ``verdict`` values say how sure it is that the answer shown first is better: 1, 0, and 0.5 for a tie.  ``template`` has the fields ``{prompt}``, ``{a}``
    and ``{b}``.  The rest as in :class:`Judge`.

    Wrong when: ``against="group"`` and a group comes in pieces: answers then meet only those of their own piece.
    """

    template: str | None = None
    verdict: Verdict | None = None
    model: str = POLICY
    against: Literal["group", "reference"] = "group"
    orders: Literal["agree", "mean", "log_odds", "one"] = "agree"
    template_file: str | None = None
    principles: Sequence[str] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    num_engines: int = 1
    max_model_len: int | None = None
    timeout_s: float = 1800.0
    each: bool = False
    bench: Bench | None = field(default=None, repr=False, compare=False)

    scope: ClassVar[str] = "batch"
    asks: ClassVar[tuple[str, ...]] = ("prompt", "a", "b")
    answers: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check(self)
        if self.against not in ("group", "reference"):
            raise ValueError(f"against={self.against!r} does not exist; choose group or reference")
        if self.orders not in ("agree", "mean", "log_odds", "one"):
            raise ValueError(f"orders={self.orders!r} does not exist; choose agree, mean, log_odds or one")
        if self.each and self.against != "group":
            raise ValueError("each=true reports comparisons with the other answers of a group; set against=group")
        low, high = self.verdict.span if self.verdict else (0.0, 1.0)
        if low < 0 or high > 1:
            raise ValueError(f"verdict: its values go from {low} to {high}, but say how sure it is that the first answer is better: between 0 and 1")

    def check(self, tokenizer: Any) -> None:
        """Whether the judge can be asked at all.  Called before anything starts."""
        _ready(self, tokenizer)

    def bound(self, name: str, engines: Engines, renderer: Any) -> PairJudge:
        """The same judge with engines to ask."""
        return replace(self, bench=Bench(name, engines, renderer))

    @property
    def compares(self) -> bool:
        """Whether an answer's reward depends on the other answers of its group."""
        return self.against == "group"

    @property
    def uses_reference(self) -> bool:
        return self.against == "reference" or "{reference}" in text_of(self)

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[Any]:
        bench, verdict = _bench(self)
        matches = list(self._matches(rollouts))
        questions = [q for i, _, key, b in matches for q in self._questions(rollouts[i], key, b) if rollouts[i].text != b]
        scores = iter(await verdict.read(bench, questions) if questions else [])
        won: list[list[float]] = [[] for _ in rollouts]
        lost: list[str] = [""] * len(rollouts)
        against: list[dict[str, float]] = [{} for _ in rollouts]
        for i, j, _, b in matches:
            both = [] if rollouts[i].text == b else [next(scores) for _ in range(1 if self.orders == "one" else 2)]
            failed = [s.detail for s in both if s.value is None]
            p = 0.5 if not both else None if failed else self.decide(*(s.value for s in both))  # type: ignore[misc]
            for index, other, value in ((i, j, p), (j, i, None if p is None else 1.0 - p)):
                if index is not None and value is not None:
                    won[index].append(value)
                    if self.each and other is not None:
                        against[index][f"against/{rollouts[other].sample_id.rpartition('/')[2]}"] = value
                elif index is not None:
                    lost[index] = failed[0]
        found = [self._score(values, detail, r) for values, detail, r in zip(won, lost, rollouts, strict=True)]
        return [{"value": s.value, "status": s.status, "detail": s.detail, **others} if others else s for s, others in zip(found, against, strict=True)]

    def decide(self, first: float, second: float | None = None) -> float:
        """P(a better than b), from how sure the judge was of whatever stood first: a in the first order, b in the second."""
        if second is None:
            return first
        if self.orders == "mean":
            return (first + 1.0 - second) / 2.0
        if self.orders == "log_odds":
            return _sigmoid((_logit(first) - _logit(second)) / 2.0)
        votes = (first > 0.5) - (first < 0.5), (second < 0.5) - (second > 0.5)
        return {2: 1.0, -2: 0.0}.get(sum(votes), 0.5)

    def _matches(self, rollouts: Sequence[Rollout]) -> Any:
        """(index, index of the opponent or None, key, the opponent's text)."""
        if self.against == "reference":
            yield from ((i, None, r.sample_id, str(r.prompt.answer)) for i, r in enumerate(rollouts) if r.prompt.answer is not None)
            return
        groups: dict[str, list[int]] = {}
        for i, r in enumerate(rollouts):
            groups.setdefault(r.prompt.id, []).append(i)
        for members in groups.values():
            for place, i in enumerate(members):
                for j in members[place + 1 :]:
                    yield i, j, f"{rollouts[i].sample_id}~{rollouts[j].sample_id}", rollouts[j].text

    def _questions(self, rollout: Rollout, key: str, other: str) -> list[Question]:
        both = ((rollout.text, other), (other, rollout.text))[: 1 if self.orders == "one" else 2]
        return [Question(f"{key}/{order}", fill(text_of(self), self.principles, rollout, a=a, b=b)) for order, (a, b) in enumerate(both)]

    def _score(self, values: Sequence[float], failure: str, rollout: Rollout) -> Score:
        if values:
            return Score(math.fsum(values) / len(values))
        if failure:
            return Score(None, "error", failure)
        if self.against == "reference":
            return Score(None, "error", "the prompt has no answer to compare with (the column answer of data.train)")
        return Score(None, "error", f"{rollout.sample_id!r} has no other answer to be compared with")


def fill(template: str, principles: Sequence[str], rollout: Rollout, **answers: str) -> str:
    """The question about a rollout.  One pass: what is filled in is not looked at again."""
    values = {"prompt": rollout.prompt.text, "reference": str(rollout.prompt.answer), "principles": "\n".join(f"- {p}" for p in principles), **answers}
    return FIELD.sub(lambda match: values.get(match[1], match[0]), template)


def text_of(judge: Judge | PairJudge) -> str:
    """A judge's template."""
    return Path(judge.template_file).read_text() if judge.template_file else judge.template or ""


def _check(judge: Judge | PairJudge) -> None:
    if (judge.template is None) == (judge.template_file is None):
        raise ValueError("a judge needs template, the question as text, or template_file, a file of it (and not both)")
    if judge.template_file and not Path(judge.template_file).is_file():
        raise ValueError(f"template_file={judge.template_file}: there is no such file")
    if not isinstance(judge.verdict, (Labels, Said)):
        raise ValueError("a judge needs verdict: {_target_: posttrain.reward.judge.Labels, values: {...}} or posttrain.reward.judge.Said with a pattern")
    text = text_of(judge)
    for name in (*judge.asks, *(["principles"] if judge.principles else [])):
        if f"{{{name}}}" not in text:
            raise ValueError(f"the template lacks the field {{{name}}}")
    if "{principles}" in text and not judge.principles:
        raise ValueError("the template has the field {principles} and there are none; give principles=[...]")
    if judge.num_engines < 1 or not judge.timeout_s > 0:
        raise ValueError(f"num_engines={judge.num_engines} and timeout_s={judge.timeout_s} must be positive")


def _ready(judge: Judge | PairJudge, tokenizer: Any) -> None:
    if judge.model != POLICY:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(judge.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"model={judge.model}: no judge can be loaded from there ({str(error).splitlines()[0]}); give a folder or id, or policy") from error
    if isinstance(judge.verdict, Labels):
        judge.verdict.labels(tokenizer)


def _bench(judge: Judge | PairJudge) -> tuple[Bench, Verdict]:
    if judge.bench is None or judge.verdict is None:
        raise ValueError(f"this {type(judge).__name__} has no engines to ask; call bound(name, engines, renderer) first")
    return judge.bench, judge.verdict


def _logit(p: float) -> float:
    p = min(max(p, SURE), 1.0 - SURE)
    return math.log(p) - math.log1p(-p)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
