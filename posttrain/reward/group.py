"""Rewards that need no label: what most answers to a prompt agree on, which kinds of answers there are, and noise to try a method with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from posttrain.data.seeds import derive
from posttrain.records import Rollout, Score
from posttrain.reward.base import Signature, read
from posttrain.reward.rules import NORMALISERS
from posttrain.reward.text import Extract, extract

EVALUATION = "-1/"
"""How the sample ids of an evaluation begin."""


@dataclass(frozen=True)
class Majority:
    """1 for the answers that most of the group gave, 0 for the others.

    Source: majority voting as a reward without labels, arXiv 2505.22453.

    ``extract``, ``normalise``: which part of an answer is compared, and how, as in :class:`posttrain.reward.rules.Exact`.  Answers that cannot be read never vote
    and get 0.  ``min_votes``: with fewer votes, and where two answers have equally many, all get 0, which teaches nothing.

    Wrong when: the most frequent answer is wrong more often than right: the policy is then drawn to it.
    """

    extract: Extract = "boxed"
    normalise: Sequence[str] = ("strip",)
    min_votes: int = 2

    execution: ClassVar[str] = "inline"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.normalise, self.extract)
        if self.min_votes < 1:
            raise ValueError(f"min_votes={self.min_votes} must be at least 1")

    def __call__(self, completions: Sequence[str]) -> list[Score]:
        kinds = [_kind(text, self.extract, self.normalise) for text in completions]
        votes = Counter(k for k in kinds if k is not None)
        (top, count), second = (votes.most_common(1) or [("", 0)])[0], (votes.most_common(2)[1:] or [("", 0)])[0][1]
        decided = sum(votes.values()) >= self.min_votes and count > second
        return [Score(0.0, "bad_format", f"no answer found by {self.extract}") if k is None else Score(float(decided and k == top)) for k in kinds]


@dataclass(frozen=True)
class Kinds:
    """The number of an answer's class within its group, for ``advantage=diverse``: equal answers have equal numbers, unreadable ones are one class.

    ``extract``, ``normalise``: as in :class:`Majority`.  Give it weight 0.  Source: the partition of DARLING, arXiv 2509.02534, by a rule in the place of a trained
    classifier.

    Wrong when: answers differ in wording only: every phrasing is a class of its own.
    """

    extract: Extract = "boxed"
    normalise: Sequence[str] = ("strip",)

    execution: ClassVar[str] = "inline"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.normalise, self.extract)

    def __call__(self, completions: Sequence[str]) -> list[float]:
        seen: dict[str | None, int] = {}
        return [float(seen.setdefault(_kind(text, self.extract, self.normalise), len(seen))) for text in completions]


@dataclass(frozen=True)
class Noisy:
    """Another reward, flipped (``1 - r``) with probability ``p``: how much noise does a method bear?  Never in an evaluation.

    Source: random and noisy rewards, arXiv 2505.22653.  The expected centred advantage is ``1 - 2p`` times the clean one.

    ``inner``: a reward between 0 and 1 that runs inline, such as a rule.  ``unit``: ``sample``, each by itself, or ``group``, all answers to a prompt in a
    step together.  ``seed``: of the draw, which depends on the sample alone.

    Wrong when: ``inner`` has values beyond 0 and 1.
    """

    inner: Any
    p: float = 0.1
    unit: Literal["sample", "group"] = "sample"
    seed: int = 0

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p} is a probability, between 0 and 1")
        if self.unit not in ("sample", "group"):
            raise ValueError(f"unit={self.unit!r} does not exist; choose sample or group")
        signature = Signature.of("inner", self.inner)
        if signature.execution != "inline" or signature.batched:
            raise ValueError(f"inner={type(self.inner).__name__} must be a reward of single answers that runs inline, such as posttrain.reward.rules.Numeric")

    def __call__(self, rollout: Rollout, progress: float) -> Score:
        arguments = Signature.of("inner", self.inner).arguments([rollout], progress)
        score = read(self.inner(**arguments))[0]
        if score.value is None or rollout.sample_id.startswith(EVALUATION) or not self._flips(rollout):
            return score
        return Score(1.0 - score.value, score.status, f"flipped; {score.detail}")

    def _flips(self, rollout: Rollout) -> bool:
        name = rollout.sample_id.rsplit("/", 1)[0] if self.unit == "group" else rollout.sample_id
        return derive(self.seed, "noise", name) / 2**63 < self.p


def _check(normalise: Sequence[str], how: Extract) -> None:
    if unknown := [n for n in normalise if n not in NORMALISERS]:
        raise ValueError(f"unknown normaliser {', '.join(unknown)}; choose from {', '.join(NORMALISERS)}")
    extract("", how)


def _kind(text: str, how: Extract, normalise: Sequence[str]) -> str | None:
    found = extract(text, how)
    for name in normalise if found is not None else ():
        found = NORMALISERS[name](found)  # type: ignore[arg-type]
    return found or None
