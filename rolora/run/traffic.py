"""What a run sends in all its rounds, told before it is made: the server's own rules (who is drawn,
who holds which version) gone through without a model. Beside it, what another program would send.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rolora.config import Config, settled
from rolora.federated import sampling, turn
from rolora.federated.layout import Layout
from rolora.federated.methods import Method, hands_over
from rolora.recipes import choosing
from rolora.run.job import Job
from rolora_kernels.codecs import CODECS

_MOST_TASKS = 1_000_000  # tasks of a run that are gone through; a second or two
_MIB = 1 << 20


@dataclass(frozen=True)
class Traffic:
    """Bytes of the buffers that travel, headers left out."""

    down: int
    up: int

    @property
    def both(self) -> int:
        return self.down + self.up


def rows(job: Job, method: Method) -> list[tuple[str, str]]:
    """The plan's lines of a benchmark that counts what is sent; none for another."""
    known = choosing.benchmark(job.config)
    if known is None or known.yardstick is None:
        return []
    f, theirs = job.config.federation, known.yardstick
    tasks = f.rounds * settled(f.clients_per_round)
    shapes = [entry.shape for entry in job.layout.entries if entry.kind != "head"]
    message = theirs.message_bytes(shapes)
    in_all = 2 * tasks * message
    return [
        ("traffic", _ours(job, method, in_all)),
        (
            f"{theirs.name}'s own",
            f"{message:,} bytes a message, both factors in fp32; {in_all / _MIB:,.0f} MiB in all, "
            f"{in_all / theirs.budget:.1%} of the {theirs.budget / _MIB:,.0f} MiB that it allows",
        ),
        ("not the same", "; ".join(theirs.differences)),
    ]


def _ours(job: Job, method: Method, theirs: int) -> str:
    found = predicted(job.config, job.layout, method)
    if found is None:
        return "not told beforehand for these options"
    return (
        f"{found.down / _MIB:,.0f} MiB down and {found.up / _MIB:,.0f} MiB up in all rounds, "
        f"{found.both / theirs:.1%} of what follows; modelled, without headers"
    )


def predicted(config: Config, layout: Layout, method: Method) -> Traffic | None:
    """Of all rounds, where every client answers and every hand-over turns factors; None where what
    travels is not known beforehand: methods that add to the base, turn factors by themselves or
    send some ranks, secret draws, masked or asynchronous rounds, clients that come and go, and runs
    of over a million tasks.
    """
    f = config.federation
    tasks = f.rounds * settled(f.clients_per_round)
    if config.privacy.secure_aggregation or config.asynchrony.buffer is not None or f.membership:
        return None
    unknown = method.kept or method.changes_base or method.turns or method.selects
    if unknown or f.client_ranks or f.sampling != "fixed" or tasks > _MOST_TASKS:
        return None
    codec, down, up = CODECS[config.exchange.exchange_dtype], 0, 0
    for task in _tasks(config, layout, method):
        up += codec.bytes(layout.travelling_size(task.phase))
        down += sum(4 * layout.sizes[kind] for kind in task.whole)
        down += sum(codec.bytes(layout.sizes[kind]) for kind in task.changes)
        down += 8 * turn.length(layout) * len(task.turns)
    return Traffic(down, up)


@dataclass(frozen=True)
class _Task:
    """What one client is sent: whole kinds, the last change of kinds, and turns of kinds."""

    phase: str
    whole: list[str]
    changes: list[str]
    turns: list[str]


def _tasks(config: Config, layout: Layout, method: Method) -> Iterator[_Task]:
    """The tasks of all rounds, with what is missing as `peer.what_is_missing` decides."""
    f, seed = config.federation, config.run.seed
    versions: dict[str, int] = dict.fromkeys(layout.sizes, 0)
    changes: set[str] = set()  # kinds whose last publication is a change; a turn
    turns: set[str] = set()
    held: dict[int, dict[str, int]] = {}
    for number in range(1, f.rounds + 1):
        phase = method.phase(number)
        for client in sampling.cohort(seed, number, f.clients, settled(f.clients_per_round)):
            own = held.get(client, {})
            behind = [kind for kind, version in versions.items() if own.get(kind) != version]
            by_one = [kind for kind in behind if own.get(kind) == versions[kind] - 1]
            yield _Task(
                phase,
                [kind for kind in behind if kind not in by_one],
                [kind for kind in by_one if kind in changes],
                [kind for kind in by_one if kind in turns],
            )
            held[client] = dict(versions)
        changed = set(layout.travelling(phase))
        is_turned = f.hand_over is not None and hands_over(method.phase, number)
        turned = {"A", "B"} if is_turned else set()
        published = changed | turned
        for kind in published:
            versions[kind] += 1
        changes = changes - published | changed
        turns = turns - published | turned
