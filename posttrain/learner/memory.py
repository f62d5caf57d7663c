"""How many bytes one learner rank will want, from the model's config alone: nothing is loaded.

An estimate, meant to tell "fits" from "does not": weights, gradients and optimizer exactly as the engines keep them, activations from the usual
count of saved tensors per layer.  ``T`` is ``micro_batch_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose on the learner's device, and in host memory when the optimizer is offloaded.  ``loading`` is the whole model, which every
    rank holds before it is sharded; the peak is the larger of that and the rest."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    host: int
    loading: int
    parameters: int
    trainable: int

    @property
    def device(self) -> int:
        """Peak on the device that computes."""
        return max(self.weights + self.gradients + self.optimizer + self.activations + self.head, self.loading)

    @property
    def total(self) -> int:
        """Device and host together: what a rank needs on a machine without a GPU."""
        return self.device + self.host

    def __str__(self) -> str:
        named = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, "activations": self.activations, "head": self.head}
        if self.host:
            named["offloaded"] = self.host
        return ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in named.items())


def count_parameters(config: Any, lora: Any | None = None) -> tuple[int, int]:
    """``(all parameters, trainable parameters)``: the architecture is built without memory (on torch's meta device) and counted."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    if lora is None:
        return total, total
    head = model.get_output_embeddings()
    wanted = None if isinstance(lora.targets, str) else set(lora.targets)
    adapters = sum(
        lora.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and (wanted is None or name.rsplit(".", 1)[-1] in wanted)
    )
    return total + adapters, adapters


def estimate(model_cfg: Any, learner_cfg: Any) -> Memory:
    """Bytes per rank for a ``ModelConfig`` (``path`` must hold a config) and a ``LearnerConfig``.

    Weights are sharded by stage 3, gradients by stages 2 and 3, optimizer state by stages 1 to 3.  The optimizer holds two float32 moments, and a
    float32 master copy unless the weights are float32 and unsharded.  Gradients are summed in float32.  Activations per layer and token: about
    ``14 D + 5 I`` numbers (``D`` hidden, ``I`` intermediate size), with checkpointing ``D`` per layer and one layer whole.  The head holds
    ``head_chunk`` rows of float32 logits three times.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_cfg.path, trust_remote_code=model_cfg.trust_remote_code)
    text = config.get_text_config()
    parameters, trainable = count_parameters(config, model_cfg.lora)
    size, ranks, stage = BYTES[model_cfg.dtype], learner_cfg.world_size, learner_cfg.zero_stage
    if learner_cfg.engine == "deepspeed" and model_cfg.dtype == "bfloat16":
        stage = max(stage, 1)

    def shard(count: int, first_stage: int) -> int:
        return count // ranks if stage >= first_stage else count

    master = 0 if model_cfg.dtype == "float32" and stage == 0 else 4
    optimizer = shard(trainable, 1) * (8 + master)
    hidden, inner, layers = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size), text.num_hidden_layers
    tokens = learner_cfg.micro_batch_tokens
    per_layer = tokens * (14 * hidden + 5 * inner) * size
    activations = tokens * hidden * size * layers + per_layer if model_cfg.gradient_checkpointing else per_layer * layers
    offloaded = learner_cfg.offload_optimizer
    return Memory(
        weights=shard(parameters, 3) * size,
        gradients=shard(trainable, 2) * 4,
        optimizer=0 if offloaded else optimizer,
        activations=activations,
        head=3 * min(learner_cfg.head_chunk, tokens) * text.vocab_size * 4,
        host=optimizer if offloaded else 0,
        loading=parameters * size,
        parameters=parameters,
        trainable=trainable,
    )
