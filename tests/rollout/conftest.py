"""One engine for all tests of this folder (vLLM takes seconds to start), beside the transformers model whose weights it holds."""

import json
from pathlib import Path

import pytest
import torch

from posttrain.testing.tiny import create_tiny_model

SMALL = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}


class Twin:
    """A transformers model and an engine; ``perturb`` moves the first, ``weights`` is what a learner would publish."""

    def __init__(self, path: Path, dtype: str = "float32", **config):
        from transformers import AutoModelForCausalLM

        from posttrain.rollout.engine import EngineConfig, VllmEngine

        config = {"max_model_len": 256, "kv_cache_gb": 0.05, "max_num_seqs": 32, "threads": 1} | config
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.engine = VllmEngine(EngineConfig(model=str(path), dtype=dtype, **config))
        self.generator = torch.Generator().manual_seed(0)
        self.tied = self.model.config.tie_word_embeddings

    def perturb(self, size: float = 0.05) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=self.generator).to(parameter.dtype) * size)
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        return {k: v.detach() for k, v in self.model.state_dict().items() if not (self.tied and k == "lm_head.weight")}

    def next_version(self) -> int:
        return (self.engine.version or 0) + 1

    def reference(self, ids) -> list[float]:
        """log p(ids[t] | ids[:t]) for t >= 1, from a plain forward pass."""
        with torch.no_grad():
            table = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)
        return [float(table[t - 1, ids[t]]) for t in range(1, len(ids))]

    def gap(self, *sequences) -> float:
        rows = self.engine.logprobs(sequences)
        return max(abs(a - b) for ids, row in zip(sequences, rows, strict=True) for a, b in zip(self.reference(ids), row[1:], strict=True))

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(9, 90, (length,), generator=self.generator).tolist())


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """A tied model whose generation_config.json would change the sampling if anybody read it, and lists a second end-of-text id."""
    path = create_tiny_model(tmp_path_factory.mktemp("model"), **SMALL)
    given = json.loads((path / "generation_config.json").read_text())
    given |= {"eos_token_id": [given["eos_token_id"], 7], "do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 2.0}
    (path / "generation_config.json").write_text(json.dumps(given))
    return path


@pytest.fixture(scope="module")
def make_twin():
    """Further engines, closed at the end of the module."""
    made = []

    def make(path, **settings) -> Twin:
        made.append(Twin(path, **settings))
        return made[-1]

    yield make
    for twin in made:
        twin.engine.close()


@pytest.fixture(scope="package")
def twin(tiny_path) -> Twin:
    made = Twin(tiny_path)
    yield made
    made.engine.close()
