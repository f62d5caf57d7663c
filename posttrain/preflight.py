"""What can be known to fail before a run starts anything: settings that fit nobody, missing GPUs, addresses, models and data.

Every function raises :class:`ConfigError` (or the data's own :class:`DataError`) with what to change; nothing is started here.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain import cluster
from posttrain.config import ClusterConfig, ConfigError, DataConfig, RunConfig

PREVIOUS = "<previous stage>"
"""``model.path`` of a stage that begins where the one before it ended."""
ROWS = 2000
"""Rows of each data set that a run reads before it starts anything; the rest is read when its stage begins."""


def preflight(stages: Mapping[str, RunConfig], say: Callable[[str], None] = print) -> None:
    """Raise what can be known to fail before a cluster, an engine or a learner starts: GPUs, cluster address, models, data of every stage.

    Settings that cannot act are counted to ``say`` when all is well; with ``strict=true`` they are an error.
    """
    first = next(iter(stages.values()))
    lines: list[str] = []
    resources(first.cluster, cluster.demand(dict(stages)))
    with tempfile.TemporaryDirectory() as scratch:
        previous: str | None = None
        for name, config in stages.items():
            with _stage(name, len(stages) > 1):
                lines += [(f"stage {name}: " if len(stages) > 1 else "") + line for line in _idle(config)]
                names(config)
                if config.model.path == PREVIOUS and previous is None and config.init_from is None:
                    raise ConfigError(
                        "model.path is not set, and the stage before exports nothing; set checkpoint.export=true there, or model.path"
                    )
                ready, tokenizer = model(config, Path(scratch) / name, previous)
                records = _records(replace(ready, data=_head(ready.data, ROWS)), tokenizer)
                context(ready, records)
                previous = ready.model.path if config.checkpoint.export else None
    if lines:
        say(f"{len(lines)} setting{'s' if len(lines) > 1 else ''} cannot act in this run; posttrain explain with the same words says which and why")


def preflight_evaluation(config: RunConfig, gpus: float) -> None:
    """What ``posttrain eval`` needs.  Raises :class:`ConfigError` naming the setting."""
    if config.data.eval is None:
        raise ConfigError("data.eval is not set: give data.eval.path=FILE or choose data=NAME with held-out rows")
    if not config.reward.fn:
        raise ConfigError("evaluation needs a reward to say what is right: choose reward=NAME")
    if config.model.path is None and config.model.tiny is None:
        raise ConfigError("which model? give model.path=FOLDER_OR_ID")
    names(config)
    resources(config.cluster, gpus)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
"""Names by which a model's settings say that it is a mixture."""


@contextmanager
def _stage(name: str, several: bool) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if not several:
            raise
        raise ConfigError(f"stage {name}: {error}") from error


def idle(config: RunConfig) -> list[str]:
    """A line for every setting that cannot do anything in this run."""
    from posttrain.report.explain import facts_of, idle_settings, settings_that_cannot_act

    found = [*settings_that_cannot_act(config.loss, config.advantage, facts_of(config)), *idle_settings(config)]
    return [f"cannot act here: {text}" for text in found]


def _idle(config: RunConfig) -> list[str]:
    lines = idle(config)
    if lines and config.strict:
        raise ConfigError(f"strict=true: {lines[0]}" + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))
    return lines


def resources(config: ClusterConfig, gpus: float) -> None:
    """Whether the cluster answers, or, on this machine, whether it has as many GPUs as the run asks for."""
    if config.address is not None:
        reachable(config.address)
    elif gpus:
        import torch

        if gpus > (count := torch.cuda.device_count()):
            raise ConfigError(
                f"cluster.device=cuda: the run asks for {gpus:g} GPUs and this machine has {count}; use cluster=cpu, fewer engines or ranks "
                "(rollout.num_engines, learner.world_size), smaller shares (cluster.gpus_per_learner, cluster.gpus_per_engine), or "
                "cluster.address=HOST:PORT for a cluster with more"
            )


