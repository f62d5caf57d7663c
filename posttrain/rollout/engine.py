"""One vLLM engine: token ids in, token ids and the log-probs they were sampled with out, under weights whose version is known.

``VllmEngine`` is a plain object that lives in the calling process and can be driven step by step; ``actor.py`` puts one into a Ray actor.

What is fixed here, because a wrong value is silent: log-probs are *processed* (after temperature, top-k and top-p), the dtype is
explicit, the model's ``generation_config.json`` changes no sampling parameter (its end-of-text ids are still obeyed), nothing but
safetensors is read, and a stop string is matched with special tokens spelt out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.records import Finish, Sampling
from posttrain.sync.base import SyncError, check_version, compare

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """One sample to draw.  ``ids`` is the prompt; ``sampling.seed`` makes the draw its own random stream."""

    id: str
    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Sampled:
    """What came back.  ``logprobs[t]`` is the log-prob of ``ids[t]`` under the distribution it was drawn from.

    ``spans``: ``(version, start, end)``, which weights drew which tokens; ``version`` is the oldest.  The token that stopped it (end of
    text, or the last one of a stop string) is included.  ``finish`` is ``env_error`` for a request that could not be sampled, with the
    reason in ``error``.  ``routing``: ``[prompt and answer, layers, K]`` int16, the experts that read each token, where the engine records them.
    """

    id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    version: int
    spans: tuple[tuple[int, int, int], ...] = ()
    error: str = ""
    routing: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built; picklable.

    ``model``: a Hugging Face folder or id.  ``dtype`` is never guessed.  ``kv_cache_gb`` sizes the CPU cache, and
    ``gpu_memory_utilization`` the GPU's.  ``threads``: CPU threads, null leaves torch's default.  ``version``: of the weights on disk.
    ``return_routing``: record the experts of a mixture; every prompt is then read in full for each of its answers.
    """

    model: str
    dtype: str = "bfloat16"
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = True
    prefix_caching: bool = True
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    threads: int | None = None
    version: int = 0
    return_routing: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"rollout dtype {self.dtype!r}: choose from {', '.join(DTYPES)} ('auto' would sample a float32 model in bfloat16)"
            )
        if self.tensor_parallel != 1:
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel}: an engine drives one device; raise rollout.num_engines instead"
            )


