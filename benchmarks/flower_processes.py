"""The processes of a Flower federation on one machine that `benchmarks.flower_wait` times."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
CLIENTS = 2
SERVER_APP = """\
from flwr.serverapp import ServerApp
from benchmarks.flower_wait import serve
app = ServerApp()


@app.main()
def main(grid, context):
    serve(grid, str(context.run_config["rolora-config"]))
"""
CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost "
    "-keyout server.key -out server.pem"
)
CONNECTION = """\
[superlink]
default = "here"
[superlink.here]
address = "127.0.0.1:{port}"
root-certificates = "{folder}/server.pem"
"""


@dataclass(frozen=True)
class Way:
    """How messages reach a client. `node`: as the worker itself is one; else a flower-supernode,
    whose SuperExec asks for work every `poll` seconds, and whose app imports torch or not.
    """

    name: str
    node: bool = False
    poll: float = 1.0
    imports_torch: bool = False


class Processes:
    """A SuperLink, and what each way needs; all of it ends with `stop`."""

    def __init__(self, folder: Path, way: Way):
        self.folder, self.way, self.started = folder, way, list[subprocess.Popen]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def prepare(self) -> None:
        (self.folder / "flwr").mkdir()
        connection = CONNECTION.format(port=self.port, folder=self.folder)
        (self.folder / "flwr" / "config.toml").write_text(connection)
        app = shutil.copytree(ROOT / "rolora/transport/flower_app", self.folder / "app")
        (app / "server_app.py").write_text(SERVER_APP)
        if self.way.imports_torch:
            with (app / "client_app.py").open("a") as text:
                text.write("\nimport rolora.transport.flower\n")
        self.call(*CERTIFICATE.split())
        tls = ("--ssl-ca-certfile", "server.pem", "--ssl-certfile", "server.pem")
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth")
        self.start("flower-superlink", *place, *tls, "--ssl-keyfile", "server.key")
        while not self._listens():
            time.sleep(0.1)
        for number in range(CLIENTS):
            self.call(
                "ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"node{number}"
            )
            self.call("flwr", "supernode", "register", f"node{number}.pub", "here")
            self._client(number)

    def _client(self, number: int) -> None:
        own, link = (sys.executable, "-m", "benchmarks.flower_wait"), f"127.0.0.1:{self.port}"
        if self.way.node:
            self.start(*own, "--node", str(number), link)
            return
        self.start(*own, "--client", str(number), f"{number}.sock")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(self.way.poll)
        key = ("--root-certificates", "server.pem", "--auth-supernode-private-key", f"node{number}")
        where = ("--port", port, "--node-config", f'socket="{self.folder}/{number}.sock"')
        self.start("flower-supernode", "--superlink", link, *key, *where)

    def asked(self, size: int, count: int) -> list[dict[str, float]]:
        """What the ServerApp measured."""
        result = self.folder / "result.json"
        order = {"bytes": size, "rounds": count, "result": str(result)}
        (self.folder / "order.json").write_text(json.dumps(order))
        option = f'rolora-config="{self.folder}/order.json"'
        said = self.call("flwr", "run", "app", "here", "--stream", "--run-config", option)
        if not result.exists():
            logs = [path.read_text()[-1000:] for path in self.folder.glob("*.log")]
            raise SystemExit("\n".join([said[-3000:], *logs]))
        return json.loads(result.read_text())

    def start(self, *command: str) -> None:
        with (self.folder / f"{len(self.started)}.log").open("w") as log:
            made = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        self.started.append(made)

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def stop(self) -> None:
        for process in reversed(self.started):
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                for one in (process, *children):
                    one.kill()
            process.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
