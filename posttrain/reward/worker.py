"""Killable processes for reward functions: one call at a time, with a deadline that ends the process and everything it started.

A hung verifier cannot be stopped from inside: threads cannot be killed, and signal-based timeouts raise off the main thread.  So every
worker is a process of its own, talked to through a pipe.

One *template* process per pool imports the functions once; workers are forked from it, so replacing a killed worker costs milliseconds.
The template is started as a plain command: a user's script needs no ``if __name__ == "__main__"`` guard, and nothing is forked from a
process that holds threads, Ray or CUDA.  When the run ends, however it ends, the template sees its socket close and takes all workers
with it.

This module imports neither torch nor records, so that the template starts in a moment.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

START_TIMEOUT_S = 300.0


class Timeout(Exception):
    """The call did not finish within its time; the worker was killed."""


class WorkerDied(Exception):
    """The worker ended during the call (out of memory, a crash in native code, an exit)."""


class RemoteError(Exception):
    """The function raised; the message is the remote exception's."""


def dump(functions: Mapping[str, Callable[..., Any]]) -> bytes:
    """Functions by name as bytes: by reference where possible, else by value.  ``ValueError`` names the function that cannot travel."""
    if all(_importable(f) for f in functions.values()):
        with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):  # closures and lambdas need the slower way below
            return pickle.dumps(dict(functions))
    try:
        import cloudpickle
    except ImportError:
        from ray import cloudpickle  # Ray's own copy

    for name, function in functions.items():
        try:
            cloudpickle.dumps(function)
        except Exception as error:
            raise ValueError(
                f"reward {name!r} cannot be sent to a worker process ({type(error).__name__}: {error}); move it to a module without open "
                "handles in it, or set execution = 'thread' on it (a hang there is counted, but cannot be killed)"
            ) from error
    return bytes(cloudpickle.dumps(dict(functions)))


def _importable(function: Callable[..., Any]) -> bool:
    inner = getattr(function, "func", function)  # functools.partial
    return (getattr(inner, "__module__", None) or type(inner).__module__) != "__main__" and type(inner).__module__ != "__main__"


class Template:
    """The run's handle on the template process.  ``start`` and ``kill`` may be called from several threads."""

    def __init__(self, functions: bytes, memory_mb: int | None) -> None:
        self._setup = (functions, memory_mb)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None
        self._lock = threading.Lock()

    def _ready(self) -> Connection:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", "from posttrain.reward.worker import serve; serve()", str(theirs.fileno())]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
        )
        theirs.close()
        control = Connection(ours.detach())
        try:
            control.send_bytes(pickle.dumps(self._setup))
            if not control.poll(START_TIMEOUT_S):
                raise ValueError(f"reward workers did not start in {START_TIMEOUT_S:.0f} s; the machine may be overloaded")
            problem = pickle.loads(control.recv_bytes())
            if problem is not None:
                raise ValueError(f"a reward function cannot be loaded in a worker process: {problem}")
        except (EOFError, OSError) as error:
            self._end(control)
            raise ValueError("the reward workers' process ended while starting; its error output says why") from error
        except ValueError:
            self._end(control)
            raise
        self._control = control
        return control

    def start(self) -> tuple[Connection, int]:
        """A fresh worker: our end of its pipe, and its process id."""
        with self._lock:
            control = self._ready()
            ours, theirs = Pipe()
            control.send_bytes(pickle.dumps(("start", None)))
            with socket.socket(fileno=os.dup(control.fileno())) as channel:
                socket.send_fds(channel, [b"f"], [theirs.fileno()])
            theirs.close()
            return ours, pickle.loads(control.recv_bytes())

    def kill(self, pid: int) -> int | None:
        """End a worker and its process group; returns its exit status (negative: the signal that ended it)."""
        with self._lock:
            if self._control is None:
                return None
            self._control.send_bytes(pickle.dumps(("kill", pid)))
            return pickle.loads(self._control.recv_bytes())

    def close(self) -> None:
        """End the template and, through it, every worker."""
        with self._lock:
            if self._control is not None:
                self._end(self._control)
            self._control = None

    def _end(self, control: Connection) -> None:
        control.close()  # the template kills its workers and leaves
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


