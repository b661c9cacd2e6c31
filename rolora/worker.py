"""`python -m rolora.worker`: one client that stays resident.

It keeps the base model and one client's examples loaded, and trains what it is asked over a Unix
socket (`rolora.transport.unix`). `H` asks who this is (JSON comes back). Any other request is a
task message, answered by `U` and the update message, or `F` and why there is none: a fixed word and
a detail. No request ends the worker, and a refused one leaves nothing behind.
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
_REMEMBERED = 4  # rounds: more than the checkpoints that a server keeps


def work(config_file: str, client: int, path: str, train_file: str | None = None) -> None:
    """Serves until it is interrupted."""
    settled = config.resolve({}, config_file)
    import numpy as np

    from rolora.data import files
    from rolora.federated import methods
    from rolora.federated.peer import Peer
    from rolora.run import rows as row_files
    from rolora.run.federation import message_limit
    from rolora.run.job import prepare

    made = prepare(settled)
    if not 0 <= client < len(made.clients):
        raise BadInput(
            f"--client {client}: this configuration has clients 0 to {len(made.clients) - 1}"
        )
    if train_file is not None:
        own = files.read_file(train_file)
        row_files.require_columns(made.config, own, train_file)
        made.train = made.recipe.encode(own)
        made.clients[client] = np.arange(len(made.train))
    changes_base = methods.load(made.config.federation.method).changes_base
    trainer, peer = made.trainer(), Peer(made.layout, changes_base=changes_base)
    states: dict = {}
    limit = message_limit(made)
    hello = json.dumps(
        {"client": client, "layout": made.layout.hash, "examples": len(made.clients[client])}
    ).encode()
    with unix.listening(Path(path)) as server:
        print(
            f"client {client}: {len(made.clients[client])} examples, listening on {path}",
            flush=True,
        )
        unix.serve(
            server,
            hello,
            lambda request: _train(request, client, trainer, peer, limit, states),
            limit + 1,
        )


def _train(
    request: bytes, client: int, trainer, peer, limit: int, states: dict[tuple[str, int], dict]
) -> bytes:
    """The answer to a task.

    `states`: what this client kept after its last rounds, by run and number: a server that is
    resumed may ask for a round again, and finds the client as it was before it.
    """
    from rolora.federated import wire
    from rolora.federated.client import TrainingFailed

    before = peer.published, peer.versions, dict(states)
    try:
        task = wire.decode_task(request, limit)
        if task.client != client:
            raise wire.BadMessage(f"a task of client {task.client} came to client {client}")
        if task.layout != peer.layout.hash:
            raise TrainingFailed(
                "other layout", f"this client has {peer.layout.hash}, the task {task.layout}"
            )
        peer.receive(task)
        for run, number in list(states):
            if run != task.run or number >= task.round:
                del states[run, number]
        last = states[max(states)] if states else {}
        update, states[task.run, task.round] = trainer.train(task, peer.published, last)
        for old in sorted(states)[:-_REMEMBERED]:
            del states[old]
        return b"U" + wire.encode_update(update)
    except wire.BadMessage as error:
        return f"Ftask refused: {error}".encode(errors="replace")
    except TrainingFailed as error:
        return f"F{error}".encode(errors="replace")
    except Exception as error:  # whatever a hostile task brings about, the next one is served
        peer.published, peer.versions = before[:2]
        states.clear()
        states.update(before[2])
        print(f"client {client}: a task failed: {type(error).__name__}", flush=True)
        return f"Ftask failed: {type(error).__name__}".encode()


def worker(**given: Any) -> None:
    work(**given)


command = cli.command("worker", HELP, FLAGS, worker)

if __name__ == "__main__":
    cli.run(command)
