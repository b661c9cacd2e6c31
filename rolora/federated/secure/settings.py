"""What a run says of its masked rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rolora.federated.secure.noise import ClientNoise

if TYPE_CHECKING:
    from rolora.federated.secure.roster import Roster

MARK = b"masking:"  # before a request that is no task: no task has a header of that length


@dataclass(frozen=True)
class Secure:
    """`threshold`: how many clients must stay to the end of a round. `degree`: with how many
    neighbours a client shares its secrets, None for all. `noise`: what every client does to its
    change first, where the run is private. `roster`: the keys by which clients sign theirs, where
    they must.
    """

    threshold: int
    degree: int | None = None
    noise: ClientNoise | None = None
    roster: Roster | None = None
