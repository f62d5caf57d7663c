"""RunConfig -> Run: instantiate the stages and start exactly the actors that the objective and the evaluation ask for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain import checkpoint
from posttrain.canary import Canaries
from posttrain.cluster import _evaluates, _samples
from posttrain.config import ConfigError, CriticModelConfig, RunConfig
from posttrain.controller import Run
from posttrain.data.load import load_data
from posttrain.data.pack import Packer
from posttrain.data.render import Renderer
from posttrain.data.sampler import Sampler
from posttrain.folder import RunFolder
from posttrain.heldout import HeldOut, sentence
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import PassThrough, changes
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Sampling
from posttrain.report.reporter import Reporter
from posttrain.update import Critic, Learn
from posttrain.watchdog import Timings, together


@dataclass
class Engines:
    """The rollout stage with engines: draws prompts, samples, scores, and lets the strategy ask for more."""

    pool: Any
    reward: Any
    sampler: Sampler
    prompts: Sequence[Any]
    strategy: Any
    sampling: Sampling
    prompts_per_step: int
    steps: int
    advantage: Any = None

    async def collect(self, step: int) -> tuple[list[Any], dict[str, float]]:
        from posttrain.rollout.exits import go_on
        from posttrain.rollout.prefix import behind, put_back
        from posttrain.rollout.strategy import collect

        async def sample(
            prompts: Sequence[Any],
            n: int,
            first: int = 0,
            greedy: bool = False,
            prefixes: Sequence[Sequence[int]] | None = None,
            begins: Sequence[Rollout] | None = None,
            max_tokens: int | None = None,
        ) -> list[Group]:
            sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
            sampling = replace(sampling, max_tokens=max_tokens or sampling.max_tokens)
            if begins is not None:
                begun = [behind(prompt, [i for s in begin.segments for i in s.ids]) for prompt, begin in zip(prompts, begins, strict=True)]
                groups = await self.pool.sample(begun, n, sampling, step, first=first)
                return [go_on(g, begin) for g, begin in zip(groups, begins, strict=True)]
            if prefixes is None:
                return await self.pool.sample(prompts, n, sampling, step, first=first)
            begun = [behind(prompt, prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
            groups = await self.pool.sample(begun, n, sampling, step, first=first)
            return [put_back(g, prompt, prefix, self.pool.decode) for g, prompt, prefix in zip(groups, prompts, prefixes, strict=True)]

        seen: dict[str, Group] = {}  # all that was scored in this step, in however many calls

        async def score(groups: Sequence[Group]) -> list[Group]:
            scored = await self.reward.score(groups, step, step / self.steps)
            for group in scored:
                before = seen[group.id].rollouts if group.id in seen else ()
                seen[group.id] = replace(group, rollouts=before + group.rollouts)
            return scored

        def draw(count: int) -> list[Any]:
            return [self.prompts[i] for i in self.sampler.next(count)]

        groups, report = await collect(self.strategy, draw, sample, score, self.prompts_per_step, step, step / self.steps)
        return list(groups), {**report, **self.reward.measure(list(seen.values())), **self.pool.metrics()}

    @property
    def state(self) -> dict[str, Any]:
        remembered = {name: part.state_dict() for name, part in self._stateful.items()}
        return {"sampler": self.sampler.state_dict(), "budget": self.reward.budget.state_dict(), **remembered}

    def load(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.reward.budget.load_state_dict(state["budget"])
        for name, part in self._stateful.items():
            if state.get(name):
                part.load_state_dict(state[name])

    @property
    def _stateful(self) -> dict[str, Any]:
        """The strategy and the advantage estimator, where they remember something."""
        parts = {"strategy": self.strategy, "advantage": self.advantage}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


@dataclass
class DataSet:
    """The rollout stage without engines: the records as they are."""

    records: Sequence[Any]
    sampler: Sampler
    per_step: int
    advantage: Any = None

    async def collect(self, step: int) -> tuple[list[Any], dict[str, float]]:
        return [self.records[i] for i in self.sampler.next(self.per_step)], {}

    @property
    def state(self) -> dict[str, Any]:
        own = {"advantage": self.advantage.state_dict()} if hasattr(self.advantage, "state_dict") else {}
        return {"sampler": self.sampler.state_dict(), **own}

    def load(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        if state.get("advantage") and hasattr(self.advantage, "load_state_dict"):
            self.advantage.load_state_dict(state["advantage"])


@dataclass
class GateStage:
    """The gate with its demonstrations.  ``metrics`` says what it did to the last step."""

    gate: Any
    demos: Demos
    steps: int = 1
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        own = self.gate.state_dict() if hasattr(self.gate, "state_dict") else None
        return {"sampler": self.demos.sampler.state_dict() if self.demos.sampler else None, "gate": own}

    def load(self, state: dict[str, Any]) -> None:
        if self.demos.sampler and state["sampler"]:
            self.demos.sampler.load_state_dict(state["sampler"])
        if state.get("gate"):
            self.gate.load_state_dict(state["gate"])

    def __call__(self, items: Sequence[Any], step: int) -> list[Any]:
        out = self.gate(items, self.demos, step, step / self.steps)
        self.metrics = changes(items, out)
        return out


@dataclass
class Publish:
    """New weights to the engines.  A run that does not sample publishes only what an evaluation will look at.  ``verify``: the engines compare
    fingerprints."""

    learner: Any
    pool: Any
    every_step: bool
    due: Any
    verify: bool = True

    async def __call__(self, version: int, last: bool = False) -> None:
        if self.pool is not None and (self.every_step or last or self.due(version)):
            refs, fingerprint = await self.learner.publish(version)
            await self.pool.publish(version, refs, fingerprint if self.verify else None)


def prepare_model(config: RunConfig, scratch: Path, start_from: str | None) -> tuple[RunConfig, Any]:
    """The config with ``model.path`` set to the weights this stage starts from, and the tokenizer.

    In order: ``init_from``, the last stage's export, ``model.path``, a tiny model created in ``scratch``.
    """
    import dataclasses

    from transformers import AutoTokenizer

    path = config.init_from or start_from or config.model.path
    if path is None:
        from posttrain.testing.tiny import create_tiny_model

        assert config.model.tiny is not None
        if not (scratch / "config.json").exists():
            create_tiny_model(scratch, **{"seed": config.seed, "dtype": config.model.dtype, **config.model.tiny})
        path = str(scratch)
    elif not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError(f"model.path={path}: there is no such folder")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"model.path={path}: no tokenizer can be loaded from there ({str(error).splitlines()[0]})") from error
    if config.model.chat_template:
        tokenizer.chat_template = Path(config.model.chat_template).read_text()
    _check_teacher(config, tokenizer)
    for key, reward in config.reward.fn.items():
        if hasattr(reward, "check"):
            try:
                reward.check(tokenizer)
            except ValueError as error:
                raise ConfigError(f"reward.fn.{key}: {error}") from error
    return config, tokenizer


def _check_teacher(config: RunConfig, tokenizer: Any) -> None:
    """A teacher, or a base of its own, scores the policy's tokens, so a token must be the same to both."""
    from transformers import AutoTokenizer

    for name in ("teacher", "base"):
        path = getattr(config.model, name)
        if path is None:
            continue
        try:
            theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
        except Exception as error:
            raise ConfigError(f"model.{name}={path}: no tokenizer can be loaded from there ({str(error).splitlines()[0]})") from error
        own, other = tokenizer.get_vocab(), theirs.get_vocab()
        if own != other:
            different = sorted({t for t in own.keys() | other.keys() if own.get(t) != other.get(t)})
            raise ConfigError(
                f"model.{name}={path} and {config.model.path} disagree on {len(different)} tokens, first {different[0]!r} "
                f"({own.get(different[0])} here, {other.get(different[0])} there); a {name} must share the tokenizer"
            )


