"""The one loss: every objective is a set of streams, each a quadruple of terms, plus regularisers.

Any objective that depends on the policy only through the log-probabilities ``l[t]`` of given tokens has the gradient
``sum_t w[t] * grad l[t]`` with ``w[t] = dJ/dl[t]`` a number.  Per stream the weight is a product of independent choices

    w = aggregate * token_weight * product(masks) * likelihood' * (pi / pi_ref) * A

and the loss is ``-sum_t sg(w[t]) * l[t]``; full-vocabulary regularisers (entropy, full KL) add their own columns.  Everything but ``l`` is
computed without gradient.  The loss is a plain sum: denominators come from ``Totals`` over the whole optimizer step, so slicing the batch
cannot change the gradient.  The *value* of the loss is comparable within a method only; ``objective`` and ``nll`` are reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from posttrain.loss.view import Level, Metrics, TokenView, memory_key
from posttrain.mixture.control import Control, controls_in, now
from posttrain.mixture.schedule import Scalar
from posttrain.records import Source, StreamTotals, TokenBatch, Totals

COUPLINGS = ("token", "sequence", "group", "batch")


class Term(Protocol):
    """What every term declares.  All have defaults in :func:`declared`; a term states only what differs.

    ``coupling``: ``token`` | ``sequence`` | ``group`` | ``batch``, the widest set of tokens one of its numbers depends on.
    ``live``: whether those numbers can be known only when the weights are formed: they read the *current* log-probabilities, or count over
    a group or the batch.  Live and coupled wider than a sequence means: keep the set whole, or take two passes. ``needs``: reference
    columns it reads.  ``formula``: its factor as text, for ``posttrain explain``.  ``contexts``: scoring contexts whose rows it reads beside
    the stream's own (``TokenView.beside``).  ``head``: ``scalar`` where it reads the number of a scalar head.
    ``remembers``: whether ``remember(view) -> {name: number}`` says what it carries on to the next
    step, read back with ``TokenView.recall``; such a term is live and coupled over the batch.  ``fits(stream)`` (optional) raises ``ValueError`` when the other
    terms of its stream contradict it.
    """


class Likelihood(Protocol):
    """``derivative(view) -> [N]``: d f(l) / d l, and the granularity ``ratio`` that reference and masks read."""

    ratio: Level
    temperature: float

    def derivative(self, view: TokenView) -> Tensor: ...


class Reference(Protocol):
    """``log_ratio(view) -> [N]``: log(pi / pi_ref), the importance factor on the weight.  ``objective(view, weight) -> [N]`` (optional)
    says what a token adds to the reported objective; the default is its weight, right for surrogates linear in the ratio."""

    def log_ratio(self, view: TokenView) -> Tensor: ...


class Advantage(Protocol):
    """``values(view) -> [N]``: how good it was; above 0 raises the probability.  ``objective(view) -> Metrics`` (optional) replaces the
    reported objective by the term's own numbers; ``metrics(view) -> Metrics`` (optional) adds some."""

    def values(self, view: TokenView) -> Tensor: ...


class Mask(Protocol):
    """``factor(view, advantage) -> [N]``: a non-negative detached factor.  A mask whose factor can be tiny against a huge ratio gives
    ``log_factor`` instead, so that the product is formed in log space and cannot overflow."""

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor: ...


class Aggregation(Protocol):
    """``coefficient(view, kept) -> [N]``: the constant a token's weight is multiplied by.  ``kept`` is the product of the masks ``[N]``, or
    ``None`` for a regulariser, which no mask touches."""

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor: ...


class Regularizer(Protocol):
    """An additive term.  Token form: ``gradient(view) -> [N]`` is d penalty / d l; optional are ``value(view)`` for the metric and
    ``penalty(view)``, whose sum ``gradient`` differentiates, for the gradient checker.  Distribution form: ``column`` names a
    differentiable full-vocabulary column the forward must deliver (``entropy``, ``kl_reverse:base``, ...) and ``sign`` is +1 for a penalty,
    -1 for a bonus.  Where the penalty is not the column itself, ``of_column(view, logp, column) -> [N]`` gives it, with gradient; it may read other
    tokens of the same sequence (coupling ``sequence``)."""

    coef: Scalar


