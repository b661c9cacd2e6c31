"""--secure-aggregation from the command on: the same run, whichever engine and wherever clients
are, and what is refused.
"""

import json
import math
import re

import pytest

from rolora import config
from rolora.errors import BadInput
from rolora.federated.client_states import ClientStates
from rolora.federated.peer import Peer
from rolora.federated.privacy import epsilon
from rolora.federated.server import Server
from rolora.federated.wire import Task, encode_task
from rolora.run import federation, job
from rolora.run import masked as masks
from rolora.transport.answers import arrival_of
from rolora.transport.local import LocalTransport
from rolora.transport.resident import Resident
from tests.rolora.commands import bits, rows, small

MASKED = ("--secure-aggregation",)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_masked_run_ends_where_the_plain_one_does(files, tmp_path, call, engine):
    for name, more in (("plain", ()), ("masked", MASKED)):
        words = small(files, engine=engine, clients=4, **{"output-dir": tmp_path / name})
        assert call(*words, *more)[0] == 0
    assert bits(tmp_path / "plain")[1] == bits(tmp_path / "masked")[1]
    for plain, masked in zip(rows(tmp_path / "plain"), rows(tmp_path / "masked"), strict=True):
        assert plain["eval"] == masked["eval"] and plain["clients"] == masked["clients"]
        assert (plain["examples"], plain["tokens"]) == (masked["examples"], masked["tokens"])
        if plain["round"]:
            assert math.isclose(plain["train_loss"], masked["train_loss"], rel_tol=1e-6)
            assert masked["norm"] is None and masked["client_loss"] is None


