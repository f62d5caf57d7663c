"""Every shipped loss against an independent transcription of the published objective: float64, 1e-9 relative, through a real causal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import posttrain
from posttrain.testing.check import check_parity
from tests.loss import naive
from tests.loss.cases import CASES, Case, Data, columns, composed, flat, make

SEEDS = (0, 1, 2)


def gradient(case: Case, data: Data) -> torch.Tensor:
    batch, objective = data.batch(), case.load()
    rows = data.rows_of(batch)
    out = objective(batch, rows.gather(1, batch.target_ids[:, None])[:, 0], columns(objective, rows))
    return flat(torch.autograd.grad(out.loss, list(data.model.parameters()), allow_unused=True), data.model)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_the_published_objective(name: str, seed: int) -> None:
    case = CASES[name]
    data = case.make(seed)
    got, expected = gradient(case, data), data.naive_gradient(case.objective)
    assert float(expected.abs().max()) > 1e-6
    assert float((got - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


def _disagrees(case: Case, wrong: naive.Objective, seed: int) -> bool:
    data = case.make(seed)
    got, other = gradient(case, data), data.naive_gradient(wrong)
    return float((got - other).norm()) > 1e-3 * float(other.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_objective_disagrees(name: str) -> None:
    case = CASES[name]
    assert case.wrong
    for wrong in case.wrong:
        assert any(_disagrees(case, wrong, seed) for seed in SEEDS), f"{name} cannot be told from {wrong}"


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_derivative_of_the_published_objective(name: str) -> None:
    """With respect to the log-probs alone: the rest of the vocabulary is held fixed, and terms of whole rows have no weight."""
    case = CASES[name]
    data, objective = case.make(3), case.load()
    batch = data.batch()
    rows = data.rows_of(batch).detach()

    def value(logp: torch.Tensor) -> torch.Tensor:
        for i, s in enumerate(data.seqs):
            s["l"], s["rows"] = [None, *logp[batch.seq == i].unbind()], [None, *rows[batch.seq == i].unbind()]
        return case.objective(data.seqs) + 0.0 * logp.sum()

    if objective.needs.columns and not bool(objective.weights(batch).any()):
        logp = batch.logps["current"].clone().requires_grad_()
        assert not bool(torch.autograd.grad(value(logp), logp)[0].any())
    else:
        check_parity(objective, batch, value)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("ppo", "rollouts/clip/masked"),
        ("grpo", "rollouts/clip/masked"),
        ("dr_grpo", "rollouts/clip/masked"),
        ("dapo", "rollouts/clip/masked"),
        ("dapo, dual clip reached", "rollouts/dual/masked"),
        ("gspo", "rollouts/clip/masked"),
        ("rloo with a clipped product ratio", "rollouts/clip/masked"),
        ("icepop", "rollouts/reject/masked"),
        ("mis", "rollouts/reject/masked"),
        ("m2po", "rollouts/moment/masked"),
        ("opsm", "rollouts/stale/masked"),
        ("decoupled_ppo", "rollouts/clip/masked"),
        ("rejection by k3 per token", "rollouts/disagree/masked"),
        ("rejection by abs per worst", "rollouts/disagree/masked"),
        ("dual_clip", "rollouts/clip/masked"),
        ("luspo", "rollouts/clip/masked"),
        ("gspo_token", "rollouts/clip/masked"),
        ("gmpo", "rollouts/inner/masked"),
        ("dppo_tv", "rollouts/divergence/masked"),
        ("dppo_kl", "rollouts/divergence/masked"),
        ("cpgd", "rollouts/clip/masked"),
        ("stable_reinforce, log-ratios bounded", "rollouts/bound/masked"),
        ("top_entropy", "rollouts/entropy/masked"),
        ("clip_cov", "rollouts/covariance/masked"),
        ("sft_plus_rl", "rollouts/clip/masked"),
    ],
)
def test_some_tokens_are_dropped_and_some_are_kept(name: str, mask: str) -> None:
    case = CASES[name]
    shares = [case.load().weigh(case.make(seed).batch())[1][mask] for seed in SEEDS]
    dropped, tokens = sum(s for s, _ in shares), sum(n for _, n in shares)
    assert 0 < dropped < tokens


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("cispo", "rollouts/cap/factor"),
        ("dppo_tv, cap reached", "rollouts/cap/factor"),
        ("sapo", "rollouts/gate/factor"),
        ("fipo", "rollouts/future/factor"),
        ("vespo", "rollouts/taper/factor"),
        ("topr", "rollouts/taper/factor"),
        ("tis", "rollouts/tis/factor"),
        ("a_lol", "answers/ratio/factor"),
        ("truncated importance sampling", "rollouts/tis/factor"),
        ("truncated importance sampling, as a weight", "rollouts/tis/factor"),
    ],
)
def test_some_ratios_are_capped(name: str, mask: str) -> None:
    case = CASES[name]
    total, count = case.load().weigh(case.make(0).batch())[1][mask]
    assert total > 0 and total != count


def test_every_shipped_loss_is_compared() -> None:
    shipped = {p.stem for p in (Path(posttrain.__file__).parents[1] / "configs" / "loss").glob("*.yaml")}
    assert shipped <= {case.loss for name, case in CASES.items() if name == case.loss}


KNOBS = {
    "grpo": ["streams.rollouts.masks.clip.low=0.1", "streams.rollouts.masks.clip.high=0.4", "streams.rollouts.masks.clip=null"],
    "dapo": ["streams.rollouts.masks.clip.high=0.2", "streams.rollouts.masks.dual.c=1.3", "streams.rollouts.coef=0.5"],
    "dr_grpo": ["streams.rollouts.aggregation.length=128"],
    "gspo": ["streams.rollouts.likelihood.ratio=sequence", "streams.rollouts.masks.clip.high=0.01"],
    "cispo": ["streams.rollouts.masks.cap.max=1.05"],
    "dpo": ["streams.pairs.advantage.beta=0.2", "streams.pairs.advantage.label_smoothing=0.1", "streams.pairs.advantage.score=logp_sum"],
    "ipo": ["streams.pairs.advantage.beta=0.2"],
    "dft": ["streams.demos.reference={_target_: posttrain.loss.reference.Power, a: 0.5}"],
    "sft": ["streams.demos.advantage.value=0.5"],
    "sft_plus_rl": ["streams.demos.coef=0.05", "streams.demos.aggregation.denominator=joint"],
}


@pytest.mark.parametrize(("name", "override"), [(n, o) for n, overrides in KNOBS.items() for o in overrides])
def test_every_number_of_a_file_changes_the_gradient(name: str, override: str) -> None:
    changes = []
    for seed in SEEDS:
        batch = CASES[name].make(seed, 0.4 if name != "gspo" else 0.01).batch()
        was, now = composed(name).weights(batch), composed(name, (override,)).weights(batch)
        changes.append(float((was - now).norm()) / float(was.norm()))
    assert max(changes) > 1e-4


def test_loss_value_and_nll_of_maximum_likelihood() -> None:
    data = make(0)
    batch, objective = data.batch(), composed("sft")
    out = objective(batch, data.logp(batch))
    data.naive_gradient(naive.sft)
    expected = -float(naive.sft(data.seqs))
    assert float(out.loss) == pytest.approx(expected, rel=1e-12)
    total, count = out.metrics["demos/nll"]
    assert total / count == pytest.approx(expected, rel=1e-12)
    assert out.metrics["demos/objective"] == (pytest.approx(-expected), 0.0)
