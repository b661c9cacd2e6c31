"""What a run says of its masked rounds."""

from __future__ import annotations

from dataclasses import dataclass

from rolora.federated.secure.noise import ClientNoise

MARK = b"masking:"  # before a request that is no task: no task has a header of that length


@dataclass(frozen=True)
class Secure:
    """`threshold`: how many clients must stay to the end of a round. `degree`: with how many
    neighbours a client shares its secrets, None for all. `noise`: what every client does to its
    change first, where the run is private.
    """

    threshold: int
    degree: int | None = None
    noise: ClientNoise | None = None