def test_a_masked_run_that_is_cut_goes_on(files, tmp_path, call, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(*small(files, **{"output-dir": whole}), *MASKED)[0] == 0
    advance = Server._round

    def cut(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return advance(self, number)

    monkeypatch.setattr(Server, "_round", cut)
    assert call(*small(files, **{"output-dir": run}), *MASKED)[0] == 130
    monkeypatch.setattr(Server, "_round", advance)
    assert call("--resume", "--output-dir", run)[0] == 0
    assert bits(run) == bits(whole)


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--secure-threshold", 3), ["--secure-threshold 3", "--secure-aggregation"]),
        (("--secure-neighbours", 4), ["--secure-neighbours 4", "--secure-aggregation"]),
        (("--secure-roster", "r"), ["--secure-roster", "--secure-aggregation"]),
        ((*MASKED, "--secure-roster", "r"), ["--secure-roster", "clients elsewhere"]),
        ((*MASKED, "--secure-threshold", 4), ["4", "over the 3 clients", "2 to 3"]),
        ((*MASKED, "--secure-neighbours", 5), ["--secure-neighbours 5", "even"]),
        ((*MASKED, "--clients", 2), ["2 clients a round", "at least 3"]),
        ((*MASKED, "--clients", 6, "--secure-threshold", 3), ["3 of 6", "4 to 6"]),
        ((*MASKED, "--aggregation", "median"), ["--aggregation median", "use mean"]),
        ((*MASKED, "--max-update-norm", 5), ["--max-update-norm 5", "leave it out"]),
        ((*MASKED, "--sampling", "poisson", "--clients-per-round", 3), ["poisson", "fixed"]),
        ((*MASKED, "--method", "fedex"), ["--method fedex", "every client's own change"]),
        ((*MASKED, "--method", "lora-a2"), ["--method lora-a2", "tells it apart"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_with_masks_is_refused_in_a_line(files, tmp_path, call, words, parts):
    given = small(files, **{"output-dir": tmp_path / "run"})
    code, _, err = call(*given, *words)
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in parts), err
    assert not (tmp_path / "run").exists()


def test_without_the_package_one_line_says_what_to_install(files, tmp_path, call, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda n, *a: None if n == "cryptography" else found(n, *a)
    )
    code, _, err = call(*small(files, **{"output-dir": tmp_path / "run"}), *MASKED)
    assert code == 2 and "cryptography" in err and err.count("\n") == 1


def test_a_private_masked_run_tells_its_epsilon(files, tmp_path, call):
    """The noise is the clients', of the operating system: two runs differ, the charge does not."""
    private = (*MASKED, "--dp-clip", 0.5, "--dp-noise", 1.5)
    for name in ("one", "two"):
        words = small(files, rounds=2, **{"output-dir": tmp_path / name})
        code, out, _ = call(*words, *private)
        assert code == 0 and "made noisy by the clients" in out
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert bits(tmp_path / "one")[1] != bits(tmp_path / "two")[1]
    assert one[-1]["epsilon"] == two[-1]["epsilon"] == epsilon(1.5, 1.0, 2, 1e-5)
    code, _, err = call("--resume", "--output-dir", tmp_path / "one", "--rounds", 3)
    assert code == 0 and rows(tmp_path / "one")[-1]["epsilon"] == epsilon(1.5, 1.0, 3, 1e-5)


class Elsewhere(LocalTransport):
    """Workers as a network has them: bytes to each, `U` or `F` and bytes back."""

    has_all_states = True

    def __init__(self, workers):
        self.workers, self.claims, self.client_states = workers, {}, ClientStates()

    def run_round(self, tasks, deadline=None):
        yield from self.ask(dict(tasks), deadline)

    def ask(self, requests, deadline):
        for client, data in requests.items():
            yield arrival_of(client, self.workers[client].answer(data))


def test_workers_elsewhere_mask_too(files, tmp_path, call, capsys):
    """Three residents, of which one is sent nonsense before: the model of the run in one process."""
    words = small(files, **{"output-dir": tmp_path / "run"})
    assert call(*words, *MASKED)[0] == 0
    settled = config.resolve({}, tmp_path / "run" / "config.toml")
    made = job.prepare(settled)
    workers = [
        Resident(
            c, made.trainer(), Peer(made.layout), federation.message_limit(made), masked_only=True
        )
        for c in range(3)
    ]
    task = Task("r", 1, "B", 1, made.layout.hash, {}, {}, "fp32", 0.1, {}, {})
    assert workers[1].answer(encode_task(task)).startswith(b"Ftask refused: a task in the clear")
    for nonsense in (b"masking:", b"masking:K", b"masking:Z" + bytes(50), b"masking:U" + b"{" * 99):
        assert workers[1].answer(nonsense).startswith(b"Fmasking refused")
    found = []
    server = federation.build_server(made, transport=Elsewhere(workers), on_round=found.append)
    server.run()
    for row, other in zip(rows(tmp_path / "run"), found, strict=True):
        assert row["eval"] == json.loads(json.dumps(other["eval"]))
    assert "bytes out" in capsys.readouterr().out


def test_a_roster_and_a_key_are_files_that_fit(tmp_path):
    keygen = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    ssh = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    roster, key = tmp_path / "roster", tmp_path / "key"
    private = keygen.Ed25519PrivateKey.generate()
    key.write_bytes(
        private.private_bytes(ssh.Encoding.PEM, ssh.PrivateFormat.OpenSSH, ssh.NoEncryption())
    )
    public = private.public_key().public_bytes(ssh.Encoding.OpenSSH, ssh.PublicFormat.OpenSSH)
    roster.write_text(f"0 {public.decode()}\n")
    assert masks.identity(0, None, None) is None
    assert masks.identity(0, str(roster), str(key)).client == 0
    for client, given, why in (
        (0, (str(roster), None), "signs its keys by --secure-key FILE"),
        (0, (None, str(key)), "needs the roster"),
        (1, (str(roster), str(key)), "another key for client 1"),
        (0, (str(key), str(key)), "line 1 has no client's number"),
        (0, (str(roster), str(roster)), f"--secure-key {roster}"),
        (0, (f"{roster}x", str(key)), "cannot be read"),
        (0, (str(roster), f"{key}x"), "cannot be read"),
    ):
        with pytest.raises(BadInput, match=re.escape(why)):
            masks.identity(client, *given)
    settled = config.resolve(
        {"secure_aggregation": True, "clients": 2, "secure_roster": str(roster)}
    )
    with pytest.raises(BadInput, match="has no key for client 1"):
        masks.settings(settled.with_values(secure_threshold=2))
    plan = masks.text(settled.with_values(secure_threshold=2, clients_per_round=2), 10)
    assert "it cannot pose as them" in plan
    trusting = settled.with_values(secure_threshold=2, clients_per_round=2, secure_roster=None)
    assert "trusted not to pose as clients" in masks.text(trusting, 10)
