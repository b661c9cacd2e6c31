"""The files of a federation: a certificate, a key for every node, the roster of their public keys,
the run's configuration, and where Flower's commands find the server.

    python examples/federation/prepare.py FOLDER localhost:9092

In a real federation every owner makes its own key, and its private part never leaves its machine;
the public ones are exchanged, not through the server, and everybody writes a roster of its own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CLIENTS = 5
CONNECTION = """\
[superlink]
default = "here"

[superlink.here]
address = "{address}"
root-certificates = "{folder}/server.pem"
"""


def certificate(host):
    """Signed by itself: on machines of several owners, let an authority sign it."""
    names = f"subjectAltName=DNS:{host},DNS:localhost,IP:127.0.0.1"
    curve = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")
    files = ("-keyout", "server.key", "-out", "server.pem")
    subject = ("-subj", f"/CN={host}", "-addext", names)
    return ("openssl", "req", "-x509", "-newkey", *curve, *subject, *files)


def node_key(client):
    """One key for two purposes: Flower knows the node by it, the other clients its client."""
    return ("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"node{client}")


def prepare(folder, address):
    """Everything but the processes, in `folder`, which is made; raises SystemExit if it cannot."""
    for program in ("openssl", "ssh-keygen"):
        if shutil.which(program) is None:
            raise SystemExit(f"error: {program}, which makes the keys, is not installed")
    if (folder / "run.toml").exists():
        raise SystemExit(f"error: {folder} has a federation already: name a new folder")
    (folder / "flwr").mkdir(parents=True, exist_ok=True)
    commands = [certificate(address.rpartition(":")[0]), *map(node_key, range(CLIENTS))]
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"error: {' '.join(command)}: {done.stderr}")
    public = [(folder / f"node{client}.pub").read_text() for client in range(CLIENTS)]
    roster = "".join(f"{client} {key}" for client, key in enumerate(public))
    (folder / "roster.txt").write_text(roster)
    connection = CONNECTION.format(address=address, folder=folder)
    (folder / "flwr" / "config.toml").write_text(connection)
    configuration = (HERE / "run.toml").read_text().replace("/federation/", f"{folder}/")
    (folder / "run.toml").write_text(configuration)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER HOST:PORT")
    prepare(Path(sys.argv[1]).resolve(), sys.argv[2])
