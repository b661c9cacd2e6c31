"""Many clients in one forward and backward on one base.

The frozen matmuls and the common factor are shared, the rest is batched. In a round that trains B,
A is every client's: one shrink serves all their tokens, and only S B_cᵀ is a client's own; in a
round that trains A it is the other way round. Examples are grouped by client, as many for each,
padded to the longest; losses, clipping, optimizer state and steps are each client's own, so that a
client's update is that of the sequential cohort up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from rolora.adapter.attach import (
    adapted_layers,
    set_client_dropout_keys,
    set_dropout_key,
    set_phase,
)
from rolora.adapter.frozen import is_plain
from rolora.adapter.layer import ClientFactors
from rolora.cohort.adamw import ClientAdamW
from rolora.cohort.sequential import Order, Sequential
from rolora.federated import sampling
from rolora.federated.client import (
    ClientState,
    LocalTrainer,
    Report,
    TrainingFailed,
    build_optimizer,
)
from rolora.federated.wire import Task, Update
from rolora.recipes import Batch

_MIXING = ("moe", "experts", "router")


class CannotBatch(Exception):
    """This model's clients cannot be trained together; the text says why."""


def why_not(trainer: LocalTrainer, heads: Iterable[str]) -> str | None:
    """None where clients of this trainer can be trained together, else why not, by name."""
    model, config = trainer.model, trainer.config
    if getattr(trainer.recipe, "packing", False):
        return "rows of --packing are several examples, and a cohort's are told apart by rows"
    if config.kept:
        return "every client holds factors of its own"
    if config.client_ranks is not None and not config.selects:
        return "clients train different ranks"
    adapted = {name for name, _ in adapted_layers(model)}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} is a {kind}, which mixes examples"
        if any(word in kind.lower() for word in _MIXING) and any(
            a.startswith(f"{name}.") for a in adapted
        ):
            return (
                f"{name} is a {kind}, which regroups tokens of several clients, "
                "and adapted layers lie inside it"
            )
    for head in heads:
        for name, module in model.get_submodule(head).named_modules():
            if (
                any(True for _ in module.parameters(recurse=False))
                and type(module) is not nn.Linear
            ):
                return (
                    f"the head's {head}.{name} is a {type(module).__name__}; "
                    "only linear layers have a client axis"
                )
    return None


