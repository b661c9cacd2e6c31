"""Local training of one client.

A client takes the published factors, trains the travelling kinds on its own examples, returns the
change. `LocalTrainer.train(task, published, client_state) → (update, client_state)` reads nothing
but its arguments, the frozen base and the client's examples: AdamW's moments are the client's state
where it carries them, else the optimizer is new in every round, as in the paper's released code;
everything random is keyed by (seed, round, client, step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.masks import set_dropout_key
from rolora.adapter.model import adapted_layers, set_phase
from rolora.federated import (
    answering,
    control_variates,
    moments,
    sampling,
)
from rolora.federated.backward import Backward, Plain
from rolora.federated.layout import Layout, rank_of
from rolora.federated.local import (
    RESTING,
    ClientState,
    LocalConfig,
    Report,
    Start,
    TrainingFailed,
)
from rolora.federated.turn import balanced, turned
from rolora.federated.wire import Task, Update
from rolora.recipes import Batch, Recipe
from rolora.recipes.padding import Lengths


@dataclass
class LocalTrainer:
    """One base model in memory, and the examples of every client that it may be asked to train."""

    model: nn.Module
    layout: Layout
    recipe: Recipe
    examples: Sequence[Any]
    partition: Sequence[np.ndarray] | Mapping[int, np.ndarray]  # by client
    config: LocalConfig
    lengths: Lengths | None = None  # that batches are padded to; the longest example's without
    backward: Backward | None = None  # operation by operation if not given

    def __post_init__(self) -> None:
        self._last: tuple[tuple[dict[str, str], str], Start] | None = (
            None  # one start for all who hold the same
        )
        self.has_dropout = any(layer.dropout > 0 for _, layer in adapted_layers(self.model))
        parameters = self.layout.trainable(self.model)
        self._backward = self.backward or Plain(self.model, self.recipe, parameters)

    def train(
        self, task: Task, published: dict[str, Tensor], client_state: ClientState
    ) -> tuple[Update, ClientState]:
        """Trains `task.phase` from `published`.

        Raises TrainingFailed when the loss stops being finite.
        """
        if task.layout != self.layout.hash:
            raise TrainingFailed(
                "other layout", f"this client has {self.layout.hash}, the task {task.layout}"
            )
        mine, config = self.partition[task.client], self.config
        kinds = self.layout.travelling(task.phase)
        training = (*kinds, *config.kept)
        start = self.start(task, published)
        self.layout.scatter(self.model, start.held | self.kept(client_state))
        own = rank_of(config.client_ranks, task.client)
        if own is not None and not config.selects:
            self._cut_ranks(own)
        parameters = self._set_training(task.phase, training)
        by_kind = {kind: self.layout.parameters(self.model, kind) for kind in training}
        optimizer = build_optimizer(config, by_kind, task.lr)
        if config.follows:
            frame = moments.frame(task.phase, start.held)
            client_state = moments.realigned(
                self.layout, task.phase, frame, client_state, config.handed_over
            )
        if config.carry_moments:
            moments.scatter(optimizer, self.layout, self.model, training, client_state)
        added: dict[str, Tensor] = {}
        if config.control_variates:
            added = control_variates.corrections(self.layout, task, start, client_state)
        report = self._steps(
            task, mine, optimizer, parameters, control_variates.by_parameter(by_kind, added)
        )
        trained: list[Tensor] = [p for kind in kinds for p in by_kind[kind]]
        update, left = answering.answer(
            self.layout, config, task, start, trained, report, client_state
        )
        after = self.layout.gather(self.model, config.kept)
        if config.carry_moments:
            gathered = moments.gather(optimizer, self.layout, self.model, training)
            after = client_state | gathered | after
        if config.follows:
            after |= moments.frames(client_state) | frame
        if config.control_variates:
            steps = config.steps_for(len(mine))
            went = control_variates.remembered(self.layout, task, start, steps, by_kind, added)
            after |= control_variates.kept(client_state) | went
        return update, answering.remembered(client_state) | after | left

    def _steps(
        self,
        task: Task,
        mine: np.ndarray,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        corrections: Sequence[tuple[Tensor, Tensor]],
    ) -> Report:
        """The local steps of one client on its examples, `mine`; what it reports of them."""
        config, backward = self.config, self._backward
        total_loss = total_weight = 0.0
        backward.begin()
        seen = tokens = 0
        plan = sampling.batches(
            config.seed,
            task.round,
            task.client,
            len(mine),
            config.batch_size * config.accumulation,
            config.steps_for(len(mine)),
        )
        for step, indices in enumerate(plan):
            own = config.step_phase(step)
            if own is not None:
                set_phase(self.model, own)
            micro = [
                self.collate([self.examples[mine[i]] for i in part])
                for part in np.split(
                    indices, range(config.batch_size, len(indices), config.batch_size)
                )
            ]
            weight = sum(batch.weight for batch in micro)
            losses = []
            for number, batch in enumerate(micro):
                key = self.dropout_key(task, step, number) if self.has_dropout else None
                losses.append(backward(batch, max(weight, 1), key))
                seen += batch.examples
                tokens += batch.tokens
            total_weight += weight
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            control_variates.correct(corrections, task.lr)
            backward.forget()
            total_loss = _added(total_loss, losses, step)
        return Report(len(mine), total_loss / max(total_weight, 1), seen, tokens)

    def kept(self, client_state: ClientState) -> dict[str, Tensor]:
        """The kinds that a client keeps, from its last round.

        Nothing in its first, which starts from what is published.
        """
        return {kind: client_state[kind] for kind in self.config.kept if kind in client_state}

    def start(self, task: Task, published: dict[str, Tensor]) -> Start:
        """The factors that training starts from, where the model is.

        What is published, or the same model in coordinates in which the frozen factor is
        orthonormal. One copy for all the clients that hold the same.
        """
        device, config = next(self.model.parameters()).device, self.config
        if device.type == "cpu" and not config.local_coordinates:
            return Start(published, published)
        key = (task.fingerprints, task.phase)
        if self._last is None or self._last[0] != key:
            factors, back = dict(published), None
            if config.local_coordinates and task.phase in RESTING:
                frozen = RESTING[task.phase]
                turns = balanced(self.layout, published, frozen)
                for kind, turn in (turns or {}).items():
                    factors[kind] = turned(self.layout, kind, published[kind], turn)
                if turns is not None:
                    back = turns[frozen]  # what turns one factor turns the other one back
            held = {kind: flat.to(device) for kind, flat in factors.items()}
            self._last = key, Start(published, held, back)
        return self._last[1]

    @torch.no_grad()
    def _cut_ranks(self, rank: int) -> None:
        """Leaves a client's own ranks.

        Where A_j and B_j are zero so are their gradients, and they stay.
        """
        for _, layer in adapted_layers(self.model):
            layer.lora_A[..., rank:, :].zero_()
            layer.lora_B[..., rank:].zero_()

    def _set_training(self, phase: str, kinds: Sequence[str]) -> list[nn.Parameter]:
        """The parameters of the kinds that train, in their order.

        The frozen base, its dropouts included, runs as in evaluation.
        """
        self.model.eval()
        set_phase(self.model, "BOTH" if {"A", "B"} <= set(kinds) else phase)
        set_dropout_key(self.model, None)
        for _, layer in adapted_layers(self.model):
            layer.train()
        parameters = [p for kind in kinds for p in self.layout.parameters(self.model, kind)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A batch to train on, of one of the lengths that there are."""
        batch = self.recipe.collate(examples)
        return batch if self.lengths is None else self.lengths.pad(batch)

    def dropout_key(self, task: Task, step: int, micro: int) -> int:
        return sampling.key64(self.config.seed, "dropout", task.round, task.client, step, micro)


def _added(total: float, losses: list[Tensor], step: int) -> float:
    """The sum of the losses so far. The one place in a step where the host waits for a device:
    behind the optimizer, so that a GPU never waits for the host. Raises TrainingFailed for a loss
    that is not finite; what the step made of the factors is thrown away with the update.
    """
    for value in torch.stack(losses).tolist():
        if not math.isfinite(value):
            raise TrainingFailed("non-finite loss", f"loss {value} at local step {step + 1}")
        total += value
    return total


def build_optimizer(
    config: LocalConfig, by_kind: Mapping[str, Sequence[Tensor]], lr: float
) -> torch.optim.Optimizer:
    """AdamW or SGD over exactly the parameters that train, by kind, each kind at its rate: a
    frozen factor is in no optimizer.
    """
    rates = {kind: lr * config.rates.get(kind, 1.0) for kind in by_kind}
    groups: list[dict[str, Any]] = [
        {"params": list(parameters), "lr": rates[kind]} for kind, parameters in by_kind.items()
    ]
    if config.optimizer == "adamw":
        betas = (0.9, config.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=lr, weight_decay=config.weight_decay)
