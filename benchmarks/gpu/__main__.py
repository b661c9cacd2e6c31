"""One command for a machine with a GPU: checks, times, tunes, unattended, the most valuable part
first.

    python -m benchmarks.gpu --output DIR [--minutes 8] [--smoke]

DIR/gpu.json is rewritten after every unit, so a run that is cut short keeps what it has measured,
and the same command goes on with what is missing. A contender that fails, hangs or takes its
process down loses its own row, which says why. Needs torch, triton, transformers and PEFT. At the
end DIR/tables.md has the tables, and DIR/<GPU name>.json what goes into rolora_kernels/tuned, where
dispatch reads it. `--smoke` runs every line of it on tiny shapes, on a CPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import report, supervisor
from benchmarks.gpu.about import sources
from benchmarks.gpu.checks import failed
from benchmarks.gpu.results import Results
from rolora.errors import BadInput


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the results; one that has some goes on",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after so long no new measurement begins"
    )
    parser.add_argument("--smoke", action="store_true", help="every line once, on tiny shapes")
    parser.add_argument(
        "--only",
        action="append",
        metavar="BEGINNING",
        help="units whose name begins so ('layer', 'layer M=8192 '); may be given again",
    )
    parser.add_argument(
        "--also",
        type=Path,
        metavar="FILE",
        help="a Python file whose contenders(problem) gives further ones for the layers, by name",
    )
    parser.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="a contender of which nothing is heard for longer is ended (default: by part, 60 to "
        "120)",
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        metavar="ARCHIVE",
        help="what `python -m benchmarks.gpu.kernels` compiled beforehand; used where its Triton "
        "is the one here",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"rolora-kernels-{sources()}",
        help="folder of compiled kernels (default: one under the folder for temporary files)",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="measure nothing: only write the tables of what the folder holds, on any machine",
    )
    args = parser.parse_args()
    if args.smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        code = 0 if args.tables else _measured(args)
        results = Results.load(args.output)
    except BadInput as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if code == supervisor.BAD_INPUT:
        return code
    if results is None:
        print(f"error: {args.output} holds no results", file=sys.stderr)
        return code or 2
    for path in report.write(results):
        print(path)
    print("\n".join(report.lines(results)), flush=True)
    return code or (1 if failed(results.rows) else 0)


def _measured(args: argparse.Namespace) -> int:
    """Measures; the exit code."""
    _writable(args.output)
    signal.signal(signal.SIGTERM, _interrupted)  # who ends it gets the tables of what there is
    try:
        return supervisor.supervise(args.output, args.minutes, _passed_on(args))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130


def _interrupted(*_) -> None:
    raise KeyboardInterrupt


def _writable(folder: Path) -> None:
    """Raises BadInput for a folder in which nothing can be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise BadInput(
            f"--output {folder}: nothing can be written there ({problem.strerror}): name a folder "
            "of yours"
        ) from None


def _passed_on(args: argparse.Namespace) -> list[str]:
    """The worker's arguments."""
    given = ["--output", str(args.output), "--cache", str(args.cache)]
    given += ["--kernels", str(args.kernels)] if args.kernels else []
    given += ["--smoke"] if args.smoke else []
    given += ["--patience", str(args.patience)] if args.patience is not None else []
    given += ["--also", str(args.also)] if args.also else []
    for part in args.only or []:
        given += ["--only", part]
    return given


if __name__ == "__main__":
    sys.exit(main())
