"""A post-training run small enough to repeat over seeds: a softmax table learns from its own samples, or from given texts, through the package's own records,
advantages, gates, packing, two-pass weighing and objectives.  Only the model, its sampler and the optimizer are of this file.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.pack import Packer
from posttrain.learner.actor import StepReport, add_metrics
from posttrain.learner.lookahead import gradients, slope, utility
from posttrain.loss import Objective
from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Sampling, Segment, Source, TokenBatch
from posttrain.rollout.prefix import put_back
from posttrain.rollout.strategy import Ask, StepInfo
from posttrain.update import Critic, Learn
from tests.loss.cases import composed

END = 0
"""The token that ends an answer, where answers have an end."""

Index = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prompt, position, previous token) -> row of a table, each ``[N]`` int64.  At position 0 the previous token is 0."""


@dataclass
class Table:
    """A share of the logits: ``values[index(...)]``, times ``features`` ``[columns, vocabulary]`` where tokens share what is learnt of them."""

    values: Tensor
    index: Index
    features: Tensor | None = None

    def __call__(self, prompt: Tensor, position: Tensor, last: Tensor) -> Tensor:
        found = self.values[self.index(prompt, position, last)]
        return found if self.features is None else found @ self.features


@dataclass
class Policy:
    """``log pi(token | prompt, position, previous token)``: log-softmax of a sum of tables, float64.

    ``length``: the longest answer; with ``ends`` the token 0 ends one earlier.  A prompt is one token, ``vocabulary + number``.
    """

    tables: list[Table]
    vocabulary: int
    length: int = 1
    ends: bool = False

    def copy(self) -> Policy:
        """A frozen one of the same weights."""
        return replace(self, tables=[replace(t, values=t.values.detach().clone()) for t in self.tables])

    def trained(self) -> list[Tensor]:
        return [t.values for t in self.tables if t.values.requires_grad]

    def at(self, prompt: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """Logits, ``[N, vocabulary]``."""
        return sum(table(prompt, position, last) for table in self.tables)  # type: ignore[return-value]

    def rows(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities over the vocabulary of every column, ``[N, vocabulary]``."""
        prompt = batch.input_ids[batch.cu_seqlens[:-1]][batch.seq] - self.vocabulary
        last = torch.where(batch.positions == 0, 0, batch.input_ids)
        return torch.log_softmax(self.at(prompt, batch.positions, last) / temperature, -1)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[int], draw: torch.Generator, given: Sequence[Sequence[int]] | None = None, greedy: bool = False, temperature: float = 1.0
    ) -> list[list[tuple[int, float]]]:
        """One answer per prompt, as (token, log-prob), after the tokens ``given``, which are not repeated."""
        n = len(prompts)
        prompt, last, done = torch.tensor(prompts), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        forced = [list(g) for g in given] if given is not None else [[] for _ in prompts]
        out: list[list[tuple[int, float]]] = [[] for _ in prompts]
        for position in range(self.length):
            logp = torch.log_softmax(self.at(prompt, torch.full_like(prompt, position), last) / temperature, -1)
            token = logp.argmax(1) if greedy else torch.multinomial(logp.exp(), 1, generator=draw)[:, 0]
            chosen, stopped = token.tolist(), done.tolist()
            values = logp.gather(1, token[:, None])[:, 0].tolist()
            for i in range(n):
                if position < len(forced[i]):
                    chosen[i] = forced[i][position]
                elif not stopped[i]:
                    out[i].append((chosen[i], values[i]))
            last = torch.tensor(chosen)
            if self.ends:
                done = done | (last == END)
                if bool(done.all()):
                    break
        return out

    @torch.no_grad()
    def logp_of(self, prompt: int, answer: Sequence[int]) -> float:
        """Of a whole answer."""
        tokens = torch.tensor(list(answer))
        rows = torch.log_softmax(self.at(torch.full_like(tokens, prompt), torch.arange(len(tokens)), torch.cat([torch.zeros(1, dtype=torch.int64), tokens[:-1]])), -1)
        return float(rows.gather(1, tokens[:, None]).sum())

    @torch.no_grad()
    def all_answers(self, prompts: int) -> tuple[Tensor, Tensor]:
        """Every answer of full length ``[A, length]`` and its log-prob under every prompt ``[prompts, A]``: expectations are sums, not samples."""
        answers = torch.cartesian_prod(*[torch.arange(self.vocabulary)] * self.length).view(-1, self.length)
        last = torch.cat([torch.zeros(len(answers), 1, dtype=torch.int64), answers[:, :-1]], 1)
        total = torch.zeros(prompts, len(answers), dtype=torch.float64)
        for t in range(self.length):
            for p in range(prompts):
                where = torch.arange(self.vocabulary)
                rows = torch.log_softmax(self.at(torch.full_like(where, p), torch.full_like(where, t), where), -1)
                total[p] += rows[last[:, t], answers[:, t]]
        return answers, total


@dataclass
class Judge:
    """A scalar head in the place of a policy: one number per column, which every target gets.

    ``values`` ``[rows]``, read at ``index(prompt, position, last, before)``: the last token read and the one before it, 0 where there is none.
    """

    values: Tensor
    index: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    vocabulary: int

    def copy(self) -> Judge:
        return replace(self, values=self.values.detach().clone().requires_grad_())

    def trained(self) -> list[Tensor]:
        return [self.values]

    def rows(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        prompt = batch.input_ids[batch.cu_seqlens[:-1]][batch.seq] - self.vocabulary
        last = torch.where(batch.positions == 0, 0, batch.input_ids)
        before = torch.where(batch.positions <= 1, 0, batch.input_ids.roll(1))
        return self.values[self.index(prompt, batch.positions, last, before)][:, None].expand(-1, self.vocabulary)


def values(rows: int, columns: int, start: Tensor | float = 0.0, learn: bool = True) -> Tensor:
    """What a table holds; ``start`` is broadcast."""
    return (torch.zeros(rows, columns, dtype=torch.float64) + start).clone().requires_grad_(learn)


def one_row(prompt: Tensor, position: Tensor, last: Tensor) -> Tensor:
    """The same row everywhere."""
    return torch.zeros_like(prompt)


def prompt_of(number: int, vocabulary: int) -> Prompt:
    return Prompt(f"q{number}", (vocabulary + number,), answer=number)


def number_of(prompt: Prompt) -> int:
    return int(prompt.answer)


def demo_of(name: str, prompt: Prompt, answer: Sequence[int], **more: Any) -> Demo:
    return Demo(name, (Segment(prompt.ids, Source.prompt, trainable=False), Segment(tuple(answer), Source.demo)), prompt=prompt, **more)


def full_columns(names: Any, rows: Tensor, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full-vocabulary columns an objective asks for, from log-probabilities ``[N, V]``."""
    p, out = rows.exp(), {}
    for name in names:
        kind, _, to = name.partition(":")
        if kind == "entropy":
            out[name] = -(p * rows).sum(1)
        elif kind == "logp_greedy":
            out[name] = rows.max(1).values
        elif kind == "kl_reverse":
            out[name] = (p * (rows - others[to])).sum(1)
        elif kind == "kl_forward":
            out[name] = (others[to].exp() * (others[to] - rows)).sum(1)
        else:
            beta, q = float(kind.removeprefix("jsd_")), others[to].exp()
            middle = torch.log(beta * q + (1 - beta) * p)
            out[name] = (beta * q * (others[to] - middle) + (1 - beta) * p * (rows - middle)).sum(1)
    return out


@dataclass
class Learner:
    """What :class:`posttrain.update.Learn` drives, in this process: ``score``, ``step`` and ``move_base``."""

    policy: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    base: Any
    teacher: Policy | None = None
    directions: dict[str, list[Tensor]] = field(default_factory=dict)

    def _named(self, name: str) -> Any:
        found = {"current": self.policy, "base": self.base, "teacher": self.teacher}[name]
        assert found is not None
        return found

    @torch.no_grad()
    async def score(self, micro: Sequence[TokenBatch], policy: str = "current", entropy: bool = False) -> list[dict[str, Tensor]]:
        out = []
        for batch in micro:
            rows = self._named(policy).rows(batch, self.objective.needs.temperature)
            found = {"logp": rows.gather(1, batch.target_ids[:, None])[:, 0]}
            out.append({**found, "entropy": -(rows.exp() * rows).sum(1)} if entropy else found)
        return out

    async def step(self, micro: Sequence[TokenBatch], weights: Sequence[Tensor] | None = None) -> StepReport:
        needs, parts = self.objective.needs, []
        for batch, given in zip(micro, weights or [None] * len(micro), strict=True):
            rows = self.policy.rows(batch, needs.temperature)
            others = {to: self._named(to).rows(batch, needs.temperature) for name in needs.columns if (to := name.partition(":")[2])}
            out = self.objective(batch, rows.gather(1, batch.target_ids[:, None])[:, 0], full_columns(needs.columns, rows, others), given)
            out.loss.backward()
            parts.append(out.metrics)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepReport(add_metrics(parts), {})

    async def look_ahead(self, micro: Sequence[TokenBatch], name: str, measure: bool, keep: bool) -> dict[str, float]:
        control, known = self.objective.controls[name], self.directions.get(name)
        goals = {**({"utility": utility(self.objective, control)} if measure and known else {}), **({"direction": self.objective} if keep else {})}

        def logp(batch: TokenBatch) -> Tensor:
            return self.policy.rows(batch, self.objective.needs.temperature).gather(1, batch.target_ids[:, None])[:, 0]

        found = gradients(self.policy.trained(), logp, micro, goals, control)
        if keep:
            self.directions[name] = found["direction"]
        return {"slope": slope(found["utility"], known, self.optimizer.param_groups[0]["lr"], control.scale)} if "utility" in found else {}

    @torch.no_grad()
    async def move_base(self, mix: float) -> None:
        for own, now in zip(self.base.tables, self.policy.tables, strict=True):
            own.values.lerp_(now.values.detach(), mix)


@dataclass
class Run:
    """One training run.  ``loss`` is the name of a shipped objective, with ``overrides``.

    ``reward(number, answer) -> float``.  ``advantage``, ``gate`` and ``strategy`` are the package's.  ``lag``: steps by which the sampling policy is behind.
    ``updates``: optimizer steps per batch.  ``noise``: deviation added to every recorded behaviour log-prob, or a function of (log-probs, generator).  ``watch``: called
    after every step with the run.  ``fixed``: items of every step where nothing is sampled, a list or a function of the step.  ``critic``: learns beside the policy at
    ``critic_rate``, alone for the first ``critic_alone`` steps.
    """

    policy: Any
    loss: str
    overrides: tuple[str, ...] = ()
    steps: int = 100
    rate: float = 0.1
    optimizer: str = "sgd"
    seed: int = 0
    reward: Callable[[int, tuple[int, ...]], float] | None = None
    prompts: Sequence[int] = (0,)
    n: int = 8
    temperature: float = 1.0
    advantage: Any = None
    gate: Any = None
    strategy: Any = None
    demos: Demos = field(default_factory=Demos)
    fixed: Any = None
    teacher: Policy | None = None
    base: Policy | None = None
    lag: int = 0
    updates: int = 1
    noise: Callable[[Sequence[float], torch.Generator], Sequence[float]] | None = None
    base_every: int = 0
    base_mix: float = 1.0
    critic: Judge | None = None
    critic_rate: float = 1.0
    critic_alone: int = 0
    room: int = 100_000
    watch: Callable[[Run, int], None] | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"rollouts": 0, "tokens": 0, "given": 0})

    def go(self) -> Run:
        asyncio.run(self._go())
        return self

    async def _go(self) -> None:
        objective = composed(self.loss, self.overrides)
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer]
        learner = Learner(self.policy, objective, kind(self.policy.trained(), lr=self.rate), self.base or self.policy.copy(), self.teacher)
        learn = Learn(objective, Packer(self.room, 1, self.updates), learner, self.seed, separate_demos=getattr(self.gate, "separate_step", False),
                      base_every=self.base_every, base_mix=self.base_mix, critic=self._critic())  # fmt: skip
        draw = torch.Generator().manual_seed(self.seed)
        past = [self.policy.copy()]
        for step in range(self.steps):
            progress = step / self.steps
            items = self._given(step) if self.fixed is not None else self.sampled(past[0] if self.lag else self.policy, step, progress, draw)
            if self.gate is not None:
                items = self.gate(items, self.demos, step, progress)
            self.counts["given"] += given_tokens(items)
            if not _empty(items):
                self.metrics.append((await learn.learn(step, items, progress)).result())
            if self.lag:
                past = [*past, self.policy.copy()][-self.lag - 1 :]
            if self.watch is not None:
                self.watch(self, step)

    def _critic(self) -> Critic | None:
        if self.critic is None:
            return None
        objective = composed("value")
        optimizer = torch.optim.SGD(self.critic.trained(), lr=self.critic_rate)
        return Critic(Learner(self.critic, objective, optimizer, self.critic), objective, self.critic_alone)

    def _given(self, step: int) -> list[Any]:
        return self.fixed(step) if callable(self.fixed) else list(self.fixed)

    def sampled(self, policy: Policy, step: int, progress: float, draw: torch.Generator) -> list[Group]:
        """Groups with rewards and advantages, sampled by ``policy``."""
        seen: Counter[int] = Counter()
        prompts = []
        for p in self.prompts:  # a prompt that is asked twice makes two groups
            seen[p] += 1
            prompt = prompt_of(p, policy.vocabulary)
            prompts.append(prompt if seen[p] == 1 else replace(prompt, id=f"{prompt.id}#{seen[p]}"))
        info = StepInfo(step, 0, len(prompts), progress)
        asks = self.strategy.plan(prompts, info) if self.strategy is not None else [Ask(p, self.n) for p in prompts]
        numbers = [number_of(a.prompt) for a in asks for _ in range(a.n)]
        answers = iter(policy.sample(numbers, draw, [a.prefix for a in asks for _ in range(a.n)], temperature=self.temperature))
        groups: dict[str, Group] = {}
        for ask in asks:
            rollouts = tuple(self._rollout(ask, i, next(answers), step, draw) for i in range(ask.n))
            group = Group(ask.prompt, rollouts)
            if ask.prefix:
                group = put_back(group, ask.prompt, ask.prefix, lambda ids: "")
            before = groups.get(ask.prompt.id)
            groups[ask.prompt.id] = group if before is None else Group(before.prompt, (*before.rollouts, *group.rollouts))
        out = [self._observed(group, policy, info, draw) for group in groups.values()]
        return self.advantage(out) if self.advantage is not None else out

    def _observed(self, group: Group, policy: Policy, info: StepInfo, draw: torch.Generator) -> Group:
        """With the samples a strategy asks for after it has seen the others, for as long as it asks: a greedy one, continuations of what was said."""
        while asks := self.strategy.observe(group, info) if self.strategy is not None else []:
            for ask in asks:
                answers = policy.sample([number_of(ask.prompt)] * ask.n, draw, [ask.prefix] * ask.n if ask.prefix else None, greedy=ask.greedy)
                more = Group(ask.prompt, tuple(self._rollout(replace(ask, first=len(group.rollouts)), i, a, info.step, draw) for i, a in enumerate(answers)))
                more = put_back(more, ask.prompt, ask.prefix, lambda ids: "") if ask.prefix else more
                group = replace(group, rollouts=(*group.rollouts, *more.rollouts))
        return group

    def _rollout(self, ask: Ask, i: int, answer: list[tuple[int, float]], step: int, draw: torch.Generator) -> Rollout:
        ids, logps = tuple(t for t, _ in answer), [value for _, value in answer]
        logps = list(self.noise(logps, draw)) if self.noise is not None else logps
        segment = Segment(ids, Source.policy, logprobs=tuple(logps), version=step)
        assert self.reward is not None
        self.counts["rollouts"] += 1
        self.counts["tokens"] += len(ids)
        sampling = Sampling(temperature=0.0 if ask.greedy else 1.0)
        return Rollout(f"{ask.prompt.id}/{ask.first + i}", ask.prompt, (segment,), sampling=sampling, reward=float(self.reward(number_of(ask.prompt), (*ask.prefix, *ids))))


