"""Compiles, without a GPU, every kernel that the command launches, into an archive that is carried
to a GPU machine.

    python -m benchmarks.gpu.kernels --output kernels.tar.gz [--arch 90] [--processes 2]

The parts run as they do on a GPU, on tensors without data: a launch compiles and goes no further,
so the cache's keys are those of the real launches. Triton's own version and build are part of a
key: compile with the Triton of the machine that will run (the archive says which it was).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.about import commit, installed, sources
from rolora.errors import BadInput

MANIFEST = "manifest.json"
KEPT = (".json", ".cubin")  # what a cached kernel is loaded from; the rest only explains it


def key(arch: int) -> dict:
    """What has to be the same where an archive is used."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    return {
        "triton": installed("triton"),
        "build": triton_key(),
        "backend": make_backend(GPUTarget("cuda", arch, 32)).hash(),
    }


def compile_all(folder: Path, arch: int, processes: int, seconds: float | None = None) -> None:
    """Fills a folder as Triton's cache, by so many processes, in the order of the parts."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu.compiler", str(arch), str(processes)]
    started = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.DEVNULL)
        for number in range(processes)
    ]
    end = time.monotonic() + (seconds or 1e6)
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pack(folder: Path, archive: Path, arch: int) -> int:
    """Writes a cache's kernels and what they were compiled with; their number."""
    about = key(arch) | {"sources": sources(), "commit": commit()}
    count = 0
    with tarfile.open(archive, "w:gz") as out:
        text = json.dumps(about).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(text)
        out.addfile(entry, io.BytesIO(text))
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in KEPT:
                out.add(path, path.relative_to(folder).as_posix())
                count += path.suffix == ".cubin"
    return count


def unpack(archive: Path, folder: Path, arch: int) -> tuple[int, dict]:
    """Fills a folder from an archive: (number of kernels, the manifest). 0 where they were compiled
    for another Triton or GPU. Raises BadInput for a file that is no such archive.
    """
    try:
        with tarfile.open(archive) as file:
            manifest = json.load(file.extractfile(MANIFEST))  # type: ignore[arg-type]
            if any(manifest.get(name) != value for name, value in key(arch).items()):
                return 0, manifest
            _extract(file, folder)
    except (OSError, tarfile.TarError, KeyError, ValueError) as problem:
        raise BadInput(f"{archive} is no archive of benchmarks.gpu.kernels: {problem}") from None
    for path in folder.rglob("__grp__*.json"):  # it names its files by their whole paths
        names = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in names if (path.parent / name).is_file()}
        path.write_text(json.dumps({"child_paths": here}))
    return count(folder), manifest


def _extract(file: tarfile.TarFile, folder: Path) -> None:
    """Writes plain files below the folder; Python's own filter is not in every Python 3.11. Raises
    ValueError for anything else.
    """
    members = file.getmembers()
    for member in members:
        parts = Path(member.name).parts
        if not member.isfile() or ".." in parts or Path(member.name).is_absolute():
            raise ValueError(f"{member.name} is no plain file below its folder")
    for member in members:
        path, data = folder / member.name, file.extractfile(member)
        assert data is not None, "plain files have contents"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.read())


def ready(archive: Path | None, folder: Path, arch: int, seconds: float) -> dict:
    """Fills Triton's cache from the archive, or by compiling here with all cores for at most so
    long; the archive's manifest. A folder that has kernels is left as it is.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    manifest: dict = {}
    if archive is not None:
        with tempfile.TemporaryDirectory() as other:
            unpacked, manifest = unpack(archive, Path(other) if count(folder) else folder, arch)
        what = f"{manifest['triton']}, {manifest['backend']}"
        fitting = (
            f"{unpacked} kernels of {archive}" if unpacked else f"none of {archive}: not for us"
        )
        print(f"kernels: {fitting} (compiled by triton {what})", flush=True)
    if not count(folder):
        processes = os.cpu_count() or 1
        print(f"kernels: compiling with {processes} processes", flush=True)
        compile_all(folder, arch, processes, seconds)
        print(f"kernels: {count(folder)} compiled", flush=True)
    return manifest


def count(folder: Path) -> int:
    """The kernels in a cache."""
    return sum(1 for _ in folder.rglob("*.cubin"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernels", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="the archive, .tar.gz")
    parser.add_argument("--arch", type=int, default=90, help="90 is an H100 or H200 (default)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compile_all(Path(folder), args.arch, args.processes)
        kernels = pack(Path(folder), args.output, args.arch)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {kernels} kernels, {size:.1f} MB, triton {installed('triton')}")
    return 0 if kernels else 1


if __name__ == "__main__":
    sys.exit(main())
