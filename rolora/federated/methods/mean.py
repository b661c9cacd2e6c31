"""The weighted mean of the travelling buffers, summed exactly: what every method with a linear aggregation uses."""

from __future__ import annotations

from torch import Tensor

from rolora.federated.guard import Bounds
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState
from rolora_kernels.exchange import ExactSum


class MeanCollector:
    """Σ w·Δ / Σ w over one flat buffer; independent of order."""

    def __init__(self, layout: Layout, phase: str, bounds: Bounds):
        self.layout, self.phase = layout, phase
        self.sum = ExactSum(layout.travelling_size(phase), bounds.max_abs, bounds.max_weight, bounds.max_terms)

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.sum.add(change, weight)

    def finish(self) -> dict[str, Tensor]:
        return self.layout.part(self.sum.mean(), self.phase)


def collect(state: GlobalState, layout: Layout, phase: str, bounds: Bounds) -> MeanCollector:
    return MeanCollector(layout, phase, bounds)