def reachable(address: str, timeout_s: float = 5.0) -> None:
    """Whether something that could be Ray (it speaks HTTP/2, as gRPC does) answers at ``HOST:PORT``.  ``auto`` is left to Ray itself."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdigit():
        raise ConfigError(f"cluster.address={address}: write HOST:PORT, or auto for the cluster of this machine")
    fix = "start one with 'ray start --head', or leave cluster.address out for a cluster of its own"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as link:
            if os.environ.get("RAY_USE_TLS") in ("1", "true"):
                return
            link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            answer = link.recv(9)
    except TimeoutError:
        raise ConfigError(f"cluster.address={address}: no Ray cluster answers there within {timeout_s:g} s; {fix}") from None
    except OSError as error:
        raise ConfigError(f"cluster.address={address}: no Ray cluster answers there ({error.strerror or error}); {fix}") from None
    if len(answer) < 9 or answer[3] != 4:
        raise ConfigError(f"cluster.address={address}: that port is in use by something that is not Ray; {fix}")


def names(config: RunConfig) -> None:
    """Names that nothing in the run answers to: in weights, metric and gate."""
    from posttrain.reward.combine import Sum

    reward = config.reward
    if reward.fn:
        try:
            (reward.combine or Sum(reward.weights)).check(reward.fn)
        except ValueError as error:
            raise ConfigError(f"reward.weights: {error}") from error
    for key, metric in _metrics(config).items():
        if metric is not None and reward.fn and metric.split("/")[0] not in (*reward.fn, "reward"):
            advice = "null takes them combined" if key == "eval.metric" else "reward takes them combined"
            raise ConfigError(f"{key}={metric}: the rewards are {', '.join(reward.fn)}; {advice}")
    asked = {"mixture.gate": getattr(config.mixture.gate, "uses_demos", False), "rollout.strategy": getattr(config.rollout.strategy, "needs_demos", False)}
    for key in (key for key, asks in asked.items() if asks and config.data.demos is None):
        raise ConfigError(f"{key} asks for demonstrations but data.demos is not set: give data.demos.path=FILE")


def _metrics(config: RunConfig) -> dict[str, str | None]:
    """Settings that name a reward, beside the weights."""
    found: dict[str, str | None] = {"eval.metric": config.eval.metric}
    if config.rollout.kind == "vllm":
        gates = {"mixture.gate": config.mixture.gate}
        gates |= {f"mixture.gate.gates.{name}": gate for name, gate in getattr(config.mixture.gate, "gates", {}).items()}
        for key, gate in gates.items():
            for path, part in ((key, gate), (f"{key}.success", getattr(gate, "success", None))):
                found[f"{path}.metric"] = getattr(part, "metric", None)
        found["rollout.strategy.metric"] = getattr(config.rollout.strategy, "metric", None)
    return found


def model(config: RunConfig, scratch: Path, start_from: str | None) -> tuple[RunConfig, Any]:
    """The config with the model it starts from, and its tokenizer.  Raises :class:`ConfigError` when there is no such model."""
    from posttrain.build import prepare_model

    given = config.init_from or start_from or config.model.path
    folder = Path(given) if given else None
    key = "init_from" if config.init_from else "model.path"
    if given is not None and not Path(given).exists() and (given.startswith((".", "/", "~")) or given.count("/") > 1):
        home = " (write the whole path: ~ is not filled in)" if Path(given).expanduser().exists() else ""
        raise ConfigError(f"{key}={given}: there is no such folder{home}")
    if folder is not None and folder.is_dir():
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"{key}={given}: the folder holds no model (no config.json); give a Hugging Face folder, such as export/ of a run"
            )
        if config.model.init == "pretrained" and not list(folder.glob("*.safetensors")):
            raise ConfigError(
                f"{key}={given}: the folder holds no *.safetensors file; other formats can run code and are refused: convert the weights"
            )
        if not any(any(folder.glob(p)) for p in ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.tekken*")):
            raise ConfigError(f"{key}={given}: the folder holds no tokenizer (tokenizer.json); copy it from the model it belongs to")
    if config.model.chat_template and not Path(config.model.chat_template).is_file():
        raise ConfigError(f"model.chat_template={config.model.chat_template}: there is no such file")
    own_code = ConfigError(
        f"{key}={given}: the model brings code of its own, which is not run; model.trust_remote_code=true runs it, if you trust whoever wrote it"
    )
    if folder is not None and not config.model.trust_remote_code and _names_code(folder / "config.json"):
        raise own_code
    try:
        return prepare_model(config, scratch, start_from)
    except ConfigError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise own_code from error
        if folder is None or folder.exists() or error.__cause__ is None:
            raise
        reason = (str(error.__cause__).strip().splitlines() or [type(error.__cause__).__name__])[0]
        raise ConfigError(
            f"{key}={given} is neither a folder here (looked in {Path.cwd()}) nor a model that could be loaded from the Hugging Face hub: {reason}"
        ) from error
    except TypeError as error:
        raise ConfigError(f"model.tiny: {error}") from error


def _names_code(path: Path) -> bool:
    """Whether a model's settings name classes of its own and an architecture that the library does not have."""
    from transformers import CONFIG_MAPPING

    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # a folder without one, or a damaged one, has a message of its own
    return "AutoConfig" in settings.get("auto_map", {}) and settings.get("model_type") not in CONFIG_MAPPING


