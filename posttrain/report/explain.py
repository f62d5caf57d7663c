"""The composed objective as an equation with every number, what it asks of the run, and which settings cannot act in it."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.advantage import Constant, Reward
from posttrain.config import RunConfig
from posttrain.loss.reference import number
from posttrain.loss.unified import Objective, Stream, declared
from posttrain.report.notes import Notes, source_of

COLUMN_NOTES = {
    "old": "the learner's own log-probs before the first update of a batch (free with one update per batch)",
    "behaviour": "the engine's log-probs as sampled (free: they come with the rollouts)",
    "base": "a frozen copy of the start, scored once per batch (with LoRA: the adapter switched off)",
    "teacher": "a teacher model, scored once per batch",
    "collision": "log sum_v p_v^2 of the policy itself over the whole vocabulary, without gradient, scored before each optimizer step",
}


@dataclass(frozen=True)
class RunFacts:
    """What decides whether a setting can act.

    ``updates_per_batch``: optimizer steps on each batch of experience.  ``group_size``: rollouts per prompt; ``None`` when nothing is sampled.

    ``max_staleness``: how many updates old a rollout may be.
    """

    updates_per_batch: int = 1
    group_size: int | None = None
    max_staleness: int = 0

    @property
    def on_policy(self) -> bool:
        return self.updates_per_batch == 1 and self.max_staleness == 0


def _facts(run: RunFacts | Mapping[str, Any] | None, facts: Mapping[str, Any]) -> RunFacts:
    known = {} if run is None else dict(run) if isinstance(run, Mapping) else dataclasses.asdict(run)
    return RunFacts(**{**known, **facts})


def facts_of(config: RunConfig) -> RunFacts:
    """The facts of a composed run."""
    sampled = config.rollout.kind == "vllm"
    return RunFacts(config.learner.updates_per_batch, config.rollout.n if sampled else None, config.rollout.max_staleness)


def explain(
    objective: Objective,
    advantage: Any = None,
    run: RunFacts | Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
    notes: Notes | None = None,
    **facts: Any,
) -> str:
    """The objective in plain text.  ``advantage`` is the estimator that fills the advantage column; ``run`` or keywords are :class:`RunFacts`;
    ``more`` are further settings that cannot act (:func:`idle_settings`); ``notes`` say where the loss comes from.

    Without any facts the last section is left out: nothing is known about the run.
    """
    lines = [_head(objective)]
    for name, stream in objective.streams.items():
        lines += ["", *_stream(name, stream)]
    for name, term in objective.regularizers.items():
        on = getattr(term, "streams", None)
        scale = _formula(getattr(term, "aggregation", None)) or "the stream's own aggregation"
        lines += ["", f"  {name}: {_formula(term)}", f"    on {', '.join(on) if on else 'every stream'}, summed with {scale}"]
    if advantage is not None:
        lines += ["", f"  A: {_short(advantage)}"]
    lines += [line for name, control in objective.controls.items() for line in ("", f"  coefficient {name}: follows {control.metric}, {_short(control)}")]
    lines += ["", "sources", *_sources(objective, notes)]
    lines += ["", "needs", *_needs(objective)]
    if run is not None or facts:
        idle = [*settings_that_cannot_act(objective, advantage, run, **facts), *more]
        lines += ["", "cannot act in this run" if idle else "every setting can act in this run", *(f"  - {line}" for line in idle)]
    return "\n".join(lines)


def equation(objective: Objective) -> list[str]:
    """The objective alone, in a few lines."""
    lines = [_head(objective)]
    lines += [f"  {name}: {_gradient(stream)}" for name, stream in objective.streams.items()]
    return lines + [f"  {name}: {_formula(term)}" for name, term in objective.regularizers.items()]


def _head(objective: Objective) -> str:
    streams = " + ".join(_title(n, s) for n, s in objective.streams.items())
    return f"{objective.name}: maximise J = {streams}" + "".join(f" - {name}" for name in objective.regularizers)


def _title(name: str, stream: Stream) -> str:
    return name if stream.coef == 1.0 else f"{number(stream.coef)} * {name}"


def _gradient(stream: Stream) -> str:
    factors = [_formula(stream.aggregation), *map(_formula, stream.masks.values()), _formula(stream.reference), _formula(stream.advantage)]
    return f"grad = {' * '.join(f for f in factors if f)} * {_formula(stream.likelihood) or 'grad l'}"


def _stream(name: str, stream: Stream) -> list[str]:
    which = {None: "", True: ", in a preference pair", False: ", not in a preference pair"}[stream.paired]
    which += f", {stream.side}" if stream.side else ""
    which += f", scored under {stream.context!r}" if stream.context else ""
    which += "" if _is_zero(stream.own_input) else f", read with a share {_number(stream.own_input)} of the model's own first choices"
    rows = {"likelihood": stream.likelihood, "reference": stream.reference, "advantage": stream.advantage}
    rows |= {f"mask {k}": m for k, m in stream.masks.items()} or {"mask": None}
    rows |= {"aggregation": stream.aggregation}
    width = max(map(len, rows))
    meaning = "l = r, the number of a scalar head" if declared(stream.likelihood, "head") == "scalar" else "l = log pi(token)"
    return [
        f"  {name}: sum over trainable tokens from {', '.join(stream.source)}{which}, {meaning}",
        f"    {_gradient(stream)}",
        *(f"    {label:<{width}}  {_short(term) if term is not None else 'none'}" for label, term in rows.items()),
    ]


def _sources(objective: Objective, notes: Notes | None) -> list[str]:
    """Where the loss comes from, what releases do otherwise, and where its terms come from."""
    lines = []
    if notes is not None:
        lines += [notes.about, *(f"https://arxiv.org/abs/{paper}" for paper in notes.papers)]
        lines += [f"run with: {notes.run_with}"] if notes.run_with else []
        lines += [f"releases: {notes.differences}"]
    streams = [term for stream in objective.streams.values() for term in stream.terms.values()]
    for term in dict.fromkeys(type(t) for t in [*streams, *objective.regularizers.values()]):
        if source := source_of(term):
            lines.append(f"{term.__name__}: {source}")
    return [f"  {each}" for line in lines if line for each in textwrap.wrap(line, 140, subsequent_indent="  ", break_long_words=False)]


def _formula(term: Any) -> str:
    if term is None:
        return ""
    return str(term.formula) if hasattr(term, "formula") else _short(term)


def _short(term: Any) -> str:
    """``Class(field=value, ...)``."""
    if not dataclasses.is_dataclass(term):
        return repr(term)
    values = ((f.name, getattr(term, f.name)) for f in dataclasses.fields(term))
    return f"{type(term).__name__}({', '.join(f'{k}={_number(v)}' for k, v in values)})"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _needs(objective: Objective) -> list[str]:
    needs = objective.needs
    lines = [f"  log-probs {name}: {COLUMN_NOTES.get(name, 'a named column of the batch')}" for name in sorted(needs.references)]
    lines += [f"  column {name}: over the whole vocabulary, with gradient, from the same forward" for name in sorted(needs.columns)]
    lines += ["  a first pass without gradient: the model's own choices, which it then reads"] if needs.own_input else []
    lines += [f"  context {name}: rows scored beside those that are learnt from" for name in sorted(needs.contexts)]
    if not lines:
        lines.append("  no second model and no recorded log-probs")
    if objective.remembers:
        lines.append("  memory: numbers carried from step to step, and in checkpoints")
    if any(getattr(s.advantage, "reads_column", False) for s in objective.streams.values()):
        filled = {"before": "returns, which a run with a critic fills", "marked": "labels of steps: set data.kind=steps"}
        lines.append(f"  the advantage column: {filled.get(needs.at or '', 'choose advantage=NAME')}")
    if "value" in needs.references:
        lines.append("  a critic: choose critic=value")
    whole = needs.keep_whole
    passes = (
        "one pass"
        if whole is None
        else f"one pass while every {'pair or ' if whole == 'group' else ''}{whole} fits in one micro-batch, else two"
    )
    lines.append(f"  coupling {needs.coupling}: {passes}")
    lines.append(f"  training temperature {needs.temperature:g}")
    return lines


def settings_that_cannot_act(
    objective: Objective, advantage: Any = None, run: RunFacts | Mapping[str, Any] | None = None, **facts: Any
) -> list[str]:
    """One line for every setting that cannot change anything in this run, saying why and what to do."""
    run = _facts(run, facts)
    lines: list[str] = []
    for name, stream in objective.streams.items():
        lines += _idle_in_stream(f"loss.streams.{name}", stream, run)
    for name, term in objective.regularizers.items():
        if _is_zero(term.coef):
            wants = sorted(declared(term, "needs") | ({declared(term, "column")} - {None}))
            cost = f", yet {', '.join(wants)} is still computed for its metric" if wants else ""
            lines.append(f"loss.regularizers.{name}.coef=0 adds nothing{cost}; set loss.regularizers.{name}=null to switch it off")
    reads = any(getattr(s.advantage, "reads_column", False) for s in objective.streams.values())
    if advantage is not None and not reads:
        needed = run.group_size is not None and not all(stream.paired for stream in objective.streams.values())  # it says which answers take part
        if not needed:
            lines.append("advantage: no stream of this loss reads the advantage column; set advantage=none")
        elif not isinstance(advantage, (Constant, Reward)):
            lines.append(
                "advantage: no stream of this loss reads the advantage column; set advantage=constant, or reward to leave out answers without one"
            )
    if advantage is not None and reads and run.group_size is not None:
        lines += _idle_in_advantage(advantage, run.group_size)
    return lines


def idle_settings(config: RunConfig) -> list[str]:
    """The same for settings beside the objective: each line says why the setting cannot act and what to do."""
    rollout, learner, evaluation = config.rollout, config.learner, config.eval
    sampled = rollout.kind == "vllm"
    evaluated = bool(evaluation.at_start or evaluation.at_end or evaluation.every)
    lines = []
    if not sampled and rollout.strategy is not None:
        lines.append("rollout.strategy: nothing is sampled with rollout=replay; set rollout.strategy=null")
    if not sampled and not evaluated and config.reward.fn:
        lines.append("reward: nothing is sampled and nothing is evaluated; set reward=none, or eval.at_end=true")
    if not sampled and config.advantage is not None and config.data.kind != "lists":
        lines.append(f"advantage: rewards are compared of sampled answers and of data.kind=lists, and data.kind is {config.data.kind}; set advantage=none")
    if not config.reward.fn and config.reward.weights:
        lines.append("reward.weights: there is no reward; choose reward=NAME")
    asked = getattr(config.mixture.gate, "uses_demos", False) or getattr(config.rollout.strategy, "needs_demos", False)
    if config.data.demos is not None and not asked:
        lines.append("data.demos: no gate asks for demonstrations, nor does rollout.strategy; set mixture.gate, or data.demos=null")
    if learner.schedule == "constant" and learner.min_lr_ratio > 0:
        lines.append(f"learner.min_lr_ratio={learner.min_lr_ratio:g}: learner.schedule=constant never comes down; choose linear or cosine")
    if learner.lr == 0:
        lines.append("learner.lr=0: no weight can move; set learner.lr")
    if evaluated and evaluation.n > 1 and evaluation.temperature == 0:
        lines.append(f"eval.n={evaluation.n}: at eval.temperature=0 every answer to a prompt is the same; set eval.n=1 or a temperature")
    if evaluation.every > config.steps and not (evaluation.at_start or evaluation.at_end):
        lines.append(
            f"eval.every={evaluation.every}: the run has {config.steps} steps, so nothing is evaluated; lower it or set eval.at_end=true"
        )
    if sampled and config.data.loss_on != "assistant" and config.data.demos is None:
        lines.append(f"data.loss_on={config.data.loss_on}: sampled answers are learnt from whole; it concerns given answers only")
    needs = config.loss.needs
    if config.model.teacher is not None and not any("teacher" in name for name in needs.references | needs.columns):
        lines.append("model.teacher: nothing in this loss compares with a teacher; set model.teacher=null")
    if config.model.base is not None and not any("base" in name for name in needs.references | needs.columns):
        lines.append("model.base: nothing in this loss compares with a base; set model.base=null")
    if learner.base_mix != 1 and not learner.base_every:
        lines.append(f"learner.base_mix={learner.base_mix:g}: learner.base_every=0 never moves the base; set learner.base_every")
    if config.model.path is not None and config.model.tiny is not None:
        lines.append("model.tiny: model.path is set, so nothing is created on the spot")
    return lines


def _idle_in_stream(path: str, stream: Stream, run: RunFacts) -> list[str]:
    lines = []
    if _is_zero(stream.coef):
        lines.append(f"{path}.coef=0 switches the stream off; only regularisers act on its tokens")
    if run.on_policy:
        for key, mask in stream.masks.items():
            if {getattr(mask, "to", None), getattr(mask, "over", None)} == {"old", "self"}:
                lines.append(
                    f"{path}.masks.{key}: with one update per batch and no staleness pi/pi_old is exactly 1, so nothing is ever masked; raise "
                    f"learner.updates_per_batch or set {path}.masks.{key}=null"
                )
        if getattr(stream.reference, "to", None) == "old":
            lines.append(
                f"{path}.reference: with one update per batch and no staleness pi/pi_old is exactly 1: the same as reference.Current"
            )
            if getattr(stream.likelihood, "ratio", "token") != "token":
                lines.append(f"{path}.likelihood.ratio={stream.likelihood.ratio}: every ratio is 1, so its granularity does not matter")
    for key, mask in stream.masks.items():
        for bound in ("max", "c", "high"):
            value = getattr(mask, bound, None)
            lower = getattr(mask, "low", getattr(mask, "min", None))
            open_below = lower is None or lower == (1 if bound == "high" else 0)
            if isinstance(value, (int, float)) and math.isinf(value) and open_below and getattr(mask, "apply", "cap") == "cap":
                lines.append(f"{path}.masks.{key}: its range is unbounded, so nothing is ever masked; set {path}.masks.{key}=null")
    if getattr(stream.advantage, "debias", False) and not stream.advantage.label_smoothing:
        lines.append(f"{path}.advantage.debias: there is nothing to undo while label_smoothing is 0")
    score = getattr(stream.advantage, "score", "log_ratio")
    if not score.startswith("log_ratio") and stream.advantage.to != "base":
        lines.append(f"{path}.advantage.to={stream.advantage.to}: score={score} compares with no reference")
    return lines


def _idle_in_advantage(advantage: Any, group_size: int) -> list[str]:
    lines = []
    for step in getattr(advantage, "steps", {}).values():
        lines += _idle_in_advantage(step, group_size)
    center, scale = getattr(advantage, "center", None), getattr(advantage, "scale", None)
    if scale is None:
        return lines
    if group_size == 1:
        effect = {"zero": "every advantage is 0 and nothing is learnt", "raw": "the advantage is the raw reward", "error": "the run stops"}
        lines.append(
            f"advantage.center={center}, scale={scale}: rollout.n=1 leaves no group to compare with; {effect[advantage.singleton]}; raise rollout.n"
        )
    elif advantage.singleton == "raw":
        lines.append(f"advantage.singleton=raw: groups have {group_size} members, so it acts only where all rewards but one failed")
    defaults = {f.name: f.default for f in dataclasses.fields(advantage)}
    for name in ("ddof", "eps", "eps_on"):
        if scale == "none" and getattr(advantage, name) != defaults[name]:
            lines.append(f"advantage.{name}={getattr(advantage, name)}: nothing is divided by a deviation while scale=none")
    if group_size == 2 and scale == "loo_std":
        lines.append("advantage.scale=loo_std: one peer has no deviation, so nothing is scaled; raise rollout.n above 2")
    return lines


def _is_zero(coef: Any) -> bool:
    return not callable(coef) and float(coef) == 0.0
