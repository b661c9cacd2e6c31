"""The examples of every client, as the configuration splits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rolora.config import OPEN, Config
from rolora.data import cells
from rolora.errors import BadInput
from rolora.federated import aggregate, partition
from rolora.recipes import Recipe
from rolora.run import masked, members, private


def split(
    config: Config, recipe: Recipe, examples: Sequence[Any], rows: Sequence[dict]
) -> tuple[list[np.ndarray], Config]:
    """(index arrays, a client each; the configuration with how many there are and take part).

    `rows` are what `examples` were encoded from, in the same order.
    """
    clients = _indices(config, recipe, examples, rows)
    f, count = config.federation, len(clients)
    is_bounded = f.membership != OPEN  # else more clients than the partition has may come
    if f.clients_per_round is not None and f.clients_per_round > count and is_bounded:
        raise BadInput(f"--clients-per-round {f.clients_per_round} is over the {count} clients")
    per_round = f.clients_per_round or count
    if (config.asynchrony.buffer or 0) > per_round:
        raise BadInput(
            f"--buffer {config.asynchrony.buffer} is over the {per_round} clients that train at a "
            "time: give a smaller one, or more --clients-per-round"
        )
    least = aggregate.least_clients(f.aggregation, f.trim_fraction)
    if least > per_round:
        raise BadInput(
            f"--aggregation {f.aggregation} bears a wrong client from {least} clients a round on, "
            f"and there are {per_round}: ask more, raise --trim-fraction, or use mean"
        )
    if f.quorum > per_round:
        raise BadInput(f"--quorum {f.quorum} can never be met by {per_round} clients a round")
    # With fewer answers than that the rule would be a plain mean.
    quorum = max(f.quorum, least) if f.aggregation != "mean" else f.quorum
    config = config.with_values(secure_threshold=masked.threshold(config, per_round))
    members.require(config, count, max(quorum, config.privacy.secure_threshold or 0))
    config = config.with_values(clients=count, clients_per_round=per_round, quorum=quorum)
    return clients, private.with_noise(config)


def _indices(
    config: Config, recipe: Recipe, examples: Sequence[Any], rows: Sequence[dict]
) -> list[np.ndarray]:
    f, seed = config.federation, config.run.seed
    if f.partition == "column":
        column = config.data.client_column
        return partition.column(cells.label(row[column]) for row in rows)
    try:
        if f.partition == "iid":
            return partition.iid(len(examples), f.clients, seed)
        labels = recipe.skew_labels(examples)
        if labels is None:
            raise BadInput(
                f"--partition {f.partition} splits by label, which {config.task.task_type} data "
                "do not have: use iid or column"
            )
        if f.partition == "dirichlet":
            return partition.dirichlet(labels, f.clients, f.dirichlet_alpha, seed)
        return partition.shards(labels, f.clients, f.shards_per_client, seed)
    except ValueError as error:
        raise BadInput(str(error)) from None
