"""The run folder: config.toml, metrics.jsonl, adapter/, checkpoints/, summary.json, plots/.

Every file is written whole.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomli_w

from rolora import atomic
from rolora.config import Config
from rolora.errors import BadInput

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"


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
        self.rows.append(row)
        self._write_rows()

    def cut_after(self, round: int) -> None:
        """Reads the recorded rows and drops those past `round`, which will be run again."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows = [row for row in map(json.loads, lines) if row["round"] <= round]
        self._write_rows()

    def summarise(self, summary: dict) -> None:
        atomic.write_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def _write_rows(self) -> None:
        atomic.write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))


def refuse_used(path: Path) -> None:
    """Raises BadInput where a new run would mix with something that is there already."""
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
    tables = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
    return {k: v for name, table in tables.items() if name != "resolved" for k, v in table.items()}


def _versions() -> dict:
    packages = {}
    for name in ("rolora", "torch", "transformers", "triton", "numpy", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], "machine": platform.machine(), **packages}
