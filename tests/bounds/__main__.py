"""Runs every kernel in every form as Triton compiles it, without a GPU: an access outside a tensor,
a race between two programs and memory that nobody wrote are told, and results are compared.

    python3.12 -m venv .ttsem && .ttsem/bin/pip install ttsem==0.1.0 triton==3.8.0 torch numpy
    .ttsem/bin/python -m tests.bounds [--only BEGINNING]

The interpreter of the other tests sees none of these: it runs programs one after another, in forms
of the kernels that raise 16-bit operands to fp32. ttsem (MIT) executes Triton's IR of what a GPU
would run. It wants Triton 3.8 and Python 3.12, so it has an environment of its own; run this when a
kernel changes. First come faults that are planted, each of which has to be found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

os.environ["TRITON_INTERPRET"] = "0"  # set before anything imports Triton

import torch
from triton.runtime.jit import JITFunction
from ttsem import sanitize

from rolora_kernels import tune
from rolora_kernels.triton_ops import base_tma, dropped, launch
from tests.bounds.cases import cases, forms

PROGRAMS = 3  # of the persistent kernel: fewer than tiles, so that a program takes several


def planted() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(what is wrong, the kind of fault, a launch of our own kernel that has it)."""
    yield "a row too many is read", "oob_read", partial(_mask_alone, 33, 34)
    yield "a row too many is written", "oob_write", partial(_mask_alone, 34, 33)
    yield "two programs write the same", "race", partial(_mask_alone, 33, 33, stride=256)


def _mask_alone(rows_read: int, rows_written: int, stride: int = 300) -> None:
    """drop(X) in the larger of the numbers of rows, with any stride of OUT's rows."""
    x, out = torch.randn(rows_read, 300, device="cuda"), torch.zeros(rows_written, 300)
    rows, config = max(rows_read, rows_written), dropped.SPEC.shipped(4)
    grid = (-(-rows // config.BLOCK_M), -(-300 // config.BLOCK_K))
    given = (x, 300, 1, out, stride, 1, torch.tensor(7), 0, 1.0, rows, 300)
    launch.launch(dropped.SPEC, config, grid, *given, ADD=False, PER_ROW=False)


def look(name: str, work: Callable[[], object]) -> str | None:
    """What is wrong with launches, in a line; None where nothing is."""
    try:
        work()
    except sanitize.KernelFault as fault:
        return f"{name}: {fault.fault.kind}: {fault}"
    except sanitize.Unjudged as problem:
        return f"{name}: could not be judged: {problem}"
    return None


def missed() -> list[str]:
    """The planted faults that are not found, or found as something else."""
    found = []
    for name, kind, work in planted():
        told = look(name, work)
        print(f"planted: {name}: {(told or 'not found').split(': ')[1:2] or 'not found'}")
        if told is None or not told.startswith(f"{name}: {kind}: "):
            found.append(f"planted: {name} is not found as {kind}: {told}")
    return found


def compared(case) -> str | None:
    """What is wrong with a case."""
    errors: list[float] = []
    told = look(case.name, lambda: errors.append(tune.error(case.call(), case.truth())))
    if told is None and not errors[0] <= case.gate:  # NaN fails too
        told = f"{case.name}: error {errors[0]:.2e} is above {case.gate:.0e}"
    print(told or f"{case.name}: {errors[0]:.1e}", flush=True)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bounds", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--only", metavar="BEGINNING", default="", help="cases whose name begins so"
    )
    only = parser.parse_args().only
    torch.manual_seed(0)
    base_tma.multiprocessors = lambda device: PROGRAMS
    seen: dict[str, list[dict]] = defaultdict(list)
    with sanitize.session() as session:
        wrong = missed()
        run = JITFunction.run

        def noted(self, *args, **kwargs):
            seen[self.fn.__name__].append(kwargs)
            return run(self, *args, **kwargs)

        JITFunction.run = noted
        wrong += [
            told for case in cases() if case.name.startswith(only) if (told := compared(case))
        ]
    if not only:
        for kernel, settings in forms().items():
            for setting in settings:
                if not any(setting.items() <= launched.items() for launched in seen[kernel]):
                    wrong.append(f"{kernel} was never launched with {setting}")
    if session.races_unchecked:
        wrong.append(f"{session.races_unchecked} launches were too large to look for races in")
    print(f"\n{session.launches} launches, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
