"""The process that measures; supervisor starts it, and another one where it dies.

python -m benchmarks.gpu.worker --output DIR --seconds S [--smoke] [--patience S] [--only PART]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu import kernels, parts
from benchmarks.gpu.about import about
from benchmarks.gpu.bench import Bench, Doomed
from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import FULL, SMOKE
from benchmarks.gpu.supervisor import end_with_parent
from rolora.errors import BadInput


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--patience", type=float)
    parser.add_argument("--only", action="append")
    parser.add_argument("--also", type=Path)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    end_with_parent()
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    if device == "cpu" and not args.smoke:
        return _refuse("no CUDA device was found: run this on a machine with a GPU, or --smoke")
    try:
        found = about(device, args.smoke)
        if device == "cuda":
            major, minor = found["capability"]
            compiling = min(100.0, args.seconds / 4)
            manifest = kernels.ready(args.kernels, args.cache, 10 * major + minor, compiling)
            if manifest.get("sources") == found["sources"] and found["commit"] == "unknown":
                found["commit"] = manifest["commit"]
        results = Results.open(args.output, found)
        also = _module(args.also) if args.also else None
    except BadInput as problem:
        return _refuse(str(problem))
    if importlib.util.find_spec("peft"):
        importlib.import_module("peft")  # takes seconds, which are no contender's
    torch.manual_seed(0)
    bench = Bench(results, device, args.seconds, args.patience)
    results.save()
    for unit in parts.units(SMOKE if args.smoke else FULL, also):
        if unit.key in results.done or not _wanted(unit.key, args.only):
            continue
        if bench.late():
            print("time is over: what is left can be measured into the same folder", flush=True)
            break
        try:
            bench.do(unit)
        except Doomed as problem:
            print(problem, file=sys.stderr)
            return 3
    if device == "cuda":
        print(f"kernels: {kernels.count(args.cache)} in the end", flush=True)
    return 0


def _wanted(key: str, only: list[str] | None) -> bool:
    return not only or any(key.startswith(beginning) for beginning in only)


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(f"--also {path} is no file: give a Python file with contenders")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "contenders"):
        raise BadInput(f"--also {path} has no function contenders(problem)")
    return module


def _refuse(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
