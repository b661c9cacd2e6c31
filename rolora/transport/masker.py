"""A client's part of masked rounds, made when it is first asked: it needs an optional package."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from rolora.federated import wire
from rolora.federated.secure.noise import ClientNoise
from rolora.federated.secure.settings import MARK

if TYPE_CHECKING:
    from rolora.federated.secure.client import MaskingClient
    from rolora.federated.secure.roster import Identity


class Masker:
    """Answers for client number `client`, messages of at most `limit` bytes; both methods raise
    BadMessage for what is not answered. `noise`, `identity`: of this client's configuration.
    """

    def __init__(
        self,
        client: int,
        limit: int,
        noise: ClientNoise | None = None,
        identity: Identity | None = None,
    ):
        self.client, self.limit, self.noise, self.identity = client, limit, noise, identity
        self._masking: MaskingClient | None = None

    def answer(self, request: bytes) -> bytes:
        """The answer to a request that begins with MARK."""
        protocol = self._protocol()
        return protocol.answer(self._masking, request.removeprefix(MARK), self.limit)

    def masked(self, order: Tensor, update: wire.Update) -> bytes:
        """A trained update as the answer to the order that came with its task."""
        protocol = self._protocol()
        return protocol.masked_answer(self._masking, order, update, self.limit)

    def _protocol(self) -> ModuleType:
        try:
            from rolora.federated.secure import client
        except ImportError:
            raise wire.BadMessage("this client lacks the package cryptography") from None
        if self._masking is None:
            self._masking = client.MaskingClient(self.client, self.noise, self.identity)
        return client
