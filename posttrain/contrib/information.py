"""An advantage from how much a thought tells of the text that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.loss.view import Metrics, TokenView, sum_by_code
from posttrain.records import Source

PLAIN = "without_thought"
"""The context in which the text is read without a thought; ``posttrain.data.contexts`` makes its rows."""


@dataclass(frozen=True)
class InformationGain:
    """How much likelier the next words of a text are with a thought before them, for the policy, than without one, for a slow copy of it.

    Equation: ``R_i = sum_x log pi(x | text, thought_i) - sum_x log pi_to(x | text)`` over the given words behind the thought; ``A_i = R_i`` less the
    mean over the thoughts on one place.  Nothing is differentiated: the words are not learnt.
    Source: RLP, arXiv 2510.01265 (abstract and a secondary source; tau, the size of the group and the clip were not read).

    ``to``: the copy, ``base``, which follows the policy with ``learner.base_every=1`` and ``learner.base_mix=1-tau``.  ``center``: ``mean``, or ``none``.
    ``limit``: the largest gain or loss of a thought, null for none (ours): a thought that makes the words impossible loses without bound.

    An empty thought of a policy that is its own copy gains exactly 0; one that makes certain what had probability 0.2 gains 1.609.

    Wrong when: the words can be copied from the prompt; then every thought that repeats them gains.
    """

    to: str = "base"
    center: Literal["mean", "none"] = "mean"
    limit: float | None = None
    coupling = "batch"
    live = True
    contexts = frozenset({PLAIN})

    def __post_init__(self) -> None:
        if self.center not in ("mean", "none"):
            raise ValueError(f"InformationGain: center={self.center!r} does not exist; choose mean or none")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"InformationGain: limit={self.limit} must be above 0, or null")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        bound = "" if self.limit is None else f", clamped to +/-{self.limit:g}"
        less = " - group mean" if self.center == "mean" else ""
        return f"(R_i{less}) [R_i = sum_x log pi(x|thought) - log pi_{self.to}(x){bound}, x the given words behind the thought]"

    def values(self, view: TokenView) -> Tensor:
        gain, group, here = self._gains(view)
        if self.center == "mean":
            count = view.code_count(group, here).clamp(min=1).to(gain.dtype)
            gain = torch.where(here & (group >= 0), gain - view.code_sum(group, gain) / count, gain)  # who has no words behind has no part in the mean
        return view.spread(gain)

    def metrics(self, view: TokenView) -> Metrics:
        """The mean gain of a thought."""
        gain, _, here = self._gains(view)
        return {"information": (float(gain[here].sum()), float(here.sum()))}

    def _gains(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """``R_i`` ``[S]``, 0 outside the stream; the groups; which sequences are thoughts with words behind them."""
        batch = view.batch
        here, group, place = view.seq_len() > 0, batch.group, torch.arange(batch.num_tokens, device=view.on.device)
        if not bool(here.any()):
            return view.logp.new_zeros(batch.num_sequences), group, here
        view.require_whole("InformationGain")
        last = torch.full((batch.num_sequences,), -1, device=place.device).scatter_reduce(0, batch.seq, torch.where(view.on, place, -1), "amax")
        behind = (batch.source == int(Source.tool)) & here[batch.seq] & (place > last[batch.seq])
        plain = view.beside(PLAIN)
        with_thought, without = (
            view.logp.new_zeros(batch.num_sequences).index_add(0, batch.seq, torch.where(on, logp, torch.zeros_like(logp)))
            for on, logp in ((behind, view.logp), (plain.on, plain.reference(self.to)))
        )
        read = torch.zeros_like(here).index_put((batch.seq[behind],), torch.ones_like(batch.seq[behind], dtype=torch.bool))
        known = view.code_count(group, plain.member & (group >= 0)) > 0
        lost = read & ~known
        if bool(lost.any()):
            sample = batch.sample_ids[int(lost.nonzero()[0])]
            raise ValueError(
                f"stream {view.name!r}: InformationGain needs the text of sample {sample!r} without a thought (context {PLAIN!r}), and the batch has none "
                "in its group; posttrain.data.contexts makes it from groups of thoughts (mixture=before_text)"
            )
        of = plain.member & (group >= 0)
        gain = torch.where(read, with_thought - sum_by_code(group, without, of), 0.0)
        return (gain if self.limit is None else gain.clamp(-self.limit, self.limit)), group, read
