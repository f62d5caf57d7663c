"""Named rules that watch the metrics of a run and say when something looks wrong.

A rule is a pure function of the recent rows; :class:`Alarms` keeps the rows, asks every rule after every step, and tells each alarm once when it
begins.  No rule changes anything.  Thresholds are settings with defaults of ours, not published values, except where a source is named.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Row = Mapping[str, float]


class Rule(Protocol):
    """``name``, ``when`` and ``advice`` are shown to people.  Calling it with the rows so far, newest last, gives the observation or ``None``."""

    @property
    def name(self) -> str: ...
    @property
    def when(self) -> str: ...
    @property
    def advice(self) -> str: ...
    def __call__(self, rows: Sequence[Row]) -> str | None: ...


@dataclass(frozen=True)
class Alarm:
    """What a rule saw, and when."""

    name: str
    step: int
    text: str


def _series(rows: Sequence[Row], *names: str) -> list[float]:
    """The values of the first of ``names`` that the newest row has, oldest first."""
    for name in names:
        if rows and name in rows[-1]:
            return [row[name] for row in rows if name in row]
    return []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _entropy(rows: Sequence[Row], stream: str) -> list[float]:
    """The entropy where it is measured, else the mean surprise of sampled tokens, which estimates it without bias."""
    return _series(rows, f"{stream}/entropy", f"{stream}/nll")


@dataclass(frozen=True)
class EntropyFloor:
    """The policy has become almost deterministic: groups become equal and there is nothing left to compare."""

    floor: float = 0.003
    stream: str = "rollouts"
    name: str = "entropy_floor"

    @property
    def when(self) -> str:
        return f"entropy per token (`{self.stream}/entropy`, else `{self.stream}/nll`) is below {self.floor:g} nats"

    @property
    def advice(self) -> str:
        return "the sampling temperature, an entropy or KL term, the learning rate; harmless when accuracy is near 1"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        values = _entropy(rows, self.stream)
        if values and values[-1] < self.floor:
            return f"entropy is {values[-1]:.2g} nats per token, below {self.floor:g}"
        return None


@dataclass(frozen=True)
class EntropyFall:
    """Entropy collapses within a few steps."""

    drop: float = 0.75
    window: int = 5
    stream: str = "rollouts"
    name: str = "entropy_fall"

    @property
    def when(self) -> str:
        return f"entropy per token lost more than {100 * self.drop:g} % within {self.window} steps"

    @property
    def advice(self) -> str:
        return "learner.lr, the clip range, the spread of the advantages"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        values = _entropy(rows, self.stream)[-self.window - 1 :]
        if len(values) > self.window and values[0] > 0 and values[-1] < (1 - self.drop) * values[0]:
            return f"entropy fell from {values[0]:.3g} to {values[-1]:.3g} nats per token within {self.window} steps"
        return None


@dataclass(frozen=True)
class Repetition:
    """Rollouts repeat themselves."""

    share: float = 0.5
    window: int = 3
    name: str = "repetition"

    @property
    def when(self) -> str:
        return f"`rollout/repetition` is above {self.share:g} on average over {self.window} steps"

    @property
    def advice(self) -> str:
        return "the completions; whether the reward pays for length; stop conditions"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        values = _series(rows, "rollout/repetition")[-self.window :]
        if len(values) == self.window and _mean(values) > self.share:
            return f"{100 * _mean(values):.0f} % of the 4-grams of a rollout are repeats"
        return None


@dataclass(frozen=True)
class LengthDrift:
    """Answers grow while the reward does not."""

    growth: float = 0.3
    flat: float = 0.02
    window: int = 20
    name: str = "length_drift"

    @property
    def when(self) -> str:
        return (
            f"over {self.window} steps the second half's `rollout/tokens_mean` exceeds the first's by {100 * self.growth:g} % "
            f"and `reward/mean` moved by less than {self.flat:g}"
        )

    @property
    def advice(self) -> str:
        return "length normalisation of the loss, overlong shaping, the reward function"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        pairs = [(r["rollout/tokens_mean"], r["reward/mean"]) for r in rows if "rollout/tokens_mean" in r and "reward/mean" in r][
            -self.window :
        ]
        if len(pairs) < self.window:
            return None
        half = self.window // 2
        (length0, reward0), (length1, reward1) = ([_mean(c) for c in zip(*part, strict=True)] for part in (pairs[:half], pairs[half:]))
        if length1 > (1 + self.growth) * length0 and abs(reward1 - reward0) < self.flat:
            return f"rollouts grew from {length0:.0f} to {length1:.0f} tokens at a reward of {reward1:.3g}"
        return None


@dataclass(frozen=True)
class VerifierErrors:
    """Verdicts fail too often (budget of 1 % over 50 steps)."""

    budget: float = 0.01
    window: int = 50
    name: str = "verifier_errors"

    @property
    def when(self) -> str:
        return f"more than {100 * self.budget:g} % of a reward's verdicts in the last {self.window} steps are errors or time-outs"

    @property
    def advice(self) -> str:
        return "the reward function, its time limit, the sandbox; failed verdicts are masked, so the run learns from the rest"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        counts: dict[str, list[float]] = {}
        for row in rows[-self.window :]:
            for key, value in row.items():
                if found := re.fullmatch(r"reward/([^/]+)/(ok|bad_format|timeout|error)", key):
                    both = counts.setdefault(found[1], [0.0, 0.0])
                    both[0] += value if found[2] in ("timeout", "error") else 0.0
                    both[1] += value
        for reward, (failed, total) in counts.items():
            if total and failed / total > self.budget:
                return f"{failed:g} of {total:g} verdicts of reward {reward!r} failed in the last {min(len(rows), self.window)} steps"
        return None


@dataclass(frozen=True)
class MismatchHigh:
    """Learner and engine disagree about the sampled tokens.  The limit of the first number is the one a peer alarms at."""

    ratio: float = 1.05
    kl: float = 1e-3
    name: str = "mismatch"

    @property
    def when(self) -> str:
        return f"`mismatch/mean_exp_abs` is above {self.ratio:g} or `mismatch/k3` above {self.kl:g}"

    @property
    def advice(self) -> str:
        return "dtypes of learner and engine, whether the last weights arrived, top_p and top_k, the staleness; a truncated importance mask limits the harm"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        now = rows[-1] if rows else {}
        ratio, kl = now.get("mismatch/mean_exp_abs", 1.0), now.get("mismatch/k3", 0.0)
        if ratio > self.ratio or kl > self.kl:
            return f"learner and engine differ on the sampled tokens: mean factor {ratio:.4g}, KL {kl:.2g} nats"
        return None


@dataclass(frozen=True)
class ConstantReward:
    """Every rollout is worth the same."""

    window: int = 20
    name: str = "constant_reward"

    @property
    def when(self) -> str:
        return f"`reward/std` is 0 and `reward/mean` the same for {self.window} steps"

    @property
    def advice(self) -> str:
        return "the completions, the answer's format, the reward function, the difficulty of the prompts"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        seen = [(r["reward/mean"], r["reward/std"]) for r in rows if "reward/mean" in r and "reward/std" in r][-self.window :]
        if len(seen) == self.window and all(std < 1e-9 for _, std in seen) and len({mean for mean, _ in seen}) == 1:
            return f"every rollout of the last {self.window} steps had the reward {seen[-1][0]:g}"
        return None


@dataclass(frozen=True)
class RewardHacking:
    """The reward rises while held-out accuracy falls by more than chance."""

    rise: float = 0.02
    smooth: int = 5
    name: str = "reward_hacking"

    @property
    def when(self) -> str:
        return (
            f"since the best evaluation `reward/mean` (over {self.smooth} steps) rose by more than {self.rise:g} "
            "and the newest `eval/high` is below that best accuracy"
        )

    @property
    def advice(self) -> str:
        return "the completions with the highest rewards; a reward that can be had without being right; overlap of training and held-out prompts"

    def __call__(self, rows: Sequence[Row]) -> str | None:
        evaluated = [i for i, row in enumerate(rows) if "eval/accuracy" in row]
        if len(evaluated) < 2:
            return None
        best, now = max(evaluated[:-1], key=lambda i: rows[i]["eval/accuracy"]), evaluated[-1]
        rewards = [[r["reward/mean"] for r in rows[max(0, i + 1 - self.smooth) : i + 1] if "reward/mean" in r] for i in (best, now)]
        if not all(rewards):
            return None
        before, after = (_mean(r) for r in rewards)
        peak, upper = rows[best]["eval/accuracy"], rows[now].get("eval/high", rows[now]["eval/accuracy"])
        if after > before + self.rise and upper < peak:
            return f"the reward rose from {before:.3g} to {after:.3g} while held-out accuracy fell from {peak:.3g} to {rows[now]['eval/accuracy']:.3g}"
        return None


def default_rules() -> tuple[Rule, ...]:
    """Every rule with its default thresholds."""
    kinds = (EntropyFloor, EntropyFall, Repetition, LengthDrift, VerifierErrors, MismatchHigh, ConstantReward, RewardHacking)
    return tuple(kind() for kind in kinds)


WATCHED = re.compile(r"(reward|rollout|mismatch|eval)/.*|[^/]+/(entropy|nll)")


@dataclass
class Alarms:
    """The rows so far and the alarms that are on.  ``keep`` rows are remembered, and saved with the run (``state_dict``)."""

    rules: Sequence[Rule] = field(default_factory=default_rules)
    keep: int = 512
    rows: deque[dict[str, float]] = field(init=False)
    active: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rows = deque(maxlen=self.keep)
        names = [rule.name for rule in self.rules]
        if len(set(names)) < len(names):
            raise ValueError(f"two alarms have one name: {', '.join(sorted(n for n in names if names.count(n) > 1))}")

    def check(self, step: int, metrics: Row) -> list[Alarm]:
        """Add a row; the alarms that have just begun."""
        self.rows.append({k: float(v) for k, v in metrics.items() if WATCHED.fullmatch(k)})
        rows, begun = list(self.rows), []
        for rule in self.rules:
            seen = rule(rows)
            if seen is None:
                self.active.discard(rule.name)
            elif rule.name not in self.active:
                self.active.add(rule.name)
                begun.append(Alarm(rule.name, step, f"{rule.name} at step {step}: {seen}. Look at: {rule.advice}"))
        return begun

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "active": sorted(self.active)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if missing := {"rows", "active"} - set(state):
            raise ValueError(f"the saved state of the alarms lacks {', '.join(sorted(missing))}; it was not written by Alarms.state_dict")
        self.rows.clear()
        self.rows.extend(dict(row) for row in state["rows"])
        self.active = set(state["active"])
