"""The suite that defaults are chosen on and judged on: methods × wires × jobs, paired seeds, each
method at the best of as many rates.

    python -m benchmarks.suite --fetch DIR                      # encoder, texts, images; once
    python -m benchmarks.suite --texts DIR --list               # the jobs, what is left, minutes
    python -m benchmarks.suite --texts DIR --side choose        # all; the same command goes on
    python -m benchmarks.suite --texts DIR --side choose --methods rolora,fedavg,rolora*2 \\
        --wires bf16,int8 --budget-minutes 60
    python -m benchmarks.suite --tables                         # what is recorded, as Markdown
    python -m benchmarks.suite --smoke                          # seconds: does all of it work?

A method is a name with options after a plus, as for `rolora.compare`; `*2` is it at twice the rank.
Every run is a line below benchmarks/results/suite/; one that is recorded with the same
configuration is not repeated, so a command that was stopped or killed goes on where it was. Several
processes may run at a time where they have different --jobs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.suite import images, records, tables, texts
from benchmarks.suite.jobs import SIDES, Job, chosen, shortened
from benchmarks.suite.running import HELD_OUT, Contender, OutOfTime, Runner
from rolora import variants
from rolora.config import WIRES
from rolora.errors import BadInput

_METHODS = "rolora,rolora+equal-factors=false,rolora*2,fedavg,fedex,flexlora,fedrot,la-lora"
_SMOKE_JOBS = ("builtin", "digits-5x2", "tokens-iid-all")  # that need no --texts


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    try:
        return _do(asked)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", flush=True)
        return 130


def _do(asked: argparse.Namespace) -> int:
    if asked.fetch is not None:
        texts.fetch(asked.fetch)
        images.fetch(asked.fetch)
        return 0
    if asked.tables:
        tables.results(asked.side, asked.records)
        print()
        tables.summary(asked.records)
        return 0
    if asked.pictures is not None:
        for path in tables.draw(asked.pictures, asked.records):
            print(path)
        return 0
    methods, wires = _methods(asked.methods), _wires(asked.wires)
    if asked.seeds < 1 or not asked.length > 0:
        raise BadInput("--seeds and --length: expected at least one seed and a positive length")
    _set_threads(asked.threads)
    if asked.smoke:
        return _smoke()
    found = chosen(asked.side, asked.jobs)
    if not found:
        raise BadInput(f"--jobs {asked.jobs}: no job of the suite is called so (--list names them)")
    runner = Runner(asked.texts, asked.records, asked.length)
    if asked.list:
        _list(runner, found, methods, wires, asked.seeds)
        return 0
    if asked.budget_minutes is not None:
        runner.deadline = time.monotonic() + 60 * asked.budget_minutes
    try:
        for job in found:
            _run(runner, job, methods, wires, asked.seeds)
    except OutOfTime:
        print("\nout of time; left, and the same command goes on:")
        _list(runner, found, methods, wires, asked.seeds)
    return 0


def _smoke() -> int:
    """Every step of the suite on jobs of two rounds, whose records are not kept."""
    with tempfile.TemporaryDirectory() as place:
        runner = Runner(None, Path(place), length=0.0)  # a run has two rounds at least
        for job in (job for job in chosen(None, None) if job.name in _SMOKE_JOBS):
            _run(runner, shortened(job), ["rolora*2", "fedavg"], ["bf16", "int8"], 1)
        tables.results(None, Path(place))
    return 0


def _run(runner: Runner, job: Job, methods: list[str], wires: list[str], seeds: int) -> None:
    """A job's runs: the rates first, then seed by seed, so that what is there is paired."""
    able = _able(runner, job, methods, wires[0])
    rates = {method: runner.rate(job, Contender(method, wires[0])) for method in able}
    for seed in range(seeds):
        for method in able:
            for wire in wires:
                who = Contender(method, wire)
                record = runner.run(job, who, rates[method], seed, HELD_OUT)
                print(
                    f"{job.name}: {method} {wire}, lr {rates[method]:g}, seed {seed}: "
                    f"{record['headline']} {records.final(record):.4f}, "
                    f"{record['curve'][-1][1]:.2f} MB up, {record['seconds']:.0f} s",
                    flush=True,
                )


def _able(runner: Runner, job: Job, methods: list[str], wire: str) -> list[str]:
    """The methods that a job can be trained with; of the others it says why not. The digits are
    trained by SGD, which has no moments to carry.
    """
    able = []
    for method in methods:
        reason = runner.why_not(job, Contender(method, wire))
        if reason is None:
            able.append(method)
        else:
            print(f"{job.name}: {method} is left out: {reason}", flush=True)
    return able


def _list(
    runner: Runner, found: list[Job], methods: list[str], wires: list[str], seeds: int
) -> None:
    """The jobs with the runs that are not recorded and their minutes on one core."""
    total = 0.0
    for job in found:
        missing = runner.left(job, _able(runner, job, methods, wires[0]), wires, seeds)
        total += missing * job.minutes
        print(
            f"{job.name:<24} {job.side:<7} {missing:>5} runs left of {job.minutes:g} min: "
            f"{missing * job.minutes:>6.0f} min"
        )
    print(f"{total:.0f} minutes of one core in all")


def _methods(text: str) -> list[str]:
    """The methods of a comma-separated list, each checked."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        variant, star, times = name.partition("*")
        if star and (not times.isdigit() or int(times) < 2):
            raise BadInput(
                f"--methods {name}: after a star comes how many times the rank, as in *2"
            )
        variants.parse(variant)
    if not names or len(set(names)) < len(names):
        raise BadInput(f"--methods {text!r}: expected methods separated by commas, none twice")
    return names


def _wires(text: str) -> list[str]:
    wires = [part.strip() for part in text.split(",") if part.strip()]
    if not wires or not set(wires) <= set(WIRES):
        raise BadInput(f"--wires {text!r}: expected some of {', '.join(WIRES)}")
    return wires


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--side", choices=SIDES, help="of the study; both if not given")
    add("--jobs", metavar="PART,…", help="names, or parts of them; all if not given")
    add("--methods", default=_METHODS, help=f"[{_METHODS}]")
    add(
        "--wires",
        default="bf16,int8",
        help="precisions to cross them with; rates are chosen at the first  [bf16,int8]",
    )
    add("--seeds", type=int, default=5, help="paired runs of each  [5]")
    add("--length", type=float, default=1.0, help="times a job's rounds, for points at fewer bytes")
    add("--budget-minutes", type=float, help="begin no run after so long, and say what is left")
    add("--threads", type=int, default=1, help="CPU threads  [1]")
    add(
        "--texts",
        type=Path,
        metavar="DIR",
        help="where --fetch has put the encoder, texts and images",
    )
    add("--records", type=Path, default=records.FOLDER, metavar="DIR", help="where runs are kept")
    add(
        "--fetch", type=Path, metavar="DIR", help="download the encoder, texts and images, and stop"
    )
    add("--list", action="store_true", help="say what is left and how long it takes, and stop")
    add("--tables", action="store_true", help="print what is recorded, and stop")
    add("--pictures", type=Path, metavar="DIR", help="draw each job's front, and stop")
    add("--smoke", action="store_true", help="try every step in seconds, keep nothing, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
