"""Keys of masked rounds that their owners signed: what a server that poses as clients can still do,
which is nothing but to be refused by name.
"""

import dataclasses
import shutil
import subprocess

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from rolora.federated import wire
from rolora.federated.secure import client as masking
from rolora.federated.secure import crypto, messages
from rolora.federated.secure.roster import Identity, Roster, private_key
from rolora.federated.secure.settings import MARK, Secure
from rolora.federated.server import QuorumMissed
from rolora.transport.local import LocalTransport
from rolora.transport.masker import Masker
from tests.rolora.federated import toy

CLIENTS = 6
AT = ("r", 1, 0)


def key(client):
    """Ed25519 for some, ECDSA on either curve for others."""
    kinds = (
        ed25519.Ed25519PrivateKey.generate,
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP256R1()),
    )
    return kinds[client % 3]()


def line(client, private):
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return f"{client} {private.public_key().public_bytes(*ssh).decode()} somebody@there"


@pytest.fixture(scope="module")
def keys():
    return [key(client) for client in range(CLIENTS)]


@pytest.fixture(scope="module")
def roster(keys):
    lines = [line(client, private) for client, private in enumerate(keys)]
    return Roster.read("\n".join(["# client key", "", *lines]))


@pytest.fixture
def clients(keys, roster):
    return [
        masking.MaskingClient(client, identity=Identity(client, private, roster))
        for client, private in enumerate(keys)
    ]


def advertised(clients, at=AT):
    return [client.keys(messages.KeysWanted(*at, client.client)) for client in clients]


def wanted(client, found, at=AT):
    return messages.SharesWanted(
        *at,
        client,
        4,
        0,
        torch.arange(len(found)),
        torch.stack([answer.keys for answer in found]),
        messages.signature_rows([messages.raw(answer.signature) for answer in found]),
    )


def test_signed_keys_are_taken(clients):
    found = advertised(clients)
    for client in clients:
        assert len(client.shares(wanted(client.client, found)).to) == CLIENTS - 1


def test_a_server_that_swaps_a_key_is_refused_by_name(clients):
    found = advertised(clients)
    servers_own = crypto.public_of(crypto.new_key()) + crypto.public_of(crypto.new_key())
    posed = messages.blob(servers_own + crypto.commitment(bytes(32)))
    found[3] = dataclasses.replace(found[3], keys=posed)
    for client in (0, 1, 2, 4, 5):
        with pytest.raises(wire.BadMessage, match="the keys of client 3 are not signed"):
            clients[client].shares(wanted(client, found))
    with pytest.raises(wire.BadMessage, match="own keys"):
        clients[3].shares(wanted(3, found))


def test_a_part_of_the_keys_is_not_signed_by_itself(clients):
    """The commitment to a seed is signed too: by another one a server could claim a wrong seed."""
    found = advertised(clients)
    altered = found[2].keys.clone()
    altered[-1] ^= 1
    found[2] = dataclasses.replace(found[2], keys=altered)
    with pytest.raises(wire.BadMessage, match="client 2"):
        clients[0].shares(wanted(0, found))


@pytest.mark.parametrize("later", [("r", 2, 0), ("r", 1, 1), ("another", 1, 0)])
def test_an_advertisement_of_another_round_is_refused(clients, later):
    """Replayed by a server that recorded it: of another round, attempt or run."""
    old = advertised(clients)[4]
    found = advertised(clients, later)
    found[4] = old
    with pytest.raises(wire.BadMessage, match="client 4 are not signed for this attempt"):
        clients[0].shares(wanted(0, found, later))


def test_one_client_cannot_stand_for_another(clients):
    found = advertised(clients)
    found[1] = dataclasses.replace(found[5], client=1)
    with pytest.raises(wire.BadMessage, match="the keys of client 1"):
        clients[0].shares(wanted(0, found))


def test_keys_without_signatures_or_of_strangers_are_refused(clients, keys, roster):
    found = advertised(clients)
    none = dataclasses.replace(wanted(0, found), signatures=messages.signature_rows([]))
    with pytest.raises(wire.BadMessage, match="without signatures"):
        clients[0].shares(none)
    fewer = Roster({c: k for c, k in roster.keys.items() if c != 5})
    clients[0].identity = Identity(0, keys[0], fewer)
    with pytest.raises(wire.BadMessage, match="client 5 is not in the roster"):
        clients[0].shares(wanted(0, found))


