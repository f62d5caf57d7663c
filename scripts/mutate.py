#!/usr/bin/env python3
"""Does the test suite notice errors in the mathematics?  Plants small ones, one at a time, and runs the tests against each.

    scripts/mutate.py                                  120 errors; exit code 1 when fewer than 95 % are noticed
    scripts/mutate.py --number 40 --seed 7             another sample
    scripts/mutate.py --only posttrain/loss/mask.py    errors in one file (or folder)
    scripts/mutate.py --list                           what would be planted; nothing is run

Errors go into the code of ``posttrain/{loss,advantage,mixture}``: never into docstrings, messages, types or ``formula`` texts, and never
into this checkout, but into a copy in a temporary directory.  One process imports torch and pytest once and forks for every error; before
that the tests run once as they are, which says which of them execute which statement: those run against an error there, until the first failure.  A test
that runs out of time counts as a failure.  What fails without any error is left out, and said.

Errors that change nothing which could be observed stand in ``scripts/mutants_equivalent.txt`` with the reason; another is drawn instead.
"""

from __future__ import annotations

import argparse
import builtins
import compileall
import functools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mutations import Mutant, candidates, draw, scope_of, statement_line, with_probes

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "scripts" / "mutants_equivalent.txt"
COPIED = ("posttrain", "kernels", "configs", "recipes", "docs", "tests", "pyproject.toml")
PAGES = ["tests/report/test_terms_doc.py", "tests/report/test_methods_doc.py"]
MATHS = ["tests/loss", *PAGES, "tests/contract/test_terms.py", "tests/contract/test_slicing.py", "tests/contract/test_contrib.py"]
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
        setattr(builtins, SEEN, lambda where: self.lines.add(where))
        if rank is None:
            functools.cache = self.cache  # type: ignore[assignment]

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


def child(copy: Path, files: Sequence[str], cpu_s: float, rank: dict[str, tuple] | None = None) -> dict[str, Any]:
    """The tests in a process of their own.  Gives what the plugin saw, and ``code``: pytest's, or minus the signal that ended it."""
    result = copy / "result.json"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            out = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s) + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.dont_write_bytecode = rank is not None
            plugin = Plugin(rank)
            import pytest

            import posttrain

            if not str(posttrain.__file__).startswith(str(copy)):
                raise RuntimeError(f"tests would run {posttrain.__file__}, not the copy")
            words = [*files, "-q", "-p", "no:cacheprovider", f"--timeout={TEST_S if rank else 10 * TEST_S}", *(["-x"] if rank else [])]
            code = int(pytest.main(words, plugins=[plugin]))
            result.write_text(json.dumps({"tests": {} if rank else plugin.tests, "failed": plugin.failed}))
        except BaseException as error:
            result.write_text(json.dumps({"tests": {}, "failed": [f"{type(error).__name__}: {error}"[:100]]}))
            code = code or 70
        finally:
            os._exit(code)
    deadline, status = time.monotonic() + 20 * cpu_s, None
    while status is None:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    seen = json.loads(result.read_text()) if result.exists() else {"tests": {}, "failed": ["(time)" if status in (-9, -24) else "(crash)"]}
    return {**seen, "code": status}


def warm_up(copy: Path) -> None:
    """Import what is slow, and nothing of the package."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), str(copy / "kernels")])
    sys.path[:0] = [str(copy), str(copy / "kernels")]
    os.chdir(copy)
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


def ranking(m: Mutant, tests: dict[str, dict], lines: dict[str, set[tuple[str, int]]], source: bytes) -> dict[str, tuple]:
    """The tests that can notice an error, the likely ones first.

    Those that execute the statement, quick ones before slow ones.  What is executed when modules are imported can matter to every test that
    executes anything of the same class or function, and if there is none, to all; and to the table of declarations.
    """
    files = next(files for folder, files in TESTS.items() if m.file.startswith(folder))
    own, scope = (m.file, statement_line(m, source)), scope_of(m, source)
    near: tuple[list[str], ...] = ([], [], [])
    for name, test in tests.items():
        if not test["failed"] and name.startswith(tuple(files)):
            executed = lines[name]
            near[0 if own in executed else 1 if name.startswith(TABLE) or any((m.file, n) in executed for n in scope) else 2].append(name)
    at_import = own in lines[IMPORT] or not near[0]
    chosen = near[0] + (near[1] if at_import else []) or near[2]
    return {name: (name not in near[0], round(tests[name]["seconds"], 2), name) for name in chosen}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=120, help="how many errors (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--only", action="append", metavar="FILE", help="only in this file or folder; may be repeated")
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
        copy = Path(folder).resolve()
        for name in COPIED:
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "outputs")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, copy / name)
        for file, source in sources.items():
            (copy / file).write_bytes(source)
        killed, survivors = run(copy, planted, sources)
    return report(planted, killed, survivors, [(m, reasons[key(m)]) for m in equivalent], sources)


def run(copy: Path, planted: Sequence[Mutant], sources: dict[str, bytes]) -> tuple[list[Mutant], list[Mutant]]:
    warm_up(copy)
    began = time.monotonic()
    files = list(dict.fromkeys(t for m in planted for folder, tests in TESTS.items() if m.file.startswith(folder) for t in tests))
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for file, source in sources.items():
        replace_file(copy / file, with_probes(file, source, SEEN), -10)
    whole = child(copy, files, 3600)
    for file, source in sources.items():
        replace_file(copy / file, source, 10)
    compileall.compile_dir(copy / "posttrain", quiet=2)
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu
    tests = whole["tests"]
    failing = [name for name, test in tests.items() if test["failed"] and name != IMPORT]
    if len(tests) <= 2 * len(failing) or whole["code"] not in (0, 1):
        raise SystemExit(f"the tests do not run as they are: {whole['failed'][:5]}\n{(copy / 'output.txt').read_text()[-3000:]}")
    print(f"{len(tests) - 1} tests, {cpu:.0f} s of one core with their lines recorded, {time.monotonic() - began:.0f} s on the clock")
    for name in failing:
        print(f"left out, fails without any error: {name}")
    lines = {name: {(f, n) for f, n in test["lines"]} for name, test in tests.items()}
    killed, survivors = [], []
    print("\n   #            s  place, what, by which test", flush=True)
    for i, m in enumerate(planted, 1):
        began, source = time.monotonic(), sources[m.file]
        replace_file(copy / m.file, m.apply(source), 10 * i)
        rank = ranking(m, tests, lines, source)
        seen = child(copy, sorted({name.split("::")[0] for name in rank}), max(120.0, 2 * cpu), rank)
        replace_file(copy / m.file, source, -10 * i)
        if seen["code"] == 5:
            raise SystemExit(f"no test was found for {m.file}")
        (killed if seen["code"] else survivors).append(m)
        verdict = "killed" if seen["code"] else "SURVIVED"
        by = seen["failed"][0] if seen["failed"] else f"pytest's exit code {seen['code']}" if seen["code"] else f"{len(rank)} tests"
        print(f"{i:4d} {verdict:8s} {time.monotonic() - began:5.1f}  {m.file}:{m.line} {m.function} [{m.operator}] {by}", flush=True)
    return killed, survivors


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
