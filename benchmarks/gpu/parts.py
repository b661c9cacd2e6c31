"""All that is measured, in order: the most valuable first, and last what may take the process
down.
"""

from __future__ import annotations

from itertools import chain
from types import ModuleType

from benchmarks.gpu import ceilings, clients, layer, model, nf4, products, tuning
from benchmarks.gpu.bench import Unit
from benchmarks.gpu.sizes import Sizes


def units(sizes: Sizes, also: ModuleType | None = None) -> list[Unit]:
    """The units in order; `also` has further contenders for the layers."""
    return list(
        chain(
            ceilings.units(sizes),
            tuning.units(sizes, tuning.SKINNY),
            products.units(sizes),
            tuning.units(sizes, tuning.GEMMS),
            tuning.merged_units(sizes),
            layer.first_units(sizes, also),
            model.units(sizes),
            clients.units(sizes),
            nf4.units(sizes),
            tuning.masked_units(sizes),
            layer.more_units(sizes, also),
            tuning.more_units(sizes),
            tuning.tma_units(sizes),
            layer.tma_units(sizes),
        )
    )
