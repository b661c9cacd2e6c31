"""Where the seconds of a round over Flower go: two nodes on loopback, TLS and node keys on, each of
which trains for one second by sleeping.

    python -m benchmarks.flower_wait            # needs flwr; writes results/flower_wait.json
    python -m benchmarks.flower_wait --smoke    # two rounds of two ways, written nowhere

The transport, the apps and the nodes are the project's; what a client answers is made here: as many
bytes as it was sent, and the times at which it began and ended (one clock for all processes of a
machine). `local` is the same two clients in the server's own process, at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks.flower_processes import CLIENTS, Processes, Way
from benchmarks.waiting import cpu
from rolora.transport import unix

RESULT = Path(__file__).parent / "results" / "flower_wait.json"
TRAINING = 1.0  # seconds
_LIMIT = 1 << 30


WAYS = (
    Way("flower-supernode, an app that imports torch", imports_torch=True),
    Way("flower-supernode", poll=1.0),
    Way("flower-supernode, FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.05", poll=0.05),
    Way("rolora.worker --superlink", node=True),
)
# (ways, bytes each way, rounds that are measured; one before them is not)
CASES = ((WAYS, 100_000, 6), (WAYS[2:], 200_000_000, 2))


def trained(request: bytes) -> bytes:
    """The answer to a task: a second later, of its length."""
    began = time.monotonic()
    time.sleep(TRAINING)
    said = json.dumps({"began": began, "ended": time.monotonic()}).encode().ljust(128)
    return b"U" + said + request[128:]


def hello(client: int) -> bytes:
    return json.dumps({"client": client, "examples": 1}).encode()


def client(number: int, socket_path: str) -> None:
    """A worker behind a flower-supernode."""
    with unix.listening(Path(socket_path)) as server:
        unix.serve(server, hello(number), trained, _LIMIT)


def node(number: int, address: str) -> None:
    """A worker that is a node."""
    from rolora.transport import flower_node

    link = flower_node.Link(address, "server.pem", f"node{number}")

    def reply(request: bytes) -> bytes:
        return hello(number) if request == unix.HELLO else trained(request)

    flower_node.serve(link, reply, _LIMIT)


def rounds(
    run_round: Callable[[list[tuple[int, bytes]]], Iterator[tuple[int, bytes]]],
    size: int,
    count: int,
) -> list[dict[str, float]]:
    """Seconds of `count` rounds after a first one: of all, to the client that got its task last,
    and back from the one that ended last.
    """
    found = []
    for number in range(count + 1):
        tasks = [(c, os.urandom(size)) for c in range(CLIENTS)]
        start = time.monotonic()
        answers = dict(run_round(tasks))
        end = time.monotonic()
        said = []
        for c, sent in tasks:
            assert answers[c][128:] == sent[128:], f"round {number}, client {c}"
            said.append(json.loads(answers[c][:128]))
        found.append(
            {
                "round": end - start,
                "there": max(s["began"] for s in said) - start,
                "back": end - max(s["ended"] for s in said),
            }
        )
    return found[1:]


def serve(grid: Any, path: str) -> None:
    """The ServerApp: the rounds that a file asks for, and their seconds beside it."""
    from rolora.transport.flower import FlowerTransport
    from rolora.transport.flower_pulls import hasten

    hasten()
    order, transport = json.loads(Path(path).read_text()), FlowerTransport(grid)

    def run_round(tasks: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for arrival in transport.run_round(tasks):
            assert arrival.message is not None, str(arrival.failure)
            yield arrival.client, arrival.message

    found = rounds(run_round, order["bytes"], order["rounds"])
    Path(order["result"]).write_text(json.dumps(found))


def local(size: int, count: int) -> list[dict[str, float]]:
    """The same rounds in this process, both clients at once."""
    with ThreadPoolExecutor(CLIENTS) as pool:

        def run_round(tasks: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
            answers = pool.map(trained, [data for _, data in tasks])
            for (number, _), answer in zip(tasks, answers, strict=True):
                yield number, answer[1:]

        return rounds(run_round, size, count)


def measured(way: Way, size: int, count: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="flower-wait-") as place:
        processes = Processes(Path(place), way)
        try:
            processes.prepare()
            return processes.asked(size, count)
        finally:
            processes.stop()


def row(name: str, size: int, seconds: list[dict[str, float]]) -> dict[str, Any]:
    parts = {part: [one[part] for one in seconds] for part in seconds[0]}
    medians = {part: statistics.median(values) for part, values in parts.items()}
    return {
        "way": name,
        "bytes": size,
        "median": medians,
        "rounds": parts["round"],
        "load": os.getloadavg()[0],  # of the machine, by the side of which this was measured
    }


def table() -> None:
    """The committed rows."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    print(
        "| way | bytes each way | s a round | to the client | training | back | to local | load |"
    )
    print("|---|---|---|---|---|---|---|---|")
    base = {r["bytes"]: r["median"]["round"] for r in rows if r["way"] == "local"}
    for r in rows:
        m: Mapping[str, float] = r["median"]
        name = r["way"].replace("local", "local, both clients at once")
        print(
            f"| {name} | {r['bytes']:,} | {m['round']:.2f} | {m['there']:.2f} | "
            f"{TRAINING:.2f} | {m['back']:.2f} | {m['round'] / base[r['bytes']]:.2f} × | "
            f"{r['load']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two rounds, written nowhere")
    parser.add_argument("--only", help="ways whose name has this; written nowhere")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--node", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        return client(int(given.client[0]), given.client[1])
    if given.node:
        return node(int(given.node[0]), given.node[1])
    found = []
    for ways, size, count in CASES[:1] if given.smoke else CASES:
        count = 2 if given.smoke else count
        chosen = [way for way in ways if (given.only or "") in way.name]
        found.append(row("local", size, local(size, count)))
        for way in chosen[2:] if given.smoke and not given.only else chosen:
            found.append(row(way.name, size, measured(way, size, count)))
            print(json.dumps(found[-1]), flush=True)
    if given.smoke or given.only:
        return
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu(), "cores": psutil.cpu_count(logical=False)},
        "niceness": os.nice(0),
        "versions": {"python": platform.python_version(), "flwr": metadata.version("flwr")},
        "training_seconds": TRAINING,
        "rows": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
