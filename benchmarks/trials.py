"""Ideas that were tried in one process before anybody builds them: each changes the engine from
outside, on jobs of the suite that choose. What wins becomes an option, what loses leaves this file.

    python -m benchmarks.trials --texts DIR --trial rows-and-columns --job reviews-d.3-tenth-6 \\
        --rates 0.003,0.01 --seeds 2                  # adds to results/trials.json
    python -m benchmarks.trials --job builtin --method rolora+dtype=fp32+beta2=0.95
    python -m benchmarks.trials --table

Seeds are those that choose rates (1000, 1001, …), quality is on held-out rows. A run that is there
is not repeated.

rows-and-columns, blocks: server-averaged second moments (FedAdamW, arXiv 2510.27486). Clients begin
a round with first moments of zero, whose correction begins with it, and with the mean of the second
moments of the last round's clients, who would send the means of rows and columns, or of each rank.
Gone after they lost, and in the history of this file: head-in-A and head-in-B (the head trains and
travels in every second round) and first-A-forgotten (A becomes its first change; commit bb2562e).
svd-hand-over (048c801, with --balance in the method) became --equal-factors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.suite import records
from benchmarks.suite.jobs import CHOOSE, chosen
from benchmarks.suite.running import HELD_OUT, Contender, Runner
from rolora import variants
from rolora.cohort.adamw import ClientAdamW
from rolora.errors import BadInput
from rolora.federated.client_states import ClientStates
from rolora.federated.layout import Layout
from rolora.federated.local import ClientState
from rolora.run import federation

RESULTS = Path(__file__).parent / "results" / "trials.json"
_FIRST_SEED = 1000
_FIRST, _SECOND = "exp_avg.", "exp_avg_sq."


def rows_and_columns(view: Tensor, kind: str) -> None:
    """The matrix of rank one with the means of rows and columns of `view`, in its place."""
    rows, columns = view.mean(1, keepdim=True), view.mean(0, keepdim=True)
    view.copy_(rows * columns / rows.mean().clamp(min=1e-30))


def blocks(view: Tensor, kind: str) -> None:
    """A mean for each rank (of a head for each row) in its place."""
    view.copy_(view.mean(0 if kind == "B" else 1, keepdim=True).expand_as(view))


class Averaged(ClientStates):
    """What every client begins with: one state, made of those of the last round's clients."""

    def __init__(self, layout: Layout, cut: Callable[[Tensor, str], None]):
        super().__init__()
        self.layout, self.cut = layout, cut
        self.ended: list[ClientState] = []
        self.common: ClientState = {}

    def __setitem__(self, client: int, state: ClientState) -> None:
        self.ended.append(state)

    def get(self, client: int, default: Any = None) -> ClientState:
        """The same for all; the clients of a round are all asked for before one of them ends."""
        for name in [name for name in (self.ended or [{}])[0] if name.startswith(_SECOND)]:
            kind = name.removeprefix(_SECOND)
            mean = torch.stack([state[name] for state in self.ended]).mean(0)
            for view in self.layout.views({kind: mean}, kind).values():
                if view.ndim > 1:
                    self.cut(view, kind)
            self.common |= {name: mean, f"{_FIRST}{kind}": torch.zeros_like(mean)}
            self.common[f"step.{kind}"] = max(state[f"step.{kind}"] for state in self.ended)
        self.ended = []
        return dict(self.common)


@contextmanager
def averaged(cut: Callable[[Tensor, str], None]) -> Iterator[None]:
    """Runs begun within it have averaged second moments."""
    build, begin, step = federation.build_server, ClientAdamW.__init__, ClientAdamW.step

    def built(made: Any, **own: Any) -> Any:
        server = build(made, **own)
        server.transport.client_states = Averaged(made.layout, cut)
        return server

    def begun(self: Any, *given: Any) -> None:
        begin(self, *given)
        self.taken = 0

    def stepped(self: Any) -> None:
        # The first moments are as old as the round: their correction is moved into them.
        self.taken += 1
        beta = self.betas[0]
        scales = {
            kind: (1 - beta ** (steps.max().item() + 1)) / (1 - beta**self.taken)
            for kind, steps in self.steps.items()
        }
        rates = dict(self.rates)
        self.rates = {kind: rate * scales[kind] for kind, rate in rates.items()}
        step(self)
        self.rates = rates

    with (
        mock.patch.object(federation, "build_server", built),
        mock.patch.object(ClientAdamW, "__init__", begun),
        mock.patch.object(ClientAdamW, "step", stepped),
    ):
        yield


@contextmanager
def nothing() -> Iterator[None]:
    yield


TRIALS: dict[str, Callable[[], Any]] = {
    "none": nothing,
    "rows-and-columns": lambda: averaged(rows_and_columns),
    "blocks": lambda: averaged(blocks),
}


def run(runner: Runner, trial: str, name: str, method: str, rate: float, seed: int) -> dict:
    """One run's record."""
    job = next((job for job in chosen(CHOOSE, name) if job.name == name), None)
    if job is None:
        names = ", ".join(job.name for job in chosen(CHOOSE, None))
        raise BadInput(f"--job {name}: expected one that chooses: {names}")
    who = Contender(method, "bf16")
    with TRIALS[trial]():
        if job.split is None:
            made = runner._trained(runner.configuration(job, who, rate, seed, HELD_OUT))
        else:
            made = runner._two_layer_run(job, who, rate, seed, HELD_OUT)
    return {
        **{"trial": trial, "job": name, "method": method, "rate": rate, "seed": seed},
        **{"quality": made["curve"][-1][3], "loss": made["loss"], "mb_up": made["curve"][-1][1]},
        **records.stamp(),
    }


def read() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("job", "trial", "method", "rate", "seed"))


def table() -> None:
    """Means over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for record in sorted(read(), key=key):
        groups.setdefault(key(record)[:-1], []).append(record)
    print("| job | trial | method | rate | quality, by seed | loss, by seed | MB up | date |")
    print("|---" * 8 + "|")
    for (job, trial, method, rate), found in groups.items():
        each = ", ".join(f"{record['quality']:.3f}" for record in found)
        mean = statistics.mean(record["quality"] for record in found)
        losses = ", ".join(f"{record['loss']:.3f}" for record in found)
        print(
            f"| {job} | {trial} | {method} | {rate:g} | {mean:.3f}: {each} | {losses} | "
            f"{found[0]['mb_up']:.2f} | {found[-1]['date']} |"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trial", choices=TRIALS, default="none")
    add("--job", default="builtin", help="the whole name of a job that chooses")
    add("--method", default="rolora")
    add("--rates", default="0.01", help="separated by commas")
    add("--seeds", type=int, default=2)
    add("--texts", type=Path, metavar="DIR", help="as for benchmarks.suite")
    add("--table", action="store_true", help="print what is recorded, and stop")
    asked = parser.parse_args(arguments)
    if asked.table:
        table()
        return 0
    runner = Runner(asked.texts)
    torch.set_num_threads(1)
    try:
        rates = variants.rates(asked.rates)
        for seed in range(_FIRST_SEED, _FIRST_SEED + asked.seeds):
            for rate in rates:
                wanted = (asked.job, asked.trial, asked.method, rate, seed)
                if wanted in map(key, read()):
                    continue
                record = run(runner, asked.trial, asked.job, asked.method, rate, seed)
                RESULTS.write_text(json.dumps([*read(), record], indent=0) + "\n")
                print(*wanted, record["quality"], record["loss"], flush=True)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
