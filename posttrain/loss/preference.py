"""What terms that compare answers share, terms of your own included: scores of answers, differences within pairs, labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.loss.aggregate import PairSum, PairTokenMean, SequenceMeanTokenMean, SequenceMeanTokenSum
from posttrain.loss.view import TokenView, sum_by_code
from posttrain.mixture.schedule import Scalar


def sequence_score(view: TokenView, score: str, to: str, factor: Tensor | None = None) -> Tensor:
    """``sum`` or ``mean`` over the stream's tokens of the log-ratio to ``to`` or of the log-prob, ``[S]``; ``factor`` ``[N]`` scales tokens.  ``value``:
    what a scalar head gives (the sum, where it is read at several places)."""
    each = view.log_ratio(to, level="token") if score.startswith("log_ratio") else view.select(view.logp)
    each = each if factor is None else each * factor
    return view.seq_mean(each) if score.endswith("_mean") else view.seq_sum(each)


def pair_difference(view: TokenView, per_sequence: Tensor) -> Tensor:
    """Chosen minus rejected, on both sides of every pair of the stream, ``[S]``; 0 outside pairs.  Raises ``FloatingPointError`` naming the
    sample where it is not a number: both sides are infinite."""
    has = view.in_pair
    signed = per_sequence * view.batch.side
    difference = torch.where(has, sum_by_code(view.batch.pair, signed, has), torch.zeros_like(signed))
    if bool(torch.isnan(difference).any()):
        where = int(torch.isnan(difference).nonzero()[0])
        raise FloatingPointError(
            f"stream {view.name!r}: the pair of sample {view.batch.sample_ids[where]!r} has no margin, its score here is "
            f"{float(per_sequence[where]):g}: a log-prob is infinite or missing, so it was recorded under another distribution than is trained"
        )
    return difference


def require_pairs(view: TokenView, what: str) -> None:
    """Raise ``ValueError`` unless every sequence of the stream is in a pair and both sides of each pair are here."""
    batch = view.batch
    single = view.member & (batch.pair < 0)
    if bool(single.any()):
        raise ValueError(
            f"stream {view.name!r}: {what} needs preference pairs, but sample {batch.sample_ids[int(single.nonzero()[0])]!r} is in none; "
            "give the stream paired=true, or give the rows a pair and a side"
        )
    for side in (1, -1):
        here = view.in_pair & (batch.side == side)
        counts = view.code_count(batch.pair, here)
        wrong = view.in_pair & (counts != 1)
        if bool(wrong.any()):
            where = int(wrong.nonzero()[0])
            raise ValueError(
                f"stream {view.name!r}: the pair of sample {batch.sample_ids[where]!r} has {int(counts[where])} "
                f"{'chosen' if side > 0 else 'rejected'} answers here instead of 1; keep pairs whole in a micro-batch, or pass weights= computed "
                "on the whole step with objective.weights(batch)"
            )


def reward_column(view: TokenView, name: str, which: Tensor, what: str) -> Tensor:
    """The reward column ``name``, ``[S]``.  Raises ``ValueError`` naming ``what`` and the sample when it is missing on one of ``which``."""
    column = view.batch.rewards.get(name)
    if column is None:
        if not bool(which.any()):
            return torch.zeros(view.num_sequences, dtype=view.logp.dtype, device=view.logp.device)
        raise ValueError(f"stream {view.name!r}: {what} reads the reward {name!r}; the batch has {', '.join(sorted(view.batch.rewards)) or 'none'}")
    column = column.to(view.logp.dtype)
    bad = which & ~torch.isfinite(column)
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"stream {view.name!r}: {what} reads the reward {name!r}, which is {float(column[where])} on sample {view.batch.sample_ids[where]!r}"
        )
    return torch.where(which, column, torch.zeros_like(column))


def label_column(view: TokenView, name: str, which: Tensor, what: str) -> Tensor:
    """A reward column that is a probability, ``[S]``; ``side`` is 1 on chosen and 0 on rejected answers."""
    if name == "side":
        none = which & (view.batch.side == 0)
        if bool(none.any()):
            sample = view.batch.sample_ids[int(none.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: {what}=side, but sample {sample!r} is in no pair; give the stream paired=true")
        return (view.batch.side == 1).to(view.logp.dtype)
    label = reward_column(view, name, which, what)
    bad = which & ((label < 0) | (label > 1))
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"stream {view.name!r}: {what}={name} is {float(label[where]):g} on sample {view.batch.sample_ids[where]!r}; it is a probability, between "
            "0 and 1: rescale it where the data are read"
        )
    return label


def check_beta(what: str, beta: Scalar, score: str, comparable: bool) -> None:
    """Refuse an inverse temperature that is not above 0, or is on the scale of the other kind of score (``comparable`` losses only)."""
    if callable(beta):
        return
    if not beta > 0:
        raise ValueError(f"{what}: beta={beta} must be above 0")
    if comparable and score.endswith("_sum") and beta >= 2:
        raise ValueError(f"{what}: beta={beta} is on the scale of a mean over tokens (2 to 10); a sum of log-probs needs 0.01 to 1, or score={score[:-3]}mean")
    if comparable and score.endswith("_mean") and beta < 0.2:
        raise ValueError(f"{what}: beta={beta} is on the scale of a sum over tokens (0.01 to 1); a mean needs 1 to 10, or score={score[:-4]}sum")


def check_stream(what: str, score: str, stream: Any, both_sides: bool = False) -> None:
    """Refuse an aggregation that divides by the answer's length where the score does not, or the other way round: the gradient would be that
    of no objective.  ``both_sides``: the term compares answers, so a stream of one side is refused too."""
    if (score == "value") != (getattr(stream.likelihood, "head", "lm") == "scalar"):
        raise ValueError(f"{what}: score={score}: score=value is what a scalar head gives, and all that it gives; set the stream's likelihood to Score, or the score")
    name, mean = type(stream.aggregation).__name__, score.endswith("_mean")
    if mean and isinstance(stream.aggregation, (PairSum, SequenceMeanTokenSum)):
        raise ValueError(f"{what}: score={score} is a mean over tokens, but {name} sums over them; use PairTokenMean or SequenceMeanTokenMean")
    if not mean and isinstance(stream.aggregation, (PairTokenMean, SequenceMeanTokenMean)):
        raise ValueError(f"{what}: score={score} is a sum over tokens, but {name} takes their mean; use PairSum or SequenceMeanTokenSum")
    if both_sides and stream.side is not None:
        raise ValueError(f"{what} compares answers, but the stream has side={stream.side}: it would never see the other; set side=null")
