"""GlobalState: everything the federation knows between rounds, and the pure transitions that move
it.

Kinds are those of the layout, and "term" for methods that change the base (FLoRA, FedEx): a frozen
low-rank addition to it.

`published` is what every peer holds, bit for bit; it moves only by decoded messages. `master` is
the server's own, finer. A round applies the mean change to the master and publishes at once, so
that what is evaluated, saved and broadcast after round t is the result of round t; the broadcast
itself travels with the next tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rolora.federated.codec import key
from rolora.federated.layout import TERM, Layout, fingerprint
from rolora.federated.turn import turned
from rolora_kernels.codecs import CODECS, Codec


@dataclass(frozen=True)
class Broadcast:
    """The last published change of one kind: `published` is `base`, advanced by wire and turn.

    Neither wire nor turn: only `published` as a whole says it.
    """

    base: Tensor
    wire: Tensor | None = None
    turn: Tensor | None = None


def advanced(
    layout: Layout,
    kind: str,
    flat: Tensor,
    codec: Codec,
    wire: Tensor | None,
    turn: Tensor | None,
) -> Tensor:
    """One publication forward, on the server and on every peer alike: what is on the wire is added
    (appended to a term), then the factor turns.
    """
    if wire is not None and kind == TERM:
        flat = torch.cat([flat, codec.decode(wire)])
    elif wire is not None:
        flat = codec.add(flat, wire)
    return flat if turn is None else turned(layout, kind, flat, turn)


@dataclass(frozen=True)
class GlobalState:
    """Flat fp32 buffers by kind ("A", "B", "head", "term"), after `round` rounds.

    `versions[kind]` counts that kind's publications. A peer one version behind is sent
    `broadcast[kind]`; any other stale or new peer is sent `published[kind]` in full. `moments` are
    the server's, with momentum only.
    """

    round: int
    master: dict[str, Tensor]
    published: dict[str, Tensor]
    versions: dict[str, int]
    broadcast: dict[str, Broadcast] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(cls, factors: dict[str, Tensor], changes_base: bool = False) -> GlobalState:
        """Round 0: every peer is to start from these values, and from an empty term where the base
        will change.
        """
        factors = factors | ({TERM: torch.empty(0)} if changes_base else {})
        return cls(
            0,
            {k: v.clone() for k, v in factors.items()},
            {k: v.clone() for k, v in factors.items()},
            dict.fromkeys(factors, 0),
        )

    def apply(
        self, change: dict[str, Tensor], momentum: float = 0.0, lr: float = 1.0
    ) -> GlobalState:
        """The master moved by `lr` times the mean change of a round, or times its moment `m =
        momentum · m + change` (FedAvgM, Hsu et al. 2019): a moment for each kind, which begins as
        its first change and rests while the kind does. All as torch.optim.SGD has it, with the
        change as the descent. A term grows by what is appended. The published factors are as
        before.
        """
        appended = {kind: change[kind] for kind in change if kind == TERM}
        change = {kind: delta for kind, delta in change.items() if kind != TERM}
        moved = {}
        if momentum > 0.0:
            for kind, delta in change.items():
                moved[kind] = delta
                if kind in self.moments:
                    moved[kind] = momentum * self.moments[kind] + delta
        steps = moved or change
        moments = self.moments | moved
        master = self.master | {
            kind: torch.add(self.master[kind], step, alpha=lr) for kind, step in steps.items()
        }
        master |= {kind: torch.cat([master[kind], more]) for kind, more in appended.items()}
        return replace(self, round=self.round + 1, master=master, moments=moments)

    def publish(self, kinds: tuple[str, ...], dtype: str, seed: int) -> GlobalState:
        """The published factors moved towards the master by what the wire can say; versions counted
        on. What rounding leaves stays in the master, but for a term, of which what was published is
        the truth; one that was compressed travels whole.
        """
        master, published = dict(self.master), dict(self.published)
        versions, broadcast = dict(self.versions), dict(self.broadcast)
        codec = CODECS[dtype]
        for kind in kinds:
            base, drawn = self.published[kind], key(seed, self.round, f"server {kind}")
            if kind == TERM:
                grown = torch.equal(master[kind][: len(base)], base)
                wire = codec.encode(master[kind][len(base) :], drawn) if grown else None
                if wire is not None:
                    master[kind] = torch.cat([base, codec.decode(wire)])
                published[kind] = master[kind]
            else:
                wire = codec.encode(master[kind] - base, drawn)
                published[kind] = codec.add(base, wire)
            broadcast[kind] = Broadcast(base, wire)
            versions[kind] += 1
        return replace(
            self, master=master, published=published, versions=versions, broadcast=broadcast
        )

    def turn(
        self, layout: Layout, turns: dict[str, Tensor] | None, kinds: tuple[str, ...]
    ) -> GlobalState:
        """Factors re-factored by `turns[kind]` (see `turn.turned`), which follows in the
        publication of those `kinds` that this round has published already, and is one of its own
        for the others. Master and moments turn alike: the master is what the server believes in
        these coordinates, a moment is a sum of changes, which turn as the factor does.
        """
        if turns is None:
            return self
        versions, broadcast = dict(self.versions), dict(self.broadcast)
        for kind, turn in turns.items():
            if kind in kinds:
                broadcast[kind] = replace(broadcast[kind], turn=turn)
            else:
                broadcast[kind] = Broadcast(self.published[kind], turn=turn)
                versions[kind] += 1
        moved = [
            held
            | {
                kind: turned(layout, kind, held[kind], turn)
                for kind, turn in turns.items()
                if kind in held
            }
            for held in (self.master, self.published, self.moments)
        ]
        return replace(
            self,
            master=moved[0],
            published=moved[1],
            moments=moved[2],
            versions=versions,
            broadcast=broadcast,
        )

    def fingerprints(self) -> dict[str, str]:
        return {kind: fingerprint(flat) for kind, flat in self.published.items()}
