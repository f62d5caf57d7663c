"""What happened to every row on the way in: read, kept, dropped with a reason, cut, and how many tokens that made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Counts of one pass over a data set.  ``read == kept + sum(dropped.values())`` always holds, and :meth:`check` asserts it.

    ``truncated`` counts kept rows that were cut; ``events`` counts what happened to kept rows without losing them (an EOS added, a control
    token in the text spelt out, ...); ``lengths`` are the token counts of the kept rows, in order.
    """

    name: str = ""
    read: int = 0
    kept: int = 0
    truncated: int = 0
    trainable_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def keep(self, num_tokens: int, trainable_tokens: int = 0, *, truncated: bool = False) -> None:
        """Count one kept row."""
        self.read += 1
        self.kept += 1
        self.truncated += truncated
        self.trainable_tokens += trainable_tokens
        self.lengths.append(num_tokens)

    def drop(self, reason: str) -> None:
        """Count one row left out."""
        self.read += 1
        self.dropped[reason] += 1

    def add(self, other: Report) -> Report:
        """Sum of two reports, keeping this one's name."""
        return Report(
            self.name,
            self.read + other.read,
            self.kept + other.kept,
            self.truncated + other.truncated,
            self.trainable_tokens + other.trainable_tokens,
            self.dropped + other.dropped,
            self.events + other.events,
            self.lengths + other.lengths,
        )

    def check(self) -> None:
        """Raise ``AssertionError`` when a row was lost without a reason."""
        lost = self.read - self.kept - sum(self.dropped.values())
        assert lost == 0 and self.kept == len(self.lengths), f"{self.name}: {lost} rows are unaccounted for in {self}"

    def quantile(self, q: float) -> int:
        """Length in tokens below which a share ``q`` of the kept rows lies; 0 without rows."""
        ordered = sorted(self.lengths)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics file."""
        counts = {"read": self.read, "kept": self.kept, "truncated": self.truncated, "tokens": self.tokens}
        counts |= {"trainable_tokens": self.trainable_tokens}
        counts |= {f"dropped/{reason}": n for reason, n in self.dropped.items()} | {f"events/{name}": n for name, n in self.events.items()}
        return {name: float(value) for name, value in counts.items()}

    def __str__(self) -> str:
        parts = [f"{self.name + ': ' if self.name else ''}{self.read} rows read, {self.kept} kept"]
        parts += [f"{n} dropped ({reason})" for reason, n in sorted(self.dropped.items())]
        parts += [f"{self.truncated} truncated"] if self.truncated else []
        parts += [f"{n} {name.replace('_', ' ')}" for name, n in sorted(self.events.items())]
        if self.lengths:
            parts.append(f"{self.tokens} tokens ({self.trainable_tokens} trainable)")
            parts.append(f"length median {self.quantile(0.5)}, 95 % {self.quantile(0.95)}, max {max(self.lengths)}")
        return "; ".join(parts)
