"""Who comes and goes: the grammar of --membership, and what it excludes."""

from __future__ import annotations

import re
from pathlib import Path

from rolora.config.tree import Config
from rolora.errors import BadInput

OPEN = "open"
_EVENT = re.compile(r"([0-9]{1,9}):([+-])([0-9]{1,9})(?:-([0-9]{1,9}))?")
_EXPECTED = "expected rounds and clients, such as 3:+8,5:-0-1, a file of such, or open"


def parse_membership(text: str) -> list[tuple[int, bool, int, int]]:
    """ "3:+8,5:-0-1" → (round, whether they come, first client, last one) of every event; commas,
    spaces or ends of lines between them.
    """
    events = []
    for part in text.replace(",", " ").split():
        match = _EVENT.fullmatch(part)
        if match is None:
            raise BadInput(f"--membership: {part[:80]!r} is no event: {_EXPECTED}")
        number, sign, first, last = match.groups()
        if int(number) < 1 or int(last or first) < int(first):
            raise BadInput(f"--membership: {part!r}: rounds begin at 1, and ranges go upwards")
        events.append((int(number), sign == "+", int(first), int(last or first)))
    if not events:
        raise BadInput(f"--membership holds no event: {_EXPECTED}")
    return events


def settle(config: Config) -> Config:
    """The configuration with the events themselves, where their file is given: a run keeps them.
    Raises BadInput.
    """
    f = config.federation
    if f.membership is None:
        return config
    if config.asynchrony.buffer is not None:
        raise BadInput(
            "--membership does not go with --buffer, whose clients are asked as others answer: "
            "leave one of them out"
        )
    if f.membership == OPEN:
        _require_bounded(config)
        return config
    text = f.membership
    if Path(text).is_file():
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--membership {text} cannot be read: {error}") from None
        events = " ".join(line.partition("#")[0] for line in lines)
        text = ",".join(events.replace(",", " ").split())
    parse_membership(text)
    return config.with_values(membership=text)


def _require_bounded(config: Config) -> None:
    """Raises BadInput where nothing would bound what a client that comes may bring about."""
    f = config.federation
    if f.sampling == "poisson":
        raise BadInput(
            "--sampling poisson does not go with --membership open, where nobody knows how many "
            "there are: use fixed"
        )
    if config.asynchrony.client_speeds is not None:
        raise BadInput(
            "--client-speeds does not go with --membership open, whose clients take the time that "
            "they take: leave one of them out"
        )
    if f.clients_per_round is None:
        raise BadInput("--membership open needs --clients-per-round: how many are asked at most")
    if f.max_weight is None and f.weighting != "uniform":
        raise BadInput(
            "--membership open needs --max-weight: what the number of examples that a client says "
            "it has may count (or --weighting uniform)"
        )
