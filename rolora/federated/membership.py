"""Who belongs to a federation, and from which round on.

Clients come and go as a schedule says, in a run that simulates them, or as their owners do: then
whoever answers the server's greeting belongs to it. Either way a client is its number, and who is
asked in a round is drawn by that number, so that nobody's coming changes the draws of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# round, whether they come, the first client, the last one
Event = tuple[int, bool, int, int]


@dataclass(frozen=True)
class Turn:
    """Those who came before a round, and those who left; sorted."""

    joined: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """`first`: the clients that are there from the beginning; `turns`: round → who comes and goes
    before it.
    """

    first: frozenset[int]
    turns: dict[int, Turn]

    @classmethod
    def of(cls, events: Iterable[Event], clients: int) -> Schedule:
        """The schedule of `clients` clients: one whose first event is its coming is not there
        before, all others are.

        Raises ValueError, of one line, for a client that there is not, that comes where it is, or
        leaves where it is not, or does both at once.
        """
        by_round: dict[int, dict[int, bool]] = {}
        for number, joins, begin, end in events:
            if end >= clients:
                raise ValueError(f"there is no client {end}: there are 0 to {clients - 1}")
            for client in range(begin, end + 1):
                if client in by_round.setdefault(number, {}):
                    raise ValueError(f"client {client} stands twice in round {number}")
                by_round[number][client] = joins
        firsts: dict[int, bool] = {}
        for number in sorted(by_round):
            firsts = by_round[number] | firsts
        first = frozenset(c for c in range(clients) if not firsts.get(c, False))
        members, turns = set(first), {}
        for number in sorted(by_round):
            joined = sorted(client for client, joins in by_round[number].items() if joins)
            left = sorted(client for client, joins in by_round[number].items() if not joins)
            for client in joined:
                if client in members:
                    raise ValueError(f"client {client} comes in round {number}, and is there")
            for client in left:
                if client not in members:
                    raise ValueError(f"client {client} leaves in round {number}, and is not there")
            members = members.union(joined).difference(left)
            turns[number] = Turn(tuple(joined), tuple(left))
        return cls(first, turns)

    def at(self, number: int) -> list[int]:
        """The members of a round, sorted."""
        members = set(self.first)
        for turn in sorted(turn for turn in self.turns if turn <= number):
            members = members.union(self.turns[turn].joined).difference(self.turns[turn].left)
        return sorted(members)

    def fewest(self) -> tuple[int, int]:
        """(the first round that has the fewest members, how many they are)."""
        sizes = {number: len(self.at(number)) for number in [1, *self.turns]}
        number = min(sizes, key=lambda number: (sizes[number], number))
        return number, sizes[number]


@dataclass
class Members:
    """The members now, sorted; by a schedule, or by who `is_there` where there is none."""

    schedule: Schedule | None = None
    now: list[int] = field(default_factory=list)

    def begin(self, number: int, there: Iterable[int] = ()) -> Turn:
        """Brings the members to a round; who came and who left since the round before."""
        if self.schedule is not None:
            self.now = self.schedule.at(number)
            return self.schedule.turns.get(number, Turn())
        before, now = set(self.now), set(there)
        self.now = sorted(now)
        return Turn(tuple(sorted(now - before)), tuple(sorted(before - now)))
