"""A frozen teacher beside the policy: its log-probs, its full-vocabulary columns, and what happens when it does not fit."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.build import _check_teacher
from posttrain.config import ConfigError, LearnerConfig, LoraConfig, ModelConfig, RunConfig
from posttrain.data.pack import Packer
from posttrain.learner.actor import StepReport
from posttrain.learner.forward import forward, parse_column
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference, regularizer
from posttrain.records import Demo, Prompt, Row, Segment, Source, TokenBatch
from posttrain.testing.tiny import ALPHABET, create_tiny_model, create_tokenizer
from posttrain.update import OWN, Learn

SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "intermediate_size": 96}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another size than the policy, the same tokenizer."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return str(create_tiny_model(folder, seed=7, **{**SIZES, "hidden_size": 96, "num_heads": 3, "num_layers": 1}))


@pytest.fixture
def batch() -> TokenBatch:
    rows = [
        Row(ids=[5, 6, 7, 8, 9], sources=["prompt", "prompt", "policy", "policy", "policy"], sample_id="a"),
        Row(ids=[9, 8, 7], sources=["prompt", "policy", "policy"], sample_id="b"),
    ]
    return TokenBatch.from_sequences(rows)


def objective(*, regularizers: dict[str, Any] | None = None, adv: Any = None) -> Objective:
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), adv or advantage.One(0.0), aggregate.TokenMean())
    return Objective({"rollouts": stream}, regularizers or {})


def engine(path: str, teacher: str | None, goal: Objective, **model: Any) -> TorchEngine:
    cfg = ModelConfig(path=path, teacher=teacher, **{"dtype": "float64", **model})
    return TorchEngine(cfg, LearnerConfig(engine="torch", lr=5e-4), goal, total_steps=5)


def rows_of(path: str, batch: TokenBatch, logits: bool = False) -> torch.Tensor:
    """Log-probabilities over the vocabulary of every column, from the plain model."""
    from posttrain.learner.model import load_model

    model = load_model(ModelConfig(path=path, dtype="float64"), train=False)
    parts = [batch.input_ids[batch.seq == i] for i in range(batch.num_sequences)]
    with torch.no_grad():
        rows = torch.cat([model(input_ids=ids[None]).logits[0] for ids in parts])
    return rows if logits else torch.log_softmax(rows, -1)


@pytest.mark.parametrize("lora", [False, True])
def test_scores_are_the_teachers_own(tiny: str, teacher: str, batch: TokenBatch, lora: bool) -> None:
    one = engine(tiny, teacher, objective(), lora=LoraConfig(r=4) if lora else None)
    expected = rows_of(teacher, batch).gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(one.score(batch, "teacher")["logp"], expected, rtol=0, atol=1e-10)
    assert float((one.score(batch, "current")["logp"] - expected).abs().max()) > 1e-3
    assert not any(p.requires_grad for p in one.core.teacher.parameters())


def test_columns_compare_with_base_and_teacher_in_one_forward(tiny: str, teacher: str, batch: TokenBatch) -> None:
    one = engine(tiny, teacher, objective())
    names = ["kl_reverse:teacher", "kl_forward:teacher", "jsd_0.3:teacher", "kl_forward:base", "entropy", "jsd_0.5:base", "logp_greedy", "logsumexp", "collision"]
    _, found = forward(one.module, batch, columns=names, only_trainable=False, base_model=one.core.base, teacher_model=one.core.teacher)
    p, q = rows_of(tiny, batch), rows_of(teacher, batch)
    m = torch.log(0.3 * q.exp() + 0.7 * p.exp())
    expected = {
        "kl_reverse:teacher": (p.exp() * (p - q)).sum(1),
        "kl_forward:teacher": (q.exp() * (q - p)).sum(1),
        "jsd_0.3:teacher": (0.3 * q.exp() * (q - m) + 0.7 * p.exp() * (p - m)).sum(1),
        "kl_forward:base": torch.zeros(batch.num_tokens, dtype=torch.float64),
        "entropy": -(p.exp() * p).sum(1),
        "logp_greedy": p.max(1).values,
        "logsumexp": rows_of(tiny, batch, logits=True).logsumexp(1),
        "collision": (p.exp() ** 2).sum(1).log(),
        "jsd_0.5:base": torch.zeros(batch.num_tokens, dtype=torch.float64),
    }
    assert set(found) == set(names)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "term",
    [
        regularizer.FullKL("reverse", "teacher", 1.0),
        regularizer.FullKL("forward", "teacher", 1.0),
        regularizer.JensenShannon(0.5, "teacher", 1.0),
    ],
    ids=["reverse", "forward", "jsd"],
)
def test_distillation_approaches_the_teacher(tiny: str, teacher: str, batch: TokenBatch, term: Any) -> None:
    one = engine(tiny, teacher, objective(regularizers={"distill": term}))
    whole = batch.replace(totals=one.core.objective.totals(batch))
    seen = []
    for _ in range(6):
        metrics = one.forward_backward(whole)
        seen.append(metrics["rollouts/distill"][0])
        one.optim_step()
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.9 * seen[0]
    assert not one.core.teacher.training


def test_a_teacher_equal_to_the_policy_moves_nothing(tiny: str, batch: TokenBatch) -> None:
    one = engine(tiny, tiny, objective(regularizers={"distill": regularizer.FullKL("reverse", "teacher", 1.0)}))
    one.forward_backward(batch.replace(totals=one.core.objective.totals(batch)))
    assert max(float(g.abs().max()) for g in one.grads.values()) < 1e-12


def test_a_missing_or_foreign_teacher_is_refused(tiny: str, batch: TokenBatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher is not set"):
        engine(tiny, None, objective()).score(batch, "teacher")
    other = str(create_tiny_model(tmp_path / "other", alphabet="abc", **SIZES))
    with pytest.raises(ValueError, match=r"vocabulary of \d+ tokens and the policy one of"):
        engine(tiny, other, objective()).score(batch, "teacher")
    with pytest.raises(ValueError, match="teacher_model"):
        forward(engine(tiny, None, objective()).module, batch, columns=["kl_reverse:teacher"])
    with pytest.raises(ValueError, match="score has no policy 'ema'"):
        engine(tiny, None, objective()).score(batch, "ema")


@pytest.mark.parametrize("name", ["jsd:teacher", "jsd_1.5:teacher", "jsd_x:base", "kl_reverse", "kl_forward:ema", "entropy:base", "logp_greedy:base"])
def test_a_column_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown full-vocabulary column"):
        parse_column(name)


def test_the_tokenizers_must_agree(tiny: str, teacher: str, tmp_path: Path) -> None:
    config = RunConfig(loss=None, model=ModelConfig(path=tiny, teacher=teacher))
    _check_teacher(config, create_tokenizer())
    swapped = tmp_path / "swapped"
    shutil.copytree(teacher, swapped)
    create_tokenizer(ALPHABET[1] + ALPHABET[0] + ALPHABET[2:]).save_pretrained(swapped)
    config.model.teacher = str(swapped)
    with pytest.raises(ConfigError, match="disagree on 2 tokens, first 'a'"):
        _check_teacher(config, create_tokenizer())
    config.model.teacher = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        _check_teacher(config, create_tokenizer())


class InProcess:
    """The learner's group, with one engine in this process."""

    def __init__(self, one: TorchEngine) -> None:
        self.one, self.batches = one, []

    async def score(self, micro: list[TokenBatch], policy: str = "current", **wanted: bool) -> list[dict[str, torch.Tensor]]:
        return [self.one.score(b, policy, **wanted) for b in micro]

    async def step(self, micro: list[TokenBatch], weights: Any) -> StepReport:
        self.batches += micro
        return StepReport(self.one.forward_backward(micro[0]), self.one.optim_step())


