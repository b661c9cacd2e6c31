"""A resident client as a node of a Flower federation, with no other process between them.

`flower-supernode` asks its SuperLink every three seconds, starts a process for every message, and
looks for its answer every half second. This node speaks to the same SuperLink, by Flower's own
client of it (TLS, node keys, heartbeats), asks more often while a run goes on, and has the client
answer in this process. It runs nothing that the SuperLink sends: no app is fetched.

Flower's client of a SuperLink is no public interface of Flower, so `pyproject.toml` bounds its
version and `tests/rolora/test_flower.py` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from rolora.errors import BadInput
from rolora.transport.flower_bytes import pack, pause, received

Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]

_HEADERS = 1 << 16  # bytes of Flower's own in a message
_ARRIVING = 0.02  # seconds until an object that is still on its way is asked for again
_LONGEST = 1.0  # the same, after it was not there several times
_PATIENCE = 600.0  # seconds that all objects of a message may take


@dataclass(frozen=True)
class Link:
    """A SuperLink's address, `host:port`; the file of the certificates that it is known by, None
    for those of the system; and the file of this node's private key, None for a new one.
    """

    address: str
    root_certificates: str | None = None
    key: str | None = None
    insecure: bool = False

    def require_readable(self) -> None:
        """Raises BadInput for files that cannot be read, and for a key without TLS."""
        if self.insecure and (self.key or self.root_certificates):
            raise BadInput("--insecure does not go with --node-key or --root-certificates")
        self._files()

    def connection(self) -> AbstractContextManager[Any]:
        """Flower's own connection of a node to this link."""
        certificates, keys = self._files()
        return http_request_response(self.address, self.insecure, certificates, keys)

    def _files(self) -> tuple[bytes | None, Keys | None]:
        certificates = keys = None
        if self.root_certificates is not None:
            certificates = _read("--root-certificates", self.root_certificates)
        if self.key is not None:
            keys = _keys(self.key)
        return certificates, keys


class TooLong(ValueError):
    """A message of more bytes than any task has."""


def serve(link: Link, reply: Callable[[bytes], bytes], limit: int) -> None:
    """Answers every message of the link's runs with `reply` of its bytes; does not return.

    limit: bytes of a message. Raises BadInput where the link does not admit this node, or ends.
    """
    try:
        with link.connection() as connection:
            print(f"node {connection[0]} of {link.address}", flush=True)
            _serve(connection, reply, limit)
    except SystemExit as error:
        if error.code != 1:  # as Flower ends where it is not admitted, and nobody else does
            raise
        raise BadInput(
            f"--superlink {link.address} does not admit this node (Flower's reason is above): "
            "register its public key there, and name the certificates that the link has"
        ) from None
    raise BadInput(f"--superlink {link.address} has ended the connection: start the worker again")


def _serve(connection: Any, reply: Callable[[bytes], bytes], limit: int) -> None:
    receive, last = connection[1], time.monotonic()
    while True:
        try:
            found = receive()
            if found is not None:
                _answer(connection, found, reply, limit)
                last = time.monotonic()
                continue
        except RunNotRunningException:
            print("no answer: the run that asked has ended", flush=True)
        except ObjectPullError as error:
            print(f"no answer: {error}", flush=True)
        time.sleep(pause(time.monotonic() - last))


def _answer(
    connection: Any, found: tuple[Message, Any], reply: Callable[[bytes], bytes], limit: int
) -> None:
    """Fetches the objects of a message, and sends those of its answer."""
    _, _, send, _, _, pull, push, confirm = connection
    (asked, tree), start = found, time.monotonic()
    run = asked.metadata.run_id
    try:
        whole = pull_and_inflate_object_from_tree(
            tree,
            _bounded(partial(pull, run), limit + _HEADERS),
            partial(confirm, run),
            return_type=Message,
            max_time=_PATIENCE,
            initial_backoff=_ARRIVING,
            backoff_cap=_LONGEST,
        )
        request = received(whole)
    except TooLong as error:
        request, text = None, f"Ftask refused: {error}".encode()
    else:
        text = b"Ftask refused: no message of ours"
    if request is not None:
        text = reply(request)
    answer = Message(pack(text), reply_to=asked)
    answer.metadata.__dict__["_message_id"] = answer.object_id  # as Flower's own nodes do
    with no_object_id_recompute():
        tree = get_object_tree(answer)
        wanted, session = send(answer, tree, time.monotonic() - start)
        push_objects(
            get_all_nested_objects(answer), partial(push, run, session), object_ids_to_push=wanted
        )


def _bounded(pull: Callable[[str], bytes], limit: int) -> Callable[[str], bytes]:
    """`pull` that raises TooLong once more than `limit` bytes have come."""
    left = limit

    def bounded(object_id: str) -> bytes:
        nonlocal left
        if left < 0:
            raise TooLong(f"a message of more than {limit} bytes")
        content = pull(object_id)
        left -= len(content)
        return content

    return bounded


def _keys(path: str) -> Keys:
    try:
        key = load_ssh_private_key(_read("--node-key", path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--node-key {path} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(
            f"--node-key {path} is {type(key).__name__}, Flower wants ECDSA: ssh-keygen -t ecdsa"
        )
    return key, key.public_key()


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadInput(f"{flag} {path} cannot be read: {error.strerror or error}") from None
