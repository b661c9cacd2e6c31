"""Git LFS's pointers: what a clone without `git lfs pull` has in place of large files."""

from __future__ import annotations

from pathlib import Path

_FIRST = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether the file is one."""
    with open(path, "rb") as file:
        return file.read(len(_FIRST)) == _FIRST
