"""The typed settings of a run, and the checks that need to see several of them at once.

A recipe is composed elsewhere (``cli.py``); here it arrives as plain mappings with terms already built, becomes dataclasses, and every
message says which key to change.  ``from_mapping`` refuses unknown keys and wrong types, so a typing mistake never trains silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot work.  The message names the key and the change that mends it."""


@dataclass
class LoraConfig:
    """Low-rank adapters: rank ``r``, scale ``alpha / r``, ``targets`` as peft names them."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


@dataclass
class ModelConfig:
    """``path``: a Hugging Face folder or id.  ``init=random`` keeps the architecture and draws new weights.  ``tiny`` describes a model that
    is created on the spot (architecture and alphabet), used when ``path`` is null.  ``teacher``: a folder or id of the frozen model that losses
    with a ``teacher`` compare with; it must share the tokenizer.  ``base``: a folder or id of the frozen model that losses with a ``base``
    compare with; null is where the policy starts.  ``train_only``: a regular expression; parameters whose names it does not find stay as they are."""

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: str = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    chat_template: str | None = None
    tiny: dict[str, Any] | None = None
    teacher: str | None = None
    base: str | None = None
    train_only: str | None = None


@dataclass
class DataConfig:
    """What is learnt from and what is held out.

    ``kind``: ``prompts`` (answers are sampled), ``demos``, ``pairs``, ``lists`` (scored answers to one prompt) or
    ``steps`` (answers whose steps are labelled) or ``stored`` (answers with a teacher's probabilities).  ``train``, ``eval`` and ``demos`` are each a mapping for the reader
    (``path``, ``split``, ``columns``, ``limit``, ...) or an object with ``rows()``; ``demos`` feeds mixtures.
    ``loss_on``: which turns of a demonstration are learnt: all of the ``assistant``, the ``last_turn``, the ``completion`` of the last question, those of the
    ``expert`` in transcripts that say who acted, or what the ``environment`` answered.
    """

    kind: Literal["prompts", "demos", "pairs", "lists", "steps", "stored"] = "prompts"
    train: Any = None
    eval: Any = None
    demos: Any = None
    max_prompt_tokens: int = 1024
    max_length: int = 4096
    truncation: Literal["error", "drop", "end"] = "error"
    loss_on: Literal["assistant", "last_turn", "completion", "expert", "environment"] = "assistant"
    system: str | None = None
    prompt_template: str | None = None
    shuffle: bool = True


@dataclass
class RolloutConfig:
    """How answers are sampled.  ``kind=replay`` takes the data set as it is; ``vllm`` samples ``n`` answers to each of ``prompts_per_step``
    prompts.  ``environment`` answers what was said, and the model goes on; null is a single turn.
    ``dtype`` null means the model's.  ``kv_cache_gb`` is the CPU engine's cache; ``gpu_memory_utilization`` the GPU engine's."""

    kind: Literal["vllm", "replay"] = "vllm"
    num_engines: int = 1
    prompts_per_step: int = 32
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    max_model_len: int | None = None
    max_num_seqs: int = 256
    dtype: Literal["float32", "bfloat16"] | None = None
    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = True
    tensor_parallel: int = 1
    max_staleness: int = 0
    strategy: Any = None
    environment: Any = None
    timeout_s: float = 1800.0


@dataclass
class RewardConfig:
    """``fn``: name -> function or object; ``weights``: name -> number or schedule (absent means 1); ``combine``: an object, default the
    weighted sum.  ``routes``: environment (``Prompt.env``) -> names of the rewards that apply to it; those not named get all.  A run stops when
    more than ``error_budget`` of the verdicts failed over ``budget_window`` steps."""

    fn: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    combine: Any = None
    routes: dict[str, list[str]] = field(default_factory=dict)
    timeout_s: float = 30.0
    max_concurrency: int = 32
    error_budget: float = 0.01
    budget_window: int = 50


@dataclass
class MixtureConfig:
    """``gate``: which data a step uses; null keeps the rollouts and adds nothing."""

    gate: Any = None


@dataclass
class LearnerConfig:
    """The optimizer and how the batch is cut.  ``updates_per_batch`` optimizer steps are taken on each batch of experience;
    ``micro_batch_tokens`` bounds a packed row.  ``threads`` null shares the machine's cores among the ranks.  Every ``base_every`` batches (0:
    never) the base the loss compares with becomes ``base_mix`` times the policy plus the rest of itself.  ``routing``: the experts of a mixture; ``own``: chosen
    anew in every pass; ``engine``: those that sampled the answer; ``old``: those of the learner before the first of several updates."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 0
    offload_optimizer: bool = False
    world_size: int = 1
    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    updates_per_batch: int = 1
    micro_batch_tokens: int = 8192
    head_chunk: int = 1024
    timeout_s: float = 1800.0
    threads: int | None = None
    base_every: int = 0
    base_mix: float = 1.0
    routing: Literal["own", "engine", "old"] = "own"


@dataclass
class CriticConfig:
    """A critic: a model of its own with a scalar head, which says what every state was worth before the policy moves, and then learns from the returns.
    ``loss``: its objective.  ``path``: a folder or id, for instance a reward model's export; null is where the policy starts.  In the first ``warmup_batches``
    batches it learns alone.  ``heads``: several heads on its backbone, whose numbers become one value by their soft minimum at the temperature ``alpha``, in units of
    reward: 0 is the least of them, infinity their mean.  What is not named here is as in ``learner`` and ``model``."""

    loss: Any
    path: str | None = None
    lr: float = 1e-5
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    warmup_batches: int = 0
    heads: int = 1
    alpha: float | None = None


@dataclass
class CriticModelConfig(ModelConfig):
    """A critic's model: that of the run, as ``critic`` changes it."""

    heads: int = 1
    alpha: float | None = None


@dataclass
class SyncConfig:
    """How weights reach the engines.  ``verify`` compares fingerprints after every update."""

    kind: Literal["object_store"] = "object_store"
    bucket_mb: int = 256
    verify: bool = True


@dataclass
class ClusterConfig:
    """Where things run.  ``device=cuda`` asks Ray for GPUs: ``gpus_per_learner`` for every learner rank and ``gpus_per_engine`` for every engine."""

    device: Literal["cpu", "cuda"] = "cpu"
    address: str | None = None
    num_cpus: int | None = None
    gpus_per_learner: float = 1.0
    gpus_per_engine: float = 1.0
    object_store_gb: float = 1.0
    start_timeout_s: float = 600.0


@dataclass
class TrackingConfig:
    """Writers beside ``metrics.jsonl``; ``completions_per_step`` limits the dump (-1: all)."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "posttrain"
    completions_every: int = 1
    completions_per_step: int = 64
    console_samples: int = 4


@dataclass
class CheckpointConfig:
    """Save every ``every`` steps (0: only at the end), keep the newest ``keep``."""

    every: int = 50
    keep: int = 2
    export: bool = True


@dataclass
class EvalConfig:
    """Held-out accuracy: ``n`` answers to each of at most ``limit`` prompts at ``temperature``; right means reward ``metric`` >= ``threshold``.
    ``metric`` null means the combined reward."""

    every: int = 0
    at_start: bool = False
    at_end: bool = False
    limit: int = 256
    n: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    metric: str | None = None
    threshold: float = 1.0


@dataclass
class CheckConfig:
    """Canaries.  ``mismatch`` is the largest mean |learner - engine| log-prob difference allowed at the first step; null takes the value for
    the dtype.  ``alarm=stop`` turns alarms into errors."""

    mismatch: float | None = None
    weights_moved: bool = True
    constant_reward_steps: int = 20
    alarm: Literal["warn", "stop"] = "warn"


@dataclass
class RunConfig:
    """Everything a stage needs."""

    loss: Any
    name: str = "run"
    seed: int = 0
    steps: int = 100
    run_dir: str | None = None
    resume: str = "never"
    strict: bool = False
    advantage: Any = None
    stages: dict[str, Any] | None = None
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig | None = None
    sync: SyncConfig = field(default_factory=SyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    check: CheckConfig = field(default_factory=CheckConfig)


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a dataclass from nested mappings.  Raises :class:`ConfigError` for an unknown key (with the nearest known one), a missing key or
    a value of the wrong type, each with its full path."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {_join(path, near[0])}?" if near else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown key {_join(path, str(key))}{hint}")
    built: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], _join(path, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)} is not set; give it in the recipe or on the command line")
    return cls(**built)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _convert(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, path)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0] if len(errors) == 1 else f"{path}={value!r} fits none of {', '.join(_name(a) for a in args)}")
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}={value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a group of settings ({', '.join(f.name for f in dataclasses.fields(kind))})")
        return from_mapping(kind, value, path)  # type: ignore[arg-type]
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r} must be a list, e.g. '{path}=[{value}]'")
        return [_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a mapping")
        return {str(k): _convert(args[1], v, _join(path, str(k))) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r} must be {_name(kind)}, not {type(value).__name__}")
    return value


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))
