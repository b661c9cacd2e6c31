"""A client's copy of the published factors, kept current by tasks, proven by fingerprints."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rolora.federated import turn
from rolora.federated.layout import TERM, Layout, fingerprint
from rolora.federated.state import Broadcast, GlobalState, advanced
from rolora.federated.wire import BadMessage, Task
from rolora_kernels.codecs import CODECS, Codec

PHASES = ("A", "B", "BOTH")
Copies = MutableMapping[
    tuple[str, str], Tensor
]  # (kind, fingerprint) → a buffer that somebody holds


@dataclass
class Peer:
    """What one client holds: buffers by kind and their versions; empty before its first task.

    Peers of one process that are given the same `copies` hold one buffer together where they hold
    the same bits, which their fingerprints prove; nobody changes a buffer that is held.
    """

    layout: Layout
    published: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    changes_base: bool = True  # whether the method has a term; one is refused where it has none
    copies: Copies = field(default_factory=WeakValueDictionary)

    def receive(self, task: Task) -> None:
        """Brings the factors to the task's versions.

        Raises BadMessage when they then are not what the task proves.
        """
        codec = CODECS.get(task.exchange_dtype)
        if codec is None:
            raise BadMessage(
                f"exchange dtype {task.exchange_dtype[:20]!r} is not one of {', '.join(CODECS)}"
            )
        factors = dict(self.published)
        for kind in sorted(task.delta.keys() | task.turn.keys()):
            wire, matrices = task.delta.get(kind), task.turn.get(kind)
            self._require_fitting(kind, wire, matrices, codec)
            factors[kind] = advanced(self.layout, kind, factors[kind], codec, wire, matrices)
        self._require_whole(task)
        factors |= task.full
        for kind, wanted in task.fingerprints.items():  # all kinds: see `_require_whole`
            if kind not in factors or fingerprint(factors[kind]) != wanted:
                raise BadMessage(f"the published {kind} is not the server's: stale or altered")
        self.published = {
            kind: self.copies.setdefault((kind, task.fingerprints[kind]), flat)
            for kind, flat in factors.items()
        }
        self.versions = dict(task.versions)

    def keep(self, versions: dict[str, int]) -> None:
        """Lets go of the kinds that `versions` does not name."""
        if len(versions) < len(self.versions):
            self.published = {kind: self.published[kind] for kind in versions}
            self.versions = versions

    def _require_whole(self, task: Task) -> None:
        """Raises BadMessage for a task whose words or whole buffers are not this layout's."""
        if task.phase not in PHASES:
            raise BadMessage(f"phase {task.phase[:20]!r} is not one of {', '.join(PHASES)}")
        kinds = set(self.layout.sizes)
        if self.changes_base and TERM in task.fingerprints:
            kinds.add(TERM)
        if task.fingerprints.keys() != kinds or task.versions.keys() != kinds:
            raise BadMessage(f"versions and fingerprints are not those of {sorted(kinds)}")
        if any(type(version) is not int for version in task.versions.values()):
            raise BadMessage("a version is not an integer")
        for kind, flat in task.full.items():
            if kind not in kinds:
                raise BadMessage(f"a buffer of {kind[:20]!r}, which this layout does not have")
            if flat.dtype != torch.float32 or flat.ndim != 1:
                raise BadMessage(f"{kind} is {flat.dtype} with {flat.ndim} axes, not flat fp32")
            if kind == TERM:
                fits = len(flat) % self.layout.term_unit == 0
            else:
                fits = len(flat) == self.layout.sizes[kind]
            if not fits:
                raise BadMessage(f"{len(flat)} values of {kind} do not fit this layout")

    def _require_fitting(
        self, kind: str, wire: Tensor | None, matrices: Tensor | None, codec: Codec
    ) -> None:
        """Raises BadMessage for a change that this peer cannot have been meant for."""
        wrong = kind not in self.published
        if wire is not None and not wrong:
            try:  # a term grows by whole ranks, the others change as a whole
                values = codec.values_in(wire) if wire.dtype == codec.dtype else -1
            except ValueError:
                values = -1
            unit = self.layout.term_unit if kind == TERM else len(self.published[kind])
            wrong = (
                wire.ndim != 1
                or values < 1
                or (values % unit if kind == TERM else values != unit) != 0
            )
        if matrices is not None and not wrong:
            wrong = kind not in ("A", "B") or (matrices.dtype, tuple(matrices.shape)) != (
                torch.float64,
                (turn.length(self.layout),),
            )
        if wrong:
            raise BadMessage(f"a change of {kind} for a peer that does not hold it")


def what_is_missing(
    state: GlobalState, held: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Broadcast]]:
    """(full buffers, publications) that bring a peer with versions `held` up to date.

    The last publication where it is one behind, the whole fp32 buffer where it is new or further
    behind, nothing where it is current.
    """
    full: dict[str, Tensor] = {}
    publications: dict[str, Broadcast] = {}
    for kind, version in state.versions.items():
        if held.get(kind) == version:
            continue
        last, is_next = state.broadcast.get(kind), held.get(kind) == version - 1
        if is_next and last is not None and (last.wire is not None or last.turn is not None):
            publications[kind] = last
        else:
            full[kind] = state.published[kind]
    return full, publications
