"""The order in which items are drawn: endless epochs, each a permutation derived by hashing, resumed exactly from four numbers.

No random state is stored: epoch ``e`` is ``permutation(num_items, seed, "sampler", name, e)``, so position ``p`` of epoch ``e`` is the same
item in every process, after every resume, whatever else was drawn meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from posttrain.data.seeds import permutation


class Sampler:
    """Indices of ``items`` (a count or anything with a length), epoch after epoch.

    ``shuffle=False`` keeps file order in every epoch.  ``name`` separates samplers that share a seed.  ``epoch`` counts completed passes of
    the item drawn next; ``drawn`` counts all items handed out.

    Cool-down: :meth:`cool_down` puts indices aside for a number of further *draws*.  A cooling item that comes up is passed over and
    counted in ``passed_over``; it is seen again in a later epoch.  When everything is cooling, the item is drawn all the same, so that
    ``next`` always ends.
    """

    def __init__(self, items: int | Sized, seed: int = 0, shuffle: bool = True, name: str = "train") -> None:
        self.num_items = items if isinstance(items, int) else len(items)
        if self.num_items < 1:
            raise ValueError(f"the sampler {name!r} has no items to draw from; the data set is empty or everything in it was dropped")
        self.seed, self.shuffle, self.name = seed, shuffle, name
        self.epoch = 0
        self.position = 0
        self.drawn = 0
        self.passed_over = 0
        self.cooling: dict[int, int] = {}
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        return permutation(self.num_items, self.seed, "sampler", self.name, self.epoch) if self.shuffle else list(range(self.num_items))

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices.  An index occurs twice in one call only when ``count`` reaches over the end of an epoch."""
        out: list[int] = []
        passed = 0
        while len(out) < count:
            item = self._advance()
            if self.cooling.get(item, 0) > self.drawn and passed < self.num_items:
                passed += 1
                self.passed_over += 1
                continue
            passed = 0
            out.append(item)
            self.drawn += 1
        self.cooling = {i: until for i, until in self.cooling.items() if until > self.drawn}
        return out

    def _advance(self) -> int:
        item = self._order[self.position]
        self.position += 1
        if self.position == self.num_items:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._permutation()
        return item

    def cool_down(self, indices: Iterable[int], draws: int) -> None:
        """Do not draw these until ``draws`` further items have been drawn."""
        for index in indices:
            if not 0 <= index < self.num_items:
                raise ValueError(f"cool_down: index {index} is outside 0..{self.num_items - 1}")
            self.cooling[index] = self.drawn + draws

    @property
    def epochs(self) -> float:
        """Passes over the data so far, with the fraction."""
        return self.epoch + self.position / self.num_items

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the very next item; plain numbers, fit for JSON."""
        names = ("num_items", "seed", "shuffle", "name", "epoch", "position", "drawn", "passed_over")
        return {**{n: getattr(self, n) for n in names}, "cooling": sorted(self.cooling.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.  Raises ``ValueError`` when it belongs to other data or another order."""
        for key in ("num_items", "seed", "shuffle", "name"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"cannot resume the sampler: {key} was {state[key]!r} in the checkpoint and is {getattr(self, key)!r} now; "
                    "resume with the same data and seed, or start a new run from the exported weights"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self.drawn, self.passed_over = state["drawn"], state["passed_over"]
        self.cooling = {int(i): int(until) for i, until in state["cooling"]}
        self._order = self._permutation()
