"""The reward pool: failures are masked, counted and budgeted; deadlines kill; order and splitting change nothing."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.reward.base import Reward
from posttrain.reward.combine import Gate, Sum
from posttrain.reward.pool import ErrorBudget, RewardBudgetError, RewardPool
from posttrain.reward.rules import Exact, SoftOverlong

sys.path.insert(0, str(Path(__file__).parent))
import functions


def group(name: str, *texts: str, env: str = "default", finish: str = "stop") -> Group:
    prompt = Prompt(name, (1,), text="question", answer="yes", env=env)
    segment = Segment((5, 6), Source.policy, logprobs=(0.0, 0.0), version=0)
    return Group(prompt, tuple(Rollout(f"{name}.{i}", prompt, (segment,), text=t, finish=finish) for i, t in enumerate(texts)))


def inline(function) -> Reward:
    function.execution = "inline"
    return function


def score(pool: RewardPool, *groups: Group, step: int = 0, progress: float = 0.0) -> list[Group]:
    try:
        return asyncio.run(pool.score(groups, step, progress))
    finally:
        pool.close()


def test_values_are_combined_and_the_vector_is_kept():
    pool = RewardPool({"right": Exact(), "short": SoftOverlong(3, 2)}, Sum({"right": 1.0, "short": 0.5}))
    (first,) = score(pool, group("a", "yes", "no"))
    assert [r.reward for r in first.rollouts] == [0.75, -0.25]
    assert {n: s.value for n, s in first.rollouts[0].scores.items()} == {"right": 1.0, "short": -0.5}
    assert pool.metrics["reward/mean"] == 0.25 and pool.metrics["reward/unshaped"] == 0.5 == pool.metrics["reward/right/mean"]
    assert pool.metrics["reward/std"] == 0.5 and pool.metrics["reward/constant_groups"] == 0.0
    assert pool.metrics["reward/right/ok"] == 2.0 and pool.metrics["reward/masked"] == 0.0


def test_every_kind_of_failure_is_masked_and_counted():
    pool = RewardPool({"moody": functions.moody}, timeout_s=2.0, num_workers=2, error_budget=1.0)
    texts = ("fine", "raise", "nan", "none", "exit", "hang", "spin", "fine")
    (done,) = score(pool, group("a", *texts))
    status = {t: r.scores["moody"].status for t, r in zip(texts, done.rollouts, strict=True)}
    assert status == {
        "fine": "ok",
        "raise": "error",
        "nan": "error",
        "none": "error",
        "exit": "error",
        "hang": "timeout",
        "spin": "timeout",
    }
    assert [r.reward for r in done.rollouts] == [1.0, None, None, None, None, None, None, 1.0]
    assert "broken verifier" in done.rollouts[1].scores["moody"].detail and "exit status 3" in done.rollouts[4].scores["moody"].detail
    counts = {k: v for k, v in pool.metrics.items() if k.startswith("reward/moody/")}
    assert counts == {
        f"reward/moody/{k}": v for k, v in {"ok": 2, "bad_format": 0, "timeout": 2, "error": 4, "mean": 1, "min": 1, "max": 1}.items()
    }
    assert pool.metrics["reward/masked"] == 6.0 and pool.metrics["reward/workers_killed"] == 3.0


def test_a_deadline_kills_the_process_and_its_children_and_the_pool_recovers(tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    pool = RewardPool({"moody": functions.moody}, timeout_s=3.0, num_workers=1, error_budget=1.0)
    asyncio.run(pool.score([group("a", "fine")], 0))
    before = pool._workers.workers[0].pid
    (done,) = asyncio.run(pool.score([group("b", "child", "fine")], 1))
    assert [r.scores["moody"].status for r in done.rollouts] == ["timeout", "ok"]
    child = int((tmp_path / "child").read_text())
    assert all(_gone(pid) for pid in (before, child))
    after = pool._workers.workers[0].pid
    pool.close()
    assert after not in (None, before) and _gone(after)


def _gone(pid: int, within_s: float = 10.0) -> bool:
    """No such process, or a zombie that only waits to be reaped."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_processor_time_is_limited_apart_from_the_clock():
    class Greedy:
        cpu_s = 0.3

        def __call__(self, completion):
            while completion == "spin":
                pass
            return 1.0

    pool = RewardPool({"greedy": Greedy()}, num_workers=1, timeout_s=600.0, error_budget=1.0)
    (done,) = score(pool, group("a", "spin", "fine"))
    assert [r.scores["greedy"].status for r in done.rollouts] == ["timeout", "ok"]
    assert "0.3 s" in done.rollouts[0].scores["greedy"].detail


