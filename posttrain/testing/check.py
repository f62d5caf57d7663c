"""Checks for a term of your own: what every term must satisfy, as functions that raise :class:`CheckFailed` with the reason.

``check_term(MyMask(c=2.0))`` is all most terms need; ``check_parity`` compares an objective with a formula of yours through autograd, and
``check_slicing`` holds its gradient against the micro-batches.  CPU, float64, no model, no engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import random
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.loss import advantage, aggregate, likelihood, reference
from posttrain.loss.unified import COUPLINGS, Objective, Stream, declared
from posttrain.loss.value import Towards
from posttrain.loss.view import Metrics, TokenView
from posttrain.records import Row, TokenBatch

ROLES = ("likelihood", "reference", "advantage", "mask", "aggregation", "regularizer")
COLUMNS = ("old", "behaviour", "base", "teacher")


class CheckFailed(AssertionError):
    """A term or objective breaks a rule; the message says which and on what."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckFailed(message)


def example_batch(
    seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64, fresh: bool = False, contexts: Iterable[str] = ()
) -> TokenBatch:
    """Nine ragged sequences with everything a term may read: groups of 4, 2 and 2, a preference pair inside each two, tool tokens in the
    middle, a sequence nothing is learnt from, truncated ones, a demonstration, token weights, the rewards reward and label (0 to 1) and the comparisons
    judge/against/NAME with every other answer of a group, and the columns
    current, old, behaviour, base, teacher, value, entropy and collision.

    ``spread`` is the standard deviation of the log-ratios.  For every one of ``contexts`` three more sequences are scored under it; for ``without_thought``
    they are the given words that then stand behind every answer, by group.
    """
    rng, more = random.Random(seed), random.Random(seed + 1000)
    contexts = sorted(contexts)
    rows, words = [], 2 * ("without_thought" in contexts)
    for i in range(8):
        prompt, answer = rng.randint(1, 3), rng.randint(2, 6)
        length = prompt + answer
        sources = ["prompt"] * prompt + ["policy"] * answer
        if answer >= 4:
            sources[prompt + 1] = "tool"
        sources += ["tool"] * words
        length += words
        current = [math.nan] * prompt + [-3.0 * rng.random() - 0.01 for _ in range(answer + words)]
        sampled = [s == "policy" for s in sources]
        columns = {n: [c + rng.gauss(0.0, spread) if on else math.nan for c, on in zip(current, sampled, strict=True)] for n in COLUMNS}
        columns |= {n: [more.random() if on else math.nan for on in sampled] for n in ("entropy", "value")}
        # between all that is left on one other token and nothing of it on any
        columns["collision"] = [math.log(math.exp(2 * c) + 0.3 * (1 - math.exp(c)) ** 2) if on else math.nan for c, on in zip(current, sampled, strict=True)]
        rows.append(
            Row(
                ids=[rng.randrange(11) for _ in range(length)],
                sources=sources,
                trainable=[i != 5 and on for on in sampled],
                logps={"current": [-1.0 if math.isnan(c) else c for c in current], **columns},
                advantage=[rng.choice([-1.0, 1.0]) * (0.2 + rng.random()) for _ in range(length)] if i else 0.0,
                weight=[0.5 + rng.random() for _ in range(length)],
                group=("a", "a", "a", "a", "b", "b", "c", "c")[i],
                pair=i // 2,
                side="chosen" if i % 2 == 0 else "rejected",
                finish=("stop", "length")[i % 3 == 1],
                rewards={"reward": (i * 5 % 7) / 3 - 0.5, "label": (0.0, 1.0, 0.25, 1.0)[i % 4], **_compared(i, "aaaabbcc")},
                sample_id=f"sample {i}",
            )
        )
    for context, i in itertools.product(contexts, range(3)):
        n = rng.randint(2, 5)
        current = [math.nan] + [-3.0 * rng.random() - 0.01 for _ in range(n)]
        columns = {name: [c - rng.gauss(0.3, spread) for c in current] for name in COLUMNS}
        rows.append(
            Row(
                ids=[rng.randrange(11) for _ in range(n + 1)],
                sources=["prompt"] + ["tool" if context == "without_thought" else "policy"] * n,
                trainable=[False] + [True] * n,
                group="abc"[i] if context == "without_thought" else None,
                logps={"current": [-1.0, *current[1:]], **columns},
                context=context,
                sample_id=f"{context} {i}",
            )
        )
    rows.append(Row(ids=[1, 2, 3], sources=["prompt", "demo", "demo"], logps={"current": [-1.0, -0.5, -2.0]}, sample_id="a demonstration"))
    return TokenBatch.from_sequences(rows, progress=0.25, fresh=fresh, dtype=dtype)