def _head(data: DataConfig, limit: int) -> DataConfig:
    from posttrain.data.load import as_spec

    def head(source: Any, name: str) -> Any:
        spec = as_spec(source, name)
        return replace(spec, limit=limit if spec.limit is None else min(limit, spec.limit))

    sources = {name: getattr(data, name) for name in ("train", "eval", "demos")}
    return replace(data, **{name: head(source, f"data.{name}") for name, source in sources.items() if source is not None})


def _records(config: RunConfig, tokenizer: Any) -> list[Any]:
    from posttrain.build import load_stage_data
    from posttrain.data.load import NothingUsable

    try:
        return load_stage_data(config, tokenizer)[0]
    except NothingUsable as error:
        if error.read >= ROWS:  # there may be usable rows after these
            return []
        raise


def context(config: RunConfig, records: list[Any]) -> None:
    """Whether prompts with their answers, and given texts, fit into the positions the model knows, and whether there are experts to replay."""
    from transformers import AutoConfig

    from posttrain.build import forced_tokens
    from posttrain.records import Demo, Pair

    assert config.model.path is not None
    text = AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code).get_text_config()
    if config.learner.routing != "own" and not any(getattr(text, name, None) for name in EXPERTS):
        raise ConfigError(f"learner.routing={config.learner.routing} replays the experts of a mixture, and the settings of {config.model.path} name none; set learner.routing=own")
    limit = getattr(text, "max_position_embeddings", None)
    scaled = (getattr(text, "rope_scaling", None) or {}).get("factor")
    if not isinstance(limit, int) or scaled:
        return
    rollout, data = config.rollout, config.data
    if cluster._samples(config):
        answer = max(rollout.max_tokens, config.eval.max_tokens or 0)
        forced = forced_tokens(config)
        asked = rollout.max_model_len or data.max_prompt_tokens + answer + forced + 1
        if forced >= asked:
            raise ConfigError(
                f"rollout.max_model_len={asked} leaves no room for the words that force an answer and the answer ({forced} tokens): raise it, shorten "
                "rollout.strategy.text, or lower rollout.strategy.answer_tokens"
            )
        if rollout.environment is not None:
            from posttrain.rollout.environment import check_environment, longest

            try:
                check_environment(rollout.environment)
            except ValueError as error:
                raise ConfigError(f"rollout.environment: {error}") from error
            asked = rollout.max_model_len or longest(rollout.environment, data.max_prompt_tokens, answer) + 1
            if asked > limit:
                raise ConfigError(
                    f"the model's context is {limit} tokens, but an episode of {rollout.environment.max_turns} answers of {answer} tokens with replies of "
                    f"{rollout.environment.max_reply_chars} characters may need {asked}; lower rollout.max_tokens or the environment's limits, or set "
                    "rollout.max_model_len: episodes that do not fit then end early"
                )
        if asked > limit:
            raise ConfigError(
                f"the model's context is {limit} tokens, but data.max_prompt_tokens={data.max_prompt_tokens} and answers of {answer} need {asked}"
                f"{f' with {forced} of forced answers' if forced else ''}; "
                "lower data.max_prompt_tokens, rollout.max_tokens or eval.max_tokens"
            )
    demos = [d for r in records for d in ((r.chosen, r.rejected) if isinstance(r, Pair) else (r,) if isinstance(r, Demo) else ())]
    longest = max(((sum(len(s.ids) for s in d.segments), d.id) for d in demos), default=(0, ""))
    if longest[0] > limit:
        raise ConfigError(
            f"data.train: row {longest[1]} has {longest[0]} tokens, more than the model's context of {limit}; "
            f"set data.max_length={limit} with data.truncation=drop or end"
        )
