"""What the training of one client is told, starts from and reports, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# What stays with a client between rounds: factors of its own (FedSA), AdamW's moments.
ClientState = dict[str, Tensor]
RESTING = {"A": "B", "B": "A"}  # phase → the factor that rests


class TrainingFailed(Exception):
    """A client that could not finish; `reason` is a fixed word for counting."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class LocalConfig:
    """How every client trains.

    `epochs`, where given, replaces `steps` by that many passes over the client's examples.
    `max_grad_norm` 0 means no clipping.
    """

    steps: int
    epochs: int | None
    batch_size: int
    accumulation: int
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    seed: int
    kept: tuple[str, ...] = ()  # kinds that train here and stay here (FedSA)
    selects: bool = False  # the most important ranks only are sent (LoRA-A²)
    client_ranks: tuple[int, ...] | None = None
    carry_moments: bool = False  # AdamW's, of each kind, stay with the client between its rounds
    error_feedback: bool = False  # what the wire leaves of a change is sent with the next
    handed_over: bool = False  # the server turns the factors before one of them is frozen
    realign_moments: bool = False  # moments follow the factor that rested (federated.moments)
    beta2: float = 0.999  # AdamW's, of its second moments
    local_coordinates: bool = False  # train in orthonormal coordinates of the frozen factor
    local_phase: Callable[[int], str] | None = None  # what a local step trains, where they differ
    control_variates: bool = False  # local steps are corrected for what only this client wants
    rates: Mapping[str, float] = field(default_factory=dict)  # times the rate, by kind

    @property
    def keeps(self) -> bool:
        """Whether clients keep anything from one round to the next."""
        own = self.carry_moments or self.error_feedback or self.control_variates
        return own or bool(self.kept)

    @property
    def follows(self) -> bool:
        """Whether anything that a client keeps follows the factor that rested."""
        return self.realign_moments or (self.error_feedback and self.handed_over)

    def step_phase(self, step: int) -> str | None:
        """What a local step trains, counted from 0 in a round; None: the same as every other."""
        return None if self.local_phase is None else self.local_phase(step)

    def steps_for(self, examples: int) -> int:
        per_step = self.batch_size * self.accumulation
        return self.steps if self.epochs is None else self.epochs * math.ceil(examples / per_step)


@dataclass(frozen=True)
class Start:
    """Where the training of a task starts: factors on the model's device, and the way back.

    `back`: None, or what turns changes made in local coordinates into the published ones.
    """

    published: dict[str, Tensor]
    held: dict[str, Tensor]
    back: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """What a client says of its training beside the change: see `wire.Update`."""

    weight: int
    loss: float
    examples: int
    tokens: int
