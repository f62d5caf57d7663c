"""Load a causal language model for learning: safetensors only, no code from the model folder unless asked, LoRA through peft.

Every rank loads the whole model into its own memory before an engine shards it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from posttrain.learner import attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(cfg: Any, *, seed: int = 0, train: bool = True, head: str = "lm") -> torch.nn.Module:
    """The model of a ``ModelConfig`` in its dtype, in training mode without a key-value cache.

    ``head="scalar"`` puts a linear head of width 1 on the backbone (a reward model, a critic).  Where the folder has none, its weights are drawn from
    ``seed`` with a deviation of ``1 / (hidden size + 1)``: small, and not 0, so that the first step moves everything.  A ``cfg`` with ``heads`` above 1 gives the
    layer as many rows: that of the folder, and the same plus a draw each, because equal heads would stay equal.

    ``cfg.init == "random"`` keeps the architecture and draws weights from ``seed``.  ``train=False`` gives the frozen start: no adapters, no
    gradients.  With LoRA only the adapters require gradients, and they are kept in float32 precision by the optimizer.

    Raises ``ValueError`` naming the setting for an unknown dtype, a missing folder, weights that are not safetensors, adapters on the head, or a
    ``train_only`` that finds nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if cfg.dtype not in DTYPES:
        raise ValueError(f"model.dtype={cfg.dtype!r}; choose one of {', '.join(DTYPES)}")
    if not cfg.path:
        raise ValueError("model.path is not set; give a Hugging Face folder or id")
    dtype = DTYPES[cfg.dtype]
    implementation = attention.choose(cfg.attention, dtype)
    common: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code, "attn_implementation": implementation}
    kind: Any = AutoModelForSequenceClassification if head == "scalar" else AutoModelForCausalLM
    missing: set[str] = {"score.weight"}
    try:
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
        if head == "scalar":
            config.num_labels = 1
        if cfg.init == "random":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = kind.from_config(config, dtype=torch.float32, **common).to(dtype)
        else:
            model, found = kind.from_pretrained(
                cfg.path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
            )
            missing = set(found["missing_keys"])
    except OSError as error:
        raise ValueError(f"model.path={cfg.path!r} cannot be loaded: {_hint(cfg.path)}{error}") from error
    model.config.use_cache = False
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    if head == "scalar":
        _prepare_head(model, "score.weight" in missing, seed)
        if getattr(cfg, "heads", 1) > 1:
            _several_heads(model, cfg.heads, seed)
    if not train:
        model.requires_grad_(False)
        return model.eval()
    if cfg.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"model.gradient_checkpointing=true: {type(model).__name__} does not support it; set it to false")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg.lora is not None:
        model = add_lora(model, cfg.lora, seed)
        if head == "scalar":
            plain(model).score.requires_grad_(True)
    if cfg.train_only is not None:
        keep_only(model, cfg.train_only)
    return model.train()


@torch.no_grad()
def _prepare_head(model: torch.nn.Module, fresh: bool, seed: int) -> None:
    """Refuse what is no single linear head; draw the weights of a new one."""
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise ValueError(f"{type(model).__name__} has no linear head of width 1 named 'score' ({type(score).__name__}), so it cannot be a reward model or critic here")
    model.config.architectures = [type(model).__name__]
    if fresh:
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randn(score.weight.shape, generator=draw) / (score.in_features + 1)
        score.weight.copy_(drawn.to(score.weight.dtype))
        if score.bias is not None:
            score.bias.zero_()


@torch.no_grad()
def _several_heads(model: torch.nn.Module, heads: int, seed: int) -> None:
    one: torch.nn.Linear = model.score  # type: ignore[assignment]
    score = torch.nn.Linear(one.in_features, heads, bias=one.bias is not None).to(one.weight.device, one.weight.dtype)
    draw = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn((heads, one.in_features), generator=draw) / (one.in_features + 1)
    drawn[0] = 0.0
    score.weight.copy_(one.weight + drawn.to(one.weight.dtype))
    if one.bias is not None:
        score.bias.copy_(one.bias.expand(heads))
    model.score = score
    model.config.num_labels = model.num_labels = heads


def keep_only(model: torch.nn.Module, pattern: str) -> None:
    """Freeze every trainable parameter whose name the regular expression does not find.  Raises ``ValueError`` when it finds none."""
    found = [name for name, p in model.named_parameters() if p.requires_grad and re.search(pattern, name)]
    if not found:
        some = ", ".join(name for name, _ in list(model.named_parameters())[:4])
        raise ValueError(f"model.train_only={pattern!r} finds no trainable parameter; their names look like {some}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)


def _hint(path: str) -> str:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            return "the folder has no config.json; "
        if not list(folder.glob("*.safetensors")):
            return "the folder holds no *.safetensors file (other formats can run code and are refused; convert the weights); "
        return ""
    return "it is neither a folder here nor a model id that can be reached; "


def add_lora(model: torch.nn.Module, lora: Any, seed: int) -> torch.nn.Module:
    """Wrap ``model`` with LoRA adapters.  They are drawn from ``seed`` so that every rank starts with the same ones."""
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    head = model.get_output_embeddings() or getattr(model, "score", None)
    names = {name for name, module in model.named_modules() if module is head}
    if isinstance(targets, str) and hasattr(model, "score"):
        targets = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head})
    if not isinstance(targets, str) and any(name.split(".")[-1] in targets for name in names):
        raise ValueError("model.lora.targets names the output head; adapt inner layers only, the head is computed in chunks from its own weight")
    kind = None if hasattr(model, "score") else "CAUSAL_LM"
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type=kind, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def is_lora(model: torch.nn.Module) -> bool:
    """Whether the model carries adapters that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside an adapter wrapper, or the model itself."""
    return model.get_base_model() if is_lora(model) else model
