"""One chunk of clients, trained in one forward and backward a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rolora.adapter.call import ClientFactors
from rolora.adapter.masks import set_client_dropout_keys, set_dropout_key
from rolora.adapter.model import adapted_layers, set_phase
from rolora.cohort.adamw import ClientAdamW
from rolora.cohort.heads import client_heads
from rolora.federated import answering, control_variates, moments, sampling
from rolora.federated.client import LocalTrainer, build_optimizer
from rolora.federated.local import ClientState, Report, TrainingFailed
from rolora.federated.wire import Task, Update
from rolora.recipes import Batch
from rolora_kernels.transfer import to_device


class Together:
    """One chunk of clients.

    Their parameters `[C, …]` are in the place of the model's while the context is open.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        heads: tuple[str, ...],
        tasks: list[Task],
        published: dict[str, Tensor],
        states: list[ClientState],
    ):
        self.states = states  # of the clients, what they carry to their next round at the end
        self.trainer, self.heads, self.tasks, self.task = trainer, heads, tasks, tasks[0]
        self.start = trainer.start(self.task, published)
        count, config = len(tasks), trainer.config
        self.kinds = trainer.layout.travelling(self.task.phase)
        training = (*self.kinds, *config.kept)
        trainer.layout.scatter(trainer.model, self.start.held)
        self.own = {
            kind: [
                p.detach().expand(count, *p.shape).clone().requires_grad_()
                for p in trainer.layout.parameters(trainer.model, kind)
            ]
            for kind in training
        }
        self.parameters = [p for kind in training for p in self.own[kind]]
        sizes = [len(trainer.partition[task.client]) for task in tasks]
        self.plans = [
            sampling.batches(
                config.seed,
                task.round,
                task.client,
                size,
                config.batch_size * config.accumulation,
                config.steps_for(size),
            )
            for task, size in zip(tasks, sizes, strict=True)
        ]
        self.weights = sizes

    def __enter__(self) -> Together:
        model = self.trainer.model
        model.eval()
        set_phase(model, None)  # what trains is the cohort's, not the model's
        for parameter in (p for head in self.heads for p in model.get_submodule(head).parameters()):
            parameter.requires_grad_(False)
        batch = len(self.tasks) * self._sequences
        for place, (_, layer) in enumerate(adapted_layers(model)):
            layer.train()
            A, B = (self.own[kind][place] if kind in self.own else None for kind in ("A", "B"))
            layer.set_call(replace(layer.call, clients=ClientFactors(A, B, batch)))
        self._heads = client_heads(model, self.heads, self.own.get("head", []), len(self.tasks))
        self._heads.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._heads.__exit__(*exc)
        for _, layer in adapted_layers(self.trainer.model):
            layer.set_call(replace(layer.call, clients=None))
        set_dropout_key(self.trainer.model, None)

    def train(self) -> list[Update | TrainingFailed]:
        """Every client's update, or why it has none."""
        config, count = self.trainer.config, len(self.tasks)
        lr = self.task.lr
        carrying: ClientAdamW | None = None
        optimizer: ClientAdamW | torch.optim.Optimizer
        if config.follows:
            layout, round_phase = self.trainer.layout, self.task.phase
            frame = moments.frame(round_phase, self.start.held)
            self.states = [
                moments.realigned(layout, round_phase, frame, own, config.handed_over)
                for own in self.states
            ]
        self.added: list[dict[str, Tensor]] = [{} for _ in self.tasks]
        if config.control_variates:
            self.added = [
                control_variates.corrections(self.trainer.layout, task, self.start, own)
                for task, own in zip(self.tasks, self.states, strict=True)
            ]
        corrections = control_variates.by_cohort(self.own, self.added)
        if config.carry_moments:
            optimizer = carrying = ClientAdamW(self.own, lr, config, self.states)
        else:
            optimizer = build_optimizer(config, self.own, lr)
        steps = [len(plan) for plan in self.plans]
        self.failed: dict[int, TrainingFailed] = {}
        self.losses, self.carried, self.seen, self.tokens = (
            np.zeros(count),
            np.zeros(count),
            np.zeros(count, int),
            np.zeros(count, int),
        )
        results: dict[int, Update | TrainingFailed] = {}
        for step in range(max(steps)):
            active = [step < steps[c] for c in range(count)]
            phase = config.step_phase(step)
            if phase is not None:
                self._train_only(phase)
            losses = self._backward(step, active)
            self._clip(config.max_grad_norm)
            optimizer.step()
            control_variates.correct(corrections, lr)
            optimizer.zero_grad(set_to_none=True)
            self._tally(step, active, losses)
            # A client that is done leaves with what it has; the others go on.
            for c in range(count):
                if step == steps[c] - 1:
                    results[c] = self.failed.get(c) or self._update(c)
                    if carrying is not None and c not in self.failed:
                        self.states[c] = self.states[c] | carrying.state(c)
                    if config.follows and c not in self.failed:
                        self.states[c] = self.states[c] | frame
        return [results[c] for c in range(count)]

    def _train_only(self, phase: str) -> None:
        """Lets a factor rest for a step, where the factors of a round take turns."""
        for kind in ("A", "B"):
            for p in self.own.get(kind, []):
                p.requires_grad_(phase in (kind, "BOTH"))

    def _backward(self, step: int, active: list[bool]) -> list[Tensor]:
        """Gradients of one optimizer step: each client's loss over its own weight. The losses
        `[clients]` of every micro-batch, on their device.
        """
        recipe, config, count = self.trainer.recipe, self.trainer.config, len(self.tasks)
        chosen = [plan[min(step, len(plan) - 1)] for plan in self.plans]
        examples = [
            [self.trainer.examples[self.trainer.partition[task.client][i]] for i in indices]
            for task, indices in zip(self.tasks, chosen, strict=True)
        ]
        size = config.batch_size
        micros = [
            [self.trainer.collate(own[start : start + size]) for own in examples]
            for start in range(0, len(chosen[0]), size)
        ]
        weights = np.array([sum(micro[c].weight for micro in micros) for c in range(count)])
        shares = [1.0 / max(w, 1) if a else 0.0 for w, a in zip(weights, active, strict=True)]
        share = to_device(torch.tensor(shares), self.parameters[0].device)
        losses = []
        for number, alone in enumerate(micros):
            batch = self.trainer.collate(
                [
                    example
                    for own in examples
                    for example in own[number * size : (number + 1) * size]
                ]
            )
            self._key_dropout(step, number, batch, alone)
            each = recipe.losses(self.trainer.model, batch).view(count, -1).sum(1)
            torch.where(share > 0, each * share, 0.0).sum().backward()
            losses.append(each.detach())
            for c, own in enumerate(alone):
                if active[c] and c not in self.failed:
                    self.seen[c] += own.examples
                    self.tokens[c] += own.tokens
        self.carried += weights * np.array(active)
        return losses

    def _tally(self, step: int, active: list[bool], losses: list[Tensor]) -> None:
        """Adds up the losses; who has one that is not finite fails. The one place in a step where
        the host waits for a device.
        """
        for each in torch.stack(losses).tolist():
            for c, value in enumerate(each):
                if not active[c] or c in self.failed:
                    continue
                if not math.isfinite(value):
                    self.failed[c] = TrainingFailed(
                        "non-finite loss", f"loss {value} at local step {step + 1}"
                    )
                self.losses[c] += value

    def _key_dropout(self, step: int, micro: int, together: Batch, alone: list[Batch]) -> None:
        """Each client's key, and each row's place in that client's own, shorter, batch."""
        if not self.trainer.has_dropout:
            return
        length, *lengths = (batch.inputs["input_ids"].shape[1] for batch in (together, *alone))
        keys = [self.trainer.dropout_key(task, step, micro) for task in self.tasks]
        sequence = torch.arange(self._sequences)[:, None]
        rows = torch.cat([(sequence * own + torch.arange(length)).flatten() for own in lengths])
        rows = to_device(rows, self.parameters[0].device)
        set_client_dropout_keys(self.trainer.model, keys, rows)

    @property
    def _sequences(self) -> int:
        """How many sequences of one client the model is handed at a time."""
        each = getattr(self.trainer.recipe, "sequences", 1)
        return self.trainer.config.batch_size * each

    def _clip(self, most: float) -> None:
        """Every client's gradients to a norm of `most`, as clip_grad_norm_ does for one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if most <= 0 or not gradients:
            return
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (most / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    def _update(self, c: int) -> Update:
        mean = self.losses[c] / max(self.carried[c], 1)
        report = Report(self.weights[c], float(mean), int(self.seen[c]), int(self.tokens[c]))
        trainer = self.trainer
        mine = {kind: [p[c] for p in parameters] for kind, parameters in self.own.items()}
        trained = [p for kind in self.kinds for p in mine[kind]]
        update, left = answering.answer(
            trainer.layout,
            trainer.config,
            self.tasks[c],
            self.start,
            trained,
            report,
            self.states[c],
        )
        self.states[c] = self.states[c] | left
        if trainer.config.control_variates:
            steps = len(self.plans[c])
            self.states[c] |= control_variates.remembered(
                trainer.layout, self.tasks[c], self.start, steps, mine, self.added[c]
            )
        return update
