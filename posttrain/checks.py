"""What cannot work together is refused before a run, with the keys and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.config import ConfigError, RunConfig
from posttrain.loss.unified import declared

Require = Callable[[bool, str], None]
"""Raises with the message when it does not hold."""

FILLED = frozenset({"old", "behaviour", "base", "teacher", "entropy", "collision"})
"""The per-token columns that a run fills, by itself or from its models."""


def check(config: RunConfig) -> None:
    """Refuse what cannot work together.  Every message names the keys and the way out."""
    rollout, learner, data = config.rollout, config.learner, config.data
    needs = config.loss.needs
    sources = {s for stream in config.loss.streams.values() for s in stream.source}

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    for path, value, least in (
        ("steps", config.steps, 1),
        ("rollout.n", rollout.n, 1),
        ("rollout.prompts_per_step", rollout.prompts_per_step, 1),
        ("rollout.num_engines", rollout.num_engines, 1),
        ("learner.world_size", learner.world_size, 1),
        ("learner.updates_per_batch", learner.updates_per_batch, 1),
        ("learner.micro_batch_tokens", learner.micro_batch_tokens, 2),
        ("learner.warmup_steps", learner.warmup_steps, 0),
        ("rollout.max_tokens", rollout.max_tokens, 1),
        ("rollout.tensor_parallel", rollout.tensor_parallel, 1),
        ("data.max_prompt_tokens", data.max_prompt_tokens, 1),
        ("data.max_length", data.max_length, 2),
        ("reward.max_concurrency", config.reward.max_concurrency, 1),
        ("eval.limit", config.eval.limit, 1),
        ("eval.n", config.eval.n, 1),
        ("eval.every", config.eval.every, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep", config.checkpoint.keep, 0),
        ("model.lora.r", config.model.lora.r if config.model.lora else 1, 1),
    ):
        require(value >= least, f"{path}={value} must be at least {least}")
    for path, value in (("reward.timeout_s", config.reward.timeout_s), ("rollout.timeout_s", rollout.timeout_s), ("learner.timeout_s", learner.timeout_s)):
        require(value > 0, f"{path}={value:g} must be above 0 seconds")
    require(0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p:g} must be above 0 and at most 1; 1 keeps every token")
    require(config.eval.temperature >= 0, f"eval.temperature={config.eval.temperature:g} must be at least 0; 0 takes the likeliest token")
    require(config.resume in ("never", "auto"), f"resume={config.resume!r}; choose never or auto (with run_dir=FOLDER for a particular run)")
    require(config.model.path is not None or config.model.tiny is not None, "model.path is not set: give model.path=FOLDER_OR_ID, or model=tiny")
    require(data.train is not None, "data.train is not set: give data.train.path=FILE, or choose data=NAME")
    require(learner.zero_stage in (0, 1, 2, 3), f"learner.zero_stage={learner.zero_stage}; choose 0, 1, 2 or 3")
    require(
        learner.engine == "deepspeed" or learner.zero_stage == 0,
        f"learner.engine=torch cannot shard: set learner.zero_stage=0 or learner.engine=deepspeed (zero_stage is {learner.zero_stage})",
    )
    require(
        not learner.offload_optimizer or (learner.engine == "deepspeed" and learner.zero_stage >= 1),
        "learner.offload_optimizer needs learner.engine=deepspeed and learner.zero_stage of 1, 2 or 3",
    )
    require(learner.lr >= 0, f"learner.lr={learner.lr} is negative")
    require(learner.base_every >= 0, f"learner.base_every={learner.base_every} must be at least 0; 0 never moves the base")
    require(0 < learner.base_mix <= 1, f"learner.base_mix={learner.base_mix} must be above 0 and at most 1; learner.base_every=0 never moves the base")
    compares = "base" in needs.references or any(column.endswith(":base") for column in needs.columns)
    require(not learner.base_every or compares, f"learner.base_every={learner.base_every}: loss {config.loss.name!r} compares with no base; set it to 0")
    require(
        not learner.base_every or config.model.dtype != "bfloat16" or learner.base_mix >= 1 / 64,
        f"learner.base_mix={learner.base_mix}: the base is kept in bfloat16, where steps this small are lost to rounding; move it further and less often",
    )
    require(rollout.temperature > 0, f"rollout.temperature={rollout.temperature}: sampling for training needs a temperature above 0")
    require(rollout.max_staleness == 0, "rollout.max_staleness must be 0: running ahead of the learner is not available yet")
    require(config.steps >= learner.warmup_steps, f"learner.warmup_steps={learner.warmup_steps} exceeds steps={config.steps}")
    with_teacher = "teacher" in needs.references or any(column.endswith(":teacher") for column in needs.columns)
    require(
        not with_teacher or config.model.teacher is not None,
        f"loss {config.loss.name!r} compares with a teacher: give model.teacher=FOLDER_OR_ID (a model with the same tokenizer)",
    )
    _check_heads(config, require)
    _check_routing(config, require)
    unfilled = sorted(needs.references - FILLED - ({"value"} if config.critic is not None else set()))
    require(
        not unfilled,
        f"loss {config.loss.name!r} reads the column {', '.join(map(repr, unfilled))}, which no part of a run fills (those that are: {', '.join(sorted(FILLED))}); "
        "batches made by hand may bring it",
    )
    if rollout.kind == "vllm":
        _check_sampled(config, sources, require)
    else:
        _check_given(config, sources, require)
    _check_estimator(config, require)
    _check_mixture(config, require)
    _check_evaluation(config, require)


def _check_sampled(config: RunConfig, sources: set[str], require: Require) -> None:
    """Answers are sampled: what they are asked of, scored with, compared by, and room for them."""
    rollout, data, needs = config.rollout, config.data, config.loss.needs
    require(data.kind == "prompts", f"rollout.kind=vllm samples answers, so data.kind must be prompts, not {data.kind}; or set rollout=replay")
    require(bool(config.reward.fn), "rollout.kind=vllm needs a reward: choose reward=NAME or set reward.fn.NAME._target_=module.function")
    making = getattr(config.mixture.gate, "makes_pairs", False)
    require(config.advantage is not None or making, "rollouts need an advantage: choose advantage=group_norm (or another file of configs/advantage)")
    rewriting = getattr(config.mixture.gate, "makes_demos", False)
    require("policy" in sources or rewriting, f"loss {config.loss.name!r} has no stream for sampled tokens; choose another loss or set rollout=replay")
    require(
        abs(needs.temperature - rollout.temperature) < 1e-9 or all(_imitates(s) for s in config.loss.streams.values()),
        f"the loss scores tokens at temperature {needs.temperature} but they are sampled at {rollout.temperature}; set the likelihood's "
        f"temperature to rollout.temperature (likelihood.temperature: ${{rollout.temperature}})",
    )
    if needs_group(config.advantage):
        require(rollout.n > 1, f"rollout.n={rollout.n}: {type(config.advantage).__name__} compares answers to one prompt; set rollout.n to 2 or more")
    live = [type(s.advantage).__name__ for s in config.loss.streams.values() if "policy" in s.source and not s.paired and declared(s.advantage, "coupling") == "group"]
    require(rollout.n > 1 or not live, f"rollout.n={rollout.n}: {''.join(live[:1])} of loss {config.loss.name!r} compares answers to one prompt; set rollout.n to 2 or more")
    paired = any(s.paired and "policy" in s.source for s in config.loss.streams.values())
    require(
        not paired or making,
        f"loss {config.loss.name!r} learns from pairs, and nothing makes pairs of the sampled answers: choose mixture=best_worst",
    )
    comparing = sorted(n for n, r in config.reward.fn.items() if getattr(r, "compares", False))
    require(
        not comparing or rollout.n > 1,
        f"rollout.n={rollout.n}: reward.fn.{comparing[0] if comparing else ''} compares the answers to one prompt; set rollout.n to 2 or more, or a judge's against=reference",
    )
    given = getattr(config.mixture.gate, "uses_demos", False)
    require(not making or given or rollout.n > 1, f"rollout.n={rollout.n}: the best answer to a prompt needs a worst; set rollout.n to 2 or more")
    limit = rollout.max_model_len
    prefixed, continued = (getattr(rollout.strategy, name, False) for name in ("needs_demos", "continues"))
    forcing = hasattr(rollout.strategy, "forced_tokens")
    require(not (rollout.environment and forcing), "rollout.environment and a strategy with exits do not go together: set one of them to null")
    require(
        continued or not getattr(config.mixture.gate, "needs_continuations", False),
        f"mixture.gate={type(config.mixture.gate).__name__} compares the steps of an answer, and nothing is continued from them: choose "
        "rollout=continued",
    )
    require(not (rollout.environment and (prefixed or continued)), "rollout.environment and a strategy with prefixes do not go together: set one of them to null")
    require(
        limit is None or data.max_prompt_tokens + (1 + 2 * continued) * rollout.max_tokens <= limit,
        f"rollout.max_model_len={limit} cannot hold data.max_prompt_tokens={data.max_prompt_tokens} + {'three times ' * continued}"
        f"rollout.max_tokens={rollout.max_tokens}",
    )


def _check_given(config: RunConfig, sources: set[str], require: Require) -> None:
    """Nothing is sampled: the data holds what is learnt from."""
    data, needs = config.data, config.loss.needs
    require(data.kind != "prompts", "rollout=replay learns from given answers: set data.kind to demos, pairs, lists or steps")
    require("policy" not in sources or sources != {"policy"}, f"loss {config.loss.name!r} learns from sampled tokens only; set rollout=vllm")
    require(
        "behaviour" not in needs.references,
        f"loss {config.loss.name!r} reads the behaviour log-prob, which given data does not have; set rollout=vllm or choose another loss",
    )
    paired = any(s.paired for s in config.loss.streams.values())
    require(not paired or data.kind == "pairs", f"loss {config.loss.name!r} learns from pairs; set data.kind=pairs (it is {data.kind})")
    require(paired or data.kind != "pairs", f"data.kind=pairs needs a preference loss such as dpo; loss {config.loss.name!r} has no paired stream")


def _check_estimator(config: RunConfig, require: Require) -> None:
    """What an advantage compares is sampled."""
    rollout = config.rollout
    adding = any(getattr(s, "adds_greedy", False) for s in inside(rollout.strategy))
    reading = any(getattr(a, "needs_greedy", False) for a in estimators(config.advantage))
    require(adding or not reading, "advantage GreedyBaseline compares with a greedy answer, and nobody adds one: choose rollout=greedy_baseline")
    require(
        reading or not adding or config.advantage is None,
        f"rollout.strategy adds a greedy answer to every group, which advantage {type(config.advantage).__name__} takes for a sample: choose "
        "advantage=greedy, or rollout=vllm",
    )
    forcing = hasattr(rollout.strategy, "forced_tokens")
    leaving = [type(a).__name__ for a in estimators(config.advantage) if getattr(a, "needs_exits", False)]
    require(
        forcing or not leaving,
        f"advantage {''.join(leaving[:1])} compares exits of a chain, and nobody leaves one: choose rollout=exits or rollout=blocks",
    )


def _check_mixture(config: RunConfig, require: Require) -> None:
    """What the mixture makes of a step is learnt from, and what the loss learns from is brought."""
    loss, name, data = config.loss, config.loss.name, config.data
    gates, streams = parts_of(config.mixture.gate), loss.streams
    pairing, rewriting, bringing, thinking = (
        [type(g).__name__ for g in gates if getattr(g, trait, False)] for trait in ("makes_pairs", "makes_demos", "uses_demos", "adds_text")
    )
    sampled = config.rollout.kind == "vllm"
    require(
        not (sampled and pairing) or any(s.paired for s in streams.values()),
        f"mixture.gate={''.join(pairing[:1])} makes pairs of the sampled answers, and loss {name!r} learns from none, it would imitate both sides or "
        "neither: choose loss=online_dpo or another one of pairs, or mixture=none",
    )
    by_itself = {n: s for n, s in streams.items() if s.paired is not True}
    given = any("demo" in s.source for s in by_itself.values())
    require(
        given or not rewriting,
        f"mixture.gate={''.join(rewriting[:1])} turns sampled answers into given ones, and loss {name!r} learns from none: choose loss=leti or "
        "loss=rltf, or mixture=none",
    )
    apart_from_pairs = [g for g in gates if getattr(g, "uses_demos", False) and not getattr(g, "makes_pairs", False)]
    joining = [type(g).__name__ for g in apart_from_pairs if not hasattr(g, "advantage")]  # those with an estimator act through the baseline too
    observed = any("tool" in s.source for s in by_itself.values())
    require(
        given or observed or not joining,
        f"mixture.gate={''.join(joining[:1])} brings demonstrations, and loss {name!r} learns from none: choose loss=sft_plus_rl or another one "
        "with a stream of source [demo], or mixture=none",
    )
    apart = [type(g).__name__ for g in gates if getattr(g, "separate_step", False)]
    require(
        not apart or config.learner.schedule == "constant",
        f"learner.schedule={config.learner.schedule} falls over the batches' own optimizer steps, and mixture.gate={''.join(apart[:1])} takes "
        "more of them, so the rate would be at its end before the run is: set learner.schedule=constant",
    )
    if sampled:
        wanting = [n for n, s in by_itself.items() if set(s.source) == {"demo"} and _counts(s)]
        require(
            not wanting or bool(bringing or rewriting),
            f"loss {name!r} has the stream {''.join(wanting[:1])!r} for given answers, and nothing brings any: choose mixture=NAME (add, luffy, "
            f"hpt, ...), or set loss.streams.{''.join(wanting[:1])}=null",
        )
        begun = [n for n, s in by_itself.items() if set(s.source) == {"prefix"} and _counts(s)]
        played = config.rollout.environment is not None or getattr(config.rollout.strategy, "needs_demos", False)
        require(
            not begun or played,
            f"loss {name!r} has the stream {''.join(begun[:1])!r} for given beginnings of answers, and nothing brings any: choose rollout=prefix or "
            f"rollout=hint, or set loss.streams.{''.join(begun[:1])}=null",
        )
        reads = "without_thought" in loss.needs.contexts
        require(
            not reads or bool(thinking),
            f"loss {name!r} reads what a text says behind every thought, and nothing puts it there: choose mixture=before_text",
        )
        require(
            reads or not thinking,
            "mixture=before_text puts the next words of a text behind every thought, and this loss does not read them: choose loss=rlp, or "
            "mixture=none",
        )
    if data.kind == "demos" and not sampled:
        marked = data.loss_on == "environment"
        require(
            observed or not marked,
            f"data.loss_on=environment marks what the environment answered, and loss {name!r} learns from no such tokens: choose "
            "loss=world_model, or data.loss_on=assistant",
        )
        require(
            marked or any(set(s.source) != {"tool"} for s in by_itself.values()) or not by_itself,
            f"loss {name!r} learns what an environment answered, and data.loss_on={data.loss_on} marks none of it: set data.loss_on=environment",
        )


def inside(strategy: Any) -> list[Any]:
    """A strategy and those it stands around."""
    return [] if strategy is None else [strategy, *inside(getattr(strategy, "inner", None))]


def parts_of(gate: Any) -> list[Any]:
    """A gate, or the gates that act in turn."""
    inner = getattr(gate, "gates", None)
    return [gate] if inner is None else [part for g in inner.values() if g is not None for part in parts_of(g)]


def _counts(stream: Any) -> bool:
    """Whether a stream is switched on."""
    return callable(stream.coef) or stream.coef != 0


def _check_evaluation(config: RunConfig, require: Require) -> None:
    """Held-out prompts, and a reward that can judge one answer at a time."""
    if config.eval.at_start or config.eval.at_end or config.eval.every:
        require(config.data.eval is not None, "evaluation is asked for but data.eval is not set: give data.eval.path=FILE or eval.at_start=false eval.at_end=false")
        require(bool(config.reward.fn), "evaluation needs a reward to say what is right: choose reward=NAME")
        alone = sorted(n for n, r in config.reward.fn.items() if getattr(r, "compares", False)) if config.eval.n == 1 else []
        require(
            not alone,
            f"eval.n=1: reward.fn.{''.join(alone[:1])} compares the answers to one prompt; set eval.n to 2 or more, a judge's against=reference, or no evaluation",
        )


def _check_heads(config: RunConfig, require: Require) -> None:
    """A language model, a reward model or a critic: what reads which head, and what each learns from."""
    needs, name, critic = config.loss.needs, config.loss.name, config.critic
    reads = "value" in needs.references
    if needs.head == "scalar":
        require(config.rollout.kind == "replay", f"loss {name!r} trains a scalar head, which cannot sample; set rollout=replay, or make it the critic's: critic.loss")
        require(not reads, f"loss {name!r} reads what a critic said before and cannot be run by itself; it is the loss of critic=value")
        require(
            not (config.eval.at_start or config.eval.at_end or config.eval.every),
            f"loss {name!r} trains a scalar head, which cannot answer prompts: set eval.at_start=false eval.at_end=false eval.every=0",
        )
    marked = needs.head == "scalar" and needs.at == "marked"
    require(marked or config.data.kind != "steps", f"data.kind=steps labels the ends of steps; loss {name!r} does not read there: choose loss=process_reward_model")
    require(not marked or config.data.kind == "steps", f"loss {name!r} learns from labelled steps; set data.kind=steps (it is {config.data.kind})")
    kept = any(column.endswith(":stored") for column in needs.columns)
    require(not kept or config.data.kind == "stored", f"loss {name!r} compares with a stored distribution; set data.kind=stored (it is {config.data.kind})")
    require(kept or config.data.kind != "stored", f"data.kind=stored holds a teacher's probabilities, which loss {name!r} does not read; choose to: stored in a FullKL")
    _check_places(config, require)
    require(critic is not None or not reads, f"loss {name!r} reads the values of a critic, and the run has none: choose critic=value")
    if critic is None:
        return
    require(reads, f"critic is set, but loss {name!r} reads no values; choose loss=ppo_gae, or critic=none")
    own = critic.loss.needs
    require(own.head == "scalar" and own.at == "before", f"critic.loss={critic.loss.name!r} is no critic's: its likelihood must be Score(at=before)")
    require(own.keep_whole is None, f"critic.loss={critic.loss.name!r} compares whole groups or steps, which a critic's loss cannot")
    require(critic.heads >= 1, f"critic.heads={critic.heads} must be 1 or more")
    require(critic.heads == 1 or critic.alpha is not None, f"critic.heads={critic.heads} are combined by a soft minimum: give its temperature, critic.alpha=0.3 for instance")
    require(critic.heads > 1 or critic.alpha is None, f"critic.alpha={critic.alpha} combines several heads, and there is one; set critic.heads=2, or critic.alpha=null")
    require(critic.alpha is None or critic.alpha >= 0, f"critic.alpha={critic.alpha} is the temperature of a soft minimum, 0 or more")
    require(0 <= critic.warmup_batches < config.steps, f"critic.warmup_batches={critic.warmup_batches} must be at least 0 and below steps={config.steps}")


def _check_routing(config: RunConfig, require: Require) -> None:
    """Whether there is something to replay."""
    routing, learner = config.learner.routing, config.learner
    require(routing != "engine" or config.rollout.kind == "vllm", "learner.routing=engine replays the experts that sampled an answer; with rollout=replay nothing is sampled: set learner.routing=own")
    require(
        routing != "old" or (learner.updates_per_batch > 1 and "old" in config.loss.needs.references),
        f"learner.routing=old replays the experts of the learner before several updates on one batch; it needs learner.updates_per_batch above 1 (it is "
        f"{learner.updates_per_batch}) and a loss that compares with the old policy",
    )
    require(routing == "own" or config.loss.needs.head == "lm", "learner.routing belongs to a language model that samples; set learner.routing=own")


def _check_places(config: RunConfig, require: Require) -> None:
    """One reward for every token, or one for an answer: what the loss adds up must be what the advantage hands on."""
    from posttrain.advantage import Placed
    from posttrain.update import returns_of

    placed, name = any(isinstance(a, Placed) for a in estimators(config.advantage)), config.loss.name
    terms = [term for stream in config.loss.streams.values() if (term := returns_of(stream.advantage)) is not None]
    each = any(term.rewards == "each" and term.earned is None for term in terms)
    require(each or not placed, f"advantage=placed hands on a reward for every token, and loss {name!r} does not add them up; choose loss=fine_grained, or another advantage")
    require(
        placed or not each or config.rollout.kind != "vllm",
        f"loss {name!r} adds up a reward of every token, and the advantage gives one number for an answer, which every token would be paid; choose advantage=placed",
    )


def _imitates(stream: Any) -> bool:
    """Whether a stream's tokens are learnt alike, whoever sampled them: then the temperature they were drawn at is free."""
    terms = (stream.reference, *stream.masks.values())
    return bool(getattr(stream.advantage, "constant", False)) and not any({"old", "behaviour"} & set(getattr(t, "needs", ())) for t in terms)


def estimators(advantage: Any) -> list[Any]:
    """An advantage and everything it is made of."""
    parts = [*getattr(advantage, "steps", {}).values(), getattr(advantage, "inner", None)]
    return [advantage, *(found for part in parts if part is not None for found in estimators(part))]


def needs_group(advantage: Any) -> bool:
    """Whether an advantage compares the answers of one group, so that a group of one cannot teach anything."""
    if any(needs_group(step) for step in getattr(advantage, "steps", {}).values()):
        return True
    return getattr(advantage, "needs_group", False) or getattr(advantage, "center", None) in ("mean", "loo", "median", "length_weighted")
