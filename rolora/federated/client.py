"""Local training of one client.

A client takes the published factors, trains the travelling kinds on its own examples, returns the
change. `LocalTrainer.train(task, published, client_state) → (update, client_state)` reads nothing
but its arguments, the frozen base and the client's examples: AdamW's moments are the client's state
where it carries them, else the optimizer is new in every round, as in the paper's released code;
everything random is keyed by (seed, round, client, step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.masks import set_dropout_key
from rolora.adapter.model import adapted_layers, set_phase
from rolora.federated import codec, sampling
from rolora.federated.layout import Layout, rank_of
from rolora.federated.turn import balanced, matrices, turned
from rolora.federated.wire import Task, Update
from rolora.recipes import Recipe
from rolora_kernels.exchange import pack_change

ClientState = dict[
    str, Tensor
]  # what stays with a client between rounds: factors of its own (FedSA), AdamW's moments


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
    local_coordinates: bool = False  # train in orthonormal coordinates of the frozen factor

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
        self._last: tuple[tuple, Start] | None = None  # one start for all who hold the same
        self.has_dropout = any(layer.dropout > 0 for _, layer in adapted_layers(self.model))

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
        start = self.start(task, published)
        self.layout.scatter(self.model, start.held | self.kept(client_state))
        own = rank_of(config.client_ranks, task.client)
        if own is not None and not config.selects:
            self._cut_ranks(own)
        parameters = self._set_training(task.phase, kinds)
        optimizer = build_optimizer(config.optimizer, parameters, task.lr, config.weight_decay)
        if config.carry_moments:
            self._recall(optimizer, (*kinds, *config.kept), client_state)
        total_loss = total_weight = 0.0
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
            micro = [
                self.recipe.collate([self.examples[mine[i]] for i in part])
                for part in np.split(
                    indices, range(config.batch_size, len(indices), config.batch_size)
                )
            ]
            weight = sum(batch.weight for batch in micro)
            for number, batch in enumerate(micro):
                if self.has_dropout:
                    set_dropout_key(self.model, self.dropout_key(task, step, number))
                loss = self.recipe.loss(self.model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingFailed(
                        "non-finite loss", f"loss {value} at local step {step + 1}"
                    )
                (loss / max(weight, 1)).backward()
                total_loss += value
                seen += batch.examples
                tokens += batch.tokens
            total_weight += weight
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean_loss = total_loss / max(total_weight, 1)
        travelling = sum(len(self.layout.parameters(self.model, kind)) for kind in kinds)
        report = Report(len(mine), mean_loss, seen, tokens)
        update = self.answer(task, start, parameters[:travelling], report)
        moments = (
            client_state | self._moments(optimizer, (*kinds, *config.kept))
            if config.carry_moments
            else {}
        )
        return update, moments | self.layout.gather(self.model, config.kept)

    def _moments(self, optimizer: torch.optim.Optimizer, kinds: Sequence[str]) -> ClientState:
        """AdamW's moments and steps of each kind, flat."""
        found = {}
        for kind in kinds:
            states = [optimizer.state[p] for p in self.layout.parameters(self.model, kind)]
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{kind}"] = torch.cat(
                    [state[name].flatten() for state in states]
                ).cpu()
            found[f"step.{kind}"] = states[0]["step"].reshape(1).cpu()
        return found

    def _recall(
        self, optimizer: torch.optim.Optimizer, kinds: Sequence[str], client_state: ClientState
    ) -> None:
        """Puts back what `_moments` gave after the last round in which these kinds trained."""
        for kind in kinds:
            if f"step.{kind}" not in client_state:
                continue
            parameters = self.layout.parameters(self.model, kind)
            parts = [
                client_state[f"{name}.{kind}"].split([p.numel() for p in parameters])
                for name in ("exp_avg", "exp_avg_sq")
            ]
            for p, first, second in zip(parameters, *parts, strict=True):
                optimizer.state[p] = {
                    "step": client_state[f"step.{kind}"].reshape(()).clone(),
                    "exp_avg": first.view(p.shape).to(p, copy=True),
                    "exp_avg_sq": second.view(p.shape).to(p, copy=True),
                }

    def kept(self, client_state: ClientState) -> dict[str, Tensor]:
        """The kinds that a client keeps, from its last round.

        Nothing in its first, which starts from what is published.
        """
        return {kind: client_state[kind] for kind in self.config.kept if kind in client_state}

    @torch.no_grad()
    def answer(self, task: Task, start: Start, trained: Sequence[Tensor], report: Report) -> Update:
        """The answer to a task.

        It says what training changed in the travelling tensors, as it goes over the wire.
        """
        kinds = self.layout.travelling(task.phase)
        before: Sequence[Tensor] | None = [
            view for kind in kinds for view in self.layout.views(start.held, kind).values()
        ]
        key, ranks = codec.key(self.config.seed, task.round, f"client {task.client}"), None
        some = self.config.selects or self.config.client_ranks is not None
        if start.back is not None:
            trained, before = self._turned_back(task.phase, start.back, trained, before), None
        change = pack_change(trained, before, "fp32" if some else task.exchange_dtype, key).wire
        if some:
            bits = self._selected(task, start, change)
            ranks = codec.pack_bits(bits)
            change = codec.encode(
                change[self.layout.chosen(bits, task.phase)], task.exchange_dtype, key
            )
        return Update(
            run=task.run,
            round=task.round,
            phase=task.phase,
            client=task.client,
            layout=task.layout,
            versions=task.versions,
            weight=report.weight,
            loss=report.loss,
            examples=report.examples,
            tokens=report.tokens,
            change=change,
            ranks=ranks,
        )

    def _turned_back(
        self, phase: str, back: Tensor, trained: Sequence[Tensor], before: Sequence[Tensor]
    ) -> list[Tensor]:
        """The changes in the published coordinates of what was trained in local ones.

        The turn is linear, so it is the change that turns; no other peer repeats this, so it need
        not be the same bits everywhere.
        """
        changes = [after - start for after, start in zip(trained, before, strict=True)]
        for i, matrix in enumerate(
            matrices(self.layout, back).values()
        ):  # the factor that trains comes first, then a head
            matrix = matrix.to(changes[i].device)
            changes[i] = (
                matrix @ changes[i].double() if phase == "A" else changes[i].double() @ matrix
            ).float()
        return changes

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
            frozen = {"A": "B", "B": "A"}.get(task.phase)
            turns = (
                balanced(self.layout, published, frozen)
                if config.local_coordinates and frozen
                else None
            )
            if turns is not None:
                factors |= {
                    kind: turned(self.layout, kind, published[kind], turn)
                    for kind, turn in turns.items()
                }
                back = turns[frozen]  # what turns one factor turns the other one back
            held = {kind: flat.to(device) for kind, flat in factors.items()}
            self._last = key, Start(published, held, back)
        return self._last[1]

    def _selected(self, task: Task, start: Start, change: Tensor) -> Tensor:
        """The ranks that are sent, bool `[ranks]`.

        A client's first ones, or those whose change moves the product most.
        """
        adapters, budgets = (
            self.layout.adapters(),
            self.layout.budgets(rank_of(self.config.client_ranks, task.client)),
        )
        if not self.config.selects:
            return torch.cat(
                [
                    torch.arange(rank) < budget
                    for (rank, _, _), budget in zip(adapters.values(), budgets, strict=True)
                ]
            )
        kind, other = task.phase, {"A": "B", "B": "A"}[task.phase]
        moved, frozen = (
            self.layout.views(self.layout.part(change, task.phase), kind),
            self.layout.views(start.published, other),
        )
        norms = {"A": lambda factor: factor.norm(dim=1), "B": lambda factor: factor.norm(dim=0)}
        importance = torch.cat(
            [norms[kind](moved[path]) * norms[other](frozen[path]) for path in adapters]
        )
        bits = torch.zeros(len(importance), dtype=torch.bool)
        bits[importance.argsort(descending=True, stable=True)[: sum(budgets)]] = True
        return bits

    @torch.no_grad()
    def _cut_ranks(self, rank: int) -> None:
        """Leaves a client's own ranks.

        Where A_j and B_j are zero so are their gradients, and they stay.
        """
        for _, layer in adapted_layers(self.model):
            layer.lora_A[rank:].zero_()
            layer.lora_B[:, rank:].zero_()

    def _set_training(self, phase: str, kinds: Sequence[str]) -> list[nn.Parameter]:
        """The parameters that train, those that travel first.

        The frozen base, its dropouts included, runs as in evaluation.
        """
        self.model.eval()
        set_phase(self.model, "BOTH" if self.config.kept else phase)
        set_dropout_key(self.model, None)
        for _, layer in adapted_layers(self.model):
            layer.train()
        parameters = [
            p
            for kind in (*kinds, *self.config.kept)
            for p in self.layout.parameters(self.model, kind)
        ]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        return parameters

    def dropout_key(self, task: Task, step: int, micro: int) -> int:
        return sampling.key64(self.config.seed, "dropout", task.round, task.client, step, micro)


def build_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW or SGD over exactly the parameters that train: a frozen factor is in no optimizer."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
