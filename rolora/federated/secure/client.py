"""A client's part of a masked round.

Its term leaves under a mask of its own seed and one mask with every neighbour, equal for both but
for the sign. What keeps the server out, whatever it asks:

* keys and seeds are of one attempt and are forgotten with it;
* each of the exchanges is answered once;
* of a neighbour it gives a share of the seed or of the mask key, never of both, and only when more
  than half of those that hold shares are said to have stayed. Since each client answers once,
  nobody can have two such halves for one neighbour.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora.federated.secure import crypto, graph, shamir
from rolora.federated.secure.messages import (
    EXTRAS,
    KEY,
    LOSS_STEPS,
    Keys,
    KeysWanted,
    Masked,
    MaskingWanted,
    Sealed,
    SharesWanted,
    Unmasking,
    UnmaskingWanted,
    blob,
    decode,
    encode,
    raw,
    requested,
    rows,
    signature_in,
)
from rolora.federated.secure.noise import ClientNoise
from rolora.federated.secure.roster import Identity
from rolora.federated.wire import BadMessage, Update
from rolora_kernels.codecs import CODECS
from rolora_kernels.exact_sum import ExactSum


@dataclass
class _Attempt:
    """What a client knows of one attempt at a round; it ends with the attempt."""

    session: tuple[str, int, int]
    sealing_key: bytes = field(default_factory=crypto.new_key)
    mask_key: bytes = field(default_factory=crypto.new_key)
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY))
    shared: bool = False
    masked: bool = False
    needed: int = 0  # shares that join
    public: dict[int, bytes] = field(default_factory=dict)  # neighbour → its public keys
    own_shares: tuple[bytes, bytes] = (b"", b"")  # of its own seed and mask key
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # neighbour → the same


class MaskingClient:
    """Answers the exchanges of masked rounds as client number `client`; one attempt at a time.

    `noise`: what it does to its change first. That is its own configuration's to say, not the
    server's, and so is `identity`: with it this client signs its keys, and shares nothing with
    those who did not sign theirs. Every method raises BadMessage for what it will not answer, and
    then has answered nothing.
    """

    def __init__(
        self, client: int, noise: ClientNoise | None = None, identity: Identity | None = None
    ):
        self.client, self.noise, self.identity = client, noise, identity
        self._attempt: _Attempt | None = None

    def keys(self, wanted: KeysWanted) -> Keys:
        """Begins an attempt with new keys; those of the last one are gone."""
        self._require_mine(wanted.client)
        self._attempt = mine = _Attempt(wanted.session)
        public = crypto.public_of(mine.sealing_key) + crypto.public_of(mine.mask_key)
        public += crypto.commitment(mine.seed)
        signature = b"" if self.identity is None else self.identity.sign(wanted.session, public)
        return Keys(*wanted.session, self.client, blob(public), blob(signature))

    def shares(self, wanted: SharesWanted) -> Sealed:
        """Shares of its seed and of its mask key for its neighbours and itself."""
        mine = self._current(wanted.session, wanted.client)
        _require(not mine.shared, "the shares of this attempt are given already")
        clients = wanted.clients.tolist()
        published = {client: raw(keys) for client, keys in zip(clients, wanted.keys, strict=True)}
        _require(len(published) == len(clients), "a client is named twice")
        own = crypto.public_of(mine.sealing_key) + crypto.public_of(mine.mask_key)
        _require(
            published.get(self.client, b"")[: 2 * KEY] == own,
            "this client's own keys are not there",
        )
        if self.identity is not None:
            _require_signed(wanted, published, self.identity)
        parts = [keys[at : at + KEY] for keys in published.values() for at in (0, KEY)]
        _require(len(set(parts)) == len(parts), "two clients have one key")
        _require(
            len(clients) < 2 * wanted.threshold <= 2 * len(clients),
            f"a threshold of {wanted.threshold} of {len(clients)}: more than half must stay",
        )
        around = graph.neighbours(clients, wanted.degree or None, graph.key_of(wanted.session))
        near = around[self.client]
        mine.public = {client: published[client] for client in near}
        holders = [*near, self.client]
        mine.needed = graph.share_threshold(wanted.threshold, len(clients), len(holders))
        places = [client + 1 for client in holders]
        of_seed = shamir.split(mine.seed, mine.needed, places)
        of_key = shamir.split(mine.mask_key, mine.needed, places)
        pairs = list(zip(of_seed, of_key, strict=True))
        mine.own_shares = pairs.pop()
        sealed = [
            crypto.seal(_sealing(mine, other, self.client), b"".join(pair))
            for other, pair in zip(near, pairs, strict=True)
        ]
        mine.shared = True
        width = 2 * shamir.SHARE + crypto.TAG
        return Sealed(*wanted.session, self.client, torch.tensor(near), rows(sealed, width))

    def mask(self, wanted: MaskingWanted, update: Update) -> Masked:
        """A trained update as a masked term of the sum."""
        mine = self._current(wanted.session, wanted.client)
        _require(mine.shared and not mine.masked, "this attempt is not at its masks")
        self._open(mine, wanted)
        values = _term(wanted, update, self.noise)
        crypto.add_mask(values, mine.seed, 1)
        for other in mine.held:
            secret = crypto.agreed(mine.mask_key, mine.public[other][KEY : 2 * KEY], "mask")
            crypto.add_mask(values, secret, 1 if self.client < other else -1)
        mine.masked = True
        return Masked(
            *wanted.session, self.client, update.phase, update.layout, update.versions, values
        )

    def unmask(self, wanted: UnmaskingWanted) -> Unmasking:
        """The shares that take masks off, once; the attempt is forgotten with it."""
        mine = self._current(wanted.session, wanted.client)
        stayed, gone = wanted.stayed.tolist(), wanted.gone.tolist()
        _require(mine.masked, "this attempt has no masked term of this client")
        _require(
            sorted([*stayed, *gone]) == sorted([*mine.held, self.client]),
            "those who stayed and those who are gone are not this client's neighbours, each once",
        )
        _require(self.client in stayed, "this client is said to be gone, and it is not")
        _require(
            len(stayed) >= mine.needed,
            f"{len(stayed)} of its neighbourhood stayed, {mine.needed} must",
        )
        self._attempt = None
        held = mine.held | {self.client: mine.own_shares}
        seeds, keys = [held[c][0] for c in stayed], [held[c][1] for c in gone]
        return Unmasking(
            *wanted.session, self.client, rows(seeds, shamir.SHARE), rows(keys, shamir.SHARE)
        )

    def _open(self, mine: _Attempt, wanted: MaskingWanted) -> None:
        """Opens what neighbours sealed, and checks that enough of them did."""
        senders = wanted.senders.tolist()
        known = len(set(senders)) == len(senders) == len(wanted.sealed)
        _require(known and set(senders) <= mine.public.keys(), "shares of who is no neighbour")
        _require(len(senders) + 1 >= mine.needed, f"shares of {len(senders)} neighbours only")
        held = {}
        for sender, sealed in zip(senders, wanted.sealed, strict=True):
            text = crypto.opened(_sealing(mine, sender, sender), raw(sealed))
            if text is None:
                raise BadMessage(f"the shares of client {sender} do not open")
            held[sender] = (text[: shamir.SHARE], text[shamir.SHARE :])
        mine.held = held

    def _current(self, session: tuple[str, int, int], client: int) -> _Attempt:
        self._require_mine(client)
        if self._attempt is None or self._attempt.session != session:
            raise BadMessage("another attempt than this client is in")
        return self._attempt

    def _require_mine(self, client: int) -> None:
        _require(client == self.client, f"a request of client {client}")


def _require_signed(
    wanted: SharesWanted, published: Mapping[int, bytes], identity: Identity
) -> None:
    """Raises BadMessage, naming the client, for keys that are not the roster's client's own."""
    _require(len(wanted.signatures) == len(published), "the keys come without signatures")
    for (client, keys), row in zip(published.items(), wanted.signatures, strict=True):
        identity.roster.require(client, wanted.session, keys, signature_in(row))


def _sealing(mine: _Attempt, neighbour: int, sender: int) -> bytes:
    """The key of what `sender`, one of the two, seals for the other."""
    return crypto.agreed(mine.sealing_key, mine.public[neighbour][:KEY], f"seal by {sender}")


def _term(wanted: MaskingWanted, update: Update, noise: ClientNoise | None) -> Tensor:
    """int64 `[n + EXTRAS]`: what a plain sum adds of this update, bit for bit, or its clipped and
    noisy change; and what it reports.

    A change beyond the bounds is not sent: no server could reject it.
    """
    known = CODECS.get(wanted.exchange_dtype)
    if known is None or known.dtype != update.change.dtype:
        raise BadMessage(f"the task's change is not {wanted.exchange_dtype[:20]!r}")
    change, weight = known.decode(update.change), min(update.weight, wanted.max_weight)
    try:
        if noise is not None:
            weight, total = 1, noise.protected(change)
        else:
            term = ExactSum(len(change), wanted.max_abs, wanted.max_weight, wanted.max_terms)
            term.add(change, weight)
            total = term.total
        loss = round(update.loss * weight * LOSS_STEPS)
    except (ValueError, OverflowError) as error:
        raise BadMessage(str(error)) from None
    report = torch.tensor([weight, loss, update.examples, update.tokens], dtype=torch.int64)
    assert len(report) == EXTRAS
    return torch.cat([total, report])


def masked_answer(masker: MaskingClient, order: Tensor, update: Update, limit: int) -> bytes:
    """A trained update as the answer to a task that came with the bytes of a MaskingWanted."""
    return encode(masker.mask(decode(MaskingWanted, raw(order), limit), update))


def answer(masker: MaskingClient, request: bytes, limit: int) -> bytes:
    """The answer to a request that is no task, after its MARK; raises BadMessage."""
    wanted = requested(request, limit)
    if isinstance(wanted, KeysWanted):
        return encode(masker.keys(wanted))
    if isinstance(wanted, SharesWanted):
        return encode(masker.shares(wanted))
    assert isinstance(wanted, UnmaskingWanted)
    return encode(masker.unmask(wanted))


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise BadMessage(why)
