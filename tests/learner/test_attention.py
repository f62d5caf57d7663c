"""Packed attention against padded eager attention: the same hidden states and the same gradients, and nothing of the row's length squared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.learner import attention
from posttrain.learner.attention import PackedLayout

LENGTHS = [7, 1, 31, 30, 12, 7]


def make(architecture: str, implementation: str, dtype: torch.dtype, **extra: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 128, **extra,
    }  # fmt: skip
    attention.register()
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(architecture, **sizes), attn_implementation=implementation).to(dtype)


def sequences() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 50, (length,)) for length in LENGTHS]


def packed_states(model: torch.nn.Module, given: list[Tensor]) -> Tensor:
    row, positions = torch.cat(given)[None], torch.cat([torch.arange(len(s)) for s in given])[None]
    extra = attention.keywords(attention.NAME, torch.tensor([len(s) for s in given]))
    with attention.packed_row():
        return model(input_ids=row, position_ids=positions, use_cache=False, **extra).last_hidden_state[0]


def padded_states(model: torch.nn.Module, given: list[Tensor]) -> Tensor:
    longest = max(map(len, given))
    ids = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in given])
    mask = torch.stack([torch.arange(longest) < len(s) for s in given]).long()
    states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.cat([states[i, : len(s)] for i, s in enumerate(given)])


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("qwen3", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_to_padded_eager(architecture: str, extra: dict[str, Any], dtype: torch.dtype, tolerance: float, checkpointing: bool) -> None:
    if "sliding_window" in extra and dtype is torch.float64:  # the padded reference's own mask overflows to NaN there
        dtype, tolerance = torch.float32, 2e-5
    packed, padded = make(architecture, attention.NAME, dtype, **extra), make(architecture, "eager", dtype, **extra)
    if checkpointing:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed.train()
    padded.train()
    found, wanted = packed_states(packed, sequences()), padded_states(padded, sequences())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    torch.manual_seed(2)
    direction = torch.randn_like(wanted)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    for (name, a), b in zip(packed.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance * 10, atol=tolerance * 100, msg=lambda m, name=name: f"{name}: {m}")


def test_a_sequence_does_not_see_its_neighbours() -> None:
    model = make("qwen3", attention.NAME, torch.float64)
    given = sequences()
    before = packed_states(model, given)
    changed = [s if i == 2 else (s + 1) % 50 for i, s in enumerate(given)]
    start = sum(LENGTHS[:2])
    own = slice(start, start + LENGTHS[2])
    after = packed_states(model, changed)
    torch.testing.assert_close(before[own], after[own], rtol=0, atol=1e-12)
    assert float((before[: own.start] - after[: own.start]).abs().max()) > 1e-3


def test_no_attention_over_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call to SDPA is as long as a sequence, never as long as the row, and gets no mask."""
    lengths: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert kwargs["attn_mask"] is None and kwargs["is_causal"]
        lengths.append(query.shape[2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    packed_states(make("qwen3", attention.NAME, torch.float32), sequences())
    assert sorted(set(lengths)) == [12, 31]
    assert max(lengths) == max(LENGTHS) < sum(LENGTHS)


def test_layout_restores_the_row() -> None:
    lengths = torch.tensor([3, 0, 40, 39, 1, 40, 100, 3])
    layout = PackedLayout.of(lengths)
    row = torch.arange(int(lengths.sum()))
    buckets = torch.cat([row[b.index] for b in layout.buckets])
    assert torch.equal(buckets[layout.restore], row)
    assert layout.num_tokens == len(row)
    assert sum(b.num_sequences for b in layout.buckets) == 7
    assert [b.length for b in layout.buckets] == [100, 40, 3]


def test_layout_bounds_its_padding() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(50, 2000, (200,))
    padded = sum(b.num_sequences * b.length for b in PackedLayout.of(lengths).buckets)
    assert padded <= 1.15 / 0.85 * int(lengths.sum())
    assert len(PackedLayout.of(lengths).buckets) < 40


def test_unpacked_use_still_works() -> None:
    """Without a layout the same model takes padded batches, as evaluation by others may do."""
    model, eager = make("qwen3", attention.NAME, torch.float32), make("qwen3", "eager", torch.float32)
    torch.testing.assert_close(padded_states(model, sequences()), padded_states(eager, sequences()), rtol=0, atol=2e-5)


def test_features_it_cannot_reproduce_are_refused() -> None:
    query = torch.zeros(1, 2, 4, 8)
    layout = PackedLayout.of(torch.tensor([4]))
    for feature in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=feature):
            attention.packed_sdpa(torch.nn.Identity(), query, query, query, None, packed_layout=layout, **{feature: 1.0})
    with pytest.raises(ValueError, match="one row of 4 columns"):
        attention.packed_sdpa(torch.nn.Identity(), query[:, :, :3], query, query, None, packed_layout=layout)
    with attention.packed_row(), pytest.raises(ValueError, match="does not hand keyword arguments"):
        attention.packed_sdpa(torch.nn.Identity(), query, query, query, None)


def test_choice() -> None:
    assert attention.choose("auto", torch.float32) == attention.NAME
    with pytest.raises(ValueError, match="would mix sequences"):
        attention.choose("eager", torch.float32)
    extra = attention.keywords("flash_attention_2", torch.tensor([3, 5]))
    assert extra["cu_seq_lens_q"].tolist() == [0, 3, 8] and extra["cu_seq_lens_q"].dtype == torch.int32 and extra["max_length_q"] == 5


def test_registration_reaches_transformers(tmp_path: Path) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    assert attention.register() in AttentionInterface() and attention.NAME in AttentionMaskInterface()