@contextlib.contextmanager
def _quiet_import(config: EngineConfig) -> Iterator[None]:
    """vLLM reads the environment while it is built, and writes to it: set what it must see, put back what it must not leave."""
    required = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if config.return_routing:
        required |= {"VLLM_USE_V2_MODEL_RUNNER": "0"}  # the recorder follows the first runner's order of tokens
    if config.device == "cpu":
        required |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    for name, value in required.items():
        os.environ[name] = value
    for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(name, value)
    import torch

    if config.device == "cpu" and "torch._dynamo" in sys.modules:  # imported before, so it has read the environment already
        sys.modules["torch._dynamo"].config.disable = True

    names = ("LD_PRELOAD", "OMP_NUM_THREADS", "NUMEXPR_MAX_THREADS", "LOCAL_WORLD_SIZE", "VLLM_DIST_IDENT")
    keep = {name: os.environ.get(name) for name in names}
    set_num_threads, generator = torch.set_num_threads, torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # the CPU worker replaces it with a function that only warns
        torch.set_rng_state(generator)
        for name, value in keep.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class VllmEngine:
    """An in-process vLLM engine.  ``version``: of the weights it holds; ``None`` after a failed update, when it refuses to sample."""

    num_open = 0

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._version: int | None = config.version
        self._live: dict[str, Request] = {}
        self._internal: dict[str, str] = {}
        self._early: list[Sampled] = []  # finished while somebody else was stepping
        with _quiet_import(config):
            import torch

            if config.threads is not None:
                torch.set_num_threads(config.threads)
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            from posttrain.sync.vllm_model import register_plain_loader, unpack_heads

            args: dict[str, Any] = {
                "model": config.model,
                "dtype": config.dtype,
                "seed": config.seed,
                "max_model_len": config.max_model_len,
                "max_num_seqs": config.max_num_seqs,
                "enforce_eager": config.enforce_eager or config.device == "cpu",
                "enable_prefix_caching": config.prefix_caching and not config.return_routing,
                "trust_remote_code": config.trust_remote_code,
                "logprobs_mode": "processed_logprobs",
                "max_logprobs": -1,
                "generation_config": "vllm",
                "disable_log_stats": True,
                "use_tqdm_on_load": False,
                "async_scheduling": False,
                "load_format": "safetensors",
            }
            if config.device == "cpu":
                # a prompt computed in pieces must rewind its random stream after each, which CPU generators cannot do
                args |= {"load_format": register_plain_loader(), "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30), "enable_chunked_prefill": False}
            else:
                args |= {"gpu_memory_utilization": config.gpu_memory_utilization}
            _group_of_experts()
            self._engine = LLMEngine.from_engine_args(EngineArgs(**args))
            VllmEngine.num_open += 1
            if config.device == "cpu":
                unpack_heads(self.model)
            self._recorder = None
            if config.return_routing:
                from posttrain.rollout.experts import Recorder

                self._recorder = Recorder(self._runner)
        self._engine.set_weight_version(str(config.version))
        self.max_model_len = int(self._engine.model_config.max_model_len)
        self.vocab_size = int(self._engine.model_config.get_vocab_size())
        self.stop_ids = _end_ids(config.model)

    # -- what it is ----------------------------------------------------------------------------------------------------
    @property
    def _runner(self) -> Any:
        worker = self._engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    @property
    def model(self) -> Any:
        """The vLLM model itself."""
        return self._runner.get_model()

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def num_unfinished(self) -> int:
        return len(self._live) + len(self._early)

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        """Hugging Face name -> (elements, sum of bits), of the tensors the engine computes with."""
        from posttrain.sync.fingerprint import fingerprint
        from posttrain.sync.vllm_model import named_parts

        return fingerprint(named_parts(self.model))

    # -- sampling ------------------------------------------------------------------------------------------------------
    def submit(self, requests: Sequence[Request], expect_version: int | None = None) -> list[Sampled]:
        """Queue requests.  Returns those that can never run, finished as ``env_error``.  Raises :class:`SyncError` when the engine's
        weights are not ``expect_version`` (or a failed update left none), ``ValueError`` for an id that is already running."""
        if self._version is None:
            raise SyncError("the last weight update failed, so the engine holds a mixture of versions; publish again before sampling")
        if expect_version is not None and expect_version != self._version:
            raise SyncError(
                f"asked to sample with version {expect_version} but the engine holds version {self._version}; publish that version first"
            )
        refused = []
        for request in requests:
            if request.id in self._live:
                raise ValueError(f"request id {request.id!r} is already running; ids must be unique")
            if problem := self._problem(request):
                refused.append(Sampled(request.id, (), (), "env_error", self._version, error=problem))
                continue
            prompt = {"type": "token", "prompt_token_ids": list(request.ids)}
            self._internal[request.id] = self._engine.add_request(request.id, prompt, self._params(request.sampling))
            self._live[request.id] = request
        return refused

    def step(self) -> list[Sampled]:
        """One engine step for everything that runs: one more token each.  Returns the requests it finished."""
        finished, self._early = self._early, []
        if self._live:
            finished += [self._finish(output) for output in self._engine.step() if output.finished]
        return finished

    def abort(self, ids: Iterable[str] | None = None) -> list[Sampled]:
        """Stop requests (all when ``ids`` is None) and return what they had, finished as ``aborted``."""
        from vllm.v1.engine import FinishReason

        stopped = []
        for name in list(self._live) if ids is None else [i for i in ids if i in self._live]:
            internal = self._internal[name]
            state = self._engine.output_processor.request_states[internal]
            partial = state.make_request_output([], None, FinishReason.ABORT, None)
            self._engine.abort_request([internal], internal=True)
            stopped.append(self._finish(partial, "aborted"))
        return stopped

    def sample(self, requests: Sequence[Request], expect_version: int | None = None) -> list[Sampled]:
        """Draw every request and return them in order."""
        if len({r.id for r in requests}) != len(requests):
            raise ValueError("request ids must be unique within a call")
        done = {s.id: s for s in self.submit(requests, expect_version)}
        wanted = {r.id for r in requests}
        while wanted - done.keys():
            done.update((s.id, s) for s in self.step())
        return [done[r.id] for r in requests]

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of given tokens, ``result[i][t]`` for ``sequences[i][t]``; the first of each sequence has none and is NaN.

        At a temperature other than 1 the whole row of probabilities is fetched and rescaled, which is slow: a check, not a scorer.
        """
        import torch
        from vllm import SamplingParams

        count = 0 if temperature == 1.0 else -1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=count, flat_logprobs=True, detokenize=False)
        names = [f"logprobs-{i}" for i in range(len(sequences))]
        waiting = set()
        for name, ids in zip(names, sequences, strict=True):
            if problem := self._problem(Request(name, tuple(ids))):
                raise ValueError(f"{name}: {problem}")
            if len(ids) > 1:
                self._engine.add_request(name, {"type": "token", "prompt_token_ids": list(ids)}, params)
                waiting.add(name)
        outputs: dict[str, Any] = {}
        while waiting - outputs.keys():
            for output in self._engine.step():
                if output.finished and output.request_id in waiting:
                    outputs[output.request_id] = output.prompt_logprobs
                elif output.finished:
                    self._early.append(self._finish(output))
        results = []
        for name, ids in zip(names, sequences, strict=True):
            row = [float("nan")]
            for t in range(1, len(ids)):
                flat = outputs[name]
                start, end = flat.start_indices[t], flat.end_indices[t]
                tokens, values = flat.token_ids[start:end], torch.tensor(flat.logprobs[start:end], dtype=torch.float64)
                if count:  # the token itself comes first, then the whole row
                    tokens, values = tokens[1:], torch.log_softmax(values[1:] / temperature, 0)
                row.append(float(values[tokens.index(ids[t])]))
            results.append(row)
        return results

    def _problem(self, request: Request) -> str:
        sampling = request.sampling
        if not request.ids:
            return "the prompt is empty"
        if len(request.ids) >= self.max_model_len:
            return (
                f"the prompt has {len(request.ids)} tokens and max_model_len={self.max_model_len} leaves no room for an answer; raise "
                "rollout.max_model_len or lower data.max_prompt_tokens"
            )
        if min(request.ids) < 0 or max(request.ids) >= self.vocab_size:
            return (
                f"the prompt holds token id {max(request.ids)} but the model's vocabulary has {self.vocab_size}; tokenizer and model "
                "do not match"
            )
        if sampling.max_tokens < 1:
            return f"max_tokens={sampling.max_tokens}; at least one token must be sampled"
        return ""

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            stop_token_ids=sorted({*sampling.stop_token_ids, *self.stop_ids}),
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _finish(self, output: Any, finish: Finish | None = None) -> Sampled:
        request = self._live.pop(output.request_id)
        internal = self._internal.pop(request.id)
        answer = output.outputs[0]
        ids = tuple(answer.token_ids)
        flat = answer.logprobs
        logprobs = tuple(flat.logprobs[flat.start_indices[t]] for t in range(len(ids)))
        if any(flat.token_ids[flat.start_indices[t]] != token for t, token in enumerate(ids)):
            raise AssertionError("vLLM returned log-probs of other tokens than it sampled")
        spans = tuple((int(s.version), s.start, s.end) for s in answer.weight_versions or ())
        oldest = min((version for version, _, _ in spans), default=self._version if self._version is not None else -1)
        routing = None if self._recorder is None else self._recorder.take(internal, len(request.ids) + len(ids))
        return Sampled(request.id, ids, logprobs, finish or answer.finish_reason, oldest, spans, routing=routing)

    # -- weights -------------------------------------------------------------------------------------------------------
    def load_weights(
        self,
        version: int,
        buckets: Iterable[Any],
        fingerprint: Mapping[str, tuple[int, int]] | None = None,
        running: Literal["refuse", "recompute"] = "refuse",
    ) -> None:
        """Take new weights in place, drop every cached key and value, and compare fingerprints when the learner's is given.

        ``running`` says what becomes of requests in flight: ``refuse`` the update, or ``recompute`` their cache under the new weights
        and go on (their tokens keep the version and log-prob they were sampled with).  Raises :class:`SyncError`; after a failed load
        the engine refuses to sample.
        """
        from posttrain.sync.object_store import read
        from posttrain.sync.vllm_model import load

        if self._version is not None:
            check_version(self._version, version)
        if self._live and running == "refuse":
            raise SyncError(f"version {version}: {len(self._live)} requests are running; wait for them or update with running='recompute'")
        self._version = None
        try:
            load(self._runner, read(buckets), version)
            if not self._engine.reset_prefix_cache(reset_running_requests=bool(self._live)):
                raise SyncError(f"version {version}: the key-value cache could not be cleared, old and new weights would mix")
            if fingerprint is not None:
                compare(fingerprint, self._with_tied(fingerprint), version)
        except BaseException:
            self._early += self.abort()
            raise
        self._engine.set_weight_version(str(version))
        self._version = version

    def _with_tied(self, expected: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        from posttrain.sync.vllm_model import is_tied

        own = self.fingerprint()
        if "lm_head.weight" in expected and "lm_head.weight" not in own and is_tied(self.model):
            own["lm_head.weight"] = own["model.embed_tokens.weight"]
        return own

    def close(self) -> None:
        """Free the model.  The last engine of a process also leaves vLLM's process groups behind it."""
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is None:
            return
        from vllm.distributed import parallel_state

        if self.config.device == "cpu":
            engine.engine_core._finalizer.detach()  # its shutdown collects all garbage three times over, which here only costs seconds
        else:
            engine.engine_core.shutdown()
        VllmEngine.num_open -= 1
        if VllmEngine.num_open == 0:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _group_of_experts() -> None:
    """vLLM makes its process groups with the first model of a process, that of experts only for a mixture: a mixture that comes later gets one here."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        backend = dist.get_backend(world.device_group)
        parallel_state._EP = parallel_state.init_model_parallel_group([[world.rank]], world.local_rank, backend, group_name="ep")


def _end_ids(model: str) -> tuple[int, ...]:
    """End-of-text ids in the model's generation_config.json: a property of the model, kept although its sampling defaults are not."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids or ())