class Worker:
    """One process.  One owner calls it at a time.  Starts on the first call and again after every kill."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._pipe: Connection | None = None
        self.pid: int | None = None

    def call(self, name: str, arguments: Mapping[str, Any], timeout_s: float, cpu_s: float | None) -> Any:
        """Run one function.  Raises ``Timeout``, ``WorkerDied`` or ``RemoteError``; after the first two the process is gone."""
        if self._pipe is None:
            self._pipe, self.pid = self._template.start()
        pipe = self._pipe
        try:
            pipe.send_bytes(pickle.dumps((name, dict(arguments), cpu_s or 4 * timeout_s + 5)))
            if not pipe.poll(timeout_s):
                self.kill()
                raise Timeout(f"no answer within {timeout_s:g} s")
            ok, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            code = self.kill()
            if code == -signal.SIGPROF:
                raise Timeout("used up its processor time" + (f" of {cpu_s:g} s" if cpu_s else "")) from None
            raise WorkerDied(f"the worker process ended during the call (exit status {code})") from error
        if not ok:
            raise RemoteError(value)
        return value

    def kill(self) -> int | None:
        """End the process and what it started, now.  Returns the exit status."""
        if self._pipe is not None:
            self._pipe.close()
        pid, self.pid, self._pipe = self.pid, None, None
        return None if pid is None else self._template.kill(pid)


class WorkerPool:
    """``num_workers`` workers, each used by one thread at a time.  ``call`` blocks: run it in a thread."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], num_workers: int, memory_mb: int | None = 8192) -> None:
        self._template = Template(dump(functions), memory_mb)
        self.workers = [Worker(self._template) for _ in range(num_workers)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self.workers:
            self._free.put(worker)
        self.kills = 0
        self._lock = threading.Lock()

    def call(self, name: str, arguments: Mapping[str, Any], timeout_s: float, cpu_s: float | None = None) -> Any:
        worker = self._free.get()
        try:
            return worker.call(name, arguments, timeout_s, cpu_s)
        except (Timeout, WorkerDied):
            with self._lock:
                self.kills += 1
            raise
        finally:
            self._free.put(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self._template.close()


# -- the other side ----------------------------------------------------------------------------------------------------
def serve() -> None:
    """Main of the template: load the functions, then fork and kill workers as told, until the run's end of the socket closes."""
    descriptor = int(sys.argv[1])
    control = Connection(descriptor)
    payload, memory_mb = pickle.loads(control.recv_bytes())
    try:
        functions = pickle.loads(payload)
        for function in functions.values():
            getattr(function, "prepare", lambda: None)()
    except BaseException as error:
        control.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
        return
    control.send_bytes(pickle.dumps(None))
    workers: set[int] = set()
    while True:
        try:
            order, pid = pickle.loads(control.recv_bytes())
        except (EOFError, OSError):
            break
        if order == "start":
            with socket.socket(fileno=os.dup(descriptor)) as channel:
                (pipe,) = socket.recv_fds(channel, 1, 1)[1]
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(Connection(pipe), functions, memory_mb)
            os.close(pipe)
            workers.add(pid)
            control.send_bytes(pickle.dumps(pid))
        else:
            workers.discard(pid)
            control.send_bytes(pickle.dumps(_end_worker(pid)))
    for pid in workers:
        _end_worker(pid)


def _end_worker(pid: int) -> int:
    """A worker that ended by itself keeps the status it ended with: it is not collected before this."""
    ended, status = 0, 0
    for _ in range(20):  # a worker that closed its pipe may need a moment to be gone
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if not _leaving(pid):
            break
        time.sleep(0.005)
    for target in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL) if not ended else None):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            target()
    if not ended:
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _leaving(pid: int) -> bool:
    """Is the process on its way out (no memory map any more), or still computing?"""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return file.read().startswith("0 ")
    except OSError:
        return True


def _work(pipe: Connection, functions: Mapping[str, Callable[..., Any]], memory_mb: int | None) -> None:
    """Main of a worker: answer one call after the other until the pipe closes.  Never returns."""
    os.setsid()  # its own process group, so that what a function starts is killed with it
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    if memory_mb is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    while True:
        try:
            name, arguments, cpu_s = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        signal.setitimer(
            signal.ITIMER_PROF, cpu_s
        )  # processor time; the default action of SIGPROF ends the process, whatever holds the GIL
        try:
            answer = pickle.dumps((True, functions[name](**arguments)))
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException as error:
            answer = pickle.dumps((False, f"{type(error).__name__}: {error}"[:2000]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            pipe.send_bytes(answer)
        except OSError:
            os._exit(0)


def _leave_with(template: int) -> None:
    while os.getppid() == template:
        time.sleep(1.0)
    os._exit(1)
