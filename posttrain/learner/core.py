"""What both engines do alike with one micro-batch: score it, or turn it into a loss.  How gradients and weights are kept is the engine's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posttrain.learner.forward import PolicyModule, forward, self_check
from posttrain.learner.model import is_lora, load_model, plain
from posttrain.learner.scalar import ScalarModule, scalar_self_check
from posttrain.records import TokenBatch
from posttrain.rollout.mismatch import sums

Metrics = dict[str, tuple[float, float]]


def device_of(rank: int) -> torch.device:
    """This rank's accelerator: the first visible GPU when there is one (an actor sees only its own), the CPU otherwise."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def build_module(model_cfg: Any, cfg: Any, objective: Any, device: torch.device, seed: int) -> PolicyModule | ScalarModule:
    """The module an engine wraps, with the head its objective reads, checked against the model it is made of."""
    head = objective.needs.head
    model = load_model(model_cfg, seed=seed, head=head).to(device)
    if head == "scalar":
        scalar = ScalarModule(model, getattr(model_cfg, "alpha", None) or 0.0)
        scalar_self_check(scalar)
        return scalar
    module = PolicyModule(model, cfg.head_chunk)
    self_check(module)
    if getattr(cfg, "routing", "own") != "own" and not module.routers.layers:
        raise ValueError(f"learner.routing={cfg.routing} replays the experts of a mixture, and no router was found in {type(module.inner).__name__}; set learner.routing=own")
    return module


