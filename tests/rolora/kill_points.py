"""Run by test_faults.py in a process of its own: one training run killed at every point where it
touches the disk, each time resumed.

    python -m tests.rolora.kill_points FOLDER POINTS [--interrupt] -- FLAGS…

Imports everything, then forks: a child counts the points of an undisturbed run, and for POINTS of
them, spread over the run, one child is killed (SIGKILL) at that point and another resumes. Prints a
JSON line a point: what it was, and whether the end is the same.

With --interrupt the points are calls of our own functions, from the first one of the round loop on,
and the process is interrupted (KeyboardInterrupt, as Ctrl-C and SIGTERM are) instead of killed.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

# Imported before the forks.
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast  # noqa: F401

from rolora import atomic, cli, train
from rolora.federated import wire
from rolora.run import (
    plots,
    session,
)
from tests.rolora import pictures

_TIMED = ("seconds", "peak_memory_bytes")


class Killer:
    """Counts writes (before and half-way), fsyncs, renames, new and removed files; kills the
    process at number `at`.
    """

    def __init__(self, at: int | None):
        self.at, self.names = at, []

    def point(self, name: str) -> bool:
        self.names.append(name)
        return len(self.names) - 1 == self.at

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._before(name, getattr(os, name)))
        atomic.open = self._open

    def _before(self, name, function):
        def wrapped(*args, **kwargs):
            if self.point(name):
                self.die()
            return function(*args, **kwargs)

        return wrapped

    def _open(self, path, mode):
        file = open(path, mode)
        write = file.write

        def halting(data):
            if self.point("before a write"):
                self.die()
            if self.point("half-way through a write"):
                write(data[: len(data) // 2])
                file.flush()
                self.die()
            return write(data)

        return _Watched(file, halting)


class Interrupter:
    """Counts the calls of functions of rolora while a session runs; interrupts number `at`."""

    def __init__(self, at: int | None):
        self.at, self.names = at, []

    def install(self) -> None:
        run = session.Session.run

        def watched(own):
            sys.setprofile(self._on_call)
            try:
                run(own)
            finally:
                sys.setprofile(None)

        session.Session.run = watched

    def _on_call(self, frame, event, _argument) -> None:
        code = frame.f_code
        if event not in ("call", "return") or f"{os.sep}rolora{os.sep}" not in code.co_filename:
            return
        if event == "return" and code.co_flags & inspect.CO_GENERATOR:
            return  # Python itself drops what is raised while a generator is cleared away
        self.names.append(f"{Path(code.co_filename).stem}.{code.co_name} {event}")
        if len(self.names) - 1 == self.at:
            raise KeyboardInterrupt


class _Watched:
    """A file whose `write` is another."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


INTERRUPTION = Interrupter if "--interrupt" in sys.argv else Killer


def forked(at: int | None = None, count: bool = False) -> tuple[int, list[str]]:
    """(wait status, names of the points passed where counted) of a run in a child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        killer = INTERRUPTION(at)
        if at is not None or count:
            killer.install()
        code = 0
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.run(train.command)
            except SystemExit as stop:
                code = stop.code or 0
        os.write(writer, json.dumps(killer.names).encode() if count else b"[]")
        os._exit(code)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    return os.waitpid(pid, 0)[1], json.loads(text or b"[]")


def end(folder: Path) -> list[str]:
    """What must not differ: the adapter, the rows but for times, the checkpoints."""
    rows = [
        {k: v for k, v in json.loads(line).items() if k not in _TIMED}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    checkpoints = sorted((folder / "checkpoints").iterdir())
    if INTERRUPTION is Interrupter:
        checkpoints = checkpoints[-1:]  # an interrupt may have left one more of an earlier round
    files = sorted(path for path in (folder / "adapter").rglob("*") if path.is_file())
    files += [path for checkpoint in checkpoints for path in sorted(checkpoint.iterdir())]
    return [
        json.dumps(rows),
        *(f"{path.name} {hashlib.sha256(content(path)).hexdigest()}" for path in files),
    ]


def content(path: Path) -> bytes:
    """The bytes of a file; of a checkpoint all but the run's own name, which is in the messages of
    orders under way too, and digests over it.
    """
    if path.name == "state.safetensors":
        tensors = load_file(path)
        for name in [name for name in tensors if name.startswith("training/")]:
            update = wire.decode_update(tensors[name].numpy().tobytes(), 1 << 30)
            tensors[name] = update.change
            said = {k: v for k, v in vars(update).items() if k not in ("run", "change")}
            tensors[f"{name} {said}"] = torch.zeros(1)
        return save(tensors)
    if path.name != "state.json":
        return path.read_bytes()
    numbers = json.loads(path.read_text())
    assert numbers.pop("run") and numbers.pop("digest")
    return json.dumps(numbers).encode()


def main() -> None:
    root, points = Path(sys.argv[1]), int(sys.argv[2])
    flags = sys.argv[sys.argv.index("--") + 1 :]

    def arguments(folder: Path, *more: str) -> list[str]:
        return [*more, "--output-dir", str(folder)]

    root.mkdir(exist_ok=True)
    pictures.unpainted()
    plots.draw(
        [
            {
                "round": n,
                "eval": {"accuracy": 0.5, "loss": 1.0},
                "train_loss": 1.0,
                "bytes_up": 1,
                "bytes_down": 1,
                "seconds": 1.0,
            }
            for n in range(3)
        ],
        "accuracy",
        root / "warm",
    )  # a font cache, say
    torch.optim.AdamW(
        [torch.zeros(1, requires_grad=True)]
    ).step()  # imports what the first step needs
    sys.argv = ["train", *arguments(root / "whole", *flags)]
    status, names = forked(count=True)
    assert status == 0, status
    wanted = end(root / "whole")
    every = (
        [round(i * (len(names) - 1) / (points - 1)) for i in range(points)]
        if len(names) > points
        else range(len(names))
    )
    print(json.dumps({"points": len(names), "kinds": sorted(set(names))}), flush=True)
    for at in dict.fromkeys(every):
        folder = root / f"killed-{at}"
        sys.argv = ["train", *arguments(folder, *flags)]
        status, _ = forked(at=at)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if INTERRUPTION is Interrupter:
            killed = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 130
        if (folder / "config.toml").is_file():
            sys.argv = ["train", *arguments(folder, "--resume")]
            how = "resumed"
        else:  # nothing had been begun: the same command starts
            how = "started again"
        status, _ = forked()
        same = status == 0 and end(folder) == wanted
        print(
            json.dumps(
                {
                    "at": at,
                    "name": names[at],
                    "killed": killed,
                    "how": how,
                    "status": status,
                    "same": same,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
