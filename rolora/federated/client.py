"""Local training: a client takes the published factors, trains the travelling kinds on its own examples, returns the change.

`LocalTrainer.train(task, published, client_state) → (update, client_state)` reads nothing but its arguments, the frozen
base and the client's examples: the optimizer is new in every round, as in the paper's released code, and everything random
is keyed by (seed, round, client, step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.attach import adapted_layers, set_dropout_key, set_phase
from rolora.federated import codec, sampling
from rolora.federated.layout import Layout
from rolora.federated.wire import Task, Update
from rolora.recipes import Recipe
from rolora_kernels.exchange import pack_change

ClientState = dict[str, Tensor]  # what a method leaves with a client between rounds; empty for RoLoRA


class TrainingFailed(Exception):
    """A client that could not finish; `reason` is a fixed word for counting."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class LocalConfig:
    """How every client trains. `epochs`, where given, replaces `steps` by that many passes over the client's examples.
    `max_grad_norm` 0 means no clipping."""

    steps: int
    epochs: int | None
    batch_size: int
    accumulation: int
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    seed: int

    def steps_for(self, examples: int) -> int:
        per_step = self.batch_size * self.accumulation
        return self.steps if self.epochs is None else self.epochs * math.ceil(examples / per_step)


@dataclass
class LocalTrainer:
    """One base model in memory, and the examples of every client that it may be asked to train."""

    model: nn.Module
    layout: Layout
    recipe: Recipe
    examples: Sequence[Any]
    partition: Sequence[np.ndarray]
    config: LocalConfig

    def __post_init__(self):
        self._held: tuple[dict[str, str], dict[str, Tensor]] = {}, {}
        self.has_dropout = any(layer.dropout > 0 for _, layer in adapted_layers(self.model))

    def train(self, task: Task, published: dict[str, Tensor], client_state: ClientState) -> tuple[Update, ClientState]:
        """Trains `task.phase` from `published`; raises TrainingFailed when the loss stops being finite."""
        if task.layout != self.layout.hash:
            raise TrainingFailed("other layout", f"this client has {self.layout.hash}, the task {task.layout}")
        mine, config = self.partition[task.client], self.config
        kinds = self.layout.travelling(task.phase)
        held = self.on_device(task, published)
        self.layout.scatter(self.model, held)
        parameters = self._set_training(task.phase, kinds)
        optimizer = build_optimizer(config.optimizer, parameters, task.lr, config.weight_decay)
        total_loss = total_weight = 0.0
        seen = tokens = 0
        plan = sampling.batches(
            config.seed, task.round, task.client, len(mine), config.batch_size * config.accumulation, config.steps_for(len(mine)))
        for step, indices in enumerate(plan):
            micro = [self.recipe.collate([self.examples[mine[i]] for i in part]) for part in
                     np.split(indices, range(config.batch_size, len(indices), config.batch_size))]
            weight = sum(batch.weight for batch in micro)
            for number, batch in enumerate(micro):
                if self.has_dropout:
                    set_dropout_key(self.model, self.dropout_key(task, step, number))
                loss = self.recipe.loss(self.model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingFailed("non-finite loss", f"loss {value} at local step {step + 1}")
                (loss / max(weight, 1)).backward()
                total_loss += value
                seen += batch.examples
                tokens += batch.tokens
            total_weight += weight
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        change = self.change(task, held, kinds, parameters)
        mean_loss = total_loss / max(total_weight, 1)
        return self.update(task, len(mine), mean_loss, seen, tokens, change), client_state

    def update(self, task: Task, weight: int, loss: float, examples: int, tokens: int, change: Tensor) -> Update:
        """The answer to a task."""
        return Update(
            run=task.run, round=task.round, phase=task.phase, client=task.client, layout=task.layout, versions=task.versions,
            weight=weight, loss=loss, examples=examples, tokens=tokens, change=change)

    def on_device(self, task: Task, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published factors where the model is: themselves on a CPU, one copy for all the clients that hold the same."""
        device = next(self.model.parameters()).device
        if device.type == "cpu":
            return published
        if self._held[0] != task.fingerprints:
            self._held = task.fingerprints, {kind: flat.to(device) for kind, flat in published.items()}
        return self._held[1]

    def change(self, task: Task, held: dict[str, Tensor], kinds: Sequence[str], trained: Sequence[Tensor]) -> Tensor:
        """What training changed in the tensors of `kinds`, as it goes over the wire."""
        before = [view for kind in kinds for view in self.layout.views(held, kind).values()]
        return pack_change(trained, before, task.exchange_dtype, codec.key(self.config.seed, task.round, f"client {task.client}")).wire

    def _set_training(self, phase: str, kinds: Sequence[str]) -> list[nn.Parameter]:
        """The parameters that train; the frozen base, its dropouts included, runs as in evaluation."""
        self.model.eval()
        set_phase(self.model, phase)
        set_dropout_key(self.model, None)
        for _, layer in adapted_layers(self.model):
            layer.train()
        parameters = [p for kind in kinds for p in self.layout.parameters(self.model, kind)]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        return parameters

    def dropout_key(self, task: Task, step: int, micro: int) -> int:
        return sampling.key64(self.config.seed, "dropout", task.round, task.client, step, micro)


def build_optimizer(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW or SGD over exactly the parameters that train: a frozen factor is in no optimizer."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
