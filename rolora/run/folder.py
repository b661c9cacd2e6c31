"""The run folder: config.toml, metrics.jsonl, adapter/, checkpoints/, summary.json, plots/.

Every file is written whole.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomli_w
from filelock import FileLock, Timeout

from rolora import atomic
from rolora.config import Config, read_toml
from rolora.errors import BadInput

CONFIG, METRICS, SUMMARY, LOCK = "config.toml", "metrics.jsonl", "summary.json", ".lock"
SAMPLES = "samples.jsonl"


@dataclass
class RunFolder:
    """A run on disk; `rows` are the rounds recorded so far, round 0 included."""

    path: Path
    rows: list[dict] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def create(self, config: Config) -> None:
        """Makes the folder and writes the resolved configuration; refuses a folder that holds
        anything.
        """
        refuse_used(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        tables = config.to_tables() | {"resolved": _versions()}
        atomic.write_text(self.path / CONFIG, tomli_w.dumps(tables))

    def append(self, row: dict) -> None:
        """Adds a round's row to metrics.jsonl."""
        self._write_rows([*self.rows, row])
        self.rows.append(row)

    def has_row(self, round: int) -> bool:
        """Whether a round is recorded."""
        return bool(self.rows) and self.rows[-1]["round"] >= round

    def cut_after(self, round: int) -> None:
        """Reads the recorded rows and drops those past `round`, which will be run again.

        Raises BadInput where a round up to there is missing or cannot be read.
        """
        path = self.path / METRICS
        found = {row["round"]: row for row in _readable_rows(path)}
        lost = [str(number) for number in range(round + 1) if number not in found]
        if lost:
            raise BadInput(
                f"{path} is damaged or cut: it lacks round {', '.join(lost[:5])}: restore it, or "
                "start a new run"
            )
        self.rows = [found[number] for number in range(round + 1)]
        self._write_rows(self.rows)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; raises BadInput where another one has it."""
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"--output-dir {self.path} is in use by another process: wait for its end, or stop "
                "it first"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def summarise(self, summary: dict) -> None:
        atomic.write_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def discard(self) -> None:
        """Takes a run away that came to nothing: whatever is in the folder, the run has written."""
        shutil.rmtree(self.path)

    def _write_rows(self, rows: list[dict]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        atomic.write_text(self.path / METRICS, "".join(lines))


def refuse_used(path: Path) -> None:
    """Raises BadInput where a new run would mix with something that is there already, or no folder
    can be made.
    """
    _require_makeable(path)
    if path.exists() and not path.is_dir():
        raise BadInput(f"--output-dir {path} is a file: give a new or empty folder")
    if path.is_dir() and all(p.name.startswith(f".{CONFIG}.tmp") for p in path.iterdir()):
        atomic.sweep(path)  # a run killed before its first file was whole
    if path.is_dir() and any(path.iterdir()):
        what = "another run" if (path / CONFIG).is_file() else "other files"
        mend = (
            "add --resume to continue it, or give another folder"
            if what == "another run"
            else "give a new or empty folder"
        )
        raise BadInput(f"--output-dir {path} holds {what}: {mend}")


def _require_makeable(path: Path) -> None:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise BadInput(
            f"--output-dir {str(path)[:200]} cannot be made: {error.strerror}: give another folder"
        ) from None
    if path.is_symlink() and not path.exists():
        raise BadInput(f"--output-dir {path} is a link to nothing: remove it, or mend it")
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise BadInput(
            f"--output-dir {path} would lie in {nearest}, which is no folder: give another"
        )


def default_path(method: str) -> Path:
    """runs/<date>-<time>-<method>, numbered where it is taken."""
    stem = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(method).stem}"
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def stored_values(path: Path) -> dict:
    """The options of the run in `path`; raises BadInput where there is none."""
    if not (path / CONFIG).is_file():
        raise BadInput(f"--resume: {path} holds no run (no {CONFIG}): give the --output-dir of one")
    return read_toml(path / CONFIG, "--resume:")


def _readable_rows(path: Path) -> Iterator[dict]:
    """The rows of rounds; a line that is none (a half one, junk) is passed over."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("round")) is int:
            yield row


def _versions() -> dict:
    packages = {}
    for name in ("rolora", "torch", "transformers", "triton", "numpy", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], "machine": platform.machine(), **packages}
