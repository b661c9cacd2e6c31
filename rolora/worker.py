"""`python -m rolora.worker`: one client that stays resident.

It keeps the base model and one client's examples loaded, and trains what it is asked: as a node of
a Flower federation (`rolora.transport.flower_node`), or over a Unix socket
(`rolora.transport.unix`), to which a SuperNode of Flower's hands on what it gets. `H` asks who this
is (JSON comes back). Any other request is a task message, answered by `U` and the update message,
or `F` and why there is none: a fixed word and a detail. No request ends the worker, and a refused
one leaves nothing behind. It says a line for every task: the round, the loss, bytes and seconds, or
why there is no update.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rolora import cli, config
from rolora.errors import BadInput
from rolora.transport import unix
from rolora.transport.unix import ask

HELP = (
    "One client of a federation between owners: loads what the configuration names, and answers "
    "as a node of a Flower federation, or on a Unix socket."
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
    cli.Flag(
        ["--superlink"],
        metavar="HOST:PORT",
        group="Flower",
        help="the federation's SuperLink, whose node this is",
    ),
    cli.Flag(
        ["--root-certificates"],
        metavar="FILE",
        group="Flower",
        help="the certificates that the SuperLink is known by; the system's if not given",
    ),
    cli.Flag(
        ["--node-key"],
        metavar="FILE",
        group="Flower",
        help="this node's private key, an ECDSA key of ssh-keygen, where the SuperLink wants one",
    ),
    cli.Flag(
        ["--insecure"],
        is_flag=True,
        group="Flower",
        help="without TLS: to try things on one machine",
    ),
    cli.Flag(
        ["--secure-key"],
        metavar="FILE",
        group="Masked rounds",
        help="this client's private key, of ssh-keygen, which signs its keys of masked rounds",
    ),
    cli.Flag(
        ["--secure-roster"],
        metavar="FILE",
        group="Masked rounds",
        help="everybody's public keys, in the place of the configuration's roster",
    ),
    cli.Flag(
        ["--base-sharding"],
        is_flag=True,
        help="under torchrun: the frozen base lies in parts on its processes, which are one client",
    ),
    cli.Flag(
        ["--socket", "path"],
        metavar="PATH",
        help="listen on this Unix socket and be no node: a flower-supernode hands messages on",
    ),
]
if TYPE_CHECKING:
    from rolora.transport.resident import Resident
Answer = Callable[[bytes], bytes]
__all__ = ["ask", "command", "work"]


def work(
    config_file: str,
    client: int,
    path: str | None = None,
    train_file: str | None = None,
    superlink: str | None = None,
    root_certificates: str | None = None,
    node_key: str | None = None,
    insecure: bool = False,
    secure_roster: str | None = None,
    secure_key: str | None = None,
    base_sharding: bool = False,
) -> None:
    """Serves until it is interrupted."""
    if (path is None) == (superlink is None):
        raise BadInput("give one of --superlink HOST:PORT and --socket PATH: where tasks come from")
    if path is not None:
        if root_certificates or node_key or insecure:
            raise BadInput("--root-certificates, --node-key and --insecure go with --superlink")
    else:
        assert superlink is not None
        flower_node = _flower_node()
        link = flower_node.Link(superlink, root_certificates, node_key, insecure)
        link.require_readable()
    resident, hello = _loaded(
        config_file, client, train_file, secure_roster, secure_key, base_sharding
    )
    with _answering(resident, base_sharding) as answer:
        if answer is None:
            return
        if path is not None:
            with unix.listening(Path(path)) as server:
                _say(hello, f"listening on {path}")
                unix.serve(server, hello, answer, resident.limit + 1)
            return
        _say(hello, f"a node of {superlink}")
        # Whoever stops the process has it take its leave, so that no round waits for it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

        def reply(request: bytes) -> bytes:
            return hello if request == unix.HELLO else answer(request)

        flower_node.serve(link, reply, resident.limit + 1)


def _flower_node() -> ModuleType:
    try:
        from rolora.transport import flower_node
    except ImportError as error:
        raise BadInput(f"--superlink needs Flower ({error}): install '.[flower]'") from None
    return flower_node


@contextmanager
def _answering(resident: Resident, base_sharding: bool) -> Iterator[Answer | None]:
    """What answers tasks; None on a rank that has computed with the first one until it ended."""
    if not base_sharding:
        yield resident.answer
        return
    from rolora.run import sharded
    from rolora.transport.ranks import Ranks

    device = next(resident.trainer.model.parameters()).device
    ranks = Ranks(device)
    if ranks.rank > 0:
        sharded.follow(ranks, resident.answer)
        yield None
    else:
        with sharded.leading(ranks, resident.answer) as answer:
            yield answer


def _say(hello: bytes, where: str) -> None:
    said = json.loads(hello)
    _line(f"client {said['client']}: {said['examples']} examples, {where}")


def _line(text: str) -> None:
    print(text, flush=True)


def _loaded(
    config_file: str,
    client: int,
    train_file: str | None,
    secure_roster: str | None,
    secure_key: str | None,
    base_sharding: bool,
) -> tuple[Resident, bytes]:
    """What answers tasks, and what it says of itself."""
    settled = config.resolve({}, config_file)
    import numpy as np

    from rolora.data import files
    from rolora.federated import methods
    from rolora.federated.peer import Peer
    from rolora.run import cuda_graphs, masked, sharded
    from rolora.run import rows as row_files
    from rolora.run.examples import encode
    from rolora.run.federation import message_limit
    from rolora.run.job import prepare
    from rolora.transport.resident import Resident

    roster = secure_roster or settled.privacy.secure_roster
    identity = masked.identity(client, roster, secure_key)
    if base_sharding:
        settled = sharded.of_a_client(settled)
    made = prepare(settled)
    _require_client(client, len(made.clients), made.config, train_file)
    if train_file is not None:
        own = files.with_numbers(files.read_file(train_file))
        row_files.require_columns(made.config, own, train_file)
        made.train, _, _ = encode(made.recipe, own, made.config.task.unlearnable, train_file)
        own_part: Any = {client: np.arange(len(made.train))}  # the only one that it is asked for
        made.clients = own_part
    changes_base = methods.load(made.config.federation.method).changes_base
    peer = Peer(made.layout, changes_base=changes_base)
    noise = masked.noise(made.config)
    masks = made.config.privacy.secure_aggregation
    # A worker trains one client, whatever engine the configuration has for many.
    alone = made.config.with_values(engine="sequential")
    made.config = cuda_graphs.settled_for(alone, made, _line)
    trainer = made.trainer(cuda_graphs.backward(made, _line))
    resident = Resident(client, trainer, peer, message_limit(made), noise, identity, masks)
    hello = {"client": client, "layout": made.layout.hash, "examples": len(made.clients[client])}
    return resident, json.dumps(hello).encode()


def _require_client(
    client: int, known: int, settled: config.Config, train_file: str | None
) -> None:
    """Raises BadInput for a number that no client of this configuration has."""
    if settled.federation.membership == config.OPEN:
        if 0 <= client < known or (0 <= client < 1 << 31 and train_file is not None):
            return
        raise BadInput(
            f"--client {client} has no part of the configuration's data, which clients 0 to "
            f"{known - 1} have: give --train-file, and a number from 0 on"
        )
    if not 0 <= client < known:
        raise BadInput(f"--client {client}: this configuration has clients 0 to {known - 1}")


def worker(**given: Any) -> None:
    work(**given)


command = cli.command("worker", HELP, FLAGS, worker)

if __name__ == "__main__":
    cli.run(command)
