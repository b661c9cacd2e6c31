"""A real federation on loopback: Flower's link and nodes, our server loop and workers.

Skipped where flwr is not installed.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

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
        end = time.monotonic() + 60
        while not (self.folder / f"{client}.sock").exists():
            assert process.poll() is None and time.monotonic() < end, self.logs()
            time.sleep(0.1)
        return process

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
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    federation.start(
        "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", federation.link
    )
    for client in (0, 1):
        federation.worker(client)
        assert (tmp_path / f"{client}.sock").stat().st_mode & 0o777 == 0o600
    time.sleep(3)
    nodes = [federation.node(client) for client in (0, 1)]
    out, _ = federation.run().communicate(timeout=240)
    assert (tmp_path / "served" / "summary.json").exists(), out[-3000:] + federation.logs()
    assert bits(tmp_path / "served") == bits(tmp_path / "local")

    # Again, with a node killed after the first round, and back after the second.
    # greetings and answers take 5 to 10 s each, whatever their size
    federation.configuration.write_text(
        tomli_w.dumps(
            federation.values
            | {"output_dir": str(tmp_path / "again"), "rounds": 4, "deadline": 45.0}
        )
    )
    process = federation.run()
    recorded = tmp_path / "again" / "metrics.jsonl"
    await_rounds(recorded, 1, federation)
    kill(nodes[1])
    await_rounds(recorded, 2, federation)
    federation.node(1)
    out, _ = process.communicate(timeout=300)
    counted = [row["clients"] for row in rows(tmp_path / "again")[1:]]
    assert len(counted) == 4 and counted[0] == counted[-1] == 2 and 1 in counted, (
        counted,
        out[-2000:],
    )


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
    federation.start(
        "flower-superlink",
        "--host",
        "127.0.0.1",
        "--port",
        federation.link,
        "--ssl-ca-certfile",
        tmp_path / "tls.pem",
        "--ssl-certfile",
        tmp_path / "tls.pem",
        "--ssl-keyfile",
        tmp_path / "tls.key",
        "--enable-supernode-auth",
    )
    time.sleep(5)

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

    assert node().wait(30) != 0 and "Exit Code: 305" in federation.logs(), (
        "a key that nobody registered"
    )
    subprocess.run(
        ["flwr", "supernode", "register", tmp_path / "node.pub", "here"],
        check=True,
        env=federation.environment,
        capture_output=True,
    )
    registered = node()
    time.sleep(8)
    assert registered.poll() is None, federation.logs()


def await_rounds(path, number, federation):
    end = time.monotonic() + 120
    while not path.exists() or json.loads(path.read_text().splitlines()[-1])["round"] < number:
        assert time.monotonic() < end, federation.logs()
        time.sleep(0.05)
