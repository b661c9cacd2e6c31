"""Workers that are nodes of a Flower federation themselves, on loopback.

Skipped where flwr is not installed.
"""

import os
import shutil
import signal

import pytest
import tomli_w

from tests.rolora.commands import bits, rows
from tests.rolora.flower_pieces import Federation, kill

pytest.importorskip("flwr")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]


@pytest.fixture
def federation(files, tmp_path):
    values = {
        "model": str(files["llama"]),
        "train_file": str(files["train"]),
        "eval_file": str(files["eval"]),
        "clients": 3,
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 8,
        "rank": 4,
        "max_length": 32,
        "lr": 1e-2,
        "device": "cpu",
        "threads": 1,
        "engine": "sequential",
        "task_type": "classification",
        "output_dir": str(tmp_path / "served"),
    }
    made = Federation(tmp_path, values)
    made.values = values
    yield made
    made.stop()


def rewritten(federation, **values):
    federation.configuration.write_text(tomli_w.dumps(federation.values | values))


def test_masked_rounds_over_flower_are_the_local_plain_ones(federation, tmp_path, call):
    """With TLS and node keys; a key that nobody registered is refused in one line."""
    local = tmp_path / "local.toml"
    local.write_text(tomli_w.dumps(federation.values | {"output_dir": str(tmp_path / "local")}))
    assert call("--config", local)[0] == 0
    rewritten(federation, secure_aggregation=True)
    federation.superlink(*federation.secured())
    keys = [federation.key(f"node{client}") for client in range(3)]

    def resident(client):
        return federation.resident(
            client, "--root-certificates", tmp_path / "tls.pem", "--node-key", keys[client]
        )

    stranger = resident(0)
    assert stranger.wait() == 2
    assert "error: --superlink 127.0.0.1" in federation.logs()
    for client in range(3):
        federation.call("flwr", "supernode", "register", f"{keys[client]}.pub", "here")
        resident(client)
    out, _ = federation.run().communicate()
    assert (tmp_path / "served" / "summary.json").exists(), out[-3000:] + federation.logs()
    assert [row["clients"] for row in rows(tmp_path / "served")] == [0, 3, 3]
    # What a masked round records is less; what it trains is the same, to the last bit.
    (masked, *weights), (plain, *expected) = bits(tmp_path / "served"), bits(tmp_path / "local")
    assert [row["eval"] for row in masked] == [row["eval"] for row in plain]
    assert weights == expected


def test_a_node_that_leaves_is_missed_at_once_and_comes_back(federation, tmp_path):
    rewritten(federation, rounds=1000)
    federation.superlink("--insecure")
    nodes = [federation.resident(client) for client in range(3)]
    process = federation.run()

    def is_last(clients):
        path = tmp_path / "served" / "metrics.jsonl"
        counted = [row["clients"] for row in rows(tmp_path / "served")] if path.exists() else []
        return len(counted) > 1 and counted[-1] == clients

    federation.wait_for(process, lambda: is_last(3))
    os.kill(nodes[1].pid, signal.SIGTERM)
    assert nodes[1].wait() == 130
    federation.wait_for(process, lambda: is_last(2))
    federation.resident(1)
    federation.wait_for(process, lambda: is_last(3))
    kill(process)
