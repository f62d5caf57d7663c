"""Ray: start it or join it, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from posttrain.config import ClusterConfig, ConfigError, RunConfig
from posttrain.paths import OWN_CODE
from posttrain.reward.serve import num_engines


def demand(stages: dict[str, RunConfig]) -> float:
    """GPUs the hungriest stage asks for."""
    most = 0.0
    for config in stages.values():
        if config.cluster.device == "cuda":
            engines = config.rollout.num_engines if _samples(config) else 0
            shares = config.cluster.gpus_per_engine * config.rollout.tensor_parallel
            judged = sum(getattr(reward, "num_gpus", 0.0) for reward in config.reward.fn.values())
            judged += num_engines(config.reward.fn) * config.cluster.gpus_per_engine if _samples(config) else 0.0
            models = 1 if config.critic is None else 2
            most = max(most, models * config.learner.world_size * config.cluster.gpus_per_learner + engines * shares + judged)
    return most


def _samples(config: RunConfig) -> bool:
    return config.rollout.kind == "vllm" or _evaluates(config)


def _evaluates(config: RunConfig) -> bool:
    return config.eval.at_start or config.eval.at_end or bool(config.eval.every)


def _without_dashboard() -> None:
    """Tell Ray that its dashboard's packages are not wanted: its helpers then import a fraction of them and start in seconds, also on a slow
    machine, where the full set misses a deadline of 15 s that Ray does not let anybody change."""
    import ray._private.utils as utils

    if hasattr(utils, "get_dashboard_dependency_error"):
        utils.get_dashboard_dependency_error = lambda: ImportError("the dashboard is not used")


def _without_obituaries() -> None:
    """An actor's death is told by whoever waits for it, with what to change: a page of Ray's own about it is not wanted on the console.  What
    else Ray has to say (memory that ran out, say) is still shown."""
    import ray._private.worker as worker

    shown = worker.print_to_stdstream
    if getattr(shown, "quiet", False):
        return

    def show(data: Any, *more: Any, **named: Any) -> None:
        if not any(line.startswith("A worker died or was killed while executing a task") for line in data.get("lines", ())):
            shown(data, *more, **named)

    show.quiet = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = show


def _start(ray: Any, options: dict[str, Any], attempts: int) -> None:
    """``ray.init``, repeated when the node did not come up in time."""
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    for attempt in range(1, attempts + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            for child in psutil.Process().children(recursive=True):  # what a half-started node leaves running
                if child.pid not in before:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            if attempt == attempts or "timed out during startup" not in str(error):
                raise


@contextmanager
def session(config: ClusterConfig, gpus_wanted: float = 0.0) -> Iterator[Any]:
    """A Ray session for the length of a run.  A cluster this process started ends with it, also when the process is killed.

    Raises :class:`ConfigError` when GPUs are asked for and there are not enough.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the actors are the work: Ray would let everything else on the machine go first
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits gives its core away: engine and learner share them
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle workers cost a fifth of a core each on a small machine
    # a busy machine is slow, not dead: wait longer than Ray does, and start once more when one of its helpers came too late
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
    os.environ.setdefault("RAY_agent_register_timeout_ms", str(int(1000 * config.start_timeout_s)))
    import ray

    joined = config.address is not None
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": bool(os.environ.get("POSTTRAIN_ACTOR_LOGS")), "configure_logging": True}
    if joined:
        options["address"] = config.address
    else:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": config.num_cpus or max(os.cpu_count() or 1, 2),
            "object_store_memory": int(config.object_store_gb * 2**30),
            "_node_ip_address": "127.0.0.1",
        }
    if OWN_CODE:  # workers look beside the recipe, as they look in the folder the run was started from
        options["job_config"] = ray.job_config.JobConfig(_py_driver_sys_path=list(OWN_CODE))
    if not joined:
        _without_dashboard()
    _without_obituaries()
    try:
        _start(ray, options, attempts=1 if joined else 4)
    except ConnectionError as error:
        raise ConfigError(f"cluster.address={config.address}: no Ray cluster answers there ({error}); start one with 'ray start --head', or leave the address out") from error
    try:
        available = float(ray.cluster_resources().get("GPU", 0.0))
        if gpus_wanted > available:
            raise ConfigError(
                f"cluster.device=cuda: the run asks for {gpus_wanted:g} GPUs and Ray sees {available:g}; use cluster=cpu, fewer engines or ranks "
                f"(rollout.num_engines, learner.world_size), or smaller shares (cluster.gpus_per_learner, cluster.gpus_per_engine)"
            )
        yield ray
    finally:
        ray.shutdown()
