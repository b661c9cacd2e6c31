"""What clients keep between rounds: in memory, or on disk where there is a folder for it.

On disk there are segments: safetensors files `states-NNNNNNNNN.safetensors` that are written once
and never changed, each with the states of the clients that trained since the one before. Of a
client the newest counts. A checkpoint names the segments that it goes on from, so it copies nothing
of clients that did not train; a view of some round is a list of names, which later rounds leave as
it is. Segments of which little counts any more are written anew, so that the disk holds twice what
counts at most, and what the three newest checkpoints name.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from rolora import atomic
from rolora.federated.local import ClientState

FOLDER = "clients"  # beside the folders of checkpoints
_NAME = re.compile(r"states-([0-9]{9})\.safetensors")
_EMPTY = {"": torch.empty(0)}  # stands for a state that became empty
_MOST = 1 << 28  # bytes of states that wait in memory for the end of a round


@dataclass(frozen=True)
class Segment:
    """A file of states, and the SHA-256 of all of it."""

    name: str
    digest: str


Sealed = tuple[dict[int, ClientState], tuple[Segment, ...]]  # in memory, on disk


class ClientStates(Mapping[int, ClientState]):
    """The states of the clients that keep anything, or did, by client.

    What is read from disk is read at every access. `fresh`: states in memory to begin with. `most`:
    bytes of states that may wait in memory where there is a folder.
    """

    def __init__(
        self,
        folder: Path | None = None,
        fresh: dict[int, ClientState] | None = None,
        most: int = _MOST,
    ):
        self.folder, self.most = folder, most
        self._fresh: dict[int, ClientState] = dict(fresh or {})
        self._waiting = sum(map(_size, self._fresh.values()))
        self._segments: dict[str, Segment] = {}  # oldest first
        self._live: dict[str, int] = {}  # segment → bytes that count
        self._whole: dict[str, int] = {}  # segment → bytes of all its states
        self._where: dict[int, tuple[str, int]] = {}  # client → (segment, bytes)
        self._next = 1

    @classmethod
    def opened(
        cls, folder: Path, segments: Iterable[Segment], fresh: dict[int, ClientState]
    ) -> ClientStates:
        """The states that a checkpoint names; raises ValueError or OSError for a segment that is
        not as it was written.
        """
        states = cls(folder, fresh)
        for segment in segments:
            match = _NAME.fullmatch(segment.name)
            if match is None:
                raise ValueError(f"{segment.name!r:.80} is no name of clients' states")
            data = (folder / segment.name).read_bytes()
            if hashlib.sha256(data).hexdigest() != segment.digest:
                raise ValueError(f"the digest of {FOLDER}/{segment.name} does not hold")
            states._enter(segment, _sizes(data))
            states._next = int(match[1]) + 1
        return states

    def __getitem__(self, client: int) -> ClientState:
        if client in self._fresh:
            return self._fresh[client]
        name, _ = self._where[client]
        return self._read(name, [client])[client]

    def __setitem__(self, client: int, state: ClientState) -> None:
        if not state and client not in self:
            return
        self._waiting += _size(state) - _size(self._fresh.get(client, {}))
        self._fresh[client] = state
        if self.folder is not None and self._waiting > self.most:
            self._flush()

    def __contains__(self, client: object) -> bool:
        return client in self._fresh or client in self._where

    def __iter__(self) -> Iterator[int]:
        yield from self._fresh
        yield from (client for client in self._where if client not in self._fresh)

    def __len__(self) -> int:
        return len(self._fresh.keys() | self._where.keys())

    def sealed(self) -> Sealed:
        """All states as they are now, for a checkpoint; later ones do not change them. Where there
        is a folder they are on disk when this returns.
        """
        if self.folder is None:
            return dict(self._fresh), ()
        self._flush()
        while sum(self._whole.values()) > 2 * sum(self._live.values()):
            self._move(next(iter(self._segments)))
        return {}, tuple(self._segments.values())

    def _flush(self) -> None:
        fresh, self._fresh, self._waiting = self._fresh, {}, 0
        if fresh:
            self._write(fresh)

    def _move(self, name: str) -> None:
        """What counts of a segment, into a new one."""
        clients = [client for client, (segment, _) in self._where.items() if segment == name]
        self._write(self._read(name, clients))

    def _write(self, states: dict[int, ClientState]) -> None:
        assert self.folder is not None
        # safetensors takes no two tensors that share memory
        tensors = {
            f"{client}/{name}": value.clone()
            for client, state in states.items()
            for name, value in (state or _EMPTY).items()
        }
        data = save(tensors)
        segment = Segment(f"states-{self._next:09d}.safetensors", hashlib.sha256(data).hexdigest())
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(self.folder / segment.name, data, mode=0o600)
        self._next += 1
        self._enter(segment, _sizes(data))
        self._drop_dead()

    def _enter(self, segment: Segment, sizes: dict[int, int]) -> None:
        for client, size in sizes.items():
            self._forget(client)
            self._where[client] = segment.name, size
        self._segments[segment.name] = segment
        self._live[segment.name] = self._whole[segment.name] = sum(sizes.values())

    def _forget(self, client: int) -> None:
        """What a segment has of a client counts no longer."""
        if client in self._where:
            name, size = self._where.pop(client)
            self._live[name] -= size

    def _drop_dead(self) -> None:
        for name in [name for name, live in self._live.items() if live == 0]:
            del self._segments[name], self._live[name], self._whole[name]

    def _read(self, name: str, clients: Sequence[int]) -> dict[int, ClientState]:
        assert self.folder is not None
        wanted, found = {str(client) for client in clients}, dict[int, ClientState]()
        with safe_open(self.folder / name, framework="pt") as file:
            for key in file.keys():
                client, _, own = key.partition("/")
                if client in wanted:
                    state = found.setdefault(int(client), {})
                    if own:
                        state[own] = file.get_tensor(key).clone()
        return found


def sweep(folder: Path, named: set[str]) -> None:
    """Removes the segments in `folder` that no checkpoint names."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def _size(state: ClientState) -> int:
    return sum(value.nbytes for value in state.values())


def _sizes(data: bytes) -> dict[int, int]:
    """Bytes of every client's state in a segment, from its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    sizes: dict[int, int] = {}
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            client = int(key.partition("/")[0])
            sizes[client] = sizes.get(client, 1) + end - begin  # 1: an empty tensor is a state too
    return sizes
