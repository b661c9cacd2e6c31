"""A real federation on loopback: Flower's link and nodes, our server loop and workers.

Skipped where flwr is not installed.
"""

import shutil

import pytest
import tomli_w

from tests.rolora.commands import bits, rows
from tests.rolora.flower_pieces import Federation, kill

pytest.importorskip("flwr")


pytestmark = pytest.mark.slow


@pytest.fixture
def federation(files, tmp_path):
    configuration = {
        "model": str(files["llama"]),
        "train_file": str(files["train"]),
        "eval_file": str(files["eval"]),
        "clients": 2,
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 8,
        "rank": 4,
        "max_length": 32,
        "lr": 1e-2,
        "dropout": 0.1,
        "device": "cpu",
        "threads": 1,
        "engine": "sequential",
        "task_type": "classification",
        "output_dir": str(tmp_path / "served"),
    }
    made = Federation(tmp_path, configuration)
    made.values = configuration
    yield made
    made.stop()


def test_two_nodes_are_the_local_run_and_a_killed_one_costs_its_contribution(
    federation, tmp_path, call
):
    (tmp_path / "local.toml").write_text(
        tomli_w.dumps(federation.values | {"output_dir": str(tmp_path / "local")})
    )
    assert call("--config", tmp_path / "local.toml")[0] == 0
    federation.superlink("--insecure")
    for client in (0, 1):
        federation.worker(client)
        assert (tmp_path / f"{client}.sock").stat().st_mode & 0o777 == 0o600
    nodes = [federation.node(client) for client in (0, 1)]
    out, _ = federation.run().communicate()
    assert (tmp_path / "served" / "summary.json").exists(), out[-3000:] + federation.logs()
    assert bits(tmp_path / "served") == bits(tmp_path / "local")

    # Again, with more rounds than it will need: a node is killed, comes back, and is counted.
    again = federation.values | {"output_dir": str(tmp_path / "again"), "rounds": 1000}
    federation.configuration.write_text(tomli_w.dumps(again))
    process = federation.run()

    def is_last(clients):
        path = tmp_path / "again" / "metrics.jsonl"
        counted = [row["clients"] for row in rows(tmp_path / "again")] if path.exists() else []
        return len(counted) > 1 and counted[-1] == clients

    federation.wait_for(process, lambda: is_last(2))
    kill(nodes[1])
    federation.wait_for(process, lambda: is_last(1))
    federation.node(1)
    federation.wait_for(process, lambda: is_last(2))
    kill(process)


def test_a_run_that_cannot_start_says_why_in_the_stream_and_in_a_file(federation, tmp_path):
    federation.superlink("--insecure")
    federation.configuration.write_text(tomli_w.dumps(federation.values | {"methud": "ffa"}))
    out, _ = federation.run().communicate()
    line = f"error: {federation.configuration}: unknown key 'methud'; did you mean method?"
    assert line in out.splitlines()
    assert (tmp_path / "run.toml.error").read_text() == f"{line}\n"


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="needs openssl and ssh-keygen",
)
def test_with_keys_an_unregistered_node_is_refused_and_a_registered_one_is_not(
    federation, tmp_path
):
    federation.key("node")
    federation.superlink(*federation.secured())

    def node():
        return federation.start(
            "flower-supernode",
            "--superlink",
            f"127.0.0.1:{federation.link}",
            "--port",
            federation.nodes[0],
            "--root-certificates",
            tmp_path / "tls.pem",
            "--auth-supernode-private-key",
            tmp_path / "node",
            "--node-config",
            f'socket="{tmp_path}/0.sock"',
        )

    assert node().wait() != 0 and "Exit Code: 305" in federation.logs(), (
        "a key that nobody registered"
    )
    federation.call("flwr", "supernode", "register", tmp_path / "node.pub", "here")
    link_says = tmp_path / "0.log"
    federation.wait_for(node(), lambda: "Activated node_id" in link_says.read_text())
