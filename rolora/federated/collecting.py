"""What takes the changes of a round: the mean or another rule, private, masked or a method's."""

from __future__ import annotations

from dataclasses import replace

from rolora.federated import aggregate
from rolora.federated.guard import Bounds
from rolora.federated.methods import Context, Method
from rolora.federated.privacy import PrivateMean
from rolora.federated.round_config import RoundConfig
from rolora.federated.secure.noise import NoisyMean


def collector(
    config: RoundConfig, method: Method, context: Context, bounds: Bounds
) -> aggregate.Collector:
    """The collector of one attempt at a round.

    A private mean is never handed to a method: none can reach past its clipping.
    """
    layout, phase, planned = context.layout, context.phase, config.clients_per_round
    if config.privacy is not None and config.secure is not None:
        assert config.secure.noise is not None
        return NoisyMean(config.secure.noise, planned, config.clients, layout, phase)
    if config.privacy is not None:
        return PrivateMean(config.privacy, planned, config.clients, layout, phase)
    heaviest = min(bounds.max_weight, config.max_weight or bounds.max_weight)
    counted = replace(bounds, max_weight=heaviest)
    mean = aggregate.collector(config.rule, config.trim, layout, phase, counted)
    return method.collect(context, mean)
