"""How q, k, v (or gate, up) meet although a model calls them one by one.

The first sibling called computes the whole group in one call: one shrink of the shared input, one
dropout mask, one sum of dX. The others take their part when they are called with the same tensor
object at the same version in the same state. A part waits in the group until it is taken, its
backward runs, or the next call comes: nothing outlives backward. A group whose siblings turn out
not to share an input is disbanded, and says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rolora.adapter.call import CallState
from rolora_kernels import grouped_lora_linear
from rolora_kernels.repeated import RepeatedCall
from rolora_kernels.weights import FrozenWeight

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_PATIENCE = 3  # forwards in a row with a part that nobody took


class Member(Protocol):
    """What a group asks of the linears in it."""

    scaling: float
    call: CallState
    enabled: bool
    _forward_pre_hooks: dict

    @property
    def active_dropout(self) -> float: ...

    @property
    def merged(self) -> bool: ...

    def forward_alone(self, x: Tensor) -> Tensor: ...

    def operands(self) -> tuple[Tensor | FrozenWeight, Tensor, Tensor, Tensor | None]: ...

    def call_state(self) -> tuple[Any, ...]: ...

    def draw_dropout_key(self, device: torch.device) -> Tensor: ...


class SharedInputGroup:
    """Two or more RoLoRALinears of one parent module that are called on one input.

    `disbanded` is None, or the reason why each computes alone.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.disbanded: str | None = None
        self.call = RepeatedCall()
        self._left_over = 0
        self._waiting: dict[Member, Tensor] = {}
        self._input: weakref.ref[Tensor] | None = None
        self._at: tuple[Any, ...] = ()
        self._states: dict[Member, tuple[Any, ...]] = {}

    def forward(self, layer: Member, x: Tensor) -> Tensor:
        """`layer`'s output for x: its waiting part, or the group computed now, or the layer
        alone.
        """
        if self.disbanded is not None or torch.compiler.is_compiling():
            # A trace cannot see whether x was changed in place between two siblings, so compiled
            # code computes alone.
            return layer.forward_alone(x)
        if x.is_inference():
            # Such a tensor counts no versions, so a change in place between siblings stays unseen.
            return layer.forward_alone(x)
        around = x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
        if self._waiting:
            if layer in self._waiting:
                same = self._input_is(x) and around == self._at
                if same and layer.call_state() == self._states[layer]:
                    y = self._waiting.pop(layer)
                    if not self._waiting:
                        self._clear()
                        self._left_over = 0
                    return y
                if not self._input_is(x):
                    self.disbanded = "a sibling was called with another input"
                self._clear()
                return layer.forward_alone(x)
            self._clear()
            self._left_over += 1
            if self._left_over >= _PATIENCE:
                self.disbanded = "siblings were not called after the first"
                return layer.forward_alone(x)
        if not self.can_compute_together():
            return layer.forward_alone(x)
        self._at = around
        return self._compute(layer, x)

    def _compute(self, layer: Member, x: Tensor) -> Tensor:
        members, p = self.members, layer.active_dropout
        found = [m.operands() for m in members]
        weights, lora_As, lora_Bs, biases = zip(*found, strict=True)
        group = x, weights, lora_As, lora_Bs, tuple([m.scaling for m in members]), biases
        if p == 0.0:
            outputs = self.call.group(*group)
        else:
            key = layer.draw_dropout_key(x.device)
            outputs = grouped_lora_linear(*group, dropout_p=p, dropout_key=key)
        self._waiting = dict(zip(members, outputs, strict=True))
        self._states = {m: m.call_state() for m in members}
        own = self._waiting.pop(layer)
        self._input = weakref.ref(x)
        if own.requires_grad:
            # A sibling that is never called must not keep the graph alive once backward has run.
            # The hook sits on the shared node, so it fires whichever outputs the loss used.
            node: Any = own.grad_fn
            if node.name().startswith("View"):  # of a plan that computes on rows
                node = node.next_functions[0][0]
            node.register_prehook(_Clear(self))
        return own

    def _input_is(self, x: Tensor) -> bool:
        return self._input is not None and self._input() is x

    def can_compute_together(self) -> bool:
        """Whether the members agree in what a joint call has once."""
        first = self.members[0].active_dropout
        for m in self.members:
            if not m.enabled or m.merged or m._forward_pre_hooks or m.active_dropout != first:
                return False
        return True

    def _clear(self) -> None:
        self._waiting, self._states, self._input, self._at = {}, {}, None, ()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model start with nothing waiting.
        return {"members": self.members, "disbanded": self.disbanded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SharedInputGroup.__init__(self, state["members"])
        self.disbanded = state["disbanded"]


class _Clear:
    """Empties a group when its backward begins; holds it weakly, because the graph may outlive the
    model.
    """

    def __init__(self, group: SharedInputGroup):
        self.group = weakref.ref(group)

    def __call__(self, _grads: object) -> None:
        group = self.group()
        if group is not None:
            group._clear()
