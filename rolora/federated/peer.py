"""A client's own copy of the published factors, kept current by tasks and proven by fingerprints."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rolora.federated import codec
from rolora.federated.layout import fingerprint
from rolora.federated.state import GlobalState
from rolora.federated.wire import BadMessage, Task


@dataclass
class Peer:
    """What one client holds: buffers by kind and their versions; empty before its first task."""

    published: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def receive(self, task: Task) -> None:
        """Brings the factors to the task's versions; raises BadMessage when they then are not what the task proves."""
        if task.exchange_dtype not in codec.WIRE:
            raise BadMessage(f"exchange dtype {task.exchange_dtype[:20]!r} is not one of {', '.join(codec.WIRE)}")
        factors = dict(self.published)
        for kind, wire in task.delta.items():
            if kind not in factors or codec.wire_shape(len(factors[kind]), task.exchange_dtype) != (wire.dtype, len(wire)):
                raise BadMessage(f"a change of {kind} for a peer that does not hold it")
            factors[kind] = codec.add_decoded(factors[kind], wire)
        factors |= task.full
        for kind, wanted in task.fingerprints.items():
            if kind not in factors or fingerprint(factors[kind]) != wanted:
                raise BadMessage(f"the published {kind} is not the server's: stale or altered")
        self.published, self.versions = factors, dict(task.versions)


def what_is_missing(state: GlobalState, held: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(full, delta) buffers that bring a peer with versions `held` up to date: a change where it is one publication
    behind, the whole fp32 buffer where it is new or further behind, nothing where it is current."""
    full, delta = {}, {}
    for kind, version in state.versions.items():
        if held.get(kind) == version:
            continue
        if held.get(kind) == version - 1:
            delta[kind] = state.broadcast[kind].wire
        else:
            full[kind] = state.published[kind]
    return full, delta