def test_a_reward_that_cannot_be_loaded_stops_with_its_reason():
    class Broken:
        def __call__(self, completion):
            return 1.0

        def prepare(self):
            raise OSError("the model file is missing")

    with pytest.raises(ValueError, match="the model file is missing"):
        score(RewardPool({"broken": Broken()}, num_workers=1), group("a", "x"))


def test_no_worker_outlives_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, threading, time\n"
        "from posttrain.reward.worker import WorkerPool\n"
        "import functions\n"
        "pool = WorkerPool({'moody': functions.moody}, 1)\n"
        "pool.call('moody', {'completion': 'fine'}, 60)\n"
        "threading.Thread(target=pool.call, args=('moody', {'completion': 'spin'}, 600), daemon=True).start()\n"
        "print(pool.workers[0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    root, here = Path(__file__).parents[2], Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{here}"}
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    worker = int(run.stdout.readline())
    assert not _gone(worker, within_s=0.3)
    run.kill()
    run.wait()
    run.stdout.close()
    assert _gone(worker)


def test_sync_rewards_run_in_other_processes_and_closures_travel():
    offset = 10.0
    pool = RewardPool({"pid": functions.process_id, "closure": lambda completion: offset + len(completion)}, num_workers=1)
    (done,) = score(pool, group("a", "xy"))
    assert done.rollouts[0].scores["pid"].value != os.getpid()
    assert done.rollouts[0].scores["closure"].value == 12.0


def test_what_cannot_travel_is_refused_with_a_way_out():
    lock = threading.Lock()
    with pytest.raises(ValueError, match="execution = 'thread'"):
        RewardPool({"bad": lambda completion: lock.locked()})


def test_async_and_thread_rewards_have_deadlines_too():
    async def judge(completion):
        await asyncio.sleep(30 if completion == "slow" else 0)
        return 2.0

    def threaded(completion):
        time.sleep(2.0 if completion == "slow" else 0)
        return 3.0

    threaded.execution = "thread"
    pool = RewardPool({"judge": judge, "threaded": threaded}, timeout_s=1.0, error_budget=1.0)
    (done,) = score(pool, group("a", "quick", "slow"))
    assert done.rollouts[0].reward == 5.0
    assert {s.status for s in done.rollouts[1].scores.values()} == {"timeout"} and done.rollouts[1].reward is None


def test_async_concurrency_is_bounded():
    running = peak = 0

    async def judge(completion):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 1

    score(RewardPool({"judge": judge}, max_concurrency=3), group("a", *"abcdefgh"))
    assert peak == 3


def test_order_of_replies_changes_nothing():
    async def judge(completion):
        await asyncio.sleep(0.02 * (5 - int(completion)))
        return int(completion)

    (done,) = score(RewardPool({"judge": judge}), group("a", *"01234"))
    assert [r.reward for r in done.rollouts] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_group_rewards_see_whole_groups_however_the_batch_is_split():
    def rank(completions):
        return [sorted(completions).index(c) for c in completions]

    inline(rank)
    groups = [group("a", "y", "x", "z"), group("b", "q", "p")]
    together = score(RewardPool({"rank": rank}), *groups)
    apart = [score(RewardPool({"rank": rank}), g)[0] for g in groups]
    assert together == apart
    assert [r.reward for r in together[0].rollouts] == [1.0, 0.0, 2.0]
    with pytest.raises(ValueError, match="in pieces"):
        score(RewardPool({"rank": rank}), group("a", "x"), group("a", "y"))


def test_batch_scope_and_wrong_counts():
    seen = []

    def short(completions):
        seen.append(len(completions))
        return [1.0]

    inline(short).scope = "batch"
    groups = score(RewardPool({"short": short}, error_budget=1.0), group("a", "x", "y"), group("b", "z"))
    assert seen == [3] and all(r.scores["short"].status == "error" for g in groups for r in g.rollouts)


