"""`python -m rolora.worker`: one client that stays resident.

It keeps the base model and one client's examples loaded, and trains what it is asked over a Unix
socket (`rolora.transport.unix`). `H` asks who this is (JSON comes back). Any other request is a
task message, answered by `U` and the update message, or `F` and why there is none: a fixed word and
a detail. No request ends the worker, and a refused one leaves nothing behind. It says a line for
every task: the round, the loss, bytes and seconds, or why there is no update.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rolora import cli, config
from rolora.errors import BadInput
from rolora.transport import unix
from rolora.transport.unix import ask

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
__all__ = ["ask", "command", "work"]


def work(config_file: str, client: int, path: str, train_file: str | None = None) -> None:
    """Serves until it is interrupted."""
    settled = config.resolve({}, config_file)
    import numpy as np

    from rolora.data import files
    from rolora.federated import methods
    from rolora.federated.peer import Peer
    from rolora.run import masked
    from rolora.run import rows as row_files
    from rolora.run.examples import encode
    from rolora.run.federation import message_limit
    from rolora.run.job import prepare
    from rolora.transport.resident import Resident

    made = prepare(settled)
    if not 0 <= client < len(made.clients):
        raise BadInput(
            f"--client {client}: this configuration has clients 0 to {len(made.clients) - 1}"
        )
    if train_file is not None:
        own = files.read_file(train_file)
        row_files.require_columns(made.config, own, train_file)
        made.train, _, _ = encode(made.recipe, own, made.config.task.unlearnable, train_file)
        made.clients[client] = np.arange(len(made.train))
    changes_base = methods.load(made.config.federation.method).changes_base
    peer = Peer(made.layout, changes_base=changes_base)
    noise = masked.noise(made.config)
    resident = Resident(client, made.trainer(), peer, message_limit(made), noise)
    hello = json.dumps(
        {"client": client, "layout": made.layout.hash, "examples": len(made.clients[client])}
    ).encode()
    with unix.listening(Path(path)) as server:
        print(
            f"client {client}: {len(made.clients[client])} examples, listening on {path}",
            flush=True,
        )
        unix.serve(server, hello, resident.answer, resident.limit + 1)


def worker(**given: Any) -> None:
    work(**given)


command = cli.command("worker", HELP, FLAGS, worker)

if __name__ == "__main__":
    cli.run(command)