def load_stage_data(
    config: RunConfig, tokenizer: Any, say: Callable[[str], None] = lambda _: None
) -> tuple[list[Any], Any, list[Any], list[Any]]:
    """Training records and their report, evaluation prompts, demonstrations for mixtures.  ``say`` is told what became of every data set, and
    how many evaluation prompts are trained on."""
    data = config.data

    def load(kind: str, spec: Any, name: str) -> tuple[list[Any], Any]:
        return load_data(
            kind,
            spec,
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_length=data.max_length,
            truncation=data.truncation,
            loss_on=data.loss_on,
            system=data.system,
            prompt_template=data.prompt_template,
            name=name,
        )

    def told(kind: str, spec: Any, name: str) -> list[Any]:
        found, report = load(kind, spec, name)
        say(str(report))
        return found

    records, report = load(data.kind, data.train, "data.train")
    say(str(report))
    evaluation = told("prompts", data.eval, "data.eval")[: config.eval.limit] if data.eval is not None and _evaluates(config) else []
    demos = told("demos", data.demos, "data.demos") if data.demos is not None else []
    if seen := trained_on(evaluation, [*records, *demos]):
        say(f"{seen} of {len(evaluation)} evaluation prompts are also in the training data: what they measure is not held out")
    return records, report, evaluation, demos


