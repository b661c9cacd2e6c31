"""The tables of the model, and the figures that sentences hold."""

from __future__ import annotations

from benchmarks.roofline.machines import MACHINES, Machine
from benchmarks.roofline.model import measured, total
from benchmarks.roofline.variants import VARIANTS

SHOWN = ("H100", "H200")  # in the docs' table of variants
ROWS = (512, 2048, 8192, 16384)


def variants(gpus=SHOWN, model="llama-2-7b", M=8192, r=16, **rest) -> list[dict]:
    """A row a variant: modelled milliseconds on every GPU, shared and alone, and measured ones."""
    found = []
    for name, (label, _, _) in VARIANTS.items():
        row: dict = {"variant": label}
        for gpu in gpus:
            machine = MACHINES[gpu]
            ms = total(name, machine, model, M, r, **rest)
            frozen = total("frozen", machine, model, M, r, **rest)
            apart = total(name, machine, model, M, r, shared=False, **rest)
            real = measured(name, machine, model, M, r, rest.get("phase", "B"))
            row[gpu] = {"ms": ms, "ratio": ms / frozen, "alone_ms": apart, "measured_ms": real}
        found.append(row)
    return found


def table(**given) -> None:
    """The variants, modelled."""
    rows = variants(**given)
    gpus = [name for name in rows[0] if name != "variant"]
    heads = [f"{gpu}: modelled ms, over frozen (each alone)" for gpu in gpus]
    print("| variant | " + " | ".join(heads) + " | measured ms |")
    print("|---|" + "---|" * (len(gpus) + 1))
    for row in rows:
        cells = [
            f"{row[gpu]['ms']:.4g}, {row[gpu]['ratio']:.2f} × ({row[gpu]['alone_ms']:.4g})"
            for gpu in gpus
        ]
        real = [f"{gpu} {row[gpu]['measured_ms']:.4g}" for gpu in gpus if row[gpu]["measured_ms"]]
        print(f"| {row['variant']} | " + " | ".join(cells) + f" | {', '.join(real) or 'none'} |")


def sweep(model: str = "llama-2-7b", r: int = 16, phase: str = "B") -> None:
    """The best variant of each GPU and number of rows that keeps nothing more and has S computed on
    its own, modelled over frozen; and the best of all.
    """
    names = [name for name in VARIANTS if VARIANTS[name][0].startswith("ours")]
    print("| GPU | " + " | ".join(f"{M} rows" for M in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for gpu, machine in MACHINES.items():
        cells = []
        for M in ROWS:
            frozen = total("frozen", machine, model, M, r, phase=phase)
            times = {name: total(name, machine, model, M, r, phase=phase) for name in names}
            bound = min(times.values()) / frozen
            del times["merged_kept"], times["merged_producer"]
            best = min(times, key=times.__getitem__)
            label = VARIANTS[best][0].removeprefix("ours, ")
            cells.append(f"{label} {times[best] / frozen:.2f} × ({bound:.2f} ×)")
        print(f"| {gpu} | " + " | ".join(cells) + " |")


def figures() -> dict[str, str]:
    """Name → figure: "modelled VARIANT GPU", over the frozen linears of Llama-2-7B at 8192 rows,
    rank 16, where B trains; "… by 4" with four micro-steps, "… at 16384" with so many rows;
    "modelled rows merged / VARIANT GPU": those from which a merged weight is ahead.
    """
    found = {}
    for gpu, machine in MACHINES.items():
        for other in ("vendor", "skinny"):
            found[f"modelled rows merged / {other} {gpu}"] = f"{_crossing(machine, other):,}"
        for name in VARIANTS:
            for label, M, steps in (("", 8192, 1), (" by 4", 8192, 4), (" at 16384", 16384, 1)):
                frozen = total("frozen", machine, "llama-2-7b", M, 16)
                ms = total(name, machine, "llama-2-7b", M, 16, steps=steps)
                found[f"modelled {name} {gpu}{label}"] = f"{ms / frozen:.2f}"
    return found


def _crossing(machine: Machine, other: str) -> int:
    """The rows, in hundreds, from which a merged weight is ahead of another variant."""
    for rows in range(100, 1 << 15, 100):
        merged, rival = (total(name, machine, "llama-2-7b", rows, 16) for name in ("merged", other))
        if merged < rival:
            return rows
    raise ValueError(f"a merged weight is never ahead of {other} on {machine.name}")
