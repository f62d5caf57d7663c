#!/usr/bin/env python3
"""Does the test suite notice errors in the mathematics?  Plants small ones, one at a time, and runs the tests against each.

    scripts/mutate.py                                  120 errors; exit code 1 when fewer than 95 % are noticed
    scripts/mutate.py --number 40 --seed 7             another sample
    scripts/mutate.py --only posttrain/loss/mask.py    errors in one file (or folder)
    scripts/mutate.py --list                           what would be planted; nothing is run

Errors go into the code of ``posttrain/{loss,advantage,mixture}``: never into docstrings, messages, types or ``formula`` texts, and never
into this checkout, but into a copy in a temporary directory.  First the tests run once as they are, which says which of them execute which statement:
those run against an error there, until the first failure.  A test that runs out of time counts as a failure.  What fails without any error is left out,
and said.

Two ways to plant one, ``--jobs`` at a time.  In a process that has collected the tests, and forks for every error, the function is given the code with
the error.  What that cannot do (a default, a line outside functions) and what no test notices there (a test may start processes of its own) is written
into the file of a copy, and everything is imported again.

Errors that change nothing which could be observed stand in ``scripts/mutants_equivalent.txt`` with the reason; another is drawn instead.
"""

from __future__ import annotations

import argparse
import builtins
import compileall
import functools
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mutations import Mutant, candidates, draw, scope_of, statement_line, transplant, with_probes

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "scripts" / "mutants_equivalent.txt"
COPIED = ("posttrain", "kernels", "configs", "recipes", "docs", "tests", "pyproject.toml")
PAGES = ["tests/report/test_terms_doc.py", "tests/report/test_methods_doc.py"]
CONTRACT = [f"tests/contract/test_{name}.py" for name in ("terms", "slicing", "contrib", "nothing_is_ignored")]
MATHS = ["tests/loss", *PAGES, *CONTRACT]
TESTS = {
    "posttrain/loss": [*MATHS, "tests/mixture"],
    "posttrain/advantage": ["tests/advantage", "tests/mixture/test_edges.py", "tests/mixture/test_left_out.py", "tests/mixture/test_declared.py", *MATHS],
    "posttrain/mixture": ["tests/mixture", "tests/rollout/test_environment.py", "tests/contract/test_stages.py", *MATHS],
}
TABLE = "tests/mixture/test_declared.py"
"""Reads what classes declare, and executes nothing of them."""
ENOUGH = 0.95
TEST_S, MEMORY = 60, 8 << 30
SEEN, IMPORT = "_mutate_seen", "(while tests are imported)"

Key = tuple[str, str, str, str]


def read_equivalent(path: Path) -> dict[Key, str]:
    """Blocks of four lines, ``FILE FUNCTION``, ``- before``, ``+ after``, ``= reason``, with blank lines between; # begins a comment."""
    out: dict[Key, str] = {}
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")) if path.exists() else ""
    for block in filter(None, (b.strip() for b in text.split("\n\n"))):
        lines = block.splitlines()
        if len(lines) != 4 or [line[:2] for line in lines[1:]] != ["- ", "+ ", "= "]:
            raise SystemExit(f"{path}: a block is FILE FUNCTION, then lines that begin with '- ', '+ ' and '= '; this one is not:\n{block}")
        file, function = lines[0].split()
        out[file, function, lines[1][2:].strip(), lines[2][2:].strip()] = lines[3][2:].strip()
    return out


