"""The ten numbers of the quickstart that are pinned, and how far another machine's arithmetic may take them.

``python -m tests.recipes.pins RUN_DIR > recipes/quickstart.pinned.json`` pins those of a finished run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = {
    "sft/demos/tokens, step 1": 0.0,
    "sft/demos/nll, step 1": 0.005,
    "sft/learner/grad_norm, step 1": 0.1,
    "sft/demos/nll, step 10": 0.1,
    "sft/demos/nll, step 45": 0.2,
    "accuracy before sft": 0.02,
    "accuracy after sft": 0.12,
    "grpo/reward/mean, step 1": 0.1,
    "grpo/reward/mean, mean of the last 10 steps": 0.15,
    "accuracy after grpo": 0.1,
}
"""Name -> allowed absolute difference.  Losses drift with the rounding of the processor, accuracies with sampling as well."""


def numbers(folder: Path) -> dict[str, float]:
    """The ten numbers of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_stage: dict[str, list[dict[str, Any]]] = {name: [r for r in rows if r["stage"] == name] for name in ("sft", "grpo")}
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    out = {}
    for name in TOLERANCE:
        if name.startswith("accuracy"):
            _, when, stage = name.split()
            out[name] = stages[stage]["evaluation"][when]["accuracy"]
            continue
        key, _, where = name.partition(", ")
        stage, _, metric = key.partition("/")
        chosen = by_stage[stage][-10:] if where.startswith("mean") else [by_stage[stage][int(where.removeprefix("step ")) - 1]]
        out[name] = sum(row[metric] for row in chosen) / len(chosen)
    return out


if __name__ == "__main__":
    found = numbers(Path(sys.argv[1]))
    print(json.dumps({name: {"value": round(value, 6), "tolerance": TOLERANCE[name]} for name, value in found.items()}, indent=1))