def trained_on(evaluation: Sequence[Prompt], records: Sequence[Prompt | Demo | Pair | Group]) -> int:
    """How many evaluation prompts have the very tokens of a prompt in the training data, whatever their ids."""
    prompts = [r.chosen.prompt if isinstance(r, Pair) else r.prompt if isinstance(r, (Demo, Group)) else r for r in records]
    known = {p.ids for p in prompts if p is not None}
    return sum(p.ids in known for p in evaluation)


def make_rewards(config: RunConfig, policy: Any = None, tokenizer: Any = None, judges: Mapping[str, Any] | None = None) -> Any:
    """The reward stage, or None when the recipe has no reward.  ``judges``: those of :func:`make_judges`; ``policy``: the engines of the policy, for rewards
    that ask it."""
    from posttrain.reward.combine import Sum
    from posttrain.reward.pool import RewardPool
    from posttrain.reward.serve import bind

    reward = config.reward
    if not reward.fn:
        return None
    engines = {name: (pool, renderer) for name, (pool, renderer) in (judges or {}).items()}
    if policy is not None:
        engines["policy"] = (getattr(policy, "pool", policy), Renderer(tokenizer))  # a judge is asked once, whoever plays episodes
    return RewardPool(
        bind(reward.fn, engines) if engines else reward.fn,
        reward.combine or Sum(reward.weights),
        timeout_s=reward.timeout_s,
        max_concurrency=reward.max_concurrency,
        error_budget=reward.error_budget,
        budget_window=reward.budget_window,
        routes=reward.routes,
        decode=None if tokenizer is None else partial(tokenizer.decode, skip_special_tokens=True),
    )


def make_judges(config: RunConfig) -> dict[str, tuple[Any, Renderer]]:
    """Model -> its engines, not started yet, and its renderer, for every frozen model that a reward asks."""
    from transformers import AutoTokenizer

    from posttrain.reward.serve import frozen, longest
    from posttrain.rollout.engine import EngineConfig
    from posttrain.rollout.pool import EnginePool

    rollout, gpu = config.rollout, config.cluster.device == "cuda"
    out: dict[str, tuple[Any, Renderer]] = {}
    for path, asked in frozen(config.reward.fn).items():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
        renderer = Renderer(tokenizer)
        engine = EngineConfig(
            model=path,
            dtype=next((j.dtype for j in asked if j.dtype), None) or rollout.dtype or config.model.dtype,
            seed=config.seed,
            device=config.cluster.device,
            max_model_len=longest(asked, renderer, config.data.max_prompt_tokens, max(rollout.max_tokens, config.eval.max_tokens or 0)),
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_gb=rollout.kv_cache_gb,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            enforce_eager=rollout.enforce_eager,
            trust_remote_code=config.model.trust_remote_code,
        )
        pool = EnginePool(
            engine,
            partial(tokenizer.decode, skip_special_tokens=True),
            num_engines=max(j.num_engines for j in asked),
            run_seed=config.seed,
            timeout_s=rollout.timeout_s,
            start_timeout_s=config.cluster.start_timeout_s,
            num_cpus=0.0,
            num_gpus=config.cluster.gpus_per_engine if gpu else 0.0,
        )
        out[path] = (pool, renderer)
    return out


