"""Whose keys they are: a roster of the clients' identity keys, and a signature under what each
advertises in a masked round.

Without it a server can hand out keys of its own, as those of all of a client's neighbours, and take
that client's masks off. With it a client masks only with keys that the roster's clients signed for
this very attempt at this very round. Ed25519, or ECDSA with SHA-256 on P-256 and P-384: what
`ssh-keygen` makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from rolora.federated.wire import BadMessage

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
Session = tuple[str, int, int]

MOST = 127  # bytes of a signature; one on P-384 has 104 at most
_PURPOSE = "rolora keys of a masked round"  # so that no other signature of a key is one of these
_HASH = ec.ECDSA(hashes.SHA256())
_LEAST_BITS, _MOST_BITS = 256, 384  # of a curve


@dataclass(frozen=True)
class Roster:
    """Client → its public identity key: the word of whoever wrote the file, not the server's."""

    keys: Mapping[int, PublicKey]

    @classmethod
    def read(cls, text: str) -> Roster:
        """A line a client: its number, and a public key as `ssh-keygen` writes it.

        Empty lines and those that begin with # are skipped. Raises ValueError for anything else,
        for a client that stands there twice, and for two clients with one key.
        """
        keys: dict[int, PublicKey] = {}
        owners: dict[bytes, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            first, _, rest = line.strip().partition(" ")
            if not first.isdecimal():
                raise ValueError(f"line {number} has no client's number before its key")
            client, key = int(first), _public(rest.strip(), number)
            if client in keys:
                raise ValueError(f"line {number}: client {client} stands there twice")
            owner = owners.setdefault(_bytes_of(key), client)
            if owner != client:
                raise ValueError(f"line {number}: clients {owner} and {client} have one key")
            keys[client] = key
        return cls(keys)

    def require(self, client: int, session: Session, advertised: bytes, signature: bytes) -> None:
        """Raises BadMessage where a client did not sign that it advertises these keys in this
        attempt.
        """
        key = self.keys.get(client)
        if key is None:
            raise BadMessage(f"client {client} is not in the roster")
        signed = _signed(client, session, advertised)
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, signed)
            else:
                key.verify(signature, signed, _HASH)
        except InvalidSignature:
            raise BadMessage(
                f"the keys of client {client} are not signed for this attempt by its key of the "
                "roster: another's, altered, or of another round"
            ) from None


@dataclass(frozen=True)
class Identity:
    """A client's own identity key, and the roster that it holds the others to.

    Raises ValueError where the roster has another key for this client.
    """

    client: int
    key: PrivateKey
    roster: Roster

    def __post_init__(self) -> None:
        listed = self.roster.keys.get(self.client)
        if listed is None or _bytes_of(listed) != _bytes_of(self.key.public_key()):
            raise ValueError(f"the roster has another key for client {self.client}, or none")

    def sign(self, session: Session, advertised: bytes) -> bytes:
        """The signature under this client's keys of an attempt."""
        signed = _signed(self.client, session, advertised)
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(signed)
        return self.key.sign(signed, _HASH)


def private_key(data: bytes) -> PrivateKey:
    """A private key without a password in OpenSSH's format; raises ValueError for anything else."""
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, PrivateKey) or not _usable(key.public_key()):
        raise ValueError(f"{type(key).__name__}: make one by ssh-keygen -t ed25519")
    return key


def _public(text: str, line: int) -> PublicKey:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"line {line} has no public key as ssh-keygen writes it") from None
    if not isinstance(key, PublicKey) or not _usable(key):
        raise ValueError(f"line {line}: a key that is not Ed25519, or ECDSA on P-256 or P-384")
    return key


def _usable(key: PublicKey) -> bool:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _LEAST_BITS <= key.curve.key_size <= _MOST_BITS
    return True


def _bytes_of(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _signed(client: int, session: Session, advertised: bytes) -> bytes:
    """What a signature is under: every part has one place in it."""
    return json.dumps([_PURPOSE, *session, client, advertised.hex()]).encode()