def _compared(i: int, groups: str) -> dict[str, float]:
    """Made-up probabilities of winning, those of two answers adding up to 1."""
    won = {k: (0.1 + (i + k) % 4 / 5 if i < k else 0.9 - (i + k) % 4 / 5) for k in range(len(groups)) if k != i and groups[k] == groups[i]}
    return {f"judge/against/sample {k}": p for k, p in won.items()}


def role_of(term: Any) -> str:
    """Which of the six roles a term plays, from the method it has; ``gate`` (it says ``uses_demos``) and ``reward`` (any other function) are no terms of
    the loss.  Raises :class:`CheckFailed` when it is none of these."""
    methods = {"factor": "mask", "log_factor": "mask", "derivative": "likelihood", "values": "advantage", "coefficient": "aggregation"}
    methods |= {"gradient": "regularizer", "column": "regularizer", "log_ratio": "reference"}
    for method, role in methods.items():
        if hasattr(term, method):
            return role
    if callable(term):
        return "gate" if hasattr(term, "uses_demos") else "reward"
    raise CheckFailed(f"{type(term).__name__} has none of the methods {', '.join(methods)}, so it is no term")


def objective_with(term: Any) -> Objective:
    """A plain objective (ratio to old, advantage column, token mean; of a scalar head: towards the advantage column) with one of its words replaced by
    ``term``."""
    words: dict[str, Any] = {
        "likelihood": likelihood.Token(),
        "reference": reference.Named("old"),
        "advantage": advantage.Column(),
        "aggregation": aggregate.TokenMean(),
    }
    role = role_of(term)
    if declared(term, "head") == "scalar":
        words |= {"likelihood": likelihood.Score(), "reference": reference.Current(), "advantage": Towards("squared", None)}
    if role in words:
        words[role] = term
    stream = Stream(source=("policy",), **words, masks={"term": term} if role == "mask" else {})
    return Objective({"rollouts": stream}, {"term": term} if role == "regularizer" else {})


def _probes(objective: Objective, batch: TokenBatch) -> dict[str, Tensor]:
    """Stand-ins for the full-vocabulary columns an objective asks for."""
    return {n: torch.linspace(0.1, 2.0 + i, batch.num_tokens, dtype=torch.float64) for i, n in enumerate(sorted(objective.needs.columns))}


def _output(objective: Objective, batch: TokenBatch, columns: Mapping[str, Tensor] | None = None, weights: Tensor | None = None) -> Tensor:
    """Gradient of the loss with respect to every log-prob and every full-vocabulary column, ``[N, 1 + columns]``."""
    return _run(objective, batch, columns, weights)[0]


def _run(
    objective: Objective, batch: TokenBatch, columns: Mapping[str, Tensor] | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    logp = batch.logps["current"].detach().clone().requires_grad_()
    probes = _probes(objective, batch) if columns is None else columns
    leaves = {n: c.detach().clone().requires_grad_() for n, c in probes.items()}
    out = objective(batch, logp, leaves, weights)
    wanted = [logp, *(leaves[n] for n in sorted(leaves))]
    grads = torch.autograd.grad(out.loss, wanted, allow_unused=True)
    return torch.stack(
        [torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip(wanted, grads, strict=True)], dim=1
    ), out.metrics


def check_parity(objective: Objective, batch: TokenBatch, value: Callable[[Tensor], Tensor], rtol: float = 1e-9) -> None:
    """``objective.weights(batch)`` must equal autograd's derivative of ``value(logp)``, the published objective to be *maximised*.

    ``value`` takes the current log-probs ``[N]`` with gradient and returns a scalar.  Use float64.
    """
    logp = batch.logps["current"].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(logp), logp)
    got = objective.weights(batch, logp)
    scale = float(expected.abs().max())
    _require(scale > 0, "the published objective has gradient 0 on this batch, so nothing was compared")
    error = (got - expected).abs()
    where = int(error.argmax())
    _require(
        float(error[where]) <= rtol * scale,
        f"column {where} (sample {batch.sample_ids[int(batch.seq[where])]!r}): the weight is {float(got[where]):.12g}, autograd of the "
        f"formula gives {float(expected[where]):.12g}",
    )