class Plugin:
    """What pytest does with the tests: which and in which order (``rank``), what came out, and which lines with probes each executed."""

    def __init__(self, rank: dict[str, tuple] | None) -> None:
        self.rank = rank
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.lines: set[tuple[str, int]] = set()

    def cache(self, function: Callable) -> Callable:
        """``functools.cache`` which also remembers the lines that made a value: every test that uses it depends on them."""
        known: dict[tuple, tuple[Any, set]] = {}

        @functools.wraps(function)
        def cached(*args: Any, **kwargs: Any) -> Any:
            key = (args, tuple(sorted(kwargs.items())))
            if key not in known:
                outer, self.lines = self.lines, set()
                try:
                    known[key] = function(*args, **kwargs), self.lines
                finally:
                    self.lines = outer | self.lines
            self.lines |= known[key][1]
            return known[key][0]

        return cached

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.rank is not None:
            items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda i: self.rank[i.nodeid])  # type: ignore[index]

    def pytest_collection_finish(self) -> None:
        self.tests[IMPORT] = {"seconds": 0.0, "failed": True, "lines": sorted(self.lines)}

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.lines = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "failed": False, "lines": []})
        test["seconds"] += report.duration
        test["failed"] = test["failed"] or report.failed
        if report.failed:
            self.failed.append(f"{report.nodeid}{' (time)' if 'Timeout' in str(report.longrepr) else ''}")
        if report.when == "teardown":
            test["lines"] = sorted(self.lines)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid} (not importable)")