class Batched:
    """Trains orders `chunk` at a time.

    A chunk that does not fit into memory is halved and trained again; `on_halved` is told.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        heads: Iterable[str],
        chunk: int,
        on_halved: Callable[[int], None] = lambda chunk: None,
    ):
        self.trainer, self.heads, self.chunk, self.on_halved = (
            trainer,
            tuple(heads),
            chunk,
            on_halved,
        )
        self.alone = Sequential(trainer)
        reason = why_not(trainer, self.heads)
        if reason is not None:
            raise CannotBatch(reason)

    def train(
        self, orders: Iterable[Order]
    ) -> Iterator[tuple[int, Update | TrainingFailed, ClientState]]:
        """(client, update or failure, the client's next state), one for every order."""
        orders = iter(orders)
        while waiting := list(islice(orders, self.chunk)):
            while waiting:
                try:
                    results = self._together(waiting[: self.chunk])
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not _is_lack_of_memory(error) or self.chunk == 1:
                        raise
                    self.chunk = max(1, self.chunk // 2)
                    self.on_halved(self.chunk)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                del waiting[: len(results)]
                yield from results

    def _together(
        self, orders: list[Order]
    ) -> list[tuple[int, Update | TrainingFailed, ClientState]]:
        """A result for every order, in their order."""
        tasks = [task for task, _, _ in orders]
        if any(
            task.layout != self.trainer.layout.hash or task.fingerprints != tasks[0].fingerprints
            for task in tasks
        ):
            return list(
                self.alone.train(orders)
            )  # a client that holds something else: its own trainer says so
        with _Cohort(
            self.trainer, self.heads, tasks, orders[0][1], [state for _, _, state in orders]
        ) as cohort:
            results = cohort.train()
        return [
            (task.client, result, state)
            for task, result, state in zip(tasks, results, cohort.states, strict=True)
        ]


class _Cohort:
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
        self.kinds = trainer.layout.travelling(self.task.phase)
        count, config = len(tasks), trainer.config
        trainer.layout.scatter(trainer.model, self.start.held)
        self.own = {
            kind: [
                p.detach().expand(count, *p.shape).clone().requires_grad_()
                for p in trainer.layout.parameters(trainer.model, kind)
            ]
            for kind in self.kinds
        }
        self.parameters = [p for kind in self.kinds for p in self.own[kind]]
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

    def __enter__(self) -> _Cohort:
        model = self.trainer.model
        model.eval()
        set_phase(model, None)  # what trains is the cohort's, not the model's
        for parameter in (p for head in self.heads for p in model.get_submodule(head).parameters()):
            parameter.requires_grad_(False)
        batch = len(self.tasks) * self._sequences
        for place, (_, layer) in enumerate(adapted_layers(model)):
            layer.train()
            A, B = (self.own[kind][place] if kind in self.own else None for kind in ("A", "B"))
            layer.clients = ClientFactors(A, B, batch)
        self._heads = _client_heads(model, self.heads, self.own.get("head", []), len(self.tasks))
        self._heads.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._heads.__exit__(*exc)
        for _, layer in adapted_layers(self.trainer.model):
            layer.clients = None
        set_dropout_key(self.trainer.model, None)

    def train(self) -> list[Update | TrainingFailed]:
        """Every client's update, or why it has none."""
        config, count = self.trainer.config, len(self.tasks)
        if config.carry_moments:
            optimizer = ClientAdamW(self.own, self.task.lr, config.weight_decay, self.states)
        else:
            optimizer = build_optimizer(
                config.optimizer, self.parameters, self.task.lr, config.weight_decay
            )
        steps = [len(plan) for plan in self.plans]
        self.failed: dict[int, TrainingFailed] = {}
        self.losses, self.carried, self.seen, self.tokens = (
            np.zeros(count),
            np.zeros(count),
            np.zeros(count, int),
            np.zeros(count, int),
        )
        updates: list[Update | TrainingFailed | None] = [None] * count
        for step in range(max(steps)):
            active = [step < steps[c] for c in range(count)]
            self._backward(step, active)
            self._clip(config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for c in range(
                count
            ):  # a client that is done leaves with what it has; the others go on
                if step == steps[c] - 1:
                    updates[c] = self.failed.get(c) or self._update(c)
                    if config.carry_moments and c not in self.failed:
                        self.states[c] = self.states[c] | optimizer.state(c)
        return updates

    def _backward(self, step: int, active: list[bool]) -> None:
        """Gradients of one optimizer step: each client's loss over its own weight."""
        recipe, config, count = self.trainer.recipe, self.trainer.config, len(self.tasks)
        chosen = [plan[min(step, len(plan) - 1)] for plan in self.plans]
        examples = [
            [self.trainer.examples[self.trainer.partition[task.client][i]] for i in indices]
            for task, indices in zip(self.tasks, chosen, strict=True)
        ]
        size = config.batch_size
        micros = [
            [recipe.collate(own[start : start + size]) for own in examples]
            for start in range(0, len(chosen[0]), size)
        ]
        weights = np.array([sum(micro[c].weight for micro in micros) for c in range(count)])
        device = self.parameters[0].device
        share = torch.tensor(
            [1.0 / max(w, 1) if a else 0.0 for w, a in zip(weights, active, strict=True)],
            device=device,
        )
        for number, alone in enumerate(micros):
            batch = recipe.collate(
                [
                    example
                    for own in examples
                    for example in own[number * size : (number + 1) * size]
                ]
            )
            self._key_dropout(step, number, batch, alone)
            each = recipe.losses(self.trainer.model, batch).view(count, -1).sum(1)
            torch.where(share > 0, each * share, 0.0).sum().backward()
            for c, value in enumerate(each.tolist()):
                if not active[c] or c in self.failed:
                    continue
                if not math.isfinite(value):
                    self.failed[c] = TrainingFailed(
                        "non-finite loss", f"loss {value} at local step {step + 1}"
                    )
                self.losses[c] += value
                self.seen[c] += alone[c].examples
                self.tokens[c] += alone[c].tokens
        self.carried += weights * np.array(active)

    def _key_dropout(self, step: int, micro: int, together: Batch, alone: list[Batch]) -> None:
        """Each client's key, and each row's place in that client's own, shorter, batch."""
        if not self.trainer.has_dropout:
            return
        length, *lengths = (batch.inputs["input_ids"].shape[1] for batch in (together, *alone))
        keys = [self.trainer.dropout_key(task, step, micro) for task in self.tasks]
        sequence = torch.arange(self._sequences)[:, None]
        rows = torch.cat([(sequence * own + torch.arange(length)).flatten() for own in lengths])
        set_client_dropout_keys(self.trainer.model, keys, rows.to(self.parameters[0].device))

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
        trained = [p[c] for p in self.parameters]
        return self.trainer.answer(self.tasks[c], self.start, trained, report)


@contextmanager
def _client_heads(
    model: nn.Module, heads: Iterable[str], parameters: list[Tensor], clients: int
) -> Iterator[None]:
    """While open, linears of heads that train compute with each client's own weights."""
    changed, rest = [], list(parameters)
    for head in heads if parameters else ():
        for _, module in model.get_submodule(head).named_modules():
            if is_plain(module):
                own = [rest.pop(0) for _ in module.parameters(recurse=False)]
                module.forward = _head_forward(own[0], own[1] if len(own) > 1 else None, clients)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _head_forward(weight: Tensor, bias: Tensor | None, clients: int) -> Callable[[Tensor], Tensor]:
    """`x [C·b, …, in]` by weights `[C, out, in]` and biases `[C, out]`."""

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(clients, -1, x.shape[-1])
        dtype = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else rows.dtype
        )
        y = torch.bmm(rows.to(dtype), weight.to(dtype).transpose(1, 2))
        y = y if bias is None else y + bias.to(dtype)[:, None]
        return y.view(*x.shape[:-1], weight.shape[1])

    return forward


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