def _empty(items: Sequence[Any]) -> bool:
    """Whether a gate and the advantages left nothing."""
    return not any(isinstance(i, (Demo, Pair)) or (isinstance(i, Group) and i.dropped is None and any(r.advantage is not None for r in i.rollouts)) for i in items)


def given_tokens(items: Sequence[Any]) -> int:
    """Tokens of demonstrations, or of pieces of them, that a step learns from."""
    segments = [s for i in items if isinstance(i, Demo) for s in i.segments]
    segments += [s for i in items if isinstance(i, Group) and i.dropped is None for r in i.rollouts for s in r.segments]
    return sum(len(s.ids) for s in segments if s.source in (Source.demo, Source.prefix))


def entropy(policy: Policy, prompts: Sequence[int] = (0,)) -> float:
    """Mean entropy of the first token, in nats."""
    p = torch.tensor(list(prompts))
    rows = torch.log_softmax(policy.at(p, torch.zeros_like(p), torch.zeros_like(p)), -1)
    return float(-(rows.exp() * rows).sum(1).mean())


def probabilities(policy: Policy, prompt: int = 0, position: int = 0, last: int = 0) -> Tensor:
    """The next token's distribution, ``[vocabulary]``."""
    one = [torch.tensor([x]) for x in (prompt, position, last)]
    return torch.softmax(policy.at(*one)[0].detach(), -1)


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
