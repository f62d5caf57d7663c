"""A small real model in a folder: Qwen3 architecture, dense or with experts, random weights, a character-level fast tokenizer with a chat template.

It is what the quickstart trains, what the tests run on, and what a plug-in author can try a term with.  Nothing is downloaded.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + " \n" + string.punctuation
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|unk|>", *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def create_tokenizer(alphabet: str = ALPHABET) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token per character of ``alphabet`` and one per role and special mark.

    ``<|im_end|>`` ends a turn and is the EOS; padding has a token of its own, so masking pads can never mask the EOS.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def create_tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 384,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = True,
    dtype: str = "float32",
    alphabet: str = ALPHABET,
    num_experts: int = 0,
    experts_per_token: int = 2,
) -> Path:
    """Write config, safetensors weights and tokenizer to ``path`` and return it.  About 0.9M parameters with the defaults.

    The weights depend on ``seed`` alone.  Head size is ``hidden_size / num_heads`` and must be a multiple of 32, the least that every
    attention kernel of the CPU engine accepts.  With ``num_experts`` every layer is a mixture of so many experts of width ``intermediate_size``, of
    which ``experts_per_token`` work on each token.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    head_dim = hidden_size // num_heads
    if head_dim % 32:
        raise ValueError(f"hidden_size / num_heads is {head_dim}; it must be a multiple of 32 for the CPU attention kernels")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = create_tokenizer(alphabet)
    experts = {"num_experts": num_experts, "num_experts_per_tok": experts_per_token, "moe_intermediate_size": intermediate_size, "norm_topk_prob": True}
    config = (Qwen3MoeConfig if num_experts else Qwen3Config)(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
        **(experts if num_experts else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (Qwen3MoeForCausalLM if num_experts else Qwen3ForCausalLM)(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
