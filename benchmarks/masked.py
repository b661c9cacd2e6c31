"""What masked rounds cost: seconds of a client and of the server, and bytes, beside the plain sum.

    python -m benchmarks.masked            # 50 and 1,000 clients; writes results/masked.json
    python -m benchmarks.masked --smoke    # six clients, written nowhere

Clients train nothing here: a term is a random change in bf16. All of them are in this process, one
after another, so a client's seconds are those of one core that has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.waiting import cpu
from rolora.federated import wire
from rolora.federated.aggregate import Mean
from rolora.federated.delivery import Arrival
from rolora.federated.guard import Bounds
from rolora.federated.secure import client as masking
from rolora.federated.secure.server import MaskedRound
from rolora.federated.secure.settings import MARK, Secure

RESULT = Path(__file__).parent / "results" / "masked.json"
_LIMIT, _WEIGHT, _MAX_ABS = 1 << 30, 100, 64.0
# (clients, neighbours or None for all, how many leave before they send, values of a term)
CASES = (
    (50, None, 0, 100_000),
    (50, None, 10, 100_000),
    (50, None, 0, 1_000_000),
    (1000, 100, 0, 10_000),
    (1000, 100, 100, 10_000),
)


class Orders:
    """Tasks of which only the order to mask is of interest."""

    def __init__(self, clients: list[int], order: Callable[[int], Tensor]):
        self.clients, self.order, self.sent = clients, order, 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for client in self.clients:
            message = self.order(client).numpy().tobytes()
            self.sent += len(message)
            yield client, message


class Clients:
    """A transport whose clients are here; `seconds` is what each step took them."""

    def __init__(self, values: int, leaving: set[int]):
        self.values, self.leaving = values, leaving
        self.maskers: dict[int, masking.MaskingClient] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.sum = torch.zeros(values, dtype=torch.float64)

    def ask(self, requests: Mapping[int, bytes], deadline: float | None) -> Iterator[Arrival]:
        for client, request in requests.items():
            masker = self.maskers.setdefault(client, masking.MaskingClient(client))
            start = time.perf_counter()
            answer = masking.answer(masker, request.removeprefix(MARK), _LIMIT)
            step = {b"K": "keys", b"S": "shares", b"U": "unmask"}[request[len(MARK) :][:1]]
            self.seconds[step] += time.perf_counter() - start
            yield Arrival(client, answer)

    def run_round(self, tasks: Orders, deadline: float | None) -> Iterator[Arrival]:
        for client, message in tasks:
            if client in self.leaving:
                continue
            drawn = torch.randn(self.values, generator=torch.Generator().manual_seed(client))
            change = drawn.to(torch.bfloat16)
            self.sum += _WEIGHT * change.double()
            update = wire.Update(
                "run", 1, "B", client, "layout", {"B": 0}, _WEIGHT, 1.0, 1, 1, change
            )
            start = time.perf_counter()
            order = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            answer = masking.masked_answer(self.maskers[client], order, update, _LIMIT)
            self.seconds["mask"] += time.perf_counter() - start
            yield Arrival(client, answer)


def measured(count: int, degree: int | None, leaving: int, values: int) -> dict[str, Any]:
    """One round, its sum checked against fp64."""
    layout: Any = SimpleNamespace(hash="layout", travelling_size=lambda phase: values)
    expected: Any = SimpleNamespace(
        run="run",
        number=1,
        phase="B",
        exchange_dtype="bf16",
        layout=layout,
        state=SimpleNamespace(versions={"B": 0}),
        examples_of=lambda client: _WEIGHT,
    )
    clients: Any = Clients(values, set(range(0, count, count // leaving)) if leaving else set())
    mean = Mean(layout, "B", Bounds(_MAX_ABS, _WEIGHT, count))
    secure = MaskedRound(clients, expected, Secure((2 * count + 2) // 3, degree), 0, None)
    start = time.perf_counter()
    secure.run(list(range(count)), Orders, mean)  # type: ignore[arg-type]
    whole = time.perf_counter() - start
    stayed = count - len(clients.leaving)
    assert len(secure.tally.accepted) == stayed, secure.tally.failures[:3]
    difference = mean.sum.over(1.0).double() - clients.sum
    assert difference.abs().max() <= 1e-6 * clients.sum.abs().max(), "the sum is not the sum"
    of_clients = sum(clients.seconds.values())
    return {
        "clients": count,
        "neighbours": degree or count - 1,
        "left": len(clients.leaving),
        "values": values,
        "client_seconds": {step: s / count for step, s in clients.seconds.items()},
        "client_seconds_all": of_clients / count,
        "server_seconds": whole - of_clients,
        "bytes_up": secure.tally.up / count,
        "bytes_down": secure.tally.down / count,
        "plain_bytes_up": 2 * values,
    }


def table() -> None:
    """The recorded rounds, as Markdown."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    print(
        "| clients | neighbours | leave | values | s a client | s the server | kB up a client | "
        "kB up in bf16, plain |"
    )
    print("|---" * 8 + "|")
    for row in found["rounds"]:
        print(
            f"| {row['clients']:,} | {row['neighbours']} | {row['left']} | {row['values']:,} | "
            f"{row['client_seconds_all']:.2f} | {row['server_seconds']:.1f} | "
            f"{row['bytes_up'] / 1e3:,.0f} | {row['plain_bytes_up'] / 1e3:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="six clients, written nowhere")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    found = []
    for case in ((6, None, 1, 1000), (9, 4, 0, 1000)) if smoke else CASES:
        found.append(measured(*case))
        print(json.dumps(found[-1]), flush=True)
    if smoke:
        return
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu(), "cores": psutil.cpu_count(logical=False)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cryptography": metadata.version("cryptography"),
        },
        "rounds": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