def declared(term: Any, name: str) -> Any:
    """A term's declaration, or its default: coupling ``token``, not live, no reference columns, no other contexts."""
    defaults = {"coupling": "token", "live": False, "needs": frozenset(), "column": None, "contexts": frozenset(), "remembers": False, "head": "lm"}
    return getattr(term, name, defaults[name])


@dataclass(frozen=True)
class Stream:
    """One kind of data and the four words that say how it is learnt from.

    ``source`` selects tokens by where they came from; ``paired`` restricts to sequences inside (True) or outside (False) a preference pair,
    ``side`` to the ``chosen`` or the ``rejected`` ones, ``context`` to those scored under that context (the rows' own one has no name).
    ``coef`` scales the whole stream and may be a schedule.  ``own_input``: between 0 and 1, a number or a schedule; where a token of the stream is read as the
    context of the next ones, the share of the embedding of what the model itself held most probable there, by a first pass without gradient over the
    given tokens.  Prompts are read as they are.
    """

    source: tuple[str, ...]
    likelihood: Any
    reference: Any
    advantage: Any
    aggregation: Any
    masks: Mapping[str, Any] = field(default_factory=dict)
    coef: Scalar = 1.0
    paired: bool | None = None
    side: Literal["chosen", "rejected"] | None = None
    context: str = ""
    own_input: Scalar = 0.0

    def __post_init__(self) -> None:
        if not callable(self.own_input) and not 0 <= self.own_input <= 1:
            raise ValueError(f"stream own_input={self.own_input} is the share of the model's own choice in what it reads, between 0 and 1")
        if self.side not in (None, "chosen", "rejected"):
            raise ValueError(f"stream side={self.side!r} does not exist; choose chosen or rejected, or null for both")
        if self.side is not None and self.paired is False:
            raise ValueError(f"stream side={self.side} is empty with paired=false: only answers in a pair have a side")
        source = (self.source,) if isinstance(self.source, str) else tuple(self.source)
        unknown = [s for s in source if s not in Source.__members__]
        if unknown:
            raise ValueError(f"stream source {unknown[0]!r} does not exist; choose from {', '.join(Source.__members__)}")
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "masks", {k: m for k, m in dict(self.masks).items() if m is not None})
        for key, term in self.terms.items():
            _check_head(self.likelihood, key, term)
            if hasattr(term, "fits"):
                term.fits(self)

    @property
    def terms(self) -> dict[str, Any]:
        four = {"likelihood": self.likelihood, "reference": self.reference, "advantage": self.advantage}
        return {**four, **{f"masks.{k}": m for k, m in self.masks.items()}, "aggregation": self.aggregation}


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the run.  ``references``: log-prob columns to fill; ``columns``: differentiable full-vocabulary columns the
    forward must deliver; ``live`` with a coupling wider than ``sequence`` means two passes whenever a coupled set is cut; ``contexts``: rows
    to be scored beside those that are learnt from; ``head``: what the model answers with, ``lm`` log-probabilities or ``scalar`` one number
    per column, read ``at`` the columns its likelihood names; ``own_input``: the model reads its own choices too, which takes a first pass."""

    references: frozenset[str]
    columns: frozenset[str]
    coupling: str
    live: bool
    temperature: float
    contexts: frozenset[str] = frozenset()
    head: Literal["lm", "scalar"] = "lm"
    at: str | None = None
    own_input: bool = False

    @property
    def keep_whole(self) -> str | None:
        """What the packer should keep in one micro-batch: ``group``, ``batch`` or nothing."""
        return self.coupling if self.live and self.coupling in ("group", "batch") else None


@dataclass(frozen=True)
class LossOutput:
    """``loss``: scalar with gradient, to be summed over micro-batches and ranks.  ``metrics``: name -> (sum, count)."""

    loss: Tensor
    metrics: Metrics


@dataclass(frozen=True)
class Objective:
    """A composed objective.  Call it on a batch for the loss; ask it for :meth:`weights`, :meth:`totals` and :attr:`needs`."""

    streams: Mapping[str, Stream]
    regularizers: Mapping[str, Any] = field(default_factory=dict)
    name: str = "objective"

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", {k: s for k, s in dict(self.streams or {}).items() if s is not None})
        object.__setattr__(self, "regularizers", {k: r for k, r in dict(self.regularizers or {}).items() if r is not None})
        if not self.streams:
            raise ValueError(
                "an objective needs at least one stream; choose a loss with loss=NAME, or name the tokens to learn from under streams"
            )
        for key, term in self.regularizers.items():
            self._check_regularizer(key, term)
        for term in self._all_terms:
            if declared(term, "remembers") and not (declared(term, "coupling") == "batch" and declared(term, "live")):
                raise ValueError(f"{type(term).__name__} remembers, so it must see whole steps: declare coupling = 'batch' and live = True")
        self._check_memory()
        for control in self.controls.values():  # one name, two settings: an error now, not in the run
            if hasattr(control, "fits"):
                control.fits(self)
        heads = {(declared(s.likelihood, "head"), getattr(s.likelihood, "at", None)) for s in self.streams.values()}
        if len(heads) > 1:
            raise ValueError("all streams share one forward, so one head, read at one place: give all of them the same likelihood.Score, or none")
        if next(iter(heads))[0] == "scalar" and self.needs.columns:
            raise ValueError("a scalar head has no probabilities, so no full-vocabulary regulariser can act on it; remove it")
        if self.needs.own_input:
            self._check_own_input()
        temperatures = {s.likelihood.temperature for s in self.streams.values()}
        if len(temperatures) > 1:
            raise ValueError(f"all streams share one forward, so one training temperature; these differ: {sorted(temperatures)}")

    def _check_memory(self) -> None:
        """A term is remembered by its class and its stream, and only where the objective sees it."""
        for name, stream in self.streams.items():
            terms = [*stream.terms.values(), *(t for t in self.regularizers.values() if _applies(t, name))]
            kinds = [type(t).__name__ for t in terms if declared(t, "remembers")]
            twice = [kind for kind in kinds if kinds.count(kind) > 1]
            if twice:
                raise ValueError(
                    f"stream {name!r} has {twice[0]} more than once, and what they remember would be one: give them streams of their own, or "
                    "leave one out"
                )
        for term in self._all_terms:
            inner = [getattr(term, f.name) for f in fields(term)] if is_dataclass(term) else []
            hidden = [type(t).__name__ for t in inner if is_dataclass(t) and declared(t, "remembers")]
            if hidden and not declared(term, "remembers"):
                raise ValueError(
                    f"{type(term).__name__} holds {hidden[0]}, which remembers, and does not hand it on: its memory would never move; let it stand "
                    "by itself"
                )

    def _check_own_input(self) -> None:
        """Other log-probs than those of the pass that is differentiated hold where the given tokens are read."""
        needs = self.needs
        others = sorted(needs.references) + sorted(c for c in needs.columns if ":" in c)
        if needs.head != "lm" or others or needs.keep_whole or needs.contexts:
            what = "a scalar head" if needs.head != "lm" else repr(others[0]) if others else f"coupling {needs.coupling}" if needs.keep_whole else "other contexts"
            raise ValueError(
                f"objective {self.name!r}: own_input changes what the model reads in the pass that is learnt from, and {what} is computed where the given tokens are "
                "read; set own_input=0, or remove the term"
            )

    def _check_regularizer(self, key: str, term: Any) -> None:
        only = getattr(term, "streams", None)
        unknown = [name for name in only or () if name not in self.streams]
        if unknown:
            raise ValueError(f"regulariser {key!r} names the stream {unknown[0]!r}; the objective has {', '.join(self.streams)}")
        for stream_name, stream in self.streams.items():
            if _applies(term, stream_name):
                _check_head(stream.likelihood, f"regulariser {key!r}", term)
        if declared(term, "column") is None:
            return
        for name, stream in self.streams.items():
            aggregation = getattr(term, "aggregation", None) or stream.aggregation
            if _applies(term, name) and declared(aggregation, "coupling") == "group":
                raise ValueError(
                    f"regulariser {key!r} is not a function of the sampled log-probs, so it cannot follow the aggregation of stream "
                    f"{name!r}, "
                    f"{type(aggregation).__name__}, which must see whole groups; give the regulariser an aggregation of its own"
                )

    # -- declarations --------------------------------------------------------------------------------------------------
    @property
    def _all_terms(self) -> list[Any]:
        return [t for s in self.streams.values() for t in s.terms.values()] + list(self.regularizers.values())

    @property
    def needs(self) -> Needs:
        terms = self._all_terms
        references = frozenset().union(*(declared(t, "needs") for t in terms))
        columns = frozenset(c for t in self.regularizers.values() if (c := declared(t, "column")) is not None)
        live = [t for t in terms if declared(t, "live")]
        coupling = max((declared(t, "coupling") for t in live), key=COUPLINGS.index, default="token")
        contexts = frozenset().union(*(declared(t, "contexts") for t in terms))
        likelihoods = [s.likelihood for s in self.streams.values()]
        temperature, head, at = likelihoods[0].temperature, declared(likelihoods[0], "head"), getattr(likelihoods[0], "at", None)
        own_input = any(callable(s.own_input) or s.own_input > 0 for s in self.streams.values())
        return Needs(references - {"self"}, columns, coupling, bool(live), temperature, contexts, head, at, own_input)

    @property
    def remembers(self) -> bool:
        """Whether a term carries numbers from step to step: :meth:`remember` must then be called on every step."""
        return any(declared(t, "remembers") for t in self._all_terms)

    @property
    def controls(self) -> dict[str, Control]:
        """The coefficients that follow a metric, by name."""
        return controls_in({"streams": self.streams, "regularizers": self.regularizers})

    # -- counting ------------------------------------------------------------------------------------------------------
    def _select(self, batch: TokenBatch, stream: Stream) -> tuple[Tensor, Tensor]:
        """Tokens ``on`` [N] and member sequences [S] of a stream."""
        codes = torch.tensor([int(Source[s]) for s in stream.source], device=batch.source.device)
        of_source = torch.isin(batch.source, codes)
        if stream.paired is not None:
            paired = (batch.pair >= 0)[batch.seq]
            of_source = of_source & (paired if stream.paired else ~paired)
        if stream.side is not None:
            of_source = of_source & (batch.side == (1 if stream.side == "chosen" else -1))[batch.seq]
        if any(context != stream.context for context in batch.contexts):
            own = [context == stream.context for context in batch.contexts]
            of_source = of_source & torch.tensor(own, device=batch.source.device)[batch.seq]
        member = torch.zeros(batch.num_sequences, dtype=torch.bool, device=batch.source.device)
        member[batch.seq[of_source]] = True
        return of_source & batch.trainable, member

    def totals(self, batch: TokenBatch) -> Totals:
        """The denominators, from the batch of a *whole* optimizer step (all micro-batches, all ranks)."""
        out: dict[str, StreamTotals] = {}
        for name, stream in self.streams.items():
            on, member = self._select(batch, stream)
            groups, pairs = batch.group[member & (batch.group >= 0)], batch.pair[member & (batch.pair >= 0)]
            weight = torch.where(on, batch.weight, torch.zeros_like(batch.weight)).double()
            of_sequence, lengths = (weight.new_zeros(batch.num_sequences).index_add(0, batch.seq, x) for x in (weight, on.double()))
            out[name] = StreamTotals(
                tokens=int(on.sum()),
                sequences=int(member.sum()),
                groups=len(groups.unique()),
                pairs=len(pairs.unique()),
                weight=float(weight.sum()),
                sequence_weight=float((of_sequence / lengths.clamp(min=1)).sum()),
            )
        return out

    def views(self, batch: TokenBatch, logp: Tensor | None = None) -> dict[str, TokenView]:
        """One :class:`TokenView` per stream.  ``logp`` defaults to the batch's ``current`` column."""
        logp = self._current(batch, logp).detach()
        totals = batch.totals if batch.totals is not None else self.totals(batch)
        views = {}
        for name, stream in self.streams.items():
            on, member = self._select(batch, stream)
            if name not in totals:
                raise ValueError(
                    f"the batch's totals do not know stream {name!r} (they hold {sorted(totals)}); compute them with objective.totals"
                )
            views[name] = TokenView(batch, logp, on, member, totals[name], stream.likelihood.ratio, name, totals)
        return views

    @staticmethod
    def _current(batch: TokenBatch, logp: Tensor | None) -> Tensor:
        if logp is None:
            if "current" not in batch.logps:
                raise ValueError("no current log-probs: pass logp=, or build the batch with a log-prob column named 'current'")
            logp = batch.logps["current"]
        return logp if logp.dtype in (torch.float32, torch.float64) else logp.float()

    # -- the numbers ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def weights(self, batch: TokenBatch, logp: Tensor | None = None) -> Tensor:
        """``dJ/dlogp`` of every token, ``[N]``.  Full-vocabulary regularisers are not in it: they are not functions of the sampled
        log-probs."""
        return self.weigh(batch, logp)[0]

    @torch.no_grad()
    def weigh(self, batch: TokenBatch, logp: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """:meth:`weights` together with the metrics of the batch: the first of two passes.

        The second pass, ``objective(micro, logp, weights=...)``, repeats only what each micro-batch can know, so over a step the metrics
        are those of the micro-batches, added up, then overwritten by these: ``{**added_up, **metrics}``.
        """
        return self._weights(batch, self.views(batch, logp))

    @torch.no_grad()
    def remember(self, batch: TokenBatch, logp: Tensor | None = None) -> dict[str, float]:
        """``memory`` for the next step's batch, from the batch of this *whole* step: what its terms carry on, and the rest of its own."""
        out = dict(batch.memory)
        for name, view in self.views(batch, logp).items():
            terms = [*self.streams[name].terms.values(), *(t for t in self.regularizers.values() if _applies(t, name))]
            for term in (t for t in terms if declared(t, "remembers")):
                out |= {memory_key(name, term, key): float(value) for key, value in term.remember(view).items()}
        return out

    def own_input(self, batch: TokenBatch) -> Tensor | None:
        """``own_input`` of every token's stream, ``[N]``; None where it is 0 everywhere and for every rank."""
        shares = {name: now(stream.own_input, batch.progress, batch.memory) for name, stream in self.streams.items()}
        outside = [name for name, share in shares.items() if not 0 <= share <= 1]
        if outside:
            raise ValueError(f"stream {outside[0]!r}: own_input is {shares[outside[0]]:g} at progress {batch.progress:g}; it is a share, between 0 and 1")
        if not any(shares.values()):
            return None
        out = torch.zeros(batch.num_tokens, dtype=torch.float64, device=batch.source.device)
        for name, stream in self.streams.items():
            out = torch.where(self._select(batch, stream)[0], shares[name], out)
        return out

    def memory_for_parts(self, memory: Mapping[str, float]) -> dict[str, float]:
        """``memory`` without what remembering terms keep: it is read where the whole step is weighed, and may grow with the data."""
        own = [memory_key(name, term, "") for name, stream in self.streams.items() for term in stream.terms.values() if declared(term, "remembers")]
        own += [memory_key(name, term, "") for name in self.streams for term in self.regularizers.values() if declared(term, "remembers")]
        return {key: value for key, value in memory.items() if not key.startswith(tuple(own))}

    def _weights(self, batch: TokenBatch, views: Mapping[str, TokenView]) -> tuple[Tensor, Metrics]:
        metrics: Metrics = {}
        total: Tensor | None = None
        for name, stream in self.streams.items():
            view = views[name]
            weight = self._stream_weight(name, stream, view, metrics)
            _require_finite(weight, view, f"stream {name!r}")
            for key, term in self.regularizers.items():
                if not (hasattr(term, "gradient") and _applies(term, name)):
                    continue
                if (coef := view.at(term.coef)) != 0:
                    penalty = coef * view.select(term.gradient(view)) * _regularizer_scale(term, stream, view)
                    _require_finite(penalty, view, f"regulariser {key!r} on stream {name!r}")
                    weight = weight - penalty
                if hasattr(term, "value"):
                    metrics[f"{name}/{key}"] = _mean(view, term.value(view))
                if hasattr(term, "metrics"):
                    metrics.update({f"{name}/{key}/{k}": v for k, v in term.metrics(view).items()})
            total = weight if total is None else total + weight
        assert total is not None
        return total, metrics

    def _stream_weight(self, name: str, stream: Stream, view: TokenView, metrics: Metrics) -> Tensor:
        advantage = view.select(stream.advantage.values(view))
        log_kept = torch.zeros_like(view.logp)
        for key, mask in stream.masks.items():
            log_factor = mask.log_factor(view, advantage) if hasattr(mask, "log_factor") else torch.log(mask.factor(view, advantage))
            log_factor = view.select(log_factor)
            if bool(torch.isnan(log_factor).any()):
                where = int(torch.isnan(log_factor).nonzero()[0])
                raise FloatingPointError(f"stream {name!r}: mask {key!r} gave NaN or a negative factor at {_whereabouts(view, where)}")
            log_kept = log_kept + log_factor
            metrics[f"{name}/{key}/masked"] = (float((view.on & (log_factor == -torch.inf)).sum()), float(view.on.sum()))
            metrics[f"{name}/{key}/factor"] = _mean(view, torch.exp(log_factor))
        kept = torch.exp(log_kept)
        log_ratio = view.select(stream.reference.log_ratio(view))
        live = view.on & (log_kept > -torch.inf) & (advantage != 0)
        log_scale = torch.where(live, log_kept + log_ratio + torch.log(advantage.abs()), -torch.inf)
        core = torch.sign(advantage) * torch.exp(log_scale) * view.select(stream.likelihood.derivative(view))
        coefficient = view.select(stream.aggregation.coefficient(view, kept))
        weight = view.at(stream.coef) * coefficient * view.select(view.batch.weight.to(core.dtype)) * core
        weight = view.select(weight)
        metrics[f"{name}/tokens"] = (float(view.on.sum()), 0.0)
        metrics |= _level(name, stream, view)
        metrics[f"{name}/advantage_abs"] = _mean(view, advantage.abs())
        metrics[f"{name}/zero_weight"] = (float((view.on & (weight == 0)).sum()), float(view.on.sum()))
        if hasattr(stream.advantage, "metrics"):
            metrics.update({f"{name}/{k}": v for k, v in stream.advantage.metrics(view).items()})
        if hasattr(stream.advantage, "objective"):
            metrics.update({f"{name}/{k}": v for k, v in stream.advantage.objective(view).items()})
        else:
            own = getattr(stream.reference, "objective", None)
            metrics[f"{name}/objective"] = (float((own(view, weight) if own else weight).sum()), 0.0)
        return weight

    def __call__(
        self,
        batch: TokenBatch,
        logp: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> LossOutput:
        """The loss of one micro-batch.

        ``logp`` ``[N]`` carries the gradient (default: the ``current`` column).  ``columns``: the full-vocabulary columns of :attr:`needs`,
        each ``[N]`` with gradient.  ``weights`` ``[N]``: token weights already computed on the whole step (second of two passes).
        """
        columns = columns or {}
        logp = self._current(batch, logp)
        with torch.no_grad():
            views = self.views(batch, logp)
            own, metrics = self._weights(batch, views) if weights is None else (weights.to(logp.dtype), self._report(views))
        picked = own != 0
        loss = -(own[picked] * logp[picked]).sum() if bool(picked.any()) else logp.sum() * 0.0
        for key, term in self.regularizers.items():
            name = declared(term, "column")
            if name is None:
                continue
            if name not in columns:
                raise ValueError(f"regulariser {key!r} needs the column {name!r} from the forward; got {sorted(columns) or 'none'}")
            for stream_name, stream in self.streams.items():
                if not _applies(term, stream_name):
                    continue
                view = views[stream_name]
                with torch.no_grad():
                    scale = view.at(term.coef) * term.sign * _regularizer_scale(term, stream, view)
                penalty = term.of_column(view, logp, columns[name]) if hasattr(term, "of_column") else columns[name]
                if bool(view.on.any()):
                    loss = loss + (scale[view.on] * penalty[view.on]).sum()
                metrics[f"{stream_name}/{key}"] = _mean(view, penalty.detach())
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss of {self.name!r} is {float(loss)}: a log-prob with non-zero weight is not finite")
        metrics["loss"] = (float(loss.detach()), 0.0)
        return LossOutput(loss, metrics)

    def _report(self, views: Mapping[str, TokenView]) -> Metrics:
        out: Metrics = {}
        for name, view in views.items():
            out[f"{name}/tokens"] = (float(view.on.sum()), 0.0)
            out |= _level(name, self.streams[name], view)
        return out


def _level(name: str, stream: Stream, view: TokenView) -> Metrics:
    """Where the stream stands: the mean negative log-likelihood, or the mean of the numbers a scalar head gives."""
    if declared(stream.likelihood, "head") == "scalar":
        return {f"{name}/score": _mean(view, view.logp)}
    return {f"{name}/nll": _mean(view, -view.logp)}


def _check_head(likelihood: Any, key: str, term: Any) -> None:
    """A scalar head has no log-probs, and a language model's no scalar: refuse a term that reads the other's."""
    scalar, wanted = declared(likelihood, "head") == "scalar", declared(term, "head")
    if wanted == "scalar" and not scalar:
        raise ValueError(f"{key}: {type(term).__name__} reads the number of a scalar head; set the stream's likelihood to posttrain.loss.likelihood.Score")
    compared = sorted(declared(term, "needs") - {"self", "value"})
    if scalar and compared:
        raise ValueError(f"{key}: {type(term).__name__} compares with the log-probs {compared[0]!r}, and a scalar head has none; choose another term")


def _applies(term: Any, stream: str) -> bool:
    only = getattr(term, "streams", None)
    return only is None or stream in only


def _regularizer_scale(term: Any, stream: Stream, view: TokenView) -> Tensor:
    aggregation = getattr(term, "aggregation", None) or stream.aggregation
    return view.select(aggregation.coefficient(view, None))


def _mean(view: TokenView, values: Tensor) -> tuple[float, float]:
    return float(view.select(values).sum()), float(view.on.sum())


def _whereabouts(view: TokenView, column: int) -> str:
    batch = view.batch
    columns = ", ".join(f"{k} {float(v[column]):.4g}" for k, v in batch.logps.items())
    return (
        f"column {column} (sample {batch.sample_ids[int(batch.seq[column])]!r}): log-prob {float(view.logp[column]):.4g}, "
        f"advantage {float(batch.advantage[column]):.4g}" + (f", recorded log-probs: {columns}" if columns else "")
    )


def _require_finite(values: Tensor, view: TokenView, what: str) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{what}: the weight is {float(values[where])} at {_whereabouts(view, where)}.  A ratio this large needs a bound: add a mask "
            f"(Cap, DualClip, "
            "Truncate, Reject), or max_log_ratio on a KL; a log-prob of NaN or -inf means another distribution was recorded than is trained"
        )
