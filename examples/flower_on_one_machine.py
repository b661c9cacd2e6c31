"""A Flower federation on one machine, with TLS and node keys, in one command.

    python examples/flower_on_one_machine.py runs/flower

Starts what a real federation has (docs/guides/federate.md): a SuperLink with a certificate, and for
each of two clients a worker and a SuperNode with a key of its own. Runs three rounds on the
built-in model and text, and stops everything it started. Needs flwr (pip install -c
constraints-flower.txt ".[flower]"), openssl and ssh-keygen. Prints the run's own lines, and at the
end `3 rounds of 2 clients -> runs/flower/run`.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

import rolora

CLIENTS = 2
APP = Path(rolora.__file__).parent / "transport" / "flower_app"
CONFIGURATION = """\
clients = {clients}
rounds = 3
local_steps = 4
device = "cpu"
threads = 1
output_dir = "{folder}/run"
"""
CONNECTION = """\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
root-certificates = "{folder}/server.pem"
"""
CERTIFICATE = (  # signed by itself: on machines of several owners, let an authority sign it
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost "
    "-keyout server.key -out server.pem"
)


class Federation:
    """The processes of one federation, each with a log in `folder`; none outlives `stop`."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.port = free_port()
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(APP.parents[2]), os.environ.get("PYTHONPATH", "")]),
        }

    def prepare(self):
        """Writes run.toml, Flower's own configuration, the certificate and a key a client."""
        (self.folder / "flwr").mkdir()
        self.write("run.toml", CONFIGURATION)
        self.write("flwr/config.toml", CONNECTION)
        self.call(*CERTIFICATE.split())
        for client in range(CLIENTS):
            key = ("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f")
            self.call(*key, f"node{client}")

    def start_link(self):
        """A SuperLink that speaks TLS and admits registered keys only."""
        tls = ("--ssl-ca-certfile", "server.pem", "--ssl-certfile", "server.pem")
        key = ("--ssl-keyfile", "server.key", "--enable-supernode-auth")
        place = ("--host", "127.0.0.1", "--port", self.port)
        link = self.start("superlink", "flower-superlink", *place, *tls, *key)
        self.wait_for(link, "superlink", lambda: is_listening(self.port))
        for client in range(CLIENTS):
            self.call("flwr", "supernode", "register", f"node{client}.pub", "here")

    def start_worker(self, client):
        """The process that keeps the base model and one client's examples loaded."""
        path = self.folder / f"{client}.sock"
        what = ("-m", "rolora.worker", "--config", "run.toml", "--client", client)
        worker = self.start(f"worker{client}", sys.executable, *what, "--socket", path)
        self.wait_for(worker, f"worker{client}", path.exists)

    def start_node(self, client):
        """A SuperNode; each on one machine needs a port of its own beside the link's."""
        link = ("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", "server.pem")
        key = ("--auth-supernode-private-key", f"node{client}", "--port", free_port())
        where = ("--node-config", f'socket="{self.folder}/{client}.sock"')
        self.start(f"supernode{client}", "flower-supernode", *link, *key, *where)

    def run(self):
        """The run itself: Flower's stream of what our server says."""
        option = f'rolora-config="{self.folder}/run.toml"'
        stream = ("flwr", "run", str(APP), "here", "--stream", "--run-config", option)
        subprocess.run(stream, cwd=self.folder, env=self.environment, check=True)

    def stop(self):
        """Ends what was started, the last first, and whatever that has started in its turn."""
        for process in reversed(self.started):
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

    def write(self, name, text):
        values = {"folder": self.folder, "port": self.port, "clients": CLIENTS}
        (self.folder / name).write_text(text.format(**values))

    def call(self, *command):
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"error: {' '.join(command)}: {done.stderr or done.stdout}")

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def wait_for(self, process, name, is_ready):
        while not is_ready():
            if process.poll() is not None:
                raise SystemExit(f"error: it ended at once: see {self.folder / name}.log")
            time.sleep(0.1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main(folder):
    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        raise SystemExit("error: openssl and ssh-keygen, which make the keys, are not installed")
    if folder.exists():
        raise SystemExit(f"error: {folder} exists: name a new folder")
    folder.mkdir(parents=True)
    federation = Federation(folder.resolve())
    try:
        federation.prepare()
        federation.start_link()
        for client in range(CLIENTS):
            federation.start_worker(client)
            federation.start_node(client)
        federation.run()
    finally:
        federation.stop()
    summary = folder / "run" / "summary.json"
    if not summary.is_file():
        raise SystemExit(f"error: the run has no end: see {folder}/run.toml.error and its logs")
    rounds = json.loads(summary.read_text())["rounds"]
    print(f"{rounds} rounds of {CLIENTS} clients -> {folder / 'run'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
