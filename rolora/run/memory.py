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
    each = 8 * sum(layout.sizes.values())
    if realigned:
        each += 4 * (layout.sizes["A"] + layout.sizes["B"])
    return clients * each
