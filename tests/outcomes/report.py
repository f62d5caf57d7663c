"""docs/log.md: what sources claim and what small runs found.  ``python -m tests.outcomes.report > docs/log.md``; names after it (``MODULE`` or ``MODULE:part of a claim's name``)
print rows alone."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module

from posttrain.statistics import Interval
from tests.outcomes.claims import LEVEL, Claim, measured

MODULES = {
    "hybrids": "SFT and reinforcement learning together",
    "reinforcement": "Reinforcement learning",
    "supervised": "Imitation, distillation, self-training",
    "preference": "Preference objectives",
    "off_policy": "Rollouts of another policy",
    "scored": "Reward models, rewards of steps, critics",
    "sampling": "Penalties, normalisers, the groups of a step",
    "games": "Preferences sampled anew",
    "turns": "Second attempts",
    "given": "Given texts, weighed and doubted",
    "shaped": "What is kept, where it is paid, how ratios scatter; transcripts",
}


def claims_of(module: str) -> tuple[Claim, ...]:
    return import_module(f"tests.outcomes.{module}").CLAIMS


def number(value: Interval) -> str:
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"


def row(claim: Claim) -> str:
    outcome = measured(claim)
    arms = "; ".join(f"{name} {number(interval)}" for name, interval in outcome.arms.items())
    effect = f"{claim.effect_is or 'difference'}: {number(outcome.effect)}" if len(outcome.arms) > 1 or claim.effect else ""
    cells = [
        claim.name,
        claim.source,
        claim.says,
        f"{claim.run}; {claim.seeds} seeds",
        f"{claim.unit}: {arms}",
        effect,
        f"**{outcome.found}**{'. ' + claim.note if claim.note else ''}",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEAD = """# What small runs found

What the sources claim, looked for where it can be computed: softmax tables in float64 (tables of numbers, where a scalar head stands) that learn through the package's own
records, advantages, gates, packing, two-pass weighing and objectives, with exact expectations where they can be summed. Written by
`python -m tests.outcomes.report > docs/log.md`; `tests/outcomes/test_outcomes.py` runs every row again.

A row is *one* experiment. Where a claim **holds**, the {level:.0%} interval of the effect over seeds lies above 0; where it **does not hold**, the interval ends at or below 0; else it is
**not decided**. Rates and lengths were set so that a run gets to where it goes in a second or two, not for the sign of an effect; a claim about language models
may well be true of them and false of a table of thirty logits.
`expected` stands for what follows from the formula and is claimed by nobody in particular, `secondary` for what a third party reports.
Intervals are percentile bootstraps over few seeds, so they are narrow ones.
"""
COLUMNS = ("claim", "source", "what is said", "run", "numbers", "effect", "found")


def pages() -> str:
    out, all_claims = [HEAD.format(level=LEVEL)], [c for module in MODULES for c in claims_of(module)]
    counts = Counter(measured(c).found for c in all_claims)
    out.append(f"{len(all_claims)} claims: {counts['holds']} hold, {counts['does not hold']} do not, {counts['not decided']} are not decided.\n")
    for module, title in MODULES.items():
        more = getattr(import_module(f"tests.outcomes.{module}"), "about", None)
        out += [f"## {title}\n", *([more() + "\n"] if more else []), "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(row, claims_of(module)), ""]
    return "\n".join(out)


def main(names: Sequence[str]) -> None:
    if not names:
        print(pages(), end="")
    for module, _, only in (name.partition(":") for name in names):
        for claim in (c for c in claims_of(module) if only in c.name):
            start = time.perf_counter()
            found = measured(claim).found
            print(row(claim), "" if found == claim.found else f"!!! expected {claim.found}", f"{time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
