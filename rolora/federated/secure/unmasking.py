"""Joins the shares that clients give of each other's secrets, though some of them may be wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice

from rolora.federated.guard import Rejected
from rolora.federated.secure import graph, messages, shamir

_TRIES = 256  # sets of shares that are tried where one of them is wrong


@dataclass
class Holding:
    """The shares that came: (what, whose) → holder → share."""

    threshold: int
    clients: int
    around: Mapping[int, list[int]]
    shares: dict[tuple[str, int], dict[int, bytes]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    joiners: dict[tuple[int, ...], shamir.Joiner] = field(default_factory=dict)

    def take(
        self, holder: int, order: messages.UnmaskingWanted, answer: messages.Unmasking
    ) -> None:
        """A holder's shares, in the order in which it was asked for them."""
        for what, whose, shares in (
            ("seed", order.stayed, answer.seeds),
            ("mask key", order.gone, answer.keys),
        ):
            for client, share in zip(whose.tolist(), shares, strict=True):
                self.shares[what, client][holder] = messages.raw(share)

    def needed(self, client: int) -> int:
        """How many shares of a client's secrets join."""
        return graph.share_threshold(self.threshold, self.clients, len(self.around[client]) + 1)

    def joiner(self, holders: tuple[int, ...]) -> shamir.Joiner:
        """Made once for a set of holders: most clients have the same."""
        if holders not in self.joiners:
            self.joiners[holders] = shamir.Joiner([holder + 1 for holder in holders])
        return self.joiners[holders]


def joined(
    holding: Holding, what: str, client: int, published: bytes, public_of: Callable[[bytes], bytes]
) -> bytes:
    """A client's secret, proven by what it published of it; raises Rejected where shares are
    missing, or too many of them are wrong.
    """
    shares, needed = holding.shares[what, client], holding.needed(client)
    for holders in islice(combinations(sorted(shares), needed), _TRIES):
        secret = holding.joiner(holders).join([shares[holder] for holder in holders])
        if secret is not None and public_of(secret) == published:
            return secret
    if len(shares) < needed:
        why = f"{len(shares)} shares of client {client}'s {what} came, {needed} are needed"
        raise Rejected("too few shares", why)
    raise Rejected("wrong shares", f"those of client {client}'s {what} do not join")
