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
    alone, with_what_rests = (carried_bytes(layout, clients, rests) for rests in (False, True))
    room = bool(config.optimisation.carry_moments) or with_what_rests <= _CARRIED
    config = moments(config, _everybody(config, clients), room, alone <= _CARRIED)
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


def moments(config: Config, everybody: bool, room: bool, fits: bool) -> Config:
    """Whether factors are handed over at equal size, and which moments clients carry.

    Moments follow a hand-over where everybody comes back in the next round and has room for them
    and for what they follow; `fits`: for moments alone. Where clients are drawn they keep nothing
    unless they are asked to: what is old was worth nothing, or less (benchmarks/results/STUDY.md).
    """
    f, o = config.federation, config.optimisation
    equal, follow, carried = f.equal_factors, o.realign_moments, o.carry_moments
    if equal is None:
        keep = bool(carried or follow or config.exchange.error_feedback)
        equal = (room and follow is not False) if everybody else not keep
    if follow is None:
        follow = equal and room and (everybody or bool(carried))
    if carried is None:
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
