"""Several processes of one owner share a cohort (torchrun).

Every rank trains its clients, and a round ends with one all-reduce of the int64 sum. Every rank
runs the same server loop on the same state. A rank asks and judges its own clients; sums of
integers do not depend on who added what, so the state after a round is the same bits on every rank,
at any number of ranks. What the record needs travels beside the sum as JSON. Rank 0 alone evaluates
and writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from rolora.cohort.sequential import Cohort
from rolora.errors import BadInput
from rolora.federated.aggregate import Collector, Mean
from rolora.federated.client_states import ClientStates, Sealed
from rolora.federated.local import ClientState
from rolora.federated.privacy import PrivateMean
from rolora.federated.state import GlobalState
from rolora.federated.tally import Tally
from rolora.transport.local import LocalTransport

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # a rank may evaluate, or train more clients than another


has_joined = False  # whether this process has been in a group


def join(device: torch.device) -> None:
    """Begins the process group of all ranks, once."""
    global has_joined
    has_joined = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)


class Ranks:
    """The process group of a torchrun job."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else torch.device("cpu")
        join(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @classmethod
    def from_environment(cls, device: torch.device) -> Ranks | None:
        """The group where torchrun started this process, else None."""
        return cls(device) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None

    def sum(self, values: Tensor) -> Tensor:
        """Σ over ranks of an int64 CPU tensor."""
        values = values.to(self.device)
        self._survive(lambda: dist.all_reduce(values))
        return values.cpu()

    def gather(self, value: T) -> list[T]:
        """Every rank's JSON value, in the order of ranks."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(
            self.device
        )
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        self._survive(lambda: dist.all_gather(sizes, torch.tensor([len(own)], device=self.device)))
        longest = max(int(size) for size in sizes)
        buffers = [
            torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)
        ]
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(own)] = own
        self._survive(lambda: dist.all_gather(buffers, padded))
        return [
            json.loads(bytes(b[: int(size)].cpu().numpy()))
            for b, size in zip(buffers, sizes, strict=True)
        ]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of ranks, on rank 0; nothing elsewhere."""
        sizes = self.gather(len(data))
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        own = own.to(self.device)
        into = [torch.empty_like(own) for _ in sizes] if self.rank == 0 else None
        self._survive(lambda: dist.gather(own, into))
        return [
            part[:size].cpu().numpy().tobytes()
            for part, size in zip(into or [], sizes, strict=False)
        ]

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self._survive(lambda: dist.broadcast(size, 0))
        own = torch.frombuffer(bytearray(data or b"."), dtype=torch.uint8)
        if self.rank > 0:
            own = torch.empty(max(int(size), 1), dtype=torch.uint8)
        own = own.to(self.device)
        self._survive(lambda: dist.broadcast(own, 0))
        return own[: int(size)].cpu().numpy().tobytes()

    def first(self, value: T) -> T:
        """Rank 0's JSON value."""
        return self.gather(value)[0]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _survive(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise BadInput(
                f"rank {self.rank} lost another rank ({str(error).splitlines()[0][:120]}): "
                "what was saved is intact; go on with --resume, with as many ranks as there are"
            ) from None


class RankTransport(LocalTransport):
    """LocalTransport for a rank's share of every cohort: client c belongs to rank c mod size."""

    has_all_states = False

    def __init__(self, cohort: Cohort, message_limit: int, ranks: Ranks):
        super().__init__(cohort, message_limit)
        self.ranks, self.keeps = ranks, cohort.trainer.config.keeps
        self.leads = ranks.rank == 0

    def agree(self, drawn: list[int]) -> list[int]:
        return self.ranks.first(drawn)

    def common(self, turn: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        lead = self.ranks.broadcast(save({} if turn is None else turn))
        return load(lead) or None

    def share(self, clients: Sequence[int]) -> list[int]:
        return [client for client in clients if client % self.ranks.size == self.ranks.rank]

    def restore(
        self,
        state: GlobalState,
        held: dict[int, dict[str, int]],
        client_states: Mapping[int, ClientState],
    ) -> None:
        """As in one process, with the states of a rank's own clients, in its memory."""
        own = {client: client_states[client] for client in self.share(list(client_states))}
        super().restore(state, held, ClientStates(fresh=own))

    def all_states(self) -> Sealed:
        """What all clients keep, on rank 0, from the ranks that they belong to.

        Every rank calls this.
        """
        own = set(self.share(list(self.client_states)))
        mine = {
            f"{client}/{name}": value.clone()  # safetensors takes no two that share memory
            for client in own
            for name, value in self.client_states[client].items()
        }
        found: dict[int, ClientState] = {}
        for data in self.ranks.gather_bytes(save(mine)) if self.keeps else ():
            for key, value in load(data).items():
                client, _, name = key.partition("/")
                found.setdefault(int(client), {})[name] = value
        return found, ()

    def combine(self, collector: Collector, tally: Tally) -> Tally:
        """The collector's sum and the tally become those of all ranks.

        Raises TypeError for a collector that is not one sum.
        """
        if not isinstance(collector, Mean | PrivateMean):
            raise TypeError(f"{type(collector).__name__} is not one sum")
        collector.sum.replace(self.ranks.sum(collector.sum.partial()))
        return Tally.merged(
            [Tally.from_json(value) for value in self.ranks.gather(tally.to_json())]
        )