def check_slicing(objective: Objective, batch: TokenBatch, slices: Iterable[Sequence[int]] | None = None, rtol: float = 1e-12) -> None:
    """The gradient and the metrics must not depend on how the step is cut into micro-batches.

    ``slices``: lists of sequence indices; by default every coupled set the objective declares is a slice, every other sequence its own.  A
    coupled set that is cut takes the two-pass path, as in a run.
    """
    batch = batch.replace(totals=objective.totals(batch))
    needs = objective.needs
    parts = [list(s) for s in slices] if slices is not None else _atoms(batch, needs.keep_whole or "token")
    _require(sorted(i for p in parts for i in p) == list(range(batch.num_sequences)), "the slices must hold every sequence exactly once")
    cut = needs.keep_whole is not None and not _whole(batch, parts, needs.keep_whole)
    weights, first_pass = objective.weigh(batch) if cut else (None, {})
    columns = _probes(objective, batch)
    whole, expected = _run(objective, batch)
    added: dict[str, tuple[float, float]] = {}
    for part in parts:
        here = batch.columns_of(part)
        try:
            got, metrics = _run(
                objective, batch.take(part), {n: c[here] for n, c in columns.items()}, None if weights is None else weights[here]
            )
        except ValueError as error:
            raise CheckFailed(f"sequences {part} alone: {error}") from error
        for key, (total, count) in metrics.items():
            before = added.get(key, (0.0, 0.0))
            added[key] = (before[0] + total, before[1] + count)
        _close(
            got,
            whole[here],
            f"the gradient depends on the slicing (sequences {part} alone); a term that reads more than its own sequence must declare "
            "coupling 'group' or 'batch' and live = True",
            rtol,
            float(whole.abs().max()),
        )
    for key, pair in {**added, **first_pass}.items():
        for got_number, number in zip(pair, expected[key], strict=True):
            same = math.isclose(got_number, number, rel_tol=1e-9, abs_tol=1e-9)
            _require(same, f"the metric {key} depends on the slicing: {pair} against {expected[key]}")
    lost = set(expected) - set(added) - set(first_pass)
    _require(not lost, f"slicing loses the metrics {sorted(lost)}")


def _whole(batch: TokenBatch, parts: Sequence[Sequence[int]], coupling: str) -> bool:
    return all(any(set(atom) <= set(part) for part in parts) for atom in _atoms(batch, coupling))


def _atoms(batch: TokenBatch, coupling: str) -> list[list[int]]:
    """The sets of sequences a slice may not cut under a coupling."""
    _require(coupling in COUPLINGS, f"coupling {coupling!r} does not exist; choose from {', '.join(COUPLINGS)}")
    if coupling == "batch":
        return [list(range(batch.num_sequences))]
    if coupling != "group":
        return [[i] for i in range(batch.num_sequences)]
    sets: list[set[int]] = [{i} for i in range(batch.num_sequences)]
    for codes in (batch.group.tolist(), batch.pair.tolist()):
        for code in set(codes) - {-1}:
            together = {i for i, c in enumerate(codes) if c == code}
            touched = [s for s in sets if s & together]
            sets = [s for s in sets if not s & together] + [set().union(*touched)]
    return sorted(sorted(s) for s in sets)


