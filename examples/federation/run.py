"""A whole federation on one machine in one command: a server, four nodes, TLS, node keys, sums that
the server cannot look into; one node is killed, another joins, and the accuracy stands at the end.

    python examples/federation/run.py runs/federation

Needs flwr (pip install -c constraints-flower.txt ".[flower,secure]"), openssl and ssh-keygen. Every
process runs the commands of docs/guides/federate.md, has a log in the folder, and is stopped at the
end. compose.yaml runs the same commands in containers.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from prepare import prepare

import rolora

APP = Path(rolora.__file__).parent / "transport" / "flower_app"
FIRST = (0, 1, 2, 3)  # the nodes that are there when the run begins
KILLED, LATER = 3, 4
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def superlink(host, port):
    """Flower's server: it speaks TLS and admits registered keys only."""
    tls = ("--ssl-ca-certfile", "server.pem", "--ssl-certfile", "server.pem")
    place = ("--host", host, "--port", str(port))
    keys = ("--ssl-keyfile", "server.key", "--enable-supernode-auth")
    return ("flower-superlink", *place, *tls, *keys)


def register(client):
    return ("flwr", "supernode", "register", f"node{client}.pub", "here")


def worker(client, address):
    """A client: it keeps the model and its examples loaded, and is the node itself."""
    what = ("python", "-m", "rolora.worker", "--config", "run.toml", "--client", str(client))
    link = ("--superlink", address, "--root-certificates", "server.pem")
    key = f"node{client}"
    return (*what, *link, "--node-key", key, "--secure-key", key)


def start_run(folder):
    """Flower's stream of what our server says. The first round begins without the fifth node."""
    options = f'rolora-config="{folder}/run.toml" gathering=10'
    return ("flwr", "run", str(APP), "here", "--stream", "--run-config", options)


class Federation:
    """The processes of one federation, each with a log in `folder`; none outlives `stop`."""

    def __init__(self, folder):
        self.folder, self.started = folder, {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        paths = [str(APP.parents[2]), os.environ.get("PYTHONPATH", "")]
        binaries = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = os.environ | {
            **QUIET,
            "FLWR_HOME": str(folder / "flwr"),
            "PATH": os.pathsep.join(binaries),
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def start(self, name, command):
        """A process that a terminal's Ctrl-C does not reach before `stop` does."""
        with open(self.folder / f"{name}.log", "a") as log:
            self.started[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def call(self, *command):
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"error: {' '.join(command)}: {done.stderr or done.stdout}")

    def wait_for(self, name, is_so):
        """However long it takes, while the process that is to bring it about lives."""
        while not is_so():
            if self.started[name].poll() is not None and not is_so():
                raise SystemExit(f"error: it has ended: see {self.folder / name}.log")
            time.sleep(0.1)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def start_worker(self, client):
        self.call(*register(client))
        self.start(f"node{client}", worker(client, self.address))

    def is_loaded(self, client):
        return lambda: f"a node of {self.address}" in self.log(f"node{client}")

    def has_trained(self, client):
        return lambda: f"client {client}: round" in self.log(f"node{client}")

    def kill(self, client):
        """As a machine fails: without taking its leave."""
        self.started[f"node{client}"].kill()

    def rounds(self):
        """What is recorded of every round so far; round 0 is before training."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def stop(self):
        """Ends what was started, the last first, and whatever that has started in its turn."""
        for process in reversed(self.started.values()):
            if process.poll() is not None:
                continue
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def perform(federation):
    """The play: four nodes, one that dies, one that comes."""
    federation.start("superlink", superlink("127.0.0.1", federation.port))
    federation.wait_for("superlink", lambda: is_listening(federation.port))
    for client in FIRST:
        federation.start_worker(client)
    for client in FIRST:
        federation.wait_for(f"node{client}", federation.is_loaded(client))
    federation.start("server", start_run(federation.folder))
    federation.wait_for("server", lambda: len(federation.rounds()) > 2)
    federation.wait_for("server", federation.has_trained(KILLED))
    federation.kill(KILLED)
    print(f"after round {federation.rounds()[-1]['round']}: node {KILLED} is killed", flush=True)
    federation.start_worker(LATER)
    federation.wait_for(
        "server", lambda: f"client {LATER}: round" in federation.log(f"node{LATER}")
    )
    print(f"after round {federation.rounds()[-1]['round']}: node {LATER} takes part", flush=True)
    federation.started["server"].wait()


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main(folder):
    if folder.exists():
        raise SystemExit(f"error: {folder} exists: name a new folder")
    # Whoever ends this program has its processes ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    federation = Federation(folder.resolve())
    prepare(federation.folder, federation.address)
    try:
        perform(federation)
    finally:
        federation.stop()
    if not (folder / "run" / "summary.json").is_file():
        raise SystemExit(f"error: the run has no end: see {folder}/server.log")
    rows = federation.rounds()
    for row in rows[1:]:
        print(f"round {row['round']}: nodes {row['took_part']}", flush=True)
    first, last = (row["eval"]["accuracy"] for row in (rows[0], rows[-1]))
    print(f"held-out accuracy {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
