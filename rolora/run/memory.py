"""How much memory this process has used."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on the GPU what torch allocated, on the CPU the process's
    resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
