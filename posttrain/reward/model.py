"""A trained reward model as a reward: one actor per run scores the sampled tokens as they are, in packed rows.

It is the folder that ``recipe=reward_model`` exports, or any ``...ForSequenceClassification`` folder with one label and the policy's tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.records import Rollout, Score


class RewardModel:
    """``path``: the model's folder or id.  ``dtype``: of its weights.  ``steps``: null scores the whole answer; ``min``, ``product``, ``mean`` or ``last`` of
    the probabilities behind every ``separator`` makes a process reward model's verdict; the last step of a finished answer is read
    with one behind it.  ``micro_batch_tokens``: columns per packed row.  ``num_gpus``: 0 runs on the CPU.  ``on_truncated``: what a cut-off answer gets
    in the place of its score; null scores it like any other.

    Source: arXiv 2203.02155; steps, arXiv 2305.20050.  Raises ``ValueError`` when the folder is no scalar model or its tokenizer is not the policy's.
    """

    scope = "batch"
    timeout_s = 600.0  # the first call loads the model

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        steps: str | None = None,
        separator: str = "\n",
        micro_batch_tokens: int = 8192,
        num_gpus: float = 0.0,
        on_truncated: float | None = None,
    ) -> None:
        if steps not in (None, *STEPS):
            raise ValueError(f"reward.RewardModel: steps={steps!r} does not exist; choose from {', '.join(STEPS)}, or null for the whole answer")
        self.path, self.dtype, self.steps, self.separator = path, dtype, steps, separator
        self.micro_batch_tokens, self.num_gpus, self.on_truncated = micro_batch_tokens, num_gpus, on_truncated
        self._actor: Any = None
        self._marks: frozenset[int] = frozenset()
        self._tokenizer: Any = None

    def check(self, tokenizer: Any) -> None:
        """The folder must hold a scalar model that reads the policy's tokens.  Called before anything starts."""
        from transformers import AutoConfig, AutoTokenizer

        try:
            config, own = AutoConfig.from_pretrained(self.path), AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(f"reward model path={self.path}: cannot be read ({str(error).splitlines()[0]})") from error
        if not any("SequenceClassification" in name for name in config.architectures or []) or config.num_labels != 1:
            raise ValueError(
                f"reward model path={self.path}: {', '.join(config.architectures or ['no architecture'])} with {config.num_labels} labels gives no single number; "
                "train one with recipe=reward_model, or give a ...ForSequenceClassification folder with one label"
            )
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"reward model path={self.path}: its tokenizer is not the policy's, and it is given the policy's tokens")
        if self.steps is not None:
            self._tokenizer = own
            self._marks = frozenset(i for token, i in own.get_vocab().items() if own.decode([i]).endswith(self.separator))
            if not self._marks:
                raise ValueError(f"reward model path={self.path}: no token ends with separator={self.separator!r}, so steps never end")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_actor": None}

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        if self._actor is None:
            self._start()
        sequences = [tuple(self._ids(r)) for r in rollouts]
        marks = [self._places(r, ids) for r, ids in zip(rollouts, sequences, strict=True)]
        found = await asyncio.wrap_future(self._actor.score.remote(sequences, marks).future())
        return [self._verdict(r, numbers) for r, numbers in zip(rollouts, found, strict=True)]

    def _start(self) -> None:
        import ray

        path = str(Path(self.path).resolve()) if Path(self.path).is_dir() else self.path
        self._actor = ray.remote(num_cpus=0, num_gpus=self.num_gpus)(ScoringActor).remote(path, self.dtype, self.micro_batch_tokens, not self.num_gpus)

    def _ids(self, rollout: Rollout) -> list[int]:
        """What the model reads.  The last step of a finished answer ends as every step did in training: in the separator, not in the end token."""
        asked, answer = list(rollout.prompt.ids), [i for segment in rollout.segments for i in segment.ids]
        if self.steps is not None and rollout.finish != "length":
            start = max((k + 1 for k, i in enumerate(answer) if i in self._marks), default=0)
            last = self._tokenizer.decode(answer[start:], skip_special_tokens=True)
            if last.strip():
                answer[start:] = self._tokenizer(last + self.separator, add_special_tokens=False)["input_ids"]
        return asked + answer

    def _places(self, rollout: Rollout, ids: Sequence[int]) -> list[int]:
        """Indices of the tokens behind which the head is read: the last one, or the ends of steps in the answer."""
        if self.steps is None:
            return [len(ids) - 1]
        return [i for i in range(len(rollout.prompt.ids), len(ids)) if ids[i] in self._marks]

    def _verdict(self, rollout: Rollout, numbers: Sequence[float]) -> Score:
        if rollout.finish == "length" and self.on_truncated is not None:
            return Score(self.on_truncated, "bad_format", "cut off")
        if self.steps is None:
            return Score(numbers[0])
        if not numbers:
            return Score(0.0, "bad_format", f"no step: {self.separator!r} does not occur")
        import math

        return Score(STEPS[self.steps]([1.0 / (1.0 + math.exp(-max(min(x, 500.0), -500.0))) for x in numbers]))

    def close(self) -> None:
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None


def _product(values: Sequence[float]) -> float:
    out = 1.0
    for value in values:
        out *= value
    return out


STEPS: dict[str, Any] = {"min": min, "product": _product, "mean": lambda v: sum(v) / len(v), "last": lambda v: v[-1]}


class ScoringActor:
    """The frozen model in a process of its own."""

    def __init__(self, path: str, dtype: str, micro_batch_tokens: int, cpu: bool) -> None:
        import os

        if cpu:
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self.path, self.dtype, self.limit = path, dtype, micro_batch_tokens
        self.module: Any = None

    def score(self, sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[list[float]]:
        """The head's number behind the tokens at ``places`` of every sequence."""
        import torch

        if self.module is None:
            self.module = load(self.path, self.dtype)
        device = self.module.head.weight.device
        out: list[list[float]] = [[] for _ in sequences]
        for part in packed([len(s) for s in sequences], self.limit):
            ids = torch.tensor([i for k in part for i in sequences[k]], device=device)
            positions = torch.cat([torch.arange(len(sequences[k]), device=device) for k in part])
            lengths = torch.tensor([len(sequences[k]) for k in part], device=device)
            with torch.no_grad():
                numbers = self.module(ids, ids, positions, lengths, None, 1.0)[0].tolist()
            start = 0
            for k in part:
                out[k] = [numbers[start + place] for place in places[k]]
                start += len(sequences[k])
        return out


def load(path: str, dtype: str) -> Any:
    """The frozen scalar model of a folder, in evaluation mode, on this process's GPU where there is one."""
    from posttrain.config import ModelConfig
    from posttrain.learner.core import device_of
    from posttrain.learner.model import load_model
    from posttrain.learner.scalar import ScalarModule, scalar_self_check

    module = ScalarModule(load_model(ModelConfig(path=path, dtype=dtype), train=False, head="scalar").to(device_of(0))).eval()  # type: ignore[arg-type]
    scalar_self_check(module)
    return module


def packed(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which sequences share a row: in order, as many as fit, at least one."""
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not rows or length > room:
            rows.append([])
            room = limit
        rows[-1].append(index)
        room -= length
    return rows