def make_pool(config: RunConfig, tokenizer: Any, version: int = 0) -> Any:
    """The engines, not started yet; with an environment they play whole episodes."""
    from posttrain.reward.judge import POLICY
    from posttrain.reward.serve import judges, longest
    from posttrain.rollout.engine import EngineConfig
    from posttrain.rollout.pool import EnginePool

    rollout, gpu = config.rollout, config.cluster.device == "cuda"
    assert config.model.path is not None
    prefix = config.data.max_length if getattr(rollout.strategy, "needs_demos", False) else 0
    prefix += 2 * rollout.max_tokens if getattr(rollout.strategy, "continues", False) else 0
    answer = max(rollout.max_tokens, config.eval.max_tokens or 0)
    judging = [j for j in judges(config.reward.fn).values() if j.model == POLICY]
    question = longest(judging, Renderer(tokenizer), config.data.max_prompt_tokens, answer) if judging else 0
    played = config.data.max_prompt_tokens + prefix + answer + forced_tokens(config, tokenizer)
    if rollout.environment is not None:
        from posttrain.rollout.environment import check_environment
        from posttrain.rollout.environment import longest as episode

        check_environment(rollout.environment)
        played = episode(rollout.environment, config.data.max_prompt_tokens, answer)
    engine = EngineConfig(
        model=config.model.path,
        dtype=rollout.dtype or config.model.dtype,
        seed=config.seed,
        device=config.cluster.device,
        max_model_len=rollout.max_model_len or max(played + 1, question),
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_gb=rollout.kv_cache_gb,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        tensor_parallel=rollout.tensor_parallel,
        trust_remote_code=config.model.trust_remote_code,
        version=version,
        return_routing=config.learner.routing == "engine",
    )
    pool = EnginePool(
        engine,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        num_engines=rollout.num_engines,
        run_seed=config.seed,
        timeout_s=rollout.timeout_s,
        start_timeout_s=config.cluster.start_timeout_s,
        num_cpus=0.0,
        num_gpus=config.cluster.gpus_per_engine if gpu else 0.0,
    )
    if rollout.environment is None:
        return pool
    from posttrain.rollout.environment import Playing

    assert engine.max_model_len is not None
    return Playing(pool, rollout.environment, Renderer(tokenizer), engine.max_model_len - 1, config.seed)


def forced_tokens(config: RunConfig, tokenizer: Any = None) -> int:
    """Tokens that a strategy may put behind a whole answer: words that force another one, and that one."""
    room = getattr(config.rollout.strategy, "forced_tokens", None)
    if room is not None and tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    return 0 if room is None else room(tokenizer, config.rollout.max_tokens)


def sampling_of(config: RunConfig, evaluation: bool = False) -> Sampling:
    """How answers are drawn, in training or in evaluation."""
    rollout = config.rollout
    if evaluation:
        tokens = config.eval.max_tokens or rollout.max_tokens
        return Sampling(temperature=config.eval.temperature, max_tokens=tokens, stop=tuple(rollout.stop))
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_tokens, stop=tuple(rollout.stop))


def prepare_evaluation(config: RunConfig, scratch: Path) -> tuple[RunConfig, Any, list[Any]]:
    """The config with its model, the tokenizer, and the prompts of ``posttrain eval``."""
    from posttrain.preflight import context, model

    data = config.data
    config, tokenizer = model(config, scratch, None)
    prompts, _ = load_data(
        "prompts",
        data.eval,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        truncation="drop" if data.truncation == "drop" else "error",
        system=data.system,
        prompt_template=data.prompt_template,
        name="data.eval",
    )
    context(replace(config, eval=replace(config.eval, at_end=True)), [])
    return config, tokenizer, list(prompts[: config.eval.limit])


async def evaluate_once(config: RunConfig, tokenizer: Any, prompts: Sequence[Any]) -> str:
    """Held-out accuracy of ``model.path``, as a sentence."""
    pool, judges = make_pool(config, tokenizer), make_judges(config)
    reward = make_rewards(config, pool, tokenizer, judges)
    try:
        sampling = sampling_of(config, evaluation=True)
        report = await HeldOut(config.eval, pool, reward, prompts, sampling, config.steps, print).measure()
    finally:
        for stage in (pool, reward, *(engines for engines, _ in judges.values())):
            stage.close()
    lines = [f"accuracy {sentence(report)}, {config.eval.n} answer{'s' * (config.eval.n > 1)} each at temperature {config.eval.temperature:g}"]
    lines += [f"  level {level}: {sentence({'failed': 0, **part})}" for level, part in report["by_level"].items()]
    return "\n".join(lines)


def make_learner(config: RunConfig, total_steps: int, ray_options: dict[str, Any] | None = None) -> Any:
    """The learner's ranks, not started yet."""
    from posttrain.learner.actor import LearnerGroup

    gpu = config.cluster.device == "cuda"
    return LearnerGroup(
        config.model,
        config.learner,
        config.loss,
        total_steps=total_steps,
        seed=config.seed,
        num_gpus=config.cluster.gpus_per_learner if gpu else 0.0,
        publish_dtype=config.rollout.dtype or config.model.dtype,
        bucket_mb=config.sync.bucket_mb,
    )


