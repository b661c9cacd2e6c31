"""What the round loop is told once, before the first round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rolora.federated.buffered.settings import Buffered
from rolora.federated.privacy import Privacy
from rolora.federated.secure.settings import Secure


@dataclass(frozen=True)
class RoundConfig:
    """What the loop itself needs to know; `lr(phase, round)` is the learning rate of a round's
    tasks.

    max_abs: the largest element that a client may send. examples_of(client): the most examples that
    it may claim; max_examples: the most that any may. max_weight: what its weight counts at most
    (None: no cap; 1: uniform). deadline: seconds of a round. privacy: None, or its mechanism.
    client_ranks: ranks of clients 0, 1, …, repeated. secure: None, or how rounds are masked.
    buffered: None, or how rounds are asynchronous.
    """

    run: str
    rounds: int
    clients: int
    clients_per_round: int
    quorum: int
    exchange_dtype: str
    eval_every: int
    checkpoint_every: int
    seed: int
    max_abs: float
    max_examples: int
    examples_of: Callable[[int], int]
    lr: Callable[[str, int], float]
    max_weight: int | None = None
    deadline: float | None = None
    poisson: bool = False
    rule: str = "mean"
    trim: float = 0.0
    server_momentum: float = 0.0
    server_lr: float = 1.0
    privacy: Privacy | None = None
    client_ranks: tuple[int, ...] | None = None
    secure: Secure | None = None
    buffered: Buffered | None = None
