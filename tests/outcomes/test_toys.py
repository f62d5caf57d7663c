"""The small runs themselves: what is sampled, what is summed exactly, and that a step is the gradient it should be."""

from __future__ import annotations

import torch

from posttrain.advantage import GroupAdvantage, Reward
from posttrain.data.rows import to_rows
from posttrain.data.scored import read_at
from posttrain.records import TokenBatch
from tests.loss.cases import composed
from tests.outcomes import sampling
from tests.outcomes.toys import END, Judge, Policy, Run, Table, demo_of, prompt_of, values


def chain(length: int = 3, vocabulary: int = 4, ends: bool = False) -> Policy:
    """Two prompts, every position and previous token with a row of its own."""
    start = torch.randn(2 * length * vocabulary, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Policy([Table(values(len(start), vocabulary, start), lambda p, t, last: (p * length + t) * vocabulary + last)], vocabulary, length, ends)


def test_recorded_log_probs_are_those_of_the_packed_rows() -> None:
    policy = chain(ends=True)
    run = Run(policy, "grpo", reward=lambda p, a: float(len(a)), prompts=(0, 1), n=30, advantage=GroupAdvantage())
    groups = run.sampled(policy, 0, 0.0, torch.Generator().manual_seed(1))
    batch = TokenBatch.from_sequences(to_rows(groups), dtype=torch.float64)
    own = policy.rows(batch).gather(1, batch.target_ids[:, None])[:, 0]
    assert torch.allclose(own, batch.logps["behaviour"], atol=1e-12) and batch.num_sequences == 60
    ended = [r.segments[0].ids for g in groups for r in g.rollouts]
    assert all(END not in ids[:-1] and (len(ids) == 3 or ids[-1] == END) for ids in ended) and len({len(ids) for ids in ended}) > 1


def test_all_answers_are_a_distribution_and_agree_with_one_answer() -> None:
    policy = chain()
    answers, logp = policy.all_answers(2)
    assert torch.allclose(logp.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert abs(policy.logp_of(1, answers[37].tolist()) - float(logp[1, 37])) < 1e-12


def test_given_tokens_are_forced_and_not_repeated() -> None:
    policy = chain()
    found = policy.sample([0, 1], torch.Generator().manual_seed(0), [(2, 3), ()])
    assert len(found[0]) == 1 and len(found[1]) == 3
    where = [torch.tensor([x]) for x in (0, 2, 3)]
    token, logp = found[0][0]
    assert abs(float(torch.log_softmax(policy.at(*where), -1)[0, token].detach()) - logp) < 1e-12


def test_one_step_goes_along_the_exact_gradient() -> None:
    """Of expected reward, with so many samples that the noise is small; leave-one-out has no bias."""
    policy = chain()
    answers, _ = policy.all_answers(2)
    reward = (answers.sum(1) % 2).double()
    before = policy.tables[0].values.detach().clone()
    Run(policy, "rloo", steps=1, rate=1.0, reward=lambda p, a: float(sum(a) % 2), prompts=(0, 1), n=4000, advantage=GroupAdvantage(center="loo", scale="none")).go()
    moved = policy.tables[0].values.detach() - before
    probe = Policy([Table(before.clone().requires_grad_(), policy.tables[0].index)], 4, 3)
    last = torch.cat([torch.zeros(len(answers), 1, dtype=torch.int64), answers[:, :-1]], 1)
    total = torch.zeros((), dtype=torch.float64)
    for p in (0, 1):
        logp = sum(
            torch.log_softmax(probe.at(torch.full_like(last[:, t], p), torch.full_like(last[:, t], t), last[:, t]), -1).gather(1, answers[:, t : t + 1])[:, 0] for t in range(3)
        )
        total = total + (logp.exp() * reward).sum() / 2  # the mean over answers of two groups of one size
    (exact,) = torch.autograd.grad(total, probe.tables[0].values)
    assert torch.nn.functional.cosine_similarity(moved.flatten(), exact.flatten(), dim=0) > 0.97
    assert abs(float(moved.norm() / exact.norm()) - 1) < 0.1


def test_a_judge_reads_behind_the_last_token() -> None:
    """Prompt, place and the two tokens before, of two sequences in one batch."""
    judge = Judge(torch.arange(1000, dtype=torch.float64), lambda p, t, last, before: ((p * 10 + t) * 10 + last) * 10 + before, 6)
    rows = read_at(to_rows([demo_of("a", prompt_of(0, 6), (4, 2, 3)), demo_of("b", prompt_of(0, 6), (5,))]), "end")
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    read = judge.rows(batch).gather(1, batch.target_ids[:, None])[:, 0][batch.trainable]
    assert read.tolist() == [332.0, 150.0]


def test_a_critic_learns_beside_the_policy() -> None:
    """Alone at first: only then does the policy move."""
    for alone in (3, 2):
        policy, critic = chain(), Judge(torch.zeros(2, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: p, 4)
        before = policy.tables[0].values.detach().clone()
        Run(policy, "ppo_gae", steps=3, reward=lambda p, a: float(p), prompts=(0, 1), advantage=Reward(), critic=critic, critic_alone=alone).go()
        assert torch.equal(policy.tables[0].values, before) == (alone == 3)
        assert abs(float(critic.values[0].detach())) < 0.05 < float(critic.values[1].detach())


def test_weights_of_all_answers_give_the_exact_gradient() -> None:
    """Of expected reward less the KL of whole answers, on the tree; a k2 loss gives another."""
    draw = torch.Generator().manual_seed(0)
    start, table = (torch.randn(13, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    reward = torch.rand(27, generator=draw, dtype=torch.float64)
    logp, batch = sampling.tree(start)
    batch = batch.replace(advantage=reward.repeat_interleave(3))
    table.requires_grad_()
    columns = logp(table)
    whole, base = columns.view(-1, 3).sum(1), batch.logps["base"].view(-1, 3).sum(1)
    (exact,) = torch.autograd.grad((whole.exp() * (reward - sampling.COEF * (whole - base))).sum(), table, retain_graph=True)
    for overrides, same in ((sampling.TO_GO, True), (sampling.as_loss("k2"), False)):
        weights = composed("reinforce", overrides).weights(batch, columns.detach()) * 27 * whole.detach().exp().repeat_interleave(3)
        (found,) = torch.autograd.grad((weights * columns).sum(), table, retain_graph=True)
        assert torch.allclose(found, exact, atol=1e-12) == same
