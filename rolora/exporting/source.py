"""What is exported: an adapter's folder, read once; and how a folder is written, whole or not."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rolora import atomic
from rolora.adapter.files import read_adapter
from rolora.errors import BadInput
from rolora.run import adapter_folder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, PEFT's configuration of it, and its tensors under PEFT's keys."""

    folder: Path
    stored: dict[str, Any]
    tensors: dict[str, Tensor]

    def base(self, given: str | None) -> str:
        """The base model's id or folder: the one `given`, else the adapter's own. Raises BadInput
        where there is neither.
        """
        named = self.stored.get("base_model_name_or_path")
        if given is not None:
            return given
        if not named:
            raise BadInput("the adapter does not name its base: give --model")
        return adapter_folder.find_base(self.folder, str(named))


def read(folder: Path) -> Adapter:
    """Raises BadInput where it is no adapter's folder, or is damaged."""
    try:
        return Adapter(folder, *read_adapter(folder))
    except ValueError as error:
        raise BadInput(f"--adapter {error}") from None


@contextmanager
def new_folder(folder: Path, size: int = 0) -> Iterator[Path]:
    """`atomic.new_folder` of something of about `size` bytes: BadInput where the disk is too full,
    before or half-way. What a killed export to the same place left is taken away.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if size > free:
        raise BadInput(
            f"--output-dir {folder} needs about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free there: give a folder on another disk"
        )
    _sweep(folder)
    try:
        with atomic.new_folder(folder) as new:
            yield new
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BadInput(_no_room(folder, os.strerror(error.errno or 0))) from None
    except SafetensorError as error:  # it says what the system said
        raise BadInput(_no_room(folder, " ".join(str(error).split())[:200])) from None


def _no_room(folder: Path, why: str) -> str:
    return f"--output-dir {folder} cannot be written ({why}): nothing is left of it; make room"


def _sweep(folder: Path) -> None:
    """Removes temporaries beside `folder` whose process is no more."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.tmp(\d+)")
    for path in folder.absolute().parent.glob(f".{folder.name}.tmp*"):
        found = pattern.fullmatch(path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)
