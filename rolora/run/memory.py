"""How much memory this process has used, and what clients will keep."""

from __future__ import annotations

import resource

import torch

from rolora.federated.layout import Layout


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on the GPU what torch allocated, on the CPU the process's
    resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def carried_bytes(layout: Layout, clients: int, realigned: bool) -> int:
    """What clients keep between rounds with --carry-moments: both of AdamW's fp32 moments of every
    value that travels, for all of them, and the factors that rested where moments are realigned.
    """
    each = 8 * sum(layout.sizes.values()) + realigned * _frames(layout)
    return clients * each


def left_bytes(layout: Layout, clients: int, framed: bool) -> int:
    """What clients keep between rounds with --error-feedback: an fp32 value for each that travels,
    for all of them, and the factors that rested where it follows a hand-over and moments do not.
    """
    each = 4 * sum(layout.sizes.values()) + framed * _frames(layout)
    return clients * each


def _frames(layout: Layout) -> int:
    """Bytes of the factors that rested when a client's two factors trained last."""
    return 4 * (layout.sizes["A"] + layout.sizes["B"])
