"""From a packed batch to log-probabilities: one pass of the backbone, then the chunked head on the columns that need it.

``PolicyModule`` is the one module an engine wraps.  The head's work is done inside the head module's own ``forward``, because sharding
engines (ZeRO-3) gather a module's weights in hooks around exactly that call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from posttrain_kernels import linear_argmax, linear_collision, linear_jsd, linear_kl, linear_logprob, linear_stored_kl
from torch import Tensor, nn

from posttrain.learner import attention
from posttrain.learner.model import is_lora, plain
from posttrain.learner.routing import Routers
from posttrain.records import TokenBatch

ALONE = ("entropy", "logp_greedy", "logsumexp", "collision")
KINDS = (*ALONE, "kl_reverse", "kl_forward", "jsd")
FROZEN = ("base", "teacher")
STORED = "stored"
Frozen = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states ``[n, D]`` of a frozen model, its head's weight and bias.  An empty weight means that the head is shared."""
Mixed = tuple[Tensor, Tensor]
"""Ids ``[N]`` of second input tokens, and the shares ``[N]`` of their embeddings."""


def parse_column(name: str) -> tuple[str, str | None, float]:
    """(kind, frozen model, beta) of ``entropy``, ``logp_greedy`` (of the most probable token), ``logsumexp`` (of the logits), ``collision`` (``log sum_v p_v**2``: two draws
    agree), ``kl_reverse:base``, ``kl_forward:teacher``, ``jsd_0.5:teacher``, ``kl_forward:stored`` (what the batch itself holds of a teacher), ...

    Raises ``ValueError`` for any other name.
    """
    head, _, to = name.partition(":")
    kind, _, beta = head.partition("_") if head.startswith("jsd") else (head, "", "")
    try:
        value = float(beta) if beta else 0.0
    except ValueError:
        value = math.nan
    others = (None,) if kind in ALONE else FROZEN if kind == "jsd" else (*FROZEN, STORED)
    if kind not in KINDS or (to or None) not in others or (kind == "jsd" and not 0 < value < 1):
        known = ", ".join(ALONE) + ", and kl_reverse:WHO, kl_forward:WHO, jsd_BETA:WHO with WHO one of " + " or ".join(FROZEN) + f", of a KL also {STORED}"
        raise ValueError(f"unknown full-vocabulary column {name!r}; choose from {known}")
    return kind, to or None, value


def _head_forward(head: nn.Module, original: Any) -> Any:
    """A ``forward`` for the output layer: as before for a plain call, chunked log-probabilities when ``targets`` are given, the most probable token's id where
    ``best``."""

    def forward(hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0, chunk: int = 1024, columns: tuple[str, ...] = (),
                frozen: Mapping[str, Frozen] | None = None, stored: tuple[Tensor, Tensor] | None = None, best: bool = False) -> Any:  # fmt: skip
        weight, bias = head.weight, getattr(head, "bias", None)
        if best:
            return linear_argmax(hidden, weight, chunk=chunk, bias=bias)
        if targets is None:
            return original(hidden)
        logp, entropy = linear_logprob(hidden, weight, targets, temperature=temperature, chunk=chunk, need_entropy="entropy" in columns, bias=bias)
        found = {} if entropy is None else {"entropy": entropy}
        if "logp_greedy" in columns:
            best = linear_argmax(hidden, weight, chunk=chunk, bias=bias)
            found["logp_greedy"] = linear_logprob(hidden, weight, best, temperature=temperature, chunk=chunk, bias=bias)[0]
        if "logsumexp" in columns:  # the target's own logit less its log-probability
            logit = (hidden.to(logp.dtype) * weight[targets].to(logp.dtype)).sum(-1) + (0.0 if bias is None else bias[targets].to(logp.dtype))
            found["logsumexp"] = logit / temperature - logp
        if "collision" in columns:
            found["collision"] = linear_collision(hidden, weight, temperature=temperature, chunk=chunk, bias=bias)
        for name in columns:
            kind, to, beta = parse_column(name)
            if to is None or name in found:
                continue
            if to == STORED:
                assert stored is not None
                both = linear_stored_kl(hidden, weight, *stored, temperature=temperature, chunk=chunk, bias=bias)
                found |= {f"kl_reverse:{to}": both[0], f"kl_forward:{to}": both[1]}
                continue
            theirs, their_weight, their_bias = (frozen or {})[to]
            # adapters leave the head alone, so the frozen start shares it
            other = (theirs, weight, bias) if their_weight.numel() == 0 else (theirs, their_weight, their_bias)
            options: dict[str, Any] = {"temperature": temperature, "chunk": chunk, "bias": bias}
            if kind == "jsd":
                found[name] = linear_jsd(hidden, weight, other[0], other[1], beta, other_bias=other[2], **options)
            else:
                both = linear_kl(hidden, weight, other[0], other[1], base_bias=other[2], **options)
                found |= {f"kl_reverse:{to}": both[0], f"kl_forward:{to}": both[1]}
        return (logp, *(found[name] for name in columns))

    return forward


