"""Clients that come and go, as a run's options say them."""

from __future__ import annotations

from rolora.config import OPEN, Config, parse_membership, settled
from rolora.errors import BadInput
from rolora.federated.membership import Members, Schedule

_SHOWN = 5  # rounds that a plan names


def of(config: Config) -> Members:
    """The members of a new run, of whose options the number of clients is settled."""
    text = settled(config.federation.membership)
    if text == OPEN:
        return Members()
    return Members(Schedule.of(parse_membership(text), config.federation.clients))


def require(config: Config, clients: int, least: int) -> None:
    """Raises BadInput for events that cannot happen, and for a round that fewer than `least` of the
    clients are left for.
    """
    text = config.federation.membership
    if text is None or text == OPEN:
        return
    try:
        schedule = Schedule.of(parse_membership(text), clients)
    except ValueError as error:
        raise BadInput(f"--membership: {error}") from None
    number, left = schedule.fewest()
    if left == 0:
        raise BadInput(f"--membership leaves no client for round {number}: have one stay or come")
    if left < least:
        raise BadInput(
            f"--membership leaves {left} clients for round {number}, and a round needs {least} "
            "(--quorum, --secure-threshold): have more stay, or ask for fewer"
        )


def require_elsewhere(config: Config, elsewhere: bool) -> None:
    """Raises BadInput for open membership where all clients are in this process."""
    if config.federation.membership == OPEN and not elsewhere:
        raise BadInput(
            "--membership open is for clients elsewhere, which come by themselves: serve the run "
            "over Flower, or say who comes and goes, such as 3:+8,5:-0"
        )


def text(config: Config) -> str:
    """What the plan says of them."""
    schedule = of(config).schedule
    if schedule is None:
        return "whoever is there: one that comes is sent all factors, one that leaves is missed"
    rounds = sorted(schedule.turns)
    shown = ", ".join(map(str, rounds[:_SHOWN])) + ", …" * (len(rounds) > _SHOWN)
    number, fewest = schedule.fewest()
    return (
        f"{len(schedule.first)} clients at first; some come or go in round {shown}; fewest in "
        f"round {number}: {fewest}"
    )