def policy_steps(config: RunConfig) -> int:
    """Optimizer steps of the policy, over which its learning rate falls: none while a critic learns alone."""
    alone = config.critic.warmup_batches if config.critic is not None else 0
    return (config.steps - alone) * config.learner.updates_per_batch


def make_critic(config: RunConfig) -> Any:
    """The critic's ranks, not started yet, or None when the run has no critic."""
    from posttrain.learner.actor import LearnerGroup

    critic, gpu = config.critic, config.cluster.device == "cuda"
    if critic is None:
        return None
    own = replace(config.learner, lr=critic.lr, warmup_steps=critic.warmup_steps, max_grad_norm=critic.max_grad_norm, base_every=0)
    given = {f.name: getattr(config.model, f.name) for f in fields(config.model)}
    given |= {"path": critic.path or config.model.path, "teacher": None, "base": None, "train_only": None}
    model = CriticModelConfig(**given, heads=critic.heads, alpha=critic.alpha)
    if critic.path is not None:
        model = replace(model, init="pretrained")
    return LearnerGroup(
        model,
        own,
        critic.loss,
        total_steps=config.steps * own.updates_per_batch,
        seed=config.seed,
        num_gpus=config.cluster.gpus_per_learner if gpu else 0.0,
        start_timeout_s=config.cluster.start_timeout_s,
    )


async def export_from_checkpoint(config: RunConfig, path: Path, target: Path) -> Path:
    """Write the Hugging Face folder of a checkpoint."""
    learner = make_learner(config, config.steps)
    try:
        await learner.ready()
        await learner.load(str(path / "learner"))
        await learner.export(str(target))
    finally:
        learner.close()
    return target