def hidden_states(inner: nn.Module, input_ids: Tensor, positions: Tensor, lengths: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Hidden states ``[N, D]`` of a packed row after the last norm of a transformers model, whatever its head."""
    extra = attention.keywords(inner.config._attn_implementation, lengths)
    read: dict[str, Tensor] = {"input_ids": input_ids[None]} if mixed is None else {"inputs_embeds": _embed(inner, input_ids, mixed)[None]}
    with attention.packed_row():
        out = inner.base_model(**read, position_ids=positions[None], use_cache=False, **extra)
    return out.last_hidden_state[0]


def _embed(inner: nn.Module, input_ids: Tensor, mixed: Mixed) -> Tensor:
    """``(1 - share) e(input) + share e(other)``, ``[N, D]``; exactly ``e(input)`` where the share is 0."""
    others, share = mixed
    # one call for both: some engines go wrong when a module runs twice before one backward
    given, other = inner.get_input_embeddings()(torch.cat([input_ids, others])).chunk(2)
    weight = share.to(given.dtype)[:, None]
    return torch.where(weight > 0, (1 - weight) * given + weight * other, given)


class PolicyModule(nn.Module):
    """A causal language model that answers with log-probabilities of given targets instead of logits.

    ``model`` is a transformers model, with or without LoRA.  ``forward`` takes the packed columns and returns a tuple: ``logp[n]`` of the
    selected columns, then one ``[n]`` tensor per wanted full-vocabulary column, in the order of ``columns``.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        inner = plain(model)
        head = inner.get_output_embeddings()
        if head is None or not isinstance(head, nn.Linear):
            raise ValueError(f"{type(inner).__name__} has no linear output layer ({type(head).__name__}), so log-probabilities cannot be computed in chunks")
        head.forward = _head_forward(head, head.forward)  # type: ignore[method-assign]
        self.routers = Routers(inner)

    @property
    def inner(self) -> nn.Module:
        return plain(self.model)

    @property
    def head(self) -> nn.Linear:
        return self.inner.get_output_embeddings()

    def hidden(self, input_ids: Tensor, positions: Tensor, lengths: Tensor, mixed: Mixed | None = None) -> Tensor:
        """Hidden states ``[N, D]`` of the packed row, after the last norm."""
        return hidden_states(self.inner, input_ids, positions, lengths, mixed)

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        select: Tensor | None,
        temperature: float,
        columns: tuple[str, ...] = (),
        frozen: Mapping[str, Frozen] | None = None,
        want_hidden: bool = False,
        adapter: bool = True,
        stored: tuple[Tensor, Tensor] | None = None,
        routing: Tensor | None = None,
        keep_routing: bool = False,
        mixed: Mixed | None = None,
        want_best: bool = False,
    ) -> Any:
        """``select`` ``[n]`` are the column indices to score, None for all.  ``frozen``: what the columns compare with, by name; ``stored``: ids and
        log-probs ``[N, K]`` that they compare with.  ``routing``: experts that are to read the columns, ``[N, layers, K]``; ``keep_routing``: remember those that
        do in ``routers``.
        ``adapter=False`` switches LoRA off.  ``want_hidden`` returns the selected hidden states instead, ``want_best`` the ids of the most probable tokens.
        ``mixed``: second tokens whose embeddings are read with the given ones."""
        self.routers.replay(routing, keep_routing)
        off = nullcontext() if adapter or not is_lora(self.model) else self.model.disable_adapter()
        with off:
            hidden = self.hidden(input_ids, positions, lengths, mixed)
        if select is not None:
            hidden, target_ids = hidden[select], target_ids[select]
            stored = None if stored is None else (stored[0][select], stored[1][select])
        if want_hidden:
            return hidden
        if want_best:
            return self.head(hidden, chunk=self.chunk, best=True)
        return self.head(hidden, targets=target_ids, temperature=temperature, chunk=self.chunk, columns=columns, frozen=frozen, stored=stored)


