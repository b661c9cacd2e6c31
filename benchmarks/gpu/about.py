"""What a result was measured on and with, without asking git."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MEASURED = ("rolora_kernels", "rolora/adapter", "benchmarks")  # whose code the figures are of


def about(device: str, smoke: bool) -> dict:
    """Machine, versions, commit and a hash of the sources."""
    import torch

    cuda = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "multiprocessors": _property("multi_processor_count", 0) if cuda else 0,
        "l2_bytes": _property("L2_cache_size", 0) if cuda else 0,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{name: installed(name) for name in ("triton", "transformers", "peft", "numpy")},
        "python": platform.python_version(),
        "commit": commit(),
        "sources": sources(),
        "smoke": smoke,
    }


def _property(name: str, otherwise: int) -> int:
    import torch

    return getattr(torch.cuda.get_device_properties(0), name, otherwise)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def sources() -> str:
    """A hash of what is measured: the same on every machine that holds the same files."""
    found = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """The checkout's commit, read from .git; "unknown" where there is none, as in a copy."""
    try:
        folder = ROOT / ".git"
        if folder.is_file():  # a worktree: "gitdir: …"
            folder = Path(folder.read_text().removeprefix("gitdir:").strip())
        head = (folder / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            head = _resolve(folder, head.removeprefix("ref: "))
        return head[:7]
    except (OSError, StopIteration):
        return "unknown"


def _resolve(folder: Path, ref: str) -> str:
    common = folder / "commondir"
    base = folder / common.read_text().strip() if common.is_file() else folder
    if (base / ref).is_file():
        return (base / ref).read_text().strip()
    packed = (base / "packed-refs").read_text().splitlines()
    return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
