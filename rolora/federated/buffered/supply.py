"""Which phase a client is given to train, while rounds take turns.

An answer is needed by a round ahead. Were everybody who is asked given the phase of the round that
is waited for, then with many clients in training that phase's answers would pour in when its round
is over, and the next round of the other phase would find none: answers would be about twice as old.
So a client is given the phase of the first round that the answers on hand and under way would leave
short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

from rolora.federated.buffered.settings import Buffered

Barred = Mapping[int, Set[str]]  # client → phases that it is not given now


def needed(
    phase_of: Callable[[int], str],
    number: int,
    buffered: Buffered,
    supply: Mapping[str, int],
    count: int,
) -> list[str]:
    """The phases of the next `count` orders, while round `number` is waited for.

    `supply`: answers of each phase that wait or are under way. For rounds so far ahead that an
    answer would be too old then nobody trains: the rest is given the phase of this round.
    """
    left, found, ahead = Counter(supply), list[str](), 0
    while len(found) < count and not buffered.is_too_old(ahead):
        phase = phase_of(number + ahead)
        found += [phase] * (buffered.size - left[phase])
        left[phase] = max(left[phase] - buffered.size, 0)
        ahead += 1
    found += [phase_of(number)] * (count - len(found))
    return found[:count]


def assigned(wanted: Sequence[str], drawn: Sequence[int], barred: Barred) -> dict[str, list[int]]:
    """phase → the clients that are given it, sorted.

    Those for whom some phase is barred choose first; who finds none stays idle.
    """
    left, given = Counter(wanted), dict[str, list[int]]()
    none: Set[str] = frozenset()
    for client in sorted(drawn, key=lambda client: (client not in barred, client)):
        for phase in left:
            if left[phase] > 0 and phase not in barred.get(client, none):
                left[phase] -= 1
                given.setdefault(phase, []).append(client)
                break
    return {phase: sorted(given[phase]) for phase in left if phase in given}
