"""`python -m rolora.worker`: one client that stays resident.

It keeps the base model and one client's examples loaded, and trains what it is asked over a Unix
socket. A request and its answer are 8 bytes of length (little-endian) and as many bytes: `H` asks
who this is (JSON comes back); any other is a task message, answered by `U` and the update message,
or `F` and why there is none. The socket is its owner's alone (0600).
"""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from rolora import cli, config
from rolora.errors import BadInput

HELP = (
    "One client of a federation between owners: loads what the configuration names, and answers "
    "on a Unix socket."
)
FLAGS = [
    cli.Flag(
        ["--config", "config_file"],
        metavar="FILE.toml",
        required=True,
        help="the federation's configuration, the same for all",
    ),
    cli.Flag(["--client"], type=int, required=True, help="which client of the partition this is"),
    cli.Flag(
        ["--train-file"],
        metavar="FILE",
        help="this client's own examples, in the configuration's columns, in the place of its part "
        "of the configuration's data",
    ),
    cli.Flag(["--socket", "path"], metavar="PATH", required=True, help="where to listen"),
]
LIMIT = 1 << 36  # bytes of one request
_REMEMBERED = 4  # rounds: more than the checkpoints that a server keeps


def work(config_file: str, client: int, path: str, train_file: str | None = None) -> None:
    """Serves until it is interrupted."""
    settled = config.resolve({}, config_file)
    import numpy as np

    from rolora import job as jobs
    from rolora.data import files as data
    from rolora.federated.peer import Peer
    from rolora.run.session import message_limit

    made = jobs.prepare(settled)
    if not 0 <= client < len(made.clients):
        raise BadInput(
            f"--client {client}: this configuration has clients 0 to {len(made.clients) - 1}"
        )
    if train_file is not None:
        rows = data.read_file(train_file)
        jobs.require_columns(made.config, rows, train_file)
        made.train = made.recipe.encode(rows)
        made.clients[client] = np.arange(len(made.train))
    trainer, peer, states = made.trainer(), Peer(made.layout), {}
    limit = message_limit(made)
    hello = json.dumps(
        {"client": client, "layout": made.layout.hash, "examples": len(made.clients[client])}
    ).encode()
    with _listening(Path(path)) as server:
        print(
            f"client {client}: {len(made.clients[client])} examples, listening on {path}",
            flush=True,
        )
        while True:
            connection, _ = server.accept()
            with connection:
                try:
                    request = _receive(connection, limit + 1)
                    _send(
                        connection,
                        hello
                        if request == b"H"
                        else _train(request, client, trainer, peer, limit, states),
                    )
                except (ConnectionError, ValueError):
                    continue  # who asked is gone, or asked nonsense; the next one is served


def _train(
    request: bytes, client: int, trainer, peer, limit: int, states: dict[tuple[str, int], dict]
) -> bytes:
    """The answer to a task.

    `states`: what this client kept after its last rounds, by run and number: a server that is
    resumed may ask for a round again, and finds the client as it was before it.
    """
    from rolora.federated import wire
    from rolora.federated.client import TrainingFailed

    try:
        task = wire.decode_task(request, limit)
        if task.client != client:
            raise wire.BadMessage(f"a task of client {task.client} came to client {client}")
        peer.receive(task)
        for other in [
            (run, number) for run, number in states if run != task.run or number >= task.round
        ]:
            del states[other]
        update, states[task.run, task.round] = trainer.train(
            task, peer.published, states[max(states)] if states else {}
        )
        for old in sorted(states)[:-_REMEMBERED]:
            del states[old]
    except wire.BadMessage as error:
        return f"Ftask refused: {error}".encode()
    except TrainingFailed as error:
        return f"F{error}".encode()
    return b"U" + wire.encode_update(update)


def _listening(path: Path) -> socket.socket:
    """A listening socket that only its owner can reach.

    One that a dead worker left behind is replaced, a living one refused.
    """
    if path.exists():
        try:
            ask(str(path), b"H")
        except (ConnectionError, OSError):
            path.unlink()
        else:
            raise BadInput(f"--socket {path}: a worker is listening there already")
    server, before = socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        server.bind(str(path))
    except OSError as error:
        raise BadInput(f"--socket {path} cannot be made: {error.strerror or error}") from None
    finally:
        os.umask(before)
    server.listen(4)
    return server


def ask(path: str, request: bytes) -> bytes:
    """A worker's answer to a request; raises ConnectionError or OSError where there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        _send(connection, request)
        return _receive(connection, LIMIT)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack("<Q", len(data)) + data)


def _receive(connection: socket.socket, limit: int) -> bytes:
    (length,) = struct.unpack("<Q", _exactly(connection, 8))
    if length > limit:
        raise ValueError(f"{length} bytes are over the limit of {limit}")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return bytes(data)


def worker(**given: Any) -> None:
    work(**given)


command = cli.command("worker", HELP, FLAGS, worker)

if __name__ == "__main__":
    cli.run(command)
