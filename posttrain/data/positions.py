"""Plain texts become prompts: the beginning of a text, and what it says next.

    python -m posttrain.data.positions --model FOLDER --data texts.jsonl --out positions.jsonl --per-text 8

writes the rows with ``entropy``, that of the model's next token there, and in its rising order: from easy to hard, for a run with ``data.shuffle=false``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.columns import row_id
from posttrain.data.files import DataError, Record, read_rows
from posttrain.data.seeds import derive


@dataclass(frozen=True)
class Positions:
    """Rows with ``prompt``, a text up to one of its words and ``open``, and ``answer``, the words that follow.

    Source: positions for thoughts in pre-training text, RLP, arXiv 2510.01265 (how many and where is not known; uniform draws are our choice).

    ``path``: a file or data set.  ``text``: its column.  ``per_text``: positions of each text, drawn without repetition by ``seed`` and the text;
    null takes all.  ``words``: how many words follow.  ``least``: words before the first position.  ``open``: what asks for a thought, at the end of
    every prompt.  The words that follow never stand in their prompt.

    Wrong when: a text repeats itself: what comes next then stands before it.
    """

    path: str
    text: str = "text"
    per_text: int | None = 4
    words: int = 1
    least: int = 1
    open: str = "<think>"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.words < 1 or self.least < 1 or (self.per_text is not None and self.per_text < 1):
            raise DataError(f"Positions: words={self.words}, least={self.least} and per_text={self.per_text} must be at least 1")

    def rows(self) -> Iterator[Record]:
        for number, row in enumerate(read_rows(self.path)):
            text = row.get(self.text)
            if not isinstance(text, str):
                raise DataError(f"row {number} has no text in the column {self.text!r}; it has: {', '.join(map(str, row))}")
            found = [m.span() for m in re.finditer(r"\s*\S+", text)]
            places = list(range(self.least, len(found) - self.words + 1))
            name = row_id(row, self.text)
            if self.per_text is not None and len(places) > self.per_text:
                places = sorted(random.Random(derive(self.seed, "positions", name)).sample(places, self.per_text))
            for k in places:
                start, end = found[k][0], found[k + self.words - 1][1]
                yield {"id": f"{name}/{k}", "prompt": text[:start] + self.open, "answer": text[start:end]}


def by_entropy(positions: Positions, model: Any, tokenizer: Any) -> list[Record]:
    """The rows of ``positions`` from the lowest entropy of the next token to the highest, equal ones in the order of the texts.  ``model`` is a transformers causal
    language model; one forward per position, in plain text and without the words that ask for a thought."""
    import torch

    rows = []
    for row in positions.rows():
        text = row["prompt"][: len(row["prompt"]) - len(positions.open)]
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), -1)
        rows.append({**row, "entropy": round(float(-(logp.exp() * logp).sum()), 5)})
    return sorted(rows, key=lambda row: row["entropy"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m posttrain.data.positions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of the model whose entropy orders the positions")
    parser.add_argument("--data", required=True, help="a file or data set of texts")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--text", default="text", help="the column of the texts (default text)")
    parser.add_argument("--per-text", type=int, help="positions of each text (default all)")
    parser.add_argument("--words", type=int, default=1, help="words that follow (default 1)")
    parser.add_argument("--open", default="<think>", help="what asks for a thought, at the end of every prompt (default <think>)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    positions = Positions(chosen.data, chosen.text, chosen.per_text, chosen.words, open=chosen.open, seed=chosen.seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chosen.model).eval(), AutoTokenizer.from_pretrained(chosen.model)
    rows = by_entropy(positions, model, tokenizer)
    chosen.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{chosen.out}: {len(rows)} positions" + (f", entropy {rows[0]['entropy']:.3g} to {rows[-1]['entropy']:.3g}" if rows else ""))


if __name__ == "__main__":
    main()