@asynccontextmanager
async def open_stage(
    config: RunConfig, name: str, folder: RunFolder, console: Any, *, start_from: str | None, resume: bool, last: bool
) -> AsyncIterator[Run]:
    """Everything a stage needs, started; closed again whatever happens.

    With ``resume`` the newest whole checkpoint of the stage is loaded, and torn ones are reported.
    """
    timings = Timings()
    with timings.phase("start"):
        config, tokenizer = prepare_model(config, folder.root / "model", start_from)
        records, _, evaluation, demos = load_stage_data(config, tokenizer, console.message)
        checkpoints = folder.of("checkpoints", name)
        found = checkpoint.newest(checkpoints, console.message) if resume else None
        start = found[0] if found else 0
        sampler = Sampler(records, config.seed, config.data.shuffle)
        sizes = len(records)
        if config.rollout.kind == "replay" and sizes < config.rollout.prompts_per_step:
            console.message(f"data.train holds {sizes} records, fewer than rollout.prompts_per_step={config.rollout.prompts_per_step}: each is seen more than once per step")
        drawn = Sampler(demos, config.seed, name="demos") if demos else None
        given = config.mixture.gate or PassThrough()
        if hasattr(given, "with_encode"):
            renderer = Renderer(tokenizer)
            given = given.with_encode(lambda text: renderer.plain("", text, complete=False).ids[len(renderer.bos) :])
        gate = GateStage(given, Demos(demos, drawn), config.steps)
        for key, asks in (("mixture.gate", gate.gate.uses_demos), ("rollout.strategy", getattr(config.rollout.strategy, "needs_demos", False))):
            if asks and not demos:
                raise ConfigError(f"{key} asks for demonstrations but data.demos is not set: give data.demos.path=FILE")
    pool = make_pool(config, tokenizer, version=0) if _samples(config) else None
    judges = make_judges(config) if pool else {}
    rewards = make_rewards(config, pool, tokenizer, judges)
    asked = [engines for engines, _ in judges.values()]
    learner = make_learner(config, policy_steps(config))
    critic = make_critic(config)
    closing = [stage.close for stage in (learner, critic, pool, rewards, *asked) if stage is not None]
    try:
        with timings.phase("start"):
            console.message(f"starting {'the engines and ' if pool else ''}the learner from {config.model.path}")
            await together(stage.ready() for stage in (learner, critic, pool, *asked) if stage is not None)
            if found:
                await learner.load(str(found[1] / "learner"))
                if critic is not None:
                    await critic.load(str(found[1] / "critic"))
        rollout: Any = DataSet(records, sampler, config.rollout.prompts_per_step, estimator_of(config))
        if config.rollout.kind == "vllm":
            from posttrain.rollout.strategy import Fixed

            strategy = (config.rollout.strategy or Fixed()).bound(config.rollout.n)
            if getattr(strategy, "needs_demos", False):
                strategy = strategy.with_demos(gate.demos)
            if getattr(strategy, "continues", False):
                strategy = strategy.with_decode(pool.decode)
            if hasattr(strategy, "with_tokenizer"):
                assert pool is not None
                strategy = strategy.with_tokenizer(tokenizer, config.rollout.max_tokens, pool.config.max_model_len)
            rollout = Engines(
                pool, rewards, sampler, records, strategy, sampling_of(config), config.rollout.prompts_per_step, config.steps, config.advantage
            )
        held_out = HeldOut(config.eval, pool, rewards, evaluation, sampling_of(config, evaluation=True), config.steps, console.message)
        publish = Publish(learner, pool, config.rollout.kind == "vllm", held_out.due, config.sync.verify)
        packer = Packer(config.learner.micro_batch_tokens, config.learner.world_size, config.learner.updates_per_batch)
        learn = Learn(
            config.loss,
            packer,
            learner,
            config.seed,
            _tolerance(config),
            separate_demos=getattr(gate.gate, "separate_step", False),
            base_every=config.learner.base_every,
            base_mix=config.learner.base_mix,
            routing=config.learner.routing,
            critic=None if critic is None else Critic(critic, config.critic.loss, config.critic.warmup_batches),  # type: ignore[union-attr]
        )
        canaries = Canaries(config.check, learner, patience=2 if config.model.lora else 1, critic=critic)
        reporter = Reporter(config, name, folder, console, tokenizer, timings, start)
        if found:
            remembered = checkpoint.read_controller(found[1])
            rollout.load(remembered["rollout"])
            gate.load(remembered["gate"])
            learn.load(remembered.get("learn", {"memory": {}}))
            reporter.alarms.load_state_dict(remembered["alarms"])
            reporter.last = remembered.get("metrics", {})
            held_out.results |= remembered.get("evaluation", {})
            canaries.resumed()
            await publish(start, last=True)
            console.message(f"stage {name} goes on after step {start} of {config.steps}, from {found[1]}")
        run = Run(
            name=name,
            steps=config.steps,
            start=start,
            rollout=rollout,
            advantage=estimator_of(config) or _as_is,
            gate=gate,
            learner=learn,
            publish=publish,
            canaries=canaries,
            checkpoint=checkpoint.Checkpointer(
                checkpoints,
                learner,
                lambda: {
                    "gate": gate.state,
                    "learn": learn.state,
                    "alarms": reporter.alarms.state_dict(),
                    "metrics": reporter.last,
                    "evaluation": held_out.results,
                },
                config.checkpoint.every,
                config.checkpoint.keep,
                config.steps,
                {"stage": name, "model_path": config.model.path, "steps": config.steps},
                critic,
            ),
            evaluate=held_out,
            report=reporter,
            timings=timings,
            max_staleness=config.rollout.max_staleness,
        )
        run.finish = Finish(config, learner, folder.of("export", name), held_out, reporter, timings)
        with reporter:
            yield run
    finally:
        for close in closing:
            with contextlib.suppress(Exception):
                close()


def _tolerance(config: RunConfig) -> float:
    """The mean log-prob gap allowed between engine and learner at the first step."""
    from posttrain.rollout.mismatch import TOLERANCE

    if config.check.mismatch is not None:
        return config.check.mismatch
    return max(TOLERANCE[config.model.dtype], TOLERANCE[config.rollout.dtype or config.model.dtype])


def estimator_of(config: RunConfig) -> Any:
    """The advantage, where rewards are there to be compared: of sampled answers and of scored lists."""
    return config.advantage if config.rollout.kind == "vllm" or config.data.kind == "lists" else None


def _as_is(items: list[Any]) -> list[Any]:
    return items


@dataclass
class Finish:
    """What happens after the last step: export, and the stage's result."""

    config: RunConfig
    learner: Any
    target: Path
    held_out: HeldOut
    reporter: Any
    timings: Timings

    async def __call__(self) -> dict[str, Any]:
        result: dict[str, Any] = {"steps": self.config.steps, "evaluation": self.held_out.results, "metrics": self.reporter.last}
        if self.config.checkpoint.export:
            with self.timings.phase("export"):
                await self.learner.export(str(self.target))
            result["export"] = str(self.target)
        return result | {"timings": self.timings.seconds()}