def forward(
    model: Any,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    columns: Iterable[str] = (),
    only_trainable: bool = True,
    base_model: Any | None = None,
    teacher_model: Any | None = None,
    adapter: bool = True,
    routed: bool = True,
    keep_routing: bool = False,
    mix: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(logp[N], {column: [N]})`` of a batch that is not empty, in float32 (float64 for a float64 model).

    ``model`` is a :class:`PolicyModule` or an engine around one.  With ``only_trainable`` the head runs only on trainable columns: the others
    hold 0 and carry no gradient.  The ``:base`` columns need the frozen start: ``base_model`` (another ``PolicyModule``), or the model's own
    adapters, which are switched off for one pass without gradient; the ``:teacher`` columns need ``teacher_model``.
    The batch's ``routing`` is replayed where ``routed``; frozen models choose their own experts.
    ``mix`` ``[N]``: where token t of a text is read as input, the share of what the model itself held most probable at t, by a first pass without gradient
    that reads the given tokens.  Given for one rank, it must be given for all: a pass more is run.

    Raises ``ValueError`` for an unknown column, an empty batch, or a column whose model is missing.
    """
    wanted = tuple(sorted(columns))
    others = {to for name in wanted if (to := parse_column(name)[1]) is not None} - {STORED}
    if any(parse_column(name)[1] == STORED for name in wanted) and batch.stored is None:
        if not bool(batch.trainable.any()):  # a rank without work takes part all the same
            none = batch.input_ids.new_full((batch.num_tokens, 1), -1)
            batch = batch.replace(stored=(none, none.float()))
        else:
            raise ValueError("the loss compares with a stored distribution and the data holds none; set data.kind=stored, or let the teacher be there (to: teacher)")
    if batch.num_tokens == 0:
        raise ValueError("the batch is empty; use an engine, which runs its own placeholder")
    select = batch.trainable.nonzero().squeeze(1) if only_trainable and not bool(batch.trainable.all()) else None
    lengths = batch.lengths
    row = (batch.input_ids, batch.target_ids, batch.positions, lengths, select, temperature)
    frozen = {to: _frozen(to, model, base_model if to == "base" else teacher_model, row) for to in sorted(others)}
    routing = batch.routing if routed else None
    mixed = None if mix is None else _own_choices(model, batch, row, mix, adapter, routing)
    found = model(*row, wanted, frozen, False, adapter, batch.stored, routing, keep_routing, mixed)
    names = ("logp", *wanted)
    full = {name: _spread(value, select, batch.num_tokens) for name, value in zip(names, found, strict=True)}
    return full.pop("logp"), full


@torch.no_grad()
def _own_choices(model: Any, batch: TokenBatch, row: tuple[Any, ...], mix: Tensor, adapter: bool, routing: Tensor | None) -> Mixed:
    """The most probable tokens of a pass over the given ones, where they are read: column t predicts a token that column t + 1 takes in."""
    share = torch.zeros_like(mix)
    share[1:] = torch.where(batch.seq[1:] == batch.seq[:-1], mix[:-1], 0.0)
    read = (share > 0).nonzero()[:, 0]
    ids, targets, positions, lengths, _, temperature = row
    # at least one column, so that every rank runs its head
    predicting = read - 1 if len(read) else read.new_zeros(1)
    best = model(ids, targets, positions, lengths, predicting, temperature, (), None, False, adapter, None, routing, False, None, True)
    others = ids.clone()
    others[read] = best[: len(read)]
    return others, share


@torch.no_grad()
def _frozen(to: str, model: Any, other: Any | None, row: tuple[Any, ...]) -> Frozen:
    if other is not None:
        head = other.head
        return other(*row, (), None, True), head.weight, getattr(head, "bias", None)
    if to == "teacher":
        raise ValueError("a ':teacher' column needs the teacher: give teacher_model (model.teacher=FOLDER_OR_ID)")
    module = getattr(model, "module", model)
    if not is_lora(module.model):
        raise ValueError("a ':base' column needs the frozen start: give base_model, or train with adapters (model.lora)")
    hidden = model(*row, (), None, True, False)
    return hidden, hidden.new_empty(0, hidden.shape[1]), None


def _spread(values: Tensor, select: Tensor | None, n: int) -> Tensor:
    if select is None:
        return values
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_put((select,), values)


@torch.no_grad()
def self_check(module: PolicyModule, tolerance: float | None = None) -> float:
    """Compare packed log-probabilities with the model's own logits on two short sequences; returns the largest difference.

    It catches at load time what would train wrongly in silence: layers that leak across packed sequences, and post-processing of logits that a
    chunked head does not reproduce.  Raises ``ValueError`` with the difference.
    """
    inner = module.inner
    weight = module.head.weight
    vocab = inner.config.get_text_config().vocab_size
    ids = (torch.arange(16, device=weight.device) * 7919 + 11) % vocab
    first, second = ids[:9], ids[9:]
    if tolerance is None:
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(weight.dtype, 0.25)
    training = module.training
    module.eval()
    try:
        logq = [torch.log_softmax(inner(input_ids=s[None]).logits[0, :-1].to(torch.float64), -1).gather(1, s[1:, None])[:, 0] for s in (first, second)]
        packed = torch.cat([first[:-1], second[:-1]])
        positions = torch.cat([torch.arange(len(first) - 1), torch.arange(len(second) - 1)]).to(weight.device)
        lengths = torch.tensor([len(first) - 1, len(second) - 1], device=weight.device)
        ours = module(packed, torch.cat([first[1:], second[1:]]), positions, lengths, None, 1.0)[0]
    finally:
        module.train(training)
    gap = float((torch.cat(logq) - ours.double()).abs().max())
    if not gap <= tolerance:
        raise ValueError(
            f"{type(inner).__name__}: log-probabilities of a packed row differ from the model's own by {gap:.3g} (limit {tolerance:g}); its layers "
            "mix packed sequences or its logits are post-processed, and it cannot be trained here"
        )
    return gap
