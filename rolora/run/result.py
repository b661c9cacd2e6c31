"""What a run leaves when it ends: adapters, summary.json, plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from rolora.federated.local import ClientState
from rolora.federated.methods import Method
from rolora.federated.server import Server
from rolora.run import facts, kernels, plots
from rolora.run.evaluation import OwnFactors, personal
from rolora.run.folder import RunFolder
from rolora.run.job import Job
from rolora_kernels import explain


@dataclass(frozen=True)
class Result:
    """`held_out`: the headline on the test rows, or on those of the rounds where there are none."""

    held_out: float
    plots: list[Path]


def metrics(
    job: Job,
    published: dict[str, Tensor],
    own: Mapping[int, ClientState],
    last: dict[str, float] | None,
    alone: bool,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """(of the rows that rounds are evaluated on, of the test rows, None without such); `last`: the
    former where they are known. `own`: what clients keep of the model.
    """
    test = None
    if job.test is not None and alone:
        test = personal(job, published, own, job.test)
    return personal(job, published, own) if last is None else last, test


def write(
    job: Job,
    method: Method,
    server: Server,
    client_states: Mapping[int, ClientState],
    folder: RunFolder,
    alone: bool,
    diverged: str | None = None,
) -> Result:
    """Saves the published factors and what is to be said of them. `client_states`: what clients
    keep. One of several runs (not `alone`) is not tested at the end and not drawn. `diverged`:
    why it went no further.
    """
    published, rows = server.state.published, folder.rows
    own: Mapping[int, ClientState] = {}
    if method.kept:
        own = OwnFactors(method, client_states)
    last, test = metrics(job, published, own, rows[-1]["eval"], alone)
    # All that was charged: a round that was lost before it was recorded is none of the rows.
    told = facts.of(job, rows, test, last, server.ledger.releases)
    for client, state in own.items():
        path = folder.adapter / f"client-{client:04d}"
        job.save_adapter(published | state, path, replace(told, metrics={}))
    if not own:
        job.save_adapter(published, folder.adapter, told)
    name = job.headline
    ended = {} if diverged is None else {"diverged": diverged}
    folder.summarise(
        ended
        | {
            "method": job.config.federation.method,
            "headline": name,
            "rounds": server.state.round,
            "eval": last,
            "test": test,
            "bytes_up": sum(row["bytes_up"] for row in rows),
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "rejected": sum(sum(row["rejected"].values()) for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
            "kernels": kernels.records(explain()),
        }
    )
    drawn: list[Path] = []
    if alone:
        # The rounds between evaluations have none; the last one always has.
        drawn = plots.draw([*rows[:-1], rows[-1] | {"eval": last}], name, folder.path / "plots")
    return Result((test or last)[name], drawn)