def elsewhere(keys, roster, tamper=lambda request: request):
    """Clients with identities in this process; `tamper` alters what the server asks of them."""

    class Elsewhere(LocalTransport):
        def __init__(self, cohort, limit):
            super().__init__(cohort, limit)
            for client, private in enumerate(keys):
                who = None if private is None else Identity(client, private, roster)
                self.maskers[client] = Masker(client, limit, identity=who)

        def ask(self, requests, deadline):
            altered = {client: tamper(request) for client, request in requests.items()}
            yield from super().ask(altered, deadline)

    return Elsewhere


def server(transport, roster, **options):
    rows = []
    settings = {"secure": Secure(4, roster=roster), "quorum": 4}
    made = toy.server(transport=transport, options=settings, rounds=2, on_round=rows.append)
    return made, rows


def test_a_signed_run_is_bit_for_bit_the_unsigned_one(keys, roster):
    made, rows = server(elsewhere(keys, roster), roster)
    made.run()
    other, _ = server(LocalTransport, None)
    other.run()
    for kind, value in other.state.master.items():
        assert torch.equal(made.state.master[kind], value)
    assert [row["clients"] for row in rows[1:]] == [6, 6] and not rows[-1]["rejected"]


def test_a_run_whose_server_poses_as_a_client_ends_by_its_name(keys, roster):
    """The server leaves out its own check, and gives everybody a key of its own for client 2."""
    own = messages.blob(
        crypto.public_of(crypto.new_key()) + crypto.public_of(crypto.new_key()) + bytes(32)
    )

    def tamper(request):
        if request[len(MARK) :][:1] != b"S":
            return request
        order = messages.requested(request.removeprefix(MARK), 1 << 20)
        swapped = order.keys.clone()
        swapped[2] = own
        return messages.request(dataclasses.replace(order, keys=swapped))

    made, _ = server(elsewhere(keys, roster, tamper), None)
    with pytest.raises(QuorumMissed, match="the keys of client 2 are not signed"):
        made.run()


def test_a_server_with_the_roster_leaves_out_who_does_not_sign(keys, roster):
    some = [None if client == 1 else private for client, private in enumerate(keys)]
    made, rows = server(elsewhere(some, roster), roster)
    made.run()
    assert [row["clients"] for row in rows[1:]] == [5, 5]
    assert rows[1]["rejected"] == {"not signed": 1}


@pytest.mark.parametrize(
    "text, why",
    [
        ("alice ssh-ed25519 AAAA", "line 1 has no client's number"),
        ("0 ssh-ed25519 AAAA", "line 1 has no public key"),
        ("0", "line 1 has no public key"),
        ("# fine\n\n{0}\n{0}", "line 4: client 0 stands there twice"),
        ("{0}\n{0as1}", "line 2: clients 0 and 1 have one key"),
        ("{rsa}", "line 1: a key that is not Ed25519"),
        ("{p521}", "line 1: a key that is not Ed25519"),
    ],
)
def test_what_is_no_roster(keys, text, why):
    made = {
        "{0}": line(0, keys[0]),
        "{0as1}": line(1, keys[0]),
        "{rsa}": line(0, rsa.generate_private_key(65537, 2048)),
        "{p521}": line(0, ec.generate_private_key(ec.SECP521R1())),
    }
    for name, value in made.items():
        text = text.replace(name, value)
    with pytest.raises(ValueError, match=why):
        Roster.read(text)


def test_a_key_that_the_roster_does_not_have_is_refused(keys, roster):
    for client in (1, 9):
        with pytest.raises(ValueError, match=f"another key for client {client}, or none"):
            Identity(client, keys[0], roster)


def test_what_is_no_private_key():
    for data in (b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n", b"\xff" * 99):
        with pytest.raises(ValueError):
            private_key(data)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
@pytest.mark.parametrize("kind", [("ed25519",), ("ecdsa", "-b", "384")])
def test_files_of_ssh_keygen(tmp_path, kind):
    """One key may be a Flower node's and a client's identity."""
    path = tmp_path / "node"
    command = ["ssh-keygen", "-q", "-t", *kind, "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)
    roster = Roster.read("7 " + path.with_suffix(".pub").read_text())
    who = Identity(7, private_key(path.read_bytes()), roster)
    roster.require(7, AT, b"keys", who.sign(AT, b"keys"))
    with pytest.raises(wire.BadMessage):
        roster.require(7, AT, b"other", who.sign(AT, b"keys"))
