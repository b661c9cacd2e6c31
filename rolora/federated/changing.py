"""The round loop of a federation whose clients come and go."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from rolora.federated import sampling
from rolora.federated.checkpoint import Snapshot
from rolora.federated.delivery import OpenTransport
from rolora.federated.membership import Members
from rolora.federated.record import Row
from rolora.federated.server import QuorumMissed, Server
from rolora.federated.tally import Tally


@dataclass
class ChangingServer(Server):
    """A server that asks members: a schedule's, or whoever its transport finds present.

    A client that left is forgotten, and one that comes is sent everything in full, once. The record
    of a round says how many members there were, who came and left, and who was counted.
    """

    members: Members = field(default_factory=Members)
    took: list[int] = field(default_factory=list)  # those who were counted in the last attempt

    def snapshot(self) -> Snapshot:
        found = super().snapshot()
        if self.members.schedule is not None:
            return found  # which says it of every round
        return replace(found, members=tuple(self.members.now))

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.members.now = list(snapshot.members or ())

    def _round(self, number: int) -> Row:
        there: set[int] = set()
        if self.members.schedule is None:
            elsewhere = cast(OpenTransport, self.transport)
            there = elsewhere.present(self.config.clients_per_round, self.config.quorum)
        turn = self.members.begin(number, there)
        if not self.members.now:
            raise QuorumMissed(f"round {number}: no client is there any more")
        for client in turn.left:
            self.held.pop(client, None)
        row = super()._round(number) | {"members": len(self.members.now)}
        if turn.joined:
            row["joined"] = list(turn.joined)
        if turn.left:
            row["left"] = list(turn.left)
        if self.config.privacy is None:  # which may rest on nobody knowing who took part
            row["took_part"] = self.took
        return row

    def _remember(self, clients: list[int], tally: Tally) -> None:
        super()._remember(clients, tally)
        self.took = sorted(tally.accepted)

    def _cohort(self, number: int, attempt: int) -> list[int]:
        config, now = self.config, self.members.now
        if config.privacy is not None and config.poisson:
            members = set(now)
            return [client for client in super()._cohort(number, attempt) if client in members]
        if config.poisson:
            probability = config.clients_per_round / config.clients
            return sampling.poisson_of(config.seed, number, now, probability, attempt)
        return sampling.cohort_of(config.seed, number, now, config.clients_per_round, attempt)
