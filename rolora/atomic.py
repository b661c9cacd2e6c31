"""Files written whole or not at all: a temporary beside the target, flushed to disk, renamed over
it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path | str, data: bytes, mode: int | None = None) -> None:
    """Replaces `path` by `data`; after a crash the file holds the old content or the new, never a
    part. `mode`: the file's permissions, from before anything is in it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path | str, text: str, mode: int | None = None) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"), mode)


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill, which appears under `path` (absent or empty) once everything in it is
    written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Removes what a killed process left under `folder`: temporaries of files and of
    checkpoints.
    """
    for left in [p for p in folder.rglob(".*.tmp*") if re.fullmatch(r"\..+\.tmp\d+", p.name)]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
