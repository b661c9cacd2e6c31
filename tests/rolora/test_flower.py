"""A real federation on loopback: Flower's link and nodes, our server loop and workers.

Skipped where flwr is not installed.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import psutil
import tomli_w

import rolora
from tests.rolora.commands import bits, rows

pytestmark = pytest.mark.slow
APP = Path(rolora.__file__).parent / "transport" / "flower_app"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Federation:
    """A superlink, two nodes and their workers.

    `start`ed pieces are killed at the end, with their children.
    """

    def __init__(self, folder, configuration):
        self.folder, self.running = folder, []
        self.link, *self.nodes = free_ports(3)
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.link}"\ninsecure = true\n'
        )
        binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = (
            os.environ
            | QUIET
            | {
                "FLWR_HOME": str(folder / "flwr"),
                "PATH": binaries,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(APP.parents[2]),
            }
        )
        self.configuration = folder / "run.toml"
        self.configuration.write_text(tomli_w.dumps(configuration))

    def start(self, *command):
        log = open(self.folder / f"{len(self.running)}.log", "w")
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def node(self, client):
        return self.start(
            "flower-supernode",
            "--insecure",
            "--superlink",
            f"127.0.0.1:{self.link}",
            "--port",
            self.nodes[client],
            "--node-config",
            f'socket="{self.folder}/{client}.sock"',
        )

    def worker(self, client):
        process = self.start(
            sys.executable,
            "-m",
            "rolora.worker",
            "--config",
            self.configuration,
            "--client",
            client,
            "--socket",
            f"{self.folder}/{client}.sock",
        )
        self.wait_for(process, (self.folder / f"{client}.sock").exists)
        return process

    def superlink(self, *flags):
        place = ("--host", "127.0.0.1", "--port", self.link)
        self.wait_for(self.start("flower-superlink", *place, *flags), self.answers)

    def answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.link)) == 0

    def wait_for(self, process, is_so):
        """However long it takes, while the process that is to bring it about lives."""
        while not is_so():
            assert process.poll() is None, self.logs()
            time.sleep(0.1)

    def run(self):
        bundle = self.folder / "app"
        shutil.copytree(APP, bundle, dirs_exist_ok=True)
        return subprocess.Popen(
            [
                "flwr",
                "run",
                str(bundle),
                "here",
                "--stream",
                "--run-config",
                f'rolora-config="{self.configuration}"',
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    def logs(self):
        return "\n".join(p.read_text()[-1500:] for p in sorted(self.folder.glob("*.log")))

    def stop(self):
        for process in self.running:
            if process.poll() is None:
                kill(process)


def kill(process):
    """With all that it has started: Flower's apps are in sessions of their own."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


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
    def made(*command):
        subprocess.run([str(c) for c in command], check=True, capture_output=True, cwd=tmp_path)

    made(
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        "tls.key",
        "-out",
        "tls.pem",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1,DNS:localhost",
    )
    made("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", "node")
    (tmp_path / "flwr" / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\n'
        f'address = "127.0.0.1:{federation.link}"\n'
        f'root-certificates = "{tmp_path}/tls.pem"\n'
    )
    federation.superlink(
        "--ssl-ca-certfile",
        tmp_path / "tls.pem",
        "--ssl-certfile",
        tmp_path / "tls.pem",
        "--ssl-keyfile",
        tmp_path / "tls.key",
        "--enable-supernode-auth",
    )

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
    subprocess.run(
        ["flwr", "supernode", "register", tmp_path / "node.pub", "here"],
        check=True,
        env=federation.environment,
        capture_output=True,
    )
    link_says = tmp_path / "0.log"
    federation.wait_for(node(), lambda: "Activated node_id" in link_says.read_text())