def check_term(term: Any, *also: Any, alternatives: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Everything a term must satisfy.  Raises :class:`CheckFailed` with the first rule it breaks.

    1. a number per token, finite where the stream has tokens, without gradient;  2. the same after pickling;  3. the order of the sequences
    is irrelevant;  4. the gradient does not depend on the micro-batches, given the declared ``coupling`` and ``live``;  5. the declared
    ``needs`` are those it reads;  6. every setting changes something;  7. log-ratios of +-100 give a finite result or a clear error;
    8. ``gradient`` is the derivative of ``penalty``, where a regulariser has both.  A gate or a reward is held to its own rules, those of
    ``posttrain.testing.stage``.

    ``also``: the same class with other settings, checked alike; rule 6 asks that a setting acts in one of them.  ``alternatives``: setting
    -> values to try in rule 6, where they cannot be guessed from the type.
    """
    if role_of(term) in ("gate", "reward"):
        from posttrain.testing.stage import check_gate, check_reward

        for each in (term, *also):
            (check_gate if role_of(each) == "gate" else check_reward)(each)
        return
    contexts = frozenset().union(*(declared(each, "contexts") for each in (term, *also)))
    spreads = ((0, 0.5), (1, 0.1), (2, 2.0), (3, 1.0), (4, 1.0))
    batches = [example_batch(seed, spread, contexts=contexts) for seed, spread in spreads]
    for each in (term, *also):
        objective, name = objective_with(each), type(each).__name__
        copy = objective_with(_pickled(each))
        for batch in batches:
            _check_values(each, objective, batch)
            expected = _output(objective, batch)
            _require(torch.equal(expected, _output(copy, batch)), f"{name} gives other numbers after pickling")
            order = list(range(batch.num_sequences))
            random.Random(7).shuffle(order)
            moved = objective.weights(batch.take(order))
            _close(moved, objective.weights(batch)[batch.columns_of(order)], f"{name} depends on the order of the sequences")
        check_slicing(objective, batches[2])
        _check_needs(each, objective, batches[0])
        _check_hostile(each, objective)
        if hasattr(each, "penalty"):
            _check_derivative(each, objective, batches[0])
    check_knobs([term, *also], batches, alternatives or {})


def _pickled(term: Any) -> Any:
    try:
        return pickle.loads(pickle.dumps(term))
    except Exception as error:
        raise CheckFailed(f"{type(term).__name__} cannot be pickled, so it cannot travel to a learner: {error}") from error


def _close(got: Tensor, expected: Tensor, message: str, rtol: float = 1e-12, scale: float | None = None) -> None:
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-300) if scale is None else scale
    error = float((got - expected).abs().max()) if expected.numel() else 0.0
    _require(error <= rtol * scale, f"{message} (largest difference {error:.3g})")


def _numbers(term: Any, view: TokenView) -> dict[str, Tensor]:
    """Everything the term computes on a view, by method."""
    role, signed = role_of(term), view.batch.advantage
    if role == "mask":
        return {m: getattr(term, m)(view, signed) for m in ("factor", "log_factor") if hasattr(term, m)}
    if role == "aggregation":
        kept = torch.ones_like(view.logp)
        return {"coefficient": term.coefficient(view, kept), "coefficient without masks": term.coefficient(view, None)}
    method = {"likelihood": "derivative", "reference": "log_ratio", "advantage": "values", "regularizer": "gradient"}[role]
    return {method: getattr(term, method)(view)} if hasattr(term, method) else {}


def _check_values(term: Any, objective: Objective, batch: TokenBatch) -> None:
    leaf = batch.logps["current"].clone().requires_grad_()
    view = objective.views(batch, leaf)["rollouts"]
    for method, values in _numbers(term, view).items():
        what = f"{type(term).__name__}.{method}"
        _require(isinstance(values, Tensor), f"{what} must return a tensor, not {type(values).__name__}")
        want = tuple(view.logp.shape)
        _require(values.shape == want, f"{what} has shape {tuple(values.shape)}; it must give one number per token, {want}")
        _require(values.is_floating_point(), f"{what} is {values.dtype}; return a floating-point tensor")
        _require(not values.requires_grad, f"{what} carries a gradient; terms are numbers: work on view.logp, which is detached")
        here = values[view.on]
        _require(not bool(torch.isnan(here).any()), f"{what} is NaN on a token of the stream")
        _require(method == "log_factor" or bool(torch.isfinite(here).all()), f"{what} is infinite on a token of the stream")
        _require(method != "factor" or bool((here >= 0).all()), f"{what} is negative; a mask is a factor of at least 0")
    for method, values in _numbers(term, view).items():
        again = _numbers(term, view)[method]
        _require(torch.equal(values[view.on], again[view.on]), f"{type(term).__name__}.{method} gives other numbers the second time")


def _check_needs(term: Any, objective: Objective, batch: TokenBatch) -> None:
    name, needs = type(term).__name__, frozenset(declared(term, "needs"))
    keep = needs | objective.needs.references | {"current"}
    lean = batch.replace(logps={k: v for k, v in batch.logps.items() if k in keep})
    try:
        objective.weights(lean)
    except ValueError as error:
        raise CheckFailed(f"{name} reads a log-prob column it does not declare in needs ({sorted(needs)}): {error}") from error
    for column in needs - {"self"}:
        view = objective.views(batch.replace(logps={k: v for k, v in batch.logps.items() if k != column}))["rollouts"]
        try:
            _numbers(term, view)
        except (ValueError, KeyError):
            continue
        raise CheckFailed(f"{name} declares needs={column!r} but gives its numbers without it")


def check_knobs(terms: Sequence[Any], batches: Sequence[TokenBatch], alternatives: Mapping[str, Sequence[Any]]) -> None:
    """Every field of the dataclass must change the weights, the loss, the declared needs or what is remembered: on some batch, for some other value, starting
    from one of ``terms``."""
    hints = typing.get_type_hints(type(terms[0])) if dataclasses.is_dataclass(terms[0]) else {}
    for spec in dataclasses.fields(terms[0]) if hints else ():
        tried: list[Any] = []
        if not any(_acts(term, spec.name, alternatives.get(spec.name), hints[spec.name], batches, tried) for term in terms):
            hint = f"it was tried with {tried}" if tried else "no other value could be guessed: pass alternatives"
            raise CheckFailed(f"{type(terms[0]).__name__}.{spec.name} changes nothing; {hint}")


def _acts(term: Any, name: str, values: Sequence[Any] | None, hint: Any, batches: Sequence[TokenBatch], tried: list[Any]) -> bool:
    was = [_fingerprint(objective_with(term), b) for b in batches]
    for value in values if values is not None else _guesses(getattr(term, name), hint):
        try:
            other = objective_with(dataclasses.replace(term, **{name: value}))
        except ValueError:
            if isinstance(value, bool):
                return True  # a switch that is refused here does act
            continue
        tried.append(value)
        if any(_differs(_fingerprint(other, b), before) for b, before in zip(batches, was, strict=True)):
            return True
    return False


def _fingerprint(objective: Objective, batch: TokenBatch) -> tuple[Any, Any]:
    """What is asked of the run and carried to the next step, and the gradient or the error."""
    try:
        return (objective.needs, objective.remember(batch) if objective.remembers else {}), _output(objective, batch)
    except (ValueError, FloatingPointError) as error:
        return (objective.needs, {}), str(error)


def _differs(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    if a[0] != b[0] or type(a[1]) is not type(b[1]):
        return True
    return a[1] != b[1] if isinstance(a[1], str) else a[1].shape != b[1].shape or not torch.equal(a[1], b[1])


def _guesses(value: Any, hint: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    choices = [c for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    if choices:
        return [c for c in choices if c != value]
    if isinstance(value, (int, float)):
        return [value * 0.5, value * 2.0 + 0.125, value + 1.0, 0.0]
    if isinstance(value, str):
        return [c for c in (*COLUMNS, "self") if c != value]
    return []


def _check_hostile(term: Any, objective: Objective) -> None:
    name = type(term).__name__
    read = sorted(objective.needs.references & set(COLUMNS)) or ["current"]
    for dtype, column, shift in itertools.product((torch.float32, torch.float64), read, (100.0, -100.0)):
        batch = example_batch(3, 0.3, dtype, contexts=objective.needs.contexts)
        hit = batch.logps[column].clone()
        where = int((batch.trainable & ~torch.isnan(hit)).nonzero()[2])
        hit[where] += shift
        batch = batch.with_logps(**{column: hit})
        try:
            view = objective.views(batch)["rollouts"]
            for method, values in _numbers(term, view).items():
                _require(not bool(torch.isnan(values[view.on]).any()), f"{name}.{method} is NaN when a log-ratio is {shift:g} in {dtype}")
            weights = objective.weights(batch)
        except (ValueError, FloatingPointError) as error:
            _require(len(str(error)) > 20, f"{name} fails without a message when a log-ratio is {shift:g}")
            continue
        _require(bool(torch.isfinite(weights).all()), f"{name} gives a weight that is not finite when a log-ratio is {shift:g}")


def _check_derivative(term: Any, objective: Objective, batch: TokenBatch) -> None:
    view = objective.views(batch)["rollouts"]
    leaf = view.logp.clone().requires_grad_()
    live = dataclasses.replace(view, logp=leaf)
    (expected,) = torch.autograd.grad(term.penalty(live)[view.on].sum(), leaf)
    _close(view.select(term.gradient(view)), expected, f"{type(term).__name__}.gradient is not the derivative of penalty", 1e-9)
