"""A trained reward model as a reward: what it reads, what it says, and what is refused.  The actor itself runs in ``tests/recipes/test_scalar.py``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import LearnerConfig, ModelConfig
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.records import Prompt, Rollout, Segment, Source
from posttrain.reward.base import Signature
from posttrain.reward.model import RewardModel, ScoringActor, packed
from posttrain.testing.tiny import create_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model's export."""
    root = tmp_path_factory.mktemp("rm")
    create_tiny_model(root / "model", hidden_size=32, num_heads=1, num_kv_heads=1, num_layers=1, intermediate_size=48)
    model = ModelConfig(path=str(root / "model"), dtype="float32")
    TorchEngine(model, LearnerConfig(engine="torch"), load("reward_model")).export(root / "out")
    return str(root / "out")


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rollout(tokenizer: Any, prompt: str, text: str, finish: str = "stop") -> Rollout:
    ids = tuple(tokenizer(text)["input_ids"])
    asked = Prompt(prompt, tuple(tokenizer(prompt)["input_ids"]))
    return Rollout(f"{prompt}/{text}", asked, (Segment(ids, Source.policy, logprobs=(-1.0,) * len(ids), version=0),), finish, text=text)  # type: ignore[arg-type]


def test_the_actor_gives_the_numbers_of_transformers(folder: str, tokenizer: Any) -> None:
    """However the rows are packed."""
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    theirs.config.pad_token_id = 0
    sequences = [tokenizer(text)["input_ids"] for text in ("abc", "a longer text", "x", "four words in all")]
    expected = [float(theirs(input_ids=torch.tensor([s])).logits) for s in sequences]
    for limit in (1, 16, 1000):
        found = ScoringActor(folder, "float32", limit, cpu=False).score(sequences, [[len(s) - 1] for s in sequences])
        assert [x for (x,) in found] == pytest.approx(expected, abs=1e-5)
    assert ScoringActor(folder, "float32", 64, cpu=False).score(sequences[:1], [[0, 2]])[0][1] == pytest.approx(expected[0], abs=1e-5)


def test_rows_hold_what_fits() -> None:
    assert packed([3, 4, 5, 20, 1], 10) == [[0, 1], [2], [3], [4]] and packed([], 10) == []


def test_what_is_read(folder: str, tokenizer: Any) -> None:
    whole, steps = RewardModel(folder), RewardModel(folder, steps="min")
    steps.check(tokenizer)
    answer = rollout(tokenizer, "q", "one\ntwo\nend")
    ids = whole._ids(answer)
    assert whole._places(answer, ids) == [len(ids) - 1] and tokenizer.decode(ids) == "qone\ntwo\nend"

    def read(answer: Rollout) -> list[str]:
        ids = steps._ids(answer)
        return [tokenizer.decode(ids[: i + 1]) for i in steps._places(answer, ids)]

    assert read(rollout(tokenizer, "a\nb", "c", "length")) == [], "a line break in the question ends no step, and a cut one has no end"


def test_the_last_step_is_judged_as_it_was_in_training(folder: str, tokenizer: Any) -> None:
    """An answer ends in the end token, not in a separator: read only where separators are, it would be judged without its conclusion."""
    steps = RewardModel(folder, steps="last")
    steps.check(tokenizer)
    for text in ("one\ntwo\nend", "one\ntwo\nend" + tokenizer.eos_token, "one\ntwo\nend\n", "one\ntwo\nend\n" + tokenizer.eos_token):
        answer = rollout(tokenizer, "q", text)
        ids = steps._ids(answer)
        ends = [tokenizer.decode(ids[: i + 1]) for i in steps._places(answer, ids)]
        assert ends == ["qone\n", "qone\ntwo\n", "qone\ntwo\nend\n"], text
    cut = rollout(tokenizer, "q", "one\ntwo\nen", "length")
    assert len(steps._places(cut, steps._ids(cut))) == 2
    assert len(pickle.dumps(steps)) > 0


def test_verdicts(folder: str, tokenizer: Any) -> None:
    answer, cut = rollout(tokenizer, "q", "x"), rollout(tokenizer, "q", "x", "length")
    assert RewardModel(folder)._verdict(answer, [1.5]).value == 1.5 and RewardModel(folder)._verdict(cut, [1.5]).value == 1.5
    score = RewardModel(folder, on_truncated=-1.0)._verdict(cut, [1.5])
    assert (score.value, score.status) == (-1.0, "bad_format")
    zero, low = 0.5, 1 / (1 + 2.718281828459045)
    for how, expected in (("min", low), ("product", zero * low), ("mean", (zero + low) / 2), ("last", zero)):
        assert RewardModel(folder, steps=how)._verdict(answer, [-1.0, 0.0]).value == pytest.approx(expected)
    none = RewardModel(folder, steps="min")._verdict(answer, [])
    assert (none.value, none.status) == (0.0, "bad_format")


def test_it_is_called_once_with_everything(folder: str) -> None:
    found = Signature.of("model", pickle.loads(pickle.dumps(RewardModel(folder))))
    assert (found.execution, found.scope, found.wanted) == ("async", "batch", ("rollouts",))


def test_what_is_refused(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps='worst' does not exist; choose from min, product, mean, last"):
        RewardModel(folder, steps="worst")
    with pytest.raises(ValueError, match="cannot be read"):
        RewardModel(str(tmp_path / "nowhere")).check(tokenizer)
    language = create_tiny_model(tmp_path / "lm", hidden_size=32, num_heads=1, num_kv_heads=1, num_layers=1, intermediate_size=48)
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM with .* gives no single number; train one with recipe=reward_model"):
        RewardModel(str(language)).check(tokenizer)
    from posttrain.testing.tiny import create_tokenizer

    with pytest.raises(ValueError, match="its tokenizer is not the policy's"):
        RewardModel(folder).check(create_tokenizer("abc"))
    with pytest.raises(ValueError, match=r"no token ends with separator='\\n\\n'"):
        RewardModel(folder, steps="min", separator="\n\n").check(tokenizer)
