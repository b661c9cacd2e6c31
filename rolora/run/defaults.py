"""Options whose default follows from the model, the recipe and the clients."""

from __future__ import annotations

import statistics

from rolora.adapter.attach import AttachReport
from rolora.config import Config
from rolora.federated import control_variates
from rolora.federated.layout import Layout
from rolora.federated.rates import fitting_rate
from rolora.recipes import Recipe
from rolora.recipes.padding import few
from rolora.run.memory import carried_bytes

_CARRIED = 1 << 30  # bytes that all clients may keep between rounds without being asked to


def fill(
    config: Config, recipe: Recipe, layout: Layout, report: AttachReport, clients: int
) -> Config:
    """The configuration with what follows from model and recipe, where nothing was given."""
    if config.optimisation.lr is None:
        config = config.with_values(lr=_fitting_rate(config, report))
    config = _carried(config, layout, clients)
    if config.optimisation.control_variates is None:
        size = clients * control_variates.kept_bytes(layout)
        wanted = _everybody(config, clients) and size <= _CARRIED
        config = config.with_values(control_variates=wanted)
    if config.task.metric is None:
        config = config.with_values(metric=recipe.headline)
    if config.federation.pad_to_multiple_of is None:
        is_captured = config.system.cuda_graphs != "off" and config.system.device != "cpu"
        multiple = few(config.task.max_length) if is_captured else 1
        config = config.with_values(pad_to_multiple_of=multiple)
    return config


def _carried(config: Config, layout: Layout, clients: int) -> Config:
    """Whether factors are handed over at equal size, and which moments clients carry, as far as
    they have room for them.

    Moments follow a hand-over where every client comes back in the next round. Where clients are
    drawn, theirs start anew: old ones were worth nothing (benchmarks/results/STUDY.md).
    """
    f, o = config.federation, config.optimisation
    everybody = _everybody(config, clients)
    room = o.carry_moments or carried_bytes(layout, clients, True) <= _CARRIED
    equal, follow, carried = f.equal_factors, o.realign_moments, o.carry_moments
    if equal is None:
        equal = not everybody or (bool(room) and follow is not False)
    if follow is None:
        follow = equal and bool(room) and (everybody or bool(o.carry_moments))
    if carried is None:
        fits = carried_bytes(layout, clients, False) <= _CARRIED
        carried = follow or (fits and not equal)
    return config.with_values(equal_factors=equal, realign_moments=follow, carry_moments=carried)


def _everybody(config: Config, clients: int) -> bool:
    """Whether all clients take part in every round."""
    f = config.federation
    return f.clients_per_round == clients and f.sampling == "fixed" and f.membership is None


def _fitting_rate(config: Config, report: AttachReport) -> float:
    """For the width that most of the adapted linears have."""
    layers = report.layers.values()
    width = statistics.mode(layer.in_features for layer in layers)
    scaling = statistics.mode(layer.scaling for layer in layers)
    return fitting_rate(config.optimisation.optimizer, width, scaling)
