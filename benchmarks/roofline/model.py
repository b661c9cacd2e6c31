"""Launches into modelled milliseconds: of a group of linears, and of all those of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.roofline.machines import GAP, SHARES, Machine
from benchmarks.roofline.variants import VARIANTS, Group, Launch

MEASURED = Path(__file__).parent.parent / "results" / "gpu"
# model → the groups of linears that are adapted in one layer, (K, Ns), and the layers
MODELS: dict[str, tuple[tuple[tuple[int, tuple[int, ...]], ...], int]] = {
    "llama-2-7b": (
        (
            (4096, (4096, 4096, 4096)),  # q, k, v
            (4096, (4096,)),  # o
            (4096, (11008, 11008)),  # gate, up
            (11008, (4096,)),  # down
        ),
        32,
    ),
    "roberta-large": (((1024, (1024, 1024)),), 24),  # query, value
}


def milliseconds(launch: Launch, machine: Machine, width: int) -> float:
    """The slower of a launch's arithmetic and its traffic, and the gap before the next one."""
    arithmetic, bandwidth = SHARES[_kind(launch.kind, machine)]
    computing = launch.flops / (arithmetic * machine.arithmetic(width))
    moving = (launch.read + launch.written) / (bandwidth * machine.bandwidth())
    return 1e3 * (max(computing, moving) + GAP)


def _kind(kind: str, machine: Machine) -> str:
    if kind != "our pointer product":
        return kind
    return f"{kind}, wgmma" if machine.capability >= 90 else f"{kind}, mma"


def groups(model: str, M: int, r: int, **rest) -> Iterator[Group]:
    """The groups of one layer of a model."""
    for K, Ns in MODELS[model][0]:
        yield Group(M, K, Ns, r, **rest)


def alone(group: Group) -> Iterator[Group]:
    """A group's linears as if they shared nothing."""
    for N in group.Ns:
        rest = (group.r, group.phase, group.width, group.nf4, group.steps)
        yield Group(group.M, group.K, (N,), *rest)


def total(
    variant: str, machine: Machine, model: str, M: int, r: int, *, shared: bool = True, **rest
) -> float:
    """Modelled milliseconds of a model's adapted linears, forward and backward; `shared`: linears
    of one input share what the variant lets them share.
    """
    launches, layers = VARIANTS[variant][1], MODELS[model][1]
    return layers * sum(
        milliseconds(launch, machine, part.width)
        for group in groups(model, M, r, **rest)
        for part in ([group] if shared else alone(group))
        for launch in launches(part)
    )


def extra_bytes(variant: str, group: Group) -> float:
    """Bytes beyond the frozen linears'."""
    launches = VARIANTS[variant][1]
    own = sum(launch.read + launch.written for launch in launches(group))
    return own - sum(launch.read + launch.written for launch in VARIANTS["frozen"][1](group))


def measured(variant: str, machine: Machine, model: str, M: int, r: int, phase: str):
    """Milliseconds of the same linears, each alone, from benchmarks/results/gpu; None where no such
    GPU has been measured, or not all of the linears.
    """
    for path in sorted(MEASURED.glob("*.json")):
        found = json.loads(path.read_text())
        if machine.name.split()[-1] not in (found["about"]["gpu"] or ""):
            continue
        known = {
            (row["N"], row["K"]): row["ms"]
            for row in found["rows"]
            if row["part"] == "layer"
            and row["name"] == VARIANTS[variant][2]
            and (row["M"], row["r"], row["phase"], row["p"]) == (M, r, phase, 0.0)
            and "ms" in row
        }
        linears = [(N, g.K) for g in groups(model, M, r) for N in g.Ns]
        if all(linear in known for linear in linears):
            return MODELS[model][1] * sum(known[linear] for linear in linears)
    return None
