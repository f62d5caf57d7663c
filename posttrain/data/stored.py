"""What a teacher thinks of given answers, asked once and kept: its most probable tokens at every place of an answer.

    python -m posttrain.data.stored --teacher FOLDER --data answers.jsonl --out stored.jsonl --top-k 64

writes one row per answer: ``ids``, ``num_prompt`` and, for each token of the answer, ``top_ids`` and ``top_logps`` of the distribution it was drawn
from; and ``vocabulary``, a fingerprint of the tokenizer.  ``data.kind=stored`` reads it; ``regularizer.FullKL`` with ``to: stored`` learns from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.columns import Unique, row_id
from posttrain.data.demos import Truncation
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt
from posttrain.data.render import Renderer
from posttrain.data.report import Report
from posttrain.records import Demo, Segment, Source

NAMES = ("ids", "num_prompt", "top_ids", "top_logps", "vocabulary")


def vocabulary_of(tokenizer: Any) -> str:
    """The same for two tokenizers that give every token the same number."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()).hexdigest()[:16]


def to_stored(
    rows: Iterable[Mapping[str, Any]], renderer: Renderer, *, max_length: int | None = None, truncation: Truncation = "error"
) -> tuple[list[Demo], Report]:
    """One demonstration per row.  Nothing is tokenised: the ids are those that the teacher saw.  Left out and counted: ``empty_answer``, ``too_long``.

    Raises :class:`DataError` naming the row when columns are missing or do not fit, and when the tokenizer is another one.
    """
    report, unique, demos, own = Report("stored"), Unique(), [], vocabulary_of(renderer.tokenizer)
    for number, row in enumerate(rows):
        kept = {**(row.get("meta") or {}), **row}
        missing = [name for name in NAMES if name not in kept]
        if missing:
            raise DataError(f"row {number} has no column {missing[0]!r}: a file for data.kind=stored is written by python -m posttrain.data.stored")
        if kept["vocabulary"] != own:
            raise DataError(f"row {number} was stored with another tokenizer (vocabulary {kept['vocabulary']}, this model's is {own}); store the answers again")
        ids, first = tuple(kept["ids"]), int(kept["num_prompt"])
        tops = [(tuple(i), tuple(p)) for i, p in zip(kept["top_ids"], kept["top_logps"], strict=True)]
        wrong = [k for k, (i, p) in enumerate(tops) if len(i) != len(p) or not i or len(set(i)) < len(i)]
        if len(tops) != len(ids) - first or wrong:
            where = f"token {wrong[0]} of the answer has ids that repeat or do not match" if wrong else f"{len(tops)} distributions for {len(ids) - first} tokens"
            raise DataError(f"row {number}: {where}; every token of the answer needs one list of distinct ids and one of as many log-probs")
        name = row_id(kept) if "id" in kept else hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
        if first >= len(ids):
            report.drop("empty_answer")
            continue
        if max_length is not None and len(ids) > max_length:
            if truncation == "error":
                raise DataError(f"row {number} (id {name}) has {len(ids)} tokens, more than max_length={max_length}; raise the limit, or set truncation=drop or end")
            if truncation == "drop" or first >= max_length:
                report.drop("too_long")
                continue
            ids, tops = ids[:max_length], tops[: max_length - first]
        prompt = Segment(ids[:first], Source.prompt, trainable=False)
        report.keep(len(ids), len(ids) - first)
        record = make_prompt(name, ids[:first], renderer.tokenizer.decode(ids[:first]), {})
        demos.append(Demo(unique(name), (prompt, Segment(ids[first:], Source.demo, stored=tuple(tops))), prompt=record))
    report.check()
    return demos, report


def store(demos: Sequence[Demo], teacher: Any, tokenizer: Any, top_k: int, temperature: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows for :func:`to_stored`.  ``teacher`` is a transformers causal language model; one forward per answer, over the whole vocabulary.

    Raises ``ValueError`` when the teacher has fewer outputs than the tokenizer has tokens.
    """
    import torch

    if teacher.config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(f"the teacher has {teacher.config.get_text_config().vocab_size} outputs and the tokenizer {len(tokenizer)} tokens; it cannot score them")
    vocabulary = vocabulary_of(tokenizer)
    for demo in demos:
        ids = [i for s in demo.segments for i in s.ids]
        flags = [f for s in demo.segments for f in (s.trainable if isinstance(s.trainable, tuple) else (s.trainable,) * len(s.ids))]
        first, end = flags.index(True), len(flags) - flags[::-1].index(True)
        if not all(flags[first:end]):
            raise ValueError(f"answer {demo.id!r} is interrupted by turns that are not learnt from; store single answers (prompt and completion)")
        ids = ids[:end]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([ids], device=teacher.device)).logits[0, first - 1 : -1].float()
        top = torch.log_softmax(logits / temperature, -1).topk(min(top_k, logits.shape[-1]), -1)
        yield {
            "id": demo.id, "ids": ids, "num_prompt": first, "top_ids": top.indices.tolist(),
            "top_logps": [[round(x, 5) for x in row] for row in top.values.tolist()], "vocabulary": vocabulary,
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m posttrain.data.stored", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", required=True, help="folder or Hugging Face id of the teacher; its tokenizer must be the student's")
    parser.add_argument("--data", required=True, help="answers: prompt + completion, or messages, in any form that data.kind=demos reads")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--top-k", type=int, default=64, help="tokens kept per place (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the teacher; the loss's own must be the same (default 1)")
    parser.add_argument("--max-length", type=int, default=4096)
    chosen = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.data.load import load_data

    tokenizer = AutoTokenizer.from_pretrained(chosen.teacher)
    demos, report = load_data("demos", chosen.data, tokenizer, max_length=chosen.max_length, loss_on="completion")
    print(report)
    teacher = AutoModelForCausalLM.from_pretrained(chosen.teacher).eval()
    with chosen.out.open("w") as file:
        for row in store(demos, teacher, tokenizer, chosen.top_k, chosen.temperature):  # type: ignore[arg-type]
            file.write(json.dumps(row) + "\n")
    print(f"{chosen.out}: {len(demos)} answers, the {chosen.top_k} most probable tokens at every place of each")


if __name__ == "__main__":
    main()
