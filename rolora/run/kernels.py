"""Which kernels computed a run, as a reader wants to know it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rolora_kernels.dispatch import Choice


def lines(choices: Sequence[Choice]) -> list[str]:
    """One line for every backend that computed the adapted linears, with the reason of most of its
    calls, at its longest where some calls add to it; `records` has the others.
    """
    calls: dict[str, Counter[str]] = {}
    adapted = [choice for choice in choices if choice.operation.startswith("lora_linear")]
    for choice in adapted or choices:
        calls.setdefault(choice.backend, Counter())[choice.reason] += choice.calls
    found = []
    for backend, reasons in calls.items():
        most = reasons.most_common(1)[0][0]
        reason = max((r for r in reasons if r.startswith(most)), key=len)
        found.append(f"kernels: {backend} ({reason})")
    return found


def records(choices: Sequence[Choice]) -> list[dict]:
    """For every backend and reason: the operations, and the number of calls."""
    found: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        found.setdefault((choice.backend, choice.reason), []).append(choice)
    return [
        {
            "backend": backend,
            "reason": reason,
            "operations": sorted({choice.operation for choice in own}),
            "calls": sum(choice.calls for choice in own),
        }
        for (backend, reason), own in found.items()
    ]