def test_a_failure_without_weight_harms_nobody():
    def broken(completion):
        raise RuntimeError("no")

    pool = RewardPool({"right": Exact(), "extra": inline(broken)}, Sum({"right": 1.0, "extra": 0.0}), error_budget=0.0)
    (done,) = score(pool, group("a", "yes", "no"))
    assert [r.reward for r in done.rollouts] == [1.0, 0.0] and pool.metrics["reward/extra/error"] == 2.0


def test_a_shut_gate_does_not_hide_a_failure():
    def broken(completion):
        raise RuntimeError("no")

    pool = RewardPool({"right": inline(broken), "form": Exact()}, Gate({"form": 1.0}), error_budget=1.0)
    assert [r.reward for r in score(pool, group("a", "yes", "no"))[0].rollouts] == [None, None]


def test_routes_choose_rewards_by_environment():
    def one(completion):
        return 1.0

    pool = RewardPool({"exact": Exact(), "one": inline(one)}, routes={"sums": ["exact"]})
    sums, other = score(pool, group("a", "no", env="sums"), group("b", "no"))
    assert set(sums.rollouts[0].scores) == {"exact"} and sums.rollouts[0].reward == 0.0
    assert set(other.rollouts[0].scores) == {"exact", "one"} and other.rollouts[0].reward == 1.0


def test_unfinished_rollouts_are_not_scored():
    pool = RewardPool({"exact": Exact()})
    (done,) = score(pool, group("a", "yes", finish="aborted"))
    assert done.rollouts[0].reward is None and not done.rollouts[0].scores and pool.metrics["reward/unfinished"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardPool({}), "no reward"),
        (lambda: RewardPool({"a/b": Exact()}), "must not contain"),
        (lambda: RewardPool({"a": Exact()}, Sum({"b": 1.0})), "names b"),
        (lambda: RewardPool({"a": Exact()}, primary="b"), "no reward 'b'"),
        (lambda: RewardPool({"a": Exact()}, routes={"e": ["b"]}), "no reward 'b'"),
        (lambda: RewardPool({"a": Exact()}, timeout_s=0), "positive"),
        (lambda: RewardPool({"a": Exact()}, error_budget=2.0), "error budget"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- the budget --------------------------------------------------------------------------------------------------------
def test_a_verifier_that_always_fails_stops_the_run_at_once():
    def broken(completion):
        raise RuntimeError("library missing")

    with pytest.raises(RewardBudgetError, match=r"'broken' failed on 4 of 4 .*step 7.*library missing"):
        score(RewardPool({"broken": inline(broken)}), group("a", *"abcd"), step=7)


def test_budget_is_a_share_of_a_whole_window():
    budget = ErrorBudget(0.01, 50)
    for step in range(50):  # 1 % exactly: 1 of 100 a step
        budget.add(step, {"r": (100, 1)}, {})
    with pytest.raises(RewardBudgetError):
        budget.add(50, {"r": (100, 2)}, {"r": "error: x"})
    budget = ErrorBudget(0.01, 50)
    budget.add(0, {"r": (64, 1)}, {})  # one unlucky sample in the first step is below 1 % of a window
    stopped = 0
    with pytest.raises(RewardBudgetError):
        for stopped in range(1, 50):
            budget.add(stopped, {"r": (64, 1)}, {})
    assert stopped == 32  # the 33rd failure passes 0.01 * 50 * 64


def test_budget_forgets_what_left_the_window_and_survives_a_restart():
    budget = ErrorBudget(0.1, 3)
    for step in range(3):
        budget.add(step, {"r": (10, 1)}, {})
    copy = ErrorBudget(0.1, 3)
    copy.load_state_dict(budget.state_dict())
    for b in (budget, copy):
        for step in range(3, 20):
            b.add(step, {"r": (10, 1)}, {})
        with pytest.raises(RewardBudgetError, match="4 of 30"):
            b.add(20, {"r": (10, 2)}, {})


def test_a_step_scored_in_several_calls_is_one_step_of_the_budget():
    whole, parts = ErrorBudget(0.1, 3), ErrorBudget(0.1, 3)
    for step in range(5):
        whole.add(step, {"r": (10, 1)}, {})
        parts.add(step, {"r": (4, 0)}, {})
        parts.add(step, {"r": (6, 1)}, {})
        assert parts.state_dict() == whole.state_dict()
