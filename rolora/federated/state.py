"""GlobalState: everything the federation knows between rounds, and the pure transitions that move it.

`published` is what every peer holds, bit for bit; it moves only by decoded messages. `master` is the server's own, finer.
A round applies the mean change to the master and publishes at once, so that what is evaluated, saved and broadcast after
round t is the result of round t; the broadcast itself travels with the next tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rolora.federated import codec
from rolora.federated.layout import fingerprint


@dataclass(frozen=True)
class Broadcast:
    """The last published change of one kind: `published = base + decode(wire)`."""

    base: Tensor
    wire: Tensor


@dataclass(frozen=True)
class GlobalState:
    """Flat fp32 buffers by kind ("A", "B", "head"), after `round` rounds.

    `versions[kind]` counts that kind's publications. A peer one version behind is sent `broadcast[kind].wire`; any other
    stale or new peer is sent `published[kind]` in full. `moments` are the server's, with momentum only.
    """

    round: int
    master: dict[str, Tensor]
    published: dict[str, Tensor]
    versions: dict[str, int]
    broadcast: dict[str, Broadcast] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(cls, factors: dict[str, Tensor]) -> GlobalState:
        """Round 0: every peer is to start from these values."""
        return cls(0, {k: v.clone() for k, v in factors.items()}, {k: v.clone() for k, v in factors.items()},
                   dict.fromkeys(factors, 0))

    def apply(self, change: dict[str, Tensor], momentum: float = 0.0, lr: float = 1.0) -> GlobalState:
        """The master moved by `lr` times the mean change of a round, or times its moment `m = momentum · m + change` (FedAvgM, Hsu
        et al. 2019): a moment for each kind, which rests while the kind does. The published factors are as before."""
        if momentum > 0.0:
            change = {kind: momentum * self.moments[kind] + delta if kind in self.moments else delta for kind, delta in change.items()}
        moments = self.moments | change if momentum > 0.0 else self.moments
        master = self.master | {kind: torch.add(self.master[kind], delta, alpha=lr) for kind, delta in change.items()}
        return replace(self, round=self.round + 1, master=master, moments=moments)

    def publish(self, kinds: tuple[str, ...], dtype: str, seed: int) -> GlobalState:
        """The published factors moved towards the master by what the wire can say; versions counted on."""
        published, versions, broadcast = dict(self.published), dict(self.versions), dict(self.broadcast)
        for kind in kinds:
            wire = codec.encode(self.master[kind] - self.published[kind], dtype, codec.key(seed, self.round, f"server {kind}"))
            broadcast[kind] = Broadcast(self.published[kind], wire)
            published[kind] = codec.add_decoded(self.published[kind], wire)
            versions[kind] += 1
        return replace(self, published=published, versions=versions, broadcast=broadcast)

    def fingerprints(self) -> dict[str, str]:
        return {kind: fingerprint(flat) for kind, flat in self.published.items()}