class Planter(Plugin):
    """Collects the tests, and runs the chosen ones in a fork for every error, ``jobs`` at a time."""

    def __init__(self, copy: Path, planted: Sequence[Mutant], ranks: Sequence[dict[str, tuple]], sources: dict[str, bytes], jobs: int) -> None:
        super().__init__({})
        self.copy, self.planted, self.ranks, self.sources, self.jobs = copy, planted, ranks, sources, jobs

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.items = {i.nodeid: i for i in items}

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.freeze()
        planted = forks(range(len(self.planted)), self.jobs, self.fork, lambda i: self.copy / f"{i}.json")
        noticed = set[str]()
        with open(self.copy / "verdicts.jsonl", "w", buffering=1) as out:
            for i, verdict in planted:
                noticed |= {name for name in verdict["failed"][:1] if name in self.items}
                out.write(json.dumps([i, verdict]) + "\n")
            self.control = sorted(noticed)
            for i, verdict in forks([len(self.planted)], 1, self.fork, lambda i: self.copy / f"{i}.json"):
                out.write(json.dumps([i, verdict]) + "\n")
        return True

    def verdicts(self, pid: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """What the process ``pid`` says of the errors, one after another."""
        path, ended = self.copy / "verdicts.jsonl", False
        at = 0
        while not ended:
            ended = os.waitpid(pid, os.WNOHANG)[0] != 0
            for line in path.read_text()[at:].splitlines(keepends=True) if path.exists() else ():
                if line.endswith("\n"):
                    at += len(line)
                    yield tuple(json.loads(line))  # type: ignore[misc]
            time.sleep(0.1)

    def fork(self, number: int) -> int:
        """Start the tests of an error, or behind the last those that noticed one, without any; gives the process."""
        result = self.copy / f"{number}.json"
        pid = os.fork()
        if pid:
            return pid
        seen: dict[str, Any] = {"failed": [], "possible": False}
        try:
            os.setsid()
            self.failed.clear()
            folder = self.copy / "tmp" / str(number)
            folder.mkdir(parents=True)
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
            limits(600)
            without = number == len(self.planted)
            if without or self.plant(self.planted[number]):
                seen["possible"] = True
                items = [self.items[n] for n in (self.control if without else self.ranks[number]) if n in self.items]
                for item, following in zip(items, [*items[1:], None], strict=True):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if self.failed and not without:
                        break
            seen["failed"] = self.failed
        except BaseException as error:
            seen["failed"] = [*self.failed, f"{type(error).__name__}: {error}"[:100]]
        finally:
            result.write_text(json.dumps(seen))
            shutil.rmtree(self.copy / "tmp" / str(number), ignore_errors=True)
            os._exit(0)


    def plant(self, m: Mutant) -> bool:
        module = sys.modules.get(m.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        return module is not None and transplant(m, self.sources[m.file], module)


def limits(cpu_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s) + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def forks(
    numbers: Iterable[int], jobs: int, start: Callable[[int], int], result: Callable[[int], Path], limit_s: float = 1800.0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run ``start(number)``, which gives a process, for each; yields what each wrote to ``result(number)``, with its exit status and seconds."""
    running: dict[int, tuple[int, float]] = {}
    waiting = list(numbers)[::-1]
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop()
            running[start(number)] = number, time.monotonic()
        for pid, (number, began) in list(running.items()):
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                code, path = os.waitstatus_to_exitcode(raw), result(number)
                seen = json.loads(path.read_text()) if path.exists() else {"failed": ["(time)" if code in (-9, -24) else "(crash)"], "possible": True}
                path.unlink(missing_ok=True)
                yield number, {"tests": {}, **seen, "code": code, "seconds": time.monotonic() - began}
            elif time.monotonic() > began + limit_s:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)


def session(copy: Path, files: Sequence[str], plugin: Plugin, cpu_s: float, *options: str) -> int:
    """The tests in a process of their own, which writes ``result.json``; gives the process."""
    result = copy / "result.json"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code, first = 70, plugin.rank is None
    try:
        os.setsid()
        os.chdir(copy)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), str(copy / "kernels")])
        sys.path[:0] = [str(copy), str(copy / "kernels")]
        out = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        limits(cpu_s)
        sys.dont_write_bytecode = not first
        import pytest

        import posttrain

        if not str(posttrain.__file__).startswith(str(copy)):
            raise RuntimeError(f"tests would run {posttrain.__file__}, not the copy")
        setattr(builtins, SEEN, lambda where: plugin.lines.add(where))
        if first:
            functools.cache = plugin.cache  # type: ignore[assignment]
        words = [*files, "-q", "-p", "no:cacheprovider", f"--timeout={10 * TEST_S if first else TEST_S}", *options]
        code = int(pytest.main(words, plugins=[plugin]))
        result.write_text(json.dumps({"tests": plugin.tests if first else {}, "failed": plugin.failed}))
    except BaseException as error:
        result.write_text(json.dumps({"tests": {}, "failed": [f"{type(error).__name__}: {error}"[:100]]}))
        code = code or 70
    finally:
        os._exit(code)


def warm_up() -> None:
    """Import what is slow, and nothing of the package."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import hydra  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.nn.functional

    torch.set_num_threads(1)
    assert "posttrain" not in sys.modules


def replace_file(path: Path, source: bytes, later_s: int) -> None:
    """Write a file, and set its time by hand: bytecode is taken as current when time and size are those of the file."""
    stamp = path.stat()
    path.write_bytes(source)
    os.utime(path, (stamp.st_atime, stamp.st_mtime + later_s))


class Ranking:
    """Which tests can notice an error, the likely ones first."""

    def __init__(self, tests: dict[str, dict]) -> None:
        self.tests = {name: test for name, test in tests.items() if not test["failed"]}
        self.at_import = {(f, n) for f, n in tests[IMPORT]["lines"]}
        self.by_line: dict[tuple[str, int], set[str]] = defaultdict(set)
        for name, test in self.tests.items():
            for file, line in test["lines"]:
                self.by_line[file, line].add(name)

    def __call__(self, m: Mutant, source: bytes) -> dict[str, tuple]:
        """Those that execute the statement, quick ones before slow ones, and those that execute little else before others.

        What is executed when modules are imported can matter to every test that executes anything of the same class or function, and if there is none,
        to all; and to the table of declarations.
        """
        files = tuple(next(files for folder, files in TESTS.items() if m.file.startswith(folder)))
        own = m.file, statement_line(m, source)

        def of(names: Iterable[str]) -> set[str]:
            return {name for name in names if name.startswith(files)}

        first = of(self.by_line.get(own, ()))
        chosen = set(first)
        if own in self.at_import or not first:
            scope = [self.by_line.get((m.file, n), set()) for n in scope_of(m, source)]
            chosen |= of(set().union(*scope)) | of(name for name in self.tests if name.startswith(TABLE))
        rank = {n: (n not in first, round(self.tests[n]["seconds"], 1), len(self.tests[n]["lines"]), n) for n in chosen or of(self.tests)}
        return dict(sorted(rank.items(), key=lambda item: item[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=120, help="how many errors (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--only", action="append", metavar="FILE", help="only in this file or folder; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="errors at a time (default: one per core)")
    parser.add_argument("--list", action="store_true", help="print the errors and run nothing")
    chosen = parser.parse_args(arguments)
    sources = {str(p.relative_to(ROOT)): p.read_bytes() for folder in TESTS for p in sorted((ROOT / folder).rglob("*.py"))}
    wanted = {
        f: s
        for f, s in sources.items()
        if not chosen.only or f.startswith(tuple(os.path.relpath(o, ROOT) if os.path.isabs(o) else o for o in chosen.only))
    }
    if not wanted:
        parser.error(f"--only {' '.join(chosen.only)} names no file of {', '.join(TESTS)}")
    found = [m for file, source in wanted.items() for m in candidates(file, source)]
    reasons = read_equivalent(EQUIVALENT)

    def key(m: Mutant) -> Key:
        return (m.file, m.function, *m.diff(sources[m.file]))

    known = {key(m) for m in found}
    planted, equivalent = draw(found, min(chosen.number, len(found)), chosen.seed, sources, lambda m: key(m) in reasons)
    functions = {(m.file, m.function) for m in found}
    print(f"{len(planted)} errors of {len(found)} that could be planted, in {len({(m.file, m.function) for m in planted})} of {len(functions)} functions of "
          f"{len(wanted)} files; seed {chosen.seed}")  # fmt: skip
    for stale in [k for k in reasons if k not in known and k[0] in wanted]:
        print(f"{EQUIVALENT.name}: no such error any more: {stale[0]} {stale[1]}: {stale[3]}")
    if chosen.list:
        for i, m in enumerate(planted, 1):
            print(
                f"\n{i:4d} {m.file}:{m.line} {m.function} [{m.operator}]",
                *("\n       {} {}".format(*x) for x in zip("-+", m.diff(sources[m.file]), strict=True)),
            )
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copies = [Path(folder).resolve() / str(i) for i in range(max(chosen.jobs, 1))]
        for name, copy in itertools.product(COPIED, copies):
            copy.mkdir(exist_ok=True)
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "outputs")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, copy / name)
        for file, copy in itertools.product(sources, copies):
            (copy / file).write_bytes(sources[file])
        killed, survivors = run(copies, planted, sources)
    return report(planted, killed, survivors, [(m, reasons[key(m)]) for m in equivalent], sources)


def run(copies: Sequence[Path], planted: Sequence[Mutant], sources: dict[str, bytes]) -> tuple[list[Mutant], list[Mutant]]:
    warm_up()
    began, copy, jobs = time.monotonic(), copies[0], len(copies)
    files = list(dict.fromkeys(t for m in planted for folder, tests in TESTS.items() if m.file.startswith(folder) for t in tests))
    for file, source in sources.items():
        replace_file(copy / file, with_probes(file, source, SEEN), -10)
    [(_, whole)] = forks([0], 1, lambda _: session(copy, files, Plugin(None), 3600), lambda _: copy / "result.json", 3600)
    for file, source in sources.items():
        replace_file(copy / file, source, 10)
    for one in copies:
        compileall.compile_dir(one / "posttrain", quiet=2)
    tests = whole["tests"]
    failing = [name for name, test in tests.items() if test["failed"] and name != IMPORT]
    if len(tests) <= 2 * len(failing) or whole["code"] not in (0, 1):
        raise SystemExit(f"the tests do not run as they are: {whole['failed'][:5]}\n{(copy / 'output.txt').read_text()[-3000:]}")
    print(f"{len(tests) - 1} tests, {time.monotonic() - began:.0f} s with their lines recorded")
    for name in failing:
        print(f"left out, fails without any error: {name}")
    ranking = Ranking(tests)
    ranks = [ranking(m, sources[m.file]) for m in planted]
    killed: dict[int, Mutant] = {}
    print("\n   #            s  place, what, by which test", flush=True)

    def say(i: int, seen: dict[str, Any], dead: bool) -> None:
        m = planted[i]
        by = seen["failed"][0] if seen["failed"] else f"pytest's exit code {seen['code']}" if dead else f"{len(ranks[i])} tests"
        word = "killed" if dead else "SURVIVED" if seen["possible"] else "later"
        print(f"{i + 1:4d} {word:8s} {seen['seconds']:5.1f}  {m.file}:{m.line} {m.function} [{m.operator}] {by}", flush=True)

    planter, noticed = Planter(copy, planted, ranks, sources, jobs), dict[int, str]()
    for i, seen in planter.verdicts(session(copy, files, planter, 36000)):
        if i < len(planted):
            noticed.update({i: seen["failed"][0]} if seen["failed"] else {})
            say(i, seen, bool(seen["failed"]))
        else:
            print(f"of the tests that noticed these errors fail without any: {', '.join(seen['failed']) or 'none'}")
            killed = {i: planted[i] for i, name in noticed.items() if name not in seen["failed"]}
    left = [i for i in range(len(planted)) if i not in killed]
    print(f"\nwritten into the file: {len(left)}", flush=True)
    free, used = list(copies), dict[int, Path]()

    def start(i: int) -> int:
        m, used[i] = planted[i], free.pop()
        replace_file(used[i] / m.file, m.apply(sources[m.file]), 10 * (i + 1))
        return session(used[i], sorted({name.split("::")[0] for name in ranks[i]}), Plugin(ranks[i]), 1200, "-x")

    for i, seen in forks(left, jobs, start, lambda i: used[i] / "result.json"):
        m = planted[i]
        replace_file(used[i] / m.file, sources[m.file], -10 * (i + 1))
        free.append(used[i])
        if seen["code"] == 5:
            raise SystemExit(f"no test was found for {m.file}")
        if seen["code"]:
            killed[i] = m
        say(i, {**seen, "possible": True}, bool(seen["code"]))
    return list(killed.values()), [m for i, m in enumerate(planted) if i not in killed]


def report(
    planted: Sequence[Mutant],
    killed: Sequence[Mutant],
    survivors: Sequence[Mutant],
    equivalent: Sequence[tuple[Mutant, str]],
    sources: dict[str, bytes],
) -> int:
    print("\nfile                               killed  of")
    for file in sorted({m.file for m in planted}):
        print(f"{file:36s} {sum(m.file == file for m in killed):4d} {sum(m.file == file for m in planted):3d}")
    print("\noperator                           killed  of")
    for operator, number in sorted(Counter(m.operator for m in planted).items()):
        print(f"{operator:36s} {sum(m.operator == operator for m in killed):4d} {number:3d}")
    for title, items in (
        ("survived: write a test, or say in the list why nothing can be seen", [(m, "") for m in survivors]),
        ("not planted", equivalent),
    ):
        print(f"\n{title}: {len(items)}")
        for m, reason in items:
            before, after = m.diff(sources[m.file])
            print(
                f"{m.file} {m.function}   (line {m.line}, {m.operator})\n- {before}\n+ {after}" + (f"\n= {reason}" if reason else "") + "\n"
            )
    rate = len(killed) / max(len(planted), 1)
    print(f"{len(killed)} of {len(planted)} errors noticed: {100 * rate:.1f} %, at least {100 * ENOUGH:.0f} % wanted")
    return 0 if rate >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
