"""Masked rounds as a run's options say them (`rolora.federated.secure`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rolora.config import Config, settled
from rolora.errors import BadInput
from rolora.federated.secure.noise import ClientNoise
from rolora.federated.secure.settings import Secure

if TYPE_CHECKING:
    from rolora.federated.secure.roster import Identity, Roster


def threshold(config: Config, per_round: int) -> int | None:
    """How many of a round's clients must stay to its end; None where rounds are not masked.

    Raises BadInput for what no round can meet or what would protect nobody.
    """
    p = config.privacy
    if not p.secure_aggregation:
        return None
    if importlib.util.find_spec("cryptography") is None:
        raise BadInput("--secure-aggregation needs the package cryptography: install '.[secure]'")
    if per_round < 3:
        raise BadInput(
            f"--secure-aggregation with {per_round} clients a round hides nothing from the others "
            "among them: ask at least 3"
        )
    wanted = p.secure_threshold or max((2 * per_round + 2) // 3, per_round // 2 + 1)
    if wanted > per_round:
        raise BadInput(
            f"--secure-threshold {wanted} is over the {per_round} clients of a round: give "
            f"{per_round // 2 + 1} to {per_round}"
        )
    if 2 * wanted <= per_round:
        raise BadInput(
            f"--secure-threshold {wanted} of {per_round} clients a round: a server could unmask "
            f"one client with either half of them: give {per_round // 2 + 1} to {per_round}"
        )
    return wanted


def settings(config: Config) -> Secure | None:
    """How rounds are masked; None where they are not."""
    p = config.privacy
    if not p.secure_aggregation:
        return None
    signed_by = None if p.secure_roster is None else roster(p.secure_roster)
    if signed_by is not None:
        missing = sorted(set(range(config.federation.clients)) - signed_by.keys.keys())
        if missing:
            raise BadInput(f"--secure-roster {p.secure_roster} has no key for client {missing[0]}")
    return Secure(settled(p.secure_threshold), p.secure_neighbours, noise(config), signed_by)


def roster(path: str) -> Roster:
    """The roster in a file; raises BadInput where it is none."""
    from rolora.federated.secure.roster import Roster  # needs an optional package

    with _told(f"--secure-roster {path}"):
        return Roster.read(Path(path).read_text(encoding="utf-8"))


def identity(client: int, roster_path: str | None, key_path: str | None) -> Identity | None:
    """How a client signs its keys; None where it has neither a roster nor a key."""
    if roster_path is None and key_path is None:
        return None
    if roster_path is None or key_path is None:
        raise BadInput(
            "a client of --secure-roster signs its keys by --secure-key FILE, and --secure-key "
            "needs the roster that it stands in: give both"
        )
    from rolora.federated.secure.roster import Identity, private_key  # needs an optional package

    known = roster(roster_path)
    with _told(f"--secure-key {key_path}"):
        return Identity(client, private_key(Path(key_path).read_bytes()), known)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises BadInput for a file that cannot be read, or is not what an option takes."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{what} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from None


def noise(config: Config) -> ClientNoise | None:
    """What every client does to its change before it masks; None where that is nothing."""
    p = config.privacy
    if p.dp_clip is None or not p.secure_aggregation:
        return None
    return ClientNoise.of(p.dp_clip, settled(p.dp_noise), settled(p.secure_threshold))


def text(config: Config, values: int) -> str:
    """What the plan says of them; `values` travel in a round at most."""
    p, per_round = config.privacy, settled(config.federation.clients_per_round)
    near = min(p.secure_neighbours or per_round, per_round - 1)
    bounded = "changes are bounded by the clients themselves"
    if p.dp_clip is not None:
        bounded = "changes are clipped and made noisy by the clients themselves"
    posing = "it is trusted not to pose as clients, who sign nothing (--secure-roster)"
    if p.secure_roster is not None:
        posing = "clients sign their keys, so that it cannot pose as them"
    return (
        f"the server learns the sum of at least {p.secure_threshold} of {per_round} clients and no "
        f"change of one; {posing}; {8 * values:,} bytes up a client and round, {near} masks "
        f"each; {bounded}"
    )
