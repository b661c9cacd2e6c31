"""Python programs that need not load torch and transformers each time: a process that has loaded
them forks for each.

`python -m tests.forked SOCKET` is that process. `serving(socket)` starts it and gives a `Python`,
which starts programs: `-m MODULE`, `-c TEXT` or a file, with a folder and an environment of the
caller's, as `subprocess` would. A program is a process of its own: its number, the signals it is
sent and how it ends are its own, and it ends as any interpreter does. What differs from a fresh one
is that modules are loaded and that strings have the hashes of the process that forked.

`Python.on_path(folder)` writes a `python` for a PATH, which asks the same process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a command loads, beside the module of the command itself.
_LOADED = (
    "rolora.run.session",
    "rolora.reporting.page",
    "rolora.run.plots",
    "matplotlib.figure",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta",
)
# Variables that modules read while they are loaded.
_READ_ONCE = ("HF_", "TRANSFORMERS_", "TRITON_", "PYTORCH_", "PYTHONHASHSEED")
_INTERPRET = "TRITON_INTERPRET"
_SHIM = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
ours = words and (words[0].endswith(".py") or len(words) > 1 and (
    words[0] == "-c" or words[0] == "-m" and words[1].startswith("rolora.")))
if not ours or os.environ.get("TRITON_INTERPRET") != {interpret!r}:
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({socket!r})
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps([os.getcwd(), dict(os.environ), words]).encode())
    connection.shutdown(socket.SHUT_WR)
    code = connection.makefile().read().split()[1:]
sys.exit(os.waitstatus_to_exitcode(int(code[0])) % 256 if code else 1)
"""


class Process:
    """A program that was started: `subprocess.Popen`, but that what it writes goes to files."""

    def __init__(self, connection: socket.socket, out, err):
        self.returncode: int | None = None
        self._connection, self._out, self._err = connection, out, err
        self._answers = connection.makefile()
        self.pid = int(self._answers.readline())

    @property
    def out(self) -> str:
        """What it has written to its standard output until now."""
        return _content(self._out)

    @property
    def err(self) -> str:
        return _content(self._err)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float = 1800) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def wait_for(self, text: str, timeout: float = 1800) -> None:
        """Until it has written the text, or has ended."""
        end = time.monotonic() + timeout
        while text not in self.out and self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def finished(self, timeout: float = 1800) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of its end."""
        try:
            code = self.wait(timeout)
        finally:
            self.kill()
        return code, self.out, self.err

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
        return self.returncode


def _content(file) -> str:
    """Without moving the place where the program writes."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


class Python:
    """What starts programs: asks the process that listens at the socket `place`."""

    def __init__(self, place: Path, environment: Mapping[str, str]):
        self.place, self.environment = place, environment

    def start(
        self, *words, cwd=None, env: Mapping[str, str] | None = None, typed: str = ""
    ) -> Process:
        """`env` replaces what the environment has, or adds to it; `typed` is its standard input."""
        environment = {k: v for k, v in os.environ.items() if k != _INTERPRET} | dict(env or {})
        if _INTERPRET in self.environment:
            environment.setdefault(_INTERPRET, self.environment[_INTERPRET])
        for name in environment.keys() | self.environment.keys():
            known, asked = self.environment.get(name), environment.get(name)
            if name.startswith(_READ_ONCE) and known != asked:
                raise ValueError(
                    f"{name} was {known!r} when the modules were loaded, not {asked!r}"
                )
        given, out, err = (tempfile.TemporaryFile() for _ in range(3))
        given.write(typed.encode())
        given.seek(0)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.place))
        socket.send_fds(connection, [b"."], [file.fileno() for file in (given, out, err)])
        request = [str(cwd or os.getcwd()), environment, [str(word) for word in words]]
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return Process(connection, out, err)

    def run(self, *words, **given) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        return self.start(*words, **given).finished()

    def on_path(self, folder: Path) -> None:
        """Writes `folder/python`."""
        path, interpret = folder / "python", self.environment.get(_INTERPRET)
        given = dict(python=sys.executable, socket=str(self.place), interpret=interpret)
        path.write_text(_SHIM.format(**given))
        path.chmod(0o755)


@contextlib.contextmanager
def serving(place: Path, interpreted: bool = True) -> Iterator[Python]:
    """The process that forks, while the context is open; raises RuntimeError if it cannot start.

    Without `interpreted` its programs never run kernels in Triton's interpreter.
    """
    environment = dict(os.environ)
    if not interpreted:
        environment.pop(_INTERPRET, None)
    command = [sys.executable, "-m", "tests.forked", str(place)]
    given = dict(cwd=ROOT, env=environment, stdin=subprocess.PIPE)
    with subprocess.Popen(command, **given) as process:
        try:
            while not place.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"{command} ended with {process.returncode}")
                time.sleep(0.1)
            yield Python(place, environment)
        finally:
            process.terminate()


def _serve(place: Path) -> None:
    """Ends with the process that holds the other end of its standard input."""
    for name in _LOADED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads, of which a fork would have one")
    gc.freeze()  # what is loaded stays
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place.with_suffix(".new")))
    listening.listen(64)
    place.with_suffix(".new").rename(place)  # whoever sees it can connect
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            return
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return _answer(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):  # those who have answered
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(connection: socket.socket) -> None:
    """Starts one program, in a fork, and says its number and how it ended. In the fork: runs it."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        folder, environment, words = json.loads(file.read())
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _run(streams, folder, environment, words)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):  # who asked may have gone
        connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _run(streams: list[int], folder: str, environment: dict[str, str], words: list[str]) -> None:
    """The program; exceptions and exits go on to the interpreter."""
    import numpy as np
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # read when torch was loaded
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    random.seed()
    np.random.seed()
    place = {"-m": folder, "-c": ""}.get(words[0], str(Path(words[0]).resolve().parent))
    sys.path[0] = place
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
