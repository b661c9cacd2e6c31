"""A Flower federation on loopback that a test starts piece by piece, and takes down."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import tomli_w

import rolora

APP = Path(rolora.__file__).parent / "transport" / "flower_app"


CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout tls.key "
    "-out tls.pem -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
)
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

    def resident(self, client, *flags):
        """A worker that is a node itself."""
        what = ("-m", "rolora.worker", "--config", self.configuration, "--client", client)
        link = ("--superlink", f"127.0.0.1:{self.link}", *(flags or ("--insecure",)))
        return self.start(sys.executable, *what, *link)

    def secured(self):
        """A certificate for the link; the flags of a SuperLink that has it and wants node keys."""
        self.call(*CERTIFICATE.split())
        (self.folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.link}"\n'
            f'root-certificates = "{self.folder}/tls.pem"\n'
        )
        pem = self.folder / "tls.pem"
        tls = ("--ssl-ca-certfile", pem, "--ssl-certfile", pem)
        return (*tls, "--ssl-keyfile", self.folder / "tls.key", "--enable-supernode-auth")

    def key(self, name):
        """A node's key that nobody has registered yet."""
        self.call("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", name)
        return self.folder / name

    def call(self, *command):
        subprocess.run(
            [str(c) for c in command],
            check=True,
            capture_output=True,
            cwd=self.folder,
            env=self.environment,
        )

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
