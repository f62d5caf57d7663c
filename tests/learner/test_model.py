"""Loading: dtypes, seeds, adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.config import LoraConfig, ModelConfig
from posttrain.learner.model import is_lora, load_model, plain


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_dtype(tiny: str, name: str, dtype: torch.dtype) -> None:
    model = load_model(ModelConfig(path=tiny, dtype=name))
    assert {p.dtype for p in model.parameters()} == {dtype} and model.training and not model.config.use_cache


def test_random_weights_depend_on_the_seed_alone(tiny: str) -> None:
    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        return next(load_model(ModelConfig(path=tiny, dtype="float32", init="random"), seed=seed).parameters()).detach()

    pretrained = next(load_model(ModelConfig(path=tiny, dtype="float32")).parameters()).detach()
    assert torch.equal(weights(1, 5), weights(1, 6))
    assert not torch.equal(weights(1, 5), weights(2, 5)) and not torch.equal(weights(1, 5), pretrained)


def test_frozen_start(tiny: str) -> None:
    model = load_model(ModelConfig(path=tiny, dtype="float32", lora=LoraConfig()), train=False)
    assert not is_lora(model) and not model.training and not any(p.requires_grad for p in model.parameters())


def test_lora(tiny: str) -> None:
    model = load_model(ModelConfig(path=tiny, dtype="float32", lora=LoraConfig(r=4, alpha=8.0)))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    # 7 linear layers in each of 2 blocks, two halves each; the head is left alone
    assert is_lora(model) and len(trainable) == 2 * 7 * 2 and all(".lora_" in name for name in trainable)
    assert plain(model).get_output_embeddings().weight is plain(model).get_input_embeddings().weight
    some = load_model(ModelConfig(path=tiny, dtype="float32", lora=LoraConfig(r=4, targets=["q_proj"])))
    assert sum(p.requires_grad for p in some.parameters()) == 2 * 2


def test_only_what_is_named_learns(tiny: str) -> None:
    model = load_model(ModelConfig(path=tiny, dtype="float32", train_only=r"layers\.1\.mlp\."))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    with pytest.raises(ValueError, match=r"train_only='expert' finds no trainable parameter; their names look like model\.embed"):
        load_model(ModelConfig(path=tiny, dtype="float32", train_only="expert"))


def test_gradient_checkpointing_is_on(tiny: str) -> None:
    model = load_model(ModelConfig(path=tiny, dtype="float32", gradient_checkpointing=True))
    assert model.is_gradient_checkpointing
    assert not load_model(ModelConfig(path=tiny, dtype="float32")).is_gradient_checkpointing


def test_clear_errors(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.dtype='float16'"):
        load_model(ModelConfig(path=tiny, dtype="float16"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.path is not set"):
        load_model(ModelConfig(dtype="float32"))
    with pytest.raises(ValueError, match=r"config.json"):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"))
    with pytest.raises(ValueError, match=r"model.lora.targets names the output head"):
        load_model(ModelConfig(path=tiny, dtype="float32", lora=LoraConfig(targets=["lm_head"])))


def test_pickled_weights_are_refused(tiny: str, tmp_path: Path) -> None:
    """A folder with a pickle in place of safetensors is never opened."""
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    torch.save(load_model(ModelConfig(path=tiny, dtype="float32")).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"))


def test_code_in_a_model_folder_does_not_run(tiny: str, tmp_path: Path) -> None:
    import json

    config = json.loads((Path(tiny) / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"))
    assert not (tmp_path / "ran").exists()