class Core:
    """A policy, its objective, and the frozen models it is compared with: its start and a teacher.

    ``caller`` in the methods is whatever runs the forward: the :class:`PolicyModule` or an engine around it.
    """

    def __init__(self, module: PolicyModule | ScalarModule, model_cfg: Any, objective: Any, device: torch.device, seed: int = 0) -> None:
        self.module = module
        self.objective = objective
        self.device = device
        self._model_cfg, self._seed = model_cfg, seed
        self._base: PolicyModule | None = None
        self._teacher: PolicyModule | None = None
        self._base_moved = False
        self.directions: dict[str, list[Tensor]] = {}
        """What a coefficient that looks ahead changes in the gradient, by its name; see :mod:`posttrain.learner.lookahead`."""

    @property
    def base(self) -> PolicyModule | None:
        """The frozen start, or the model at ``model.base``; None when switching adapters off gives it.  Loaded on first use; every rank holds
        a whole copy."""
        if is_lora(self.module.model) and self._base is None and self._model_cfg.base is None:
            return None
        return self._own_base()

    def _own_base(self) -> PolicyModule:
        if self._base is None:
            cfg = replace(self._model_cfg, lora=None)
            self._base = self._load(cfg if cfg.base is None else replace(cfg, path=cfg.base, init="pretrained"))
            self._same_vocabulary(self._base, f"model.base={cfg.base}")
        return self._base

    @torch.no_grad()
    def move_base(self, weights: Iterable[tuple[str, Tensor]], mix: float) -> None:
        """``base <- mix * policy + (1 - mix) * base``, tensor by tensor; ``weights`` are the policy's under their Hugging Face names.

        The sum is formed in float32 and kept in the model's dtype.  Every rank must call it.
        """
        if not 0.0 <= mix <= 1.0:
            raise ValueError(f"learner.base_mix={mix} is the policy's share in the new base, between 0 and 1")
        own = dict(plain(self._own_base().model).named_parameters())
        for name, tensor in weights:
            target = own[name]
            wide = torch.float32 if target.dtype.itemsize < 4 else target.dtype
            target.copy_(target.to(wide).lerp(tensor.to(target.device, wide), mix) if mix < 1.0 else tensor)
        self._base_moved = True

    def base_state(self) -> dict[str, Tensor] | None:
        """The base's weights for a checkpoint, None while it is what was loaded."""
        if not self._base_moved or self._base is None:
            return None
        return {name: p.detach().cpu() for name, p in plain(self._base.model).named_parameters()}

    def load_directions(self, saved: dict[str, list[Tensor]] | None) -> None:
        """Put back the ``directions`` of a checkpoint."""
        self.directions = {name: [part.to(self.device) for part in parts] for name, parts in (saved or {}).items()}

    @torch.no_grad()
    def load_base_state(self, saved: dict[str, Tensor] | None) -> None:
        """Put back what :meth:`base_state` gave."""
        if saved is None:
            self._base, self._base_moved = None, False
            return
        for name, parameter in plain(self._own_base().model).named_parameters():
            parameter.copy_(saved[name])
        self._base_moved = True

    @property
    def teacher(self) -> PolicyModule:
        """The model at ``model.teacher``, in the policy's dtype.  Loaded on first use; every rank holds a whole copy.  Raises ``ValueError``
        when there is none, or when its vocabulary has another size."""
        if self._teacher is None:
            path = self._model_cfg.teacher
            if path is None:
                raise ValueError("the objective compares with a teacher, but model.teacher is not set; give model.teacher=FOLDER_OR_ID")
            found = self._load(replace(self._model_cfg, path=path, init="pretrained", lora=None))
            self._same_vocabulary(found, f"model.teacher={path}")
            self._teacher = found
        return self._teacher

    def _same_vocabulary(self, found: PolicyModule, what: str) -> None:
        own, theirs = (plain(m.model).config.get_text_config().vocab_size for m in (self.module, found))
        if own != theirs:
            raise ValueError(f"{what} has a vocabulary of {theirs} tokens and the policy one of {own}; they must be the same")

    def _load(self, cfg: Any) -> PolicyModule:
        return PolicyModule(load_model(cfg, seed=self._seed, train=False).to(self.device), self.module.chunk).eval()

    @torch.no_grad()
    def score(self, caller: Any, batch: TokenBatch, policy: str, entropy: bool, routing: bool = False, collision: bool = False) -> dict[str, Tensor]:
        """``logp`` and, when asked, ``entropy`` and ``collision`` (``log sum_v p_v**2``) of every column, ``[N]`` on the CPU, at the objective's temperature, and the
        ``routing`` ``[N, L, K]`` that was used.

        An empty batch gives empty columns but still runs a forward, because other ranks may wait for this one.
        """
        if policy not in ("current", "base", "teacher"):
            raise ValueError(f"score has no policy {policy!r}; choose 'current', 'base' or 'teacher'")
        padded = placeholder(batch)
        target, adapter = caller, True
        if policy == "base":
            target, adapter = (caller, False) if self.base is None else (self.base, True)
        elif policy == "teacher":
            target = self.teacher
        training = self.module.training
        self.module.eval()
        try:
            logp, columns = forward(
                target,
                padded.to(self.device),
                temperature=self.objective.needs.temperature,
                columns=[name for name, asked in (("entropy", entropy), ("collision", collision)) if asked],
                only_trainable=False,
                adapter=adapter,
                routed=policy == "current",
                keep_routing=routing,
            )
        finally:
            self.module.train(training)
        n = batch.num_tokens
        kept = {"routing": self.module.routers.chosen()[:n]} if routing else {}
        return {"logp": logp[:n].cpu(), **{name: value[:n].cpu() for name, value in columns.items()}, **kept}

    def loss(self, caller: Any, batch: TokenBatch, weights: Tensor | None) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the step's loss (a plain sum) and its metrics.

        A batch with nothing to learn gives a loss of 0 that is still connected to the model, so that backward runs on this rank as on the
        others.  Raises ``FloatingPointError`` when the loss is not finite.
        """
        idle = not bool(batch.trainable.any())
        padded = placeholder(batch).to(self.device)
        needs = self.objective.needs
        wanted = {name.partition(":")[2] for name in needs.columns}
        logp, columns = forward(
            caller,
            padded,
            temperature=needs.temperature,
            columns=needs.columns,
            base_model=self.base if "base" in wanted else None,
            teacher_model=self.teacher if "teacher" in wanted else None,
            only_trainable=not idle,
            mix=self.objective.own_input(padded) if needs.own_input else None,
        )
        # gradient exactly zero through every output, and no 0 * inf
        silent = sum((torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0).sum() for x in (logp, *columns.values())), logp.new_zeros(()))
        if idle:
            return silent, {}
        found = self.objective(padded, logp=logp, columns=columns, weights=None if weights is None else weights.to(self.device))
        if not bool(torch.isfinite(found.loss)):
            raise FloatingPointError(f"the loss of this micro-batch is {float(found.loss)}; samples {', '.join(batch.sample_ids[:4])}")
        comparable = needs.head == "lm" and batch.fresh and "behaviour" in padded.logps
        scored = padded.trainable  # elsewhere the forward pass has left the log-prob out
        measured = sums(padded.logps["behaviour"][scored], logp.detach()[scored]) if comparable else {}
        if padded.routing is not None and needs.head == "lm":
            measured["mismatch/routing"] = self.module.routers.agreement
        return found.loss + silent, {**found.metrics, **measured}


def placeholder(batch: TokenBatch) -> TokenBatch:
    """The batch itself, or, when it has no columns, one column of padding that nothing is learnt from."""
    if batch.num_tokens:
        return batch
    return TokenBatch.from_sequences([{"ids": [0, 0], "sources": ["pad", "pad"]}]).replace(progress=batch.progress, memory=batch.memory)
