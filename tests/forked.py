"""Python programs that need not load torch and transformers each time: a process that has loaded
them forks for each.

`python -m tests.forked SOCKET` is that process. `shim(folder, socket)` writes a `python` for a
PATH: `python -m rolora.… ` and `python -c …` run in a fork, with the caller's streams, folder,
environment and arguments; everything else runs in a Python of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
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
_SHIM = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
ours = len(words) > 1 and (words[0] == "-c" or words[0] == "-m" and words[1].startswith("rolora."))
if not ours or "TRITON_INTERPRET" in os.environ:
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({socket!r})
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps([os.getcwd(), dict(os.environ), words]).encode())
    connection.shutdown(socket.SHUT_WR)
    code = connection.recv(8)
sys.exit(int(code or b"1"))
"""


def shim(folder: Path, place: Path) -> None:
    """Writes `folder/python`, which asks the process that listens at the socket `place`."""
    path = folder / "python"
    path.write_text(_SHIM.format(python=sys.executable, socket=str(place)))
    path.chmod(0o755)


@contextlib.contextmanager
def serving(place: Path) -> Iterator[None]:
    """The process that forks, while the context is open; raises RuntimeError if it cannot start."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.forked", str(place)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        while not place.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def _serve(place: Path) -> None:
    for name in _LOADED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads, of which a fork would have one")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place.with_suffix(".new")))
        listening.listen()
        place.with_suffix(".new").rename(place)  # whoever sees it can connect
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                _run(connection)
            connection.close()


def _run(connection: socket.socket) -> None:
    """One program, in a fork; its exit status goes back."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        folder, environment, words = json.loads(file.read())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        sys.path[0] = folder if words[0] == "-m" else ""
        sys.argv = [words[0], *words[2:]]
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())
    os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