def test_the_columns_an_objective_needs_are_filled(tiny: str, teacher: str) -> None:
    goal = objective(regularizers={"kl": regularizer.KL("k2", "teacher", 0.5)}, adv=advantage.Column())
    learner = InProcess(engine(tiny, teacher, goal))
    prompt = Prompt("p", (5, 6))
    items = [Demo("d", (Segment((5, 6), Source.prompt), Segment((7, 8), Source.demo)), prompt=prompt)]
    stream = Stream(("demo",), likelihood.Token(), reference.Current(), advantage.One(), aggregate.TokenMean())
    goal = Objective({"demos": stream}, {"kl": regularizer.KL("k2", "teacher", 0.5)})
    learner.one.core.objective = goal
    asyncio.run(Learn(goal, Packer(64), learner).learn(0, items, 0.0))
    filled = learner.batches[0]
    expected = rows_of(teacher, filled).gather(1, filled.target_ids[:, None])[:, 0]
    torch.testing.assert_close(filled.logps["teacher"].double(), expected, rtol=0, atol=1e-6)


class Certain:
    """A mask that reads how certain the current policy is."""

    live = True

    def __init__(self, *names: str) -> None:
        self.needs = frozenset(names)

    def factor(self, view: Any, advantage: torch.Tensor) -> torch.Tensor:
        return torch.exp(-sum((view.reference(name).abs() for name in sorted(self.needs)), torch.zeros(())))


@pytest.mark.parametrize("names", [("entropy",), ("collision",), ("entropy", "collision")])
def test_what_a_loss_reads_of_the_whole_vocabulary_is_that_of_the_policy_before_each_step(tiny: str, names: tuple[str, ...]) -> None:
    stream = Stream(("demo",), likelihood.Token(), reference.Current(), advantage.One(), aggregate.TokenMean(), {"certain": Certain(*names)})
    goal = Objective({"demos": stream})
    learner = InProcess(engine(tiny, None, goal))
    items = [Demo(name, (Segment((5, 6), Source.prompt), Segment((7, n), Source.demo))) for n, name in ((8, "a"), (9, "b"))]
    first = TokenBatch.from_sequences([Row(ids=[5, 6, 7, 8])])
    before = learner.one.score(first, **dict.fromkeys(names, True))
    assert set(before) == {"logp", *names}
    asyncio.run(Learn(goal, Packer(64, updates_per_batch=2), learner).learn(0, items, 0.0))
    assert len(learner.batches) == 2
    assert all(OWN & set(b.logps) == set(names) for b in learner.batches), "nothing is computed that is not read"
    for name in names:
        gaps = [float((b.logps[name] - before[name]).abs().max()) for b in learner.batches]
        assert gaps[0] < 1e-6 < gaps[1], f"the second update must see the {name} after the first"
