"""Gradients by CUDA graphs: what a forward and a backward ask of the GPU is captured once for every
shape of batches, and asked again as one.

Where a step takes the host longer than the GPU, a graph leaves the host a few copies.
The first batches of a shape run operation by operation, on the stream that graphs are captured on,
for whoever compiles, measures or sets itself up at a first call. A graph reads and writes the same
memory every time: batches, weights and dropout keys are copied into tensors of its own, and
gradients add up in buffers that stay.

A capture needs shapes that do not move and a host that looks at no value. What is known to break
either is refused before the first round (`run.cuda_graphs`); what breaks a capture otherwise is
said, and its shape runs operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.adapter.masks import HeldKeys
from rolora.adapter.model import adapted_layers
from rolora.recipes import Batch, Recipe

T = TypeVar("T")
_FIRST = 2  # batches of a shape that are not captured
_MOST = 64  # shapes that are
_QUARTERS = 4  # tokens that carry loss are counted in quarters of all, so that shapes are few


class Capturer(Protocol):
    """Where work runs so that it can be captured, and what captures it."""

    def aside(self, work: Callable[[], T]) -> T:
        """Runs `work` now, where captures are made."""

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(what does `work` on the same memory, what `work` returned, whose memory that fills).

        Nothing is done while it is captured.
        """


class Stream:
    """A CUDA stream of its own, and one pool of memory for all graphs: none runs beside another."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            done = work()
        current.wait_stream(self._stream)
        return done

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # other threads may use the GPU meanwhile
        )
        with torch.cuda.device(self.device), capturing:
            done = work()
        return graph.replay, done


@dataclass
class _Shape:
    """What is known of batches of one shape."""

    calls: int = 0
    used: list[nn.Parameter] = field(default_factory=list)  # that get a gradient
    is_refused: bool = False
    batch: Batch | None = None  # the graph's own memory
    loss: Tensor | None = None
    again: Callable[[], None] | None = None


class Graphs:
    """`Backward` by graphs. `parameters`: all that may train in some round; `say` is told what
    runs operation by operation.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        parameters: Sequence[nn.Parameter],
        capturer: Capturer,
        say: Callable[[str], None],
    ):
        self.model, self.recipe, self.parameters = model, recipe, parameters
        self.capturer, self.say = capturer, say
        self.replayed = 0  # batches, so far
        self._shapes: dict[Hashable, _Shape] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._weight = torch.ones((), device=parameters[0].device)
        self._keys = HeldKeys(model)
        self._said: set[str] = set()

    def begin(self) -> None:
        self.forget()
        self._has_term = any(layer.call.term is not None for _, layer in adapted_layers(self.model))
        if self._has_term:
            self._tell("the method's frozen term is new in every round")

    def __call__(self, batch: Batch, weight: int, key: int | None) -> Tensor:
        batch = _in_quarters(batch)
        self._weight.fill_(weight)
        if key is not None:
            self._keys.fill(key)
        shape = self._shapes.setdefault(self._what(batch, key), _Shape())
        shape.calls += 1
        if shape.again is None and not self._may_capture(shape):
            return self._plainly(shape, batch, key)
        if shape.again is None:
            self._capture(shape, batch, key)
        return self._plainly(shape, batch, key) if shape.is_refused else self._replay(shape, batch)

    def forget(self) -> None:
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
        for parameter in self.parameters:
            parameter.grad = None

    def _may_capture(self, shape: _Shape) -> bool:
        if shape.is_refused or self._has_term or shape.calls <= _FIRST:
            return False
        if sum(shape.again is not None for shape in self._shapes.values()) < _MOST:
            return True
        self._tell(f"there are more than {_MOST} shapes of batches: --pad-to-multiple-of has fewer")
        return False

    def _what(self, batch: Batch, key: int | None) -> Hashable:
        """What a graph is for: the shapes of a batch, and what trains."""
        tensors = {**batch.inputs, "labels": batch.labels, "carried": batch.carried}
        shapes = tuple((n, t.shape, t.dtype) for n, t in tensors.items() if t is not None)
        return shapes, key is None, tuple(p.requires_grad for p in self.parameters)

    def _compute(self, batch: Batch, key: int | None) -> Tensor:
        if key is not None:
            self._keys.hold()
        loss = self.recipe.loss(self.model, batch)
        (loss / self._weight).backward()
        return loss.detach()

    def _plainly(self, shape: _Shape, batch: Batch, key: int | None) -> Tensor:
        """Operation by operation; which parameters get a gradient is seen by the way."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.capturer.aside(lambda: self._compute(batch, key))
        shape.used = [p for p in self.parameters if p.grad is not None]
        for parameter, gradient in zip(self.parameters, before, strict=True):
            made, parameter.grad = parameter.grad, gradient
            if made is not None:
                self._gradient(parameter).add_(made)
        return loss

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The buffer that a parameter's gradients add up in, in its place."""
        if parameter not in self._gradients:
            self._gradients[parameter] = torch.zeros_like(parameter)
        parameter.grad = self._gradients[parameter]
        return self._gradients[parameter]

    def _capture(self, shape: _Shape, batch: Batch, key: int | None) -> None:
        own = replace(
            batch,
            inputs={name: value.clone() for name, value in batch.inputs.items()},
            labels=batch.labels.clone(),
            carried=None if batch.carried is None else batch.carried.clone(),
        )
        for parameter in shape.used:
            self._gradient(parameter)
        try:
            shape.again, shape.loss = self.capturer.capture(lambda: self._compute(own, key))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shape.is_refused = True
            size = "x".join(map(str, batch.labels.shape))
            self._tell(f"batches of {size}: {str(error).strip().splitlines()[0][:160]}")
        else:
            shape.batch = own

    def _replay(self, shape: _Shape, batch: Batch) -> Tensor:
        assert shape.batch is not None and shape.again is not None and shape.loss is not None
        for name, own in shape.batch.inputs.items():
            own.copy_(batch.inputs[name])
        shape.batch.labels.copy_(batch.labels)
        if shape.batch.carried is not None and batch.carried is not None:
            shape.batch.carried.copy_(batch.carried)
        for parameter in shape.used:
            self._gradient(parameter)
        shape.again()
        self.replayed += 1
        return shape.loss.clone()  # the next repetition fills the same memory

    def _tell(self, why: str) -> None:
        """Says once what runs operation by operation."""
        if why not in self._said:
            self._said.add(why)
            self.say(f"cuda graphs: operation by operation ({why})")


def _in_quarters(batch: Batch) -> Batch:
    """The batch with its `carried` places filled up to a quarter, a half, three quarters or all of
    the places there are, by one beyond the last.
    """
    if batch.carried is None:
        return batch
    places = batch.labels[:, 1:].numel()
    step = -(-places // _QUARTERS)
    missing = -len(batch.carried) % max(step, 1)
    return replace(batch, carried=F.pad(batch.carried, (0, missing), value=places))
