"""Checkpoints in `checkpoints/round-NNNNNN/`: written whole, self-verifying.

The newest valid one is chosen. A folder holds `state.safetensors` (every buffer of the GlobalState,
and of the clients' own states those that are in memory) and `state.json` (the numbers, the segments
of clients' states on disk with a digest of each, and a digest over all of that and the tensors). It
appears under its name by one rename, after everything that it names is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rolora import atomic
from rolora.federated import client_states
from rolora.federated.buffered.book import Book
from rolora.federated.client_states import ClientStates, Segment
from rolora.federated.local import ClientState
from rolora.federated.state import Broadcast, GlobalState

_STATE, _NUMBERS = "state.safetensors", "state.json"
_KEPT = 3
_NAME = re.compile(r"round-([0-9]{6,18})")
_GROUPS = ("master", "published", "moments", "base", "wire", "turn")


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on.

    The state, what each client holds and keeps for itself (`client_states`, and `segments` of them
    on disk), and the norms that the guard has accepted in each phase; the run's own name, and the
    options that it was begun with; the simulated time, and what is under way in asynchronous
    rounds; the members, where clients come and go. One that was loaded has all states under
    `client_states`.
    """

    state: GlobalState
    held: dict[int, dict[str, int]]
    client_states: Mapping[int, ClientState]
    layout: str
    norms: dict[str, list[float]]
    run: str
    options: dict[str, Any] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    segments: tuple[Segment, ...] = ()
    members: tuple[int, ...] | None = None


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Writes the snapshot under `folder`, then drops all but the newest three."""
    state = snapshot.state
    tensors = {
        f"{group}/{kind}": flat
        for group in ("master", "published", "moments")
        for kind, flat in getattr(state, group).items()
    }
    for kind, broadcast in state.broadcast.items():
        parts = {"base": broadcast.base, "wire": broadcast.wire, "turn": broadcast.turn}
        tensors |= {f"{part}/{kind}": value for part, value in parts.items() if value is not None}
    for client, own in snapshot.client_states.items():
        tensors |= {f"client/{client}/{name}": value for name, value in own.items()}
    tensors |= snapshot.book.tensors()
    data = save({name: tensor.clone() for name, tensor in tensors.items()})
    numbers = {
        "round": state.round,
        "versions": state.versions,
        "layout": snapshot.layout,
        "norms": snapshot.norms,
        "run": snapshot.run,
        "options": snapshot.options,
        "held": {str(client): versions for client, versions in snapshot.held.items()},
        "segments": [[segment.name, segment.digest] for segment in snapshot.segments],
    }
    book = snapshot.book.numbers()
    if book:
        numbers["book"] = book
    if snapshot.members is not None:
        numbers["members"] = snapshot.members
    numbers["digest"] = _digest(numbers, data)
    target = folder / _name(state.round)
    temporary = folder / f".{target.name}.tmp{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        # 0600: what clients keep for themselves is in it.
        atomic.write_bytes(temporary / _STATE, data, mode=0o600)
        atomic.write_text(temporary / _NUMBERS, _text(numbers))
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    atomic.sync_folder(folder)
    prune(folder)
    return target


def prune(folder: Path) -> None:
    """Drops all but the newest three, and the segments that none of these names."""
    found = _rounds(folder)
    for old in found[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    named = set()
    for path in found[-_KEPT:]:
        try:
            named |= {name for name, _ in _numbers((path / _NUMBERS).read_bytes())["segments"]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # it can be loaded no more, or is of a version that had no segments
    client_states.sweep(folder / client_states.FOLDER, named)


def load_newest(folder: Path, layout: str) -> tuple[Snapshot | None, list[str]]:
    """(the newest snapshot whose digest holds, what was wrong with the newer ones).

    None where there is none.
    """
    problems: list[str] = []
    for path in reversed(_rounds(folder)):
        try:
            return _load(path, layout), problems
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            SafetensorError,
        ) as error:
            problems.append(f"{path.name}: {error}")
    return None, problems


def _load(path: Path, layout: str) -> Snapshot:
    data = (path / _STATE).read_bytes()
    numbers = _numbers((path / _NUMBERS).read_bytes())
    if "digest" not in numbers:
        raise ValueError(
            "it has no digest over all of it, as an older version wrote it: start a new run"
        )
    if numbers.pop("digest") != _digest(numbers, data):
        raise ValueError("its digest does not hold")
    if "run" not in numbers:
        raise ValueError("it does not name its run, as an older version wrote it: start a new run")
    if numbers["layout"] != layout:
        raise ValueError("it belongs to other adapters")
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    own_states: dict[int, ClientState] = {}
    under_way: dict[str, Tensor] = {}
    for name, tensor in load(data).items():
        group, _, rest = name.partition("/")
        if group == "client":
            client, _, own = rest.partition("/")
            own_states.setdefault(int(client), {})[own] = tensor
        elif group in ("training", "waiting"):
            under_way[name] = tensor
        else:
            groups[group][rest] = tensor
    if any(
        not torch.isfinite(flat).all()
        for group in ("master", "published", "moments")
        for flat in groups[group].values()
    ):
        raise ValueError("it holds values that are not finite")
    broadcast = {
        kind: Broadcast(base, groups["wire"].get(kind), groups["turn"].get(kind))
        for kind, base in groups["base"].items()
    }
    state = GlobalState(
        numbers["round"],
        groups["master"],
        groups["published"],
        numbers["versions"],
        broadcast,
        groups["moments"],
    )
    held = {int(client): versions for client, versions in numbers["held"].items()}
    segments = [Segment(name, digest) for name, digest in numbers.get("segments", [])]
    states = ClientStates.opened(path.parent / client_states.FOLDER, segments, own_states)
    return Snapshot(
        state,
        held,
        states,
        layout,
        numbers["norms"],
        numbers["run"],
        numbers["options"],
        Book.read(numbers.get("book", {}), under_way),
        members=numbers.get("members"),
    )


def _numbers(text: bytes) -> dict[str, Any]:
    """The object of a state.json; ValueError for anything but the bytes that were written."""
    numbers = json.loads(text.decode())
    if not isinstance(numbers, dict) or _text(numbers).encode() != text:
        raise ValueError("its numbers are not as they were written")
    return numbers


def _text(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, indent=1)


def _digest(numbers: dict[str, Any], data: bytes) -> str:
    """SHA-256 over the numbers (canonical JSON, without the digest) and the tensors' SHA-256."""
    canonical = json.dumps(numbers, sort_keys=True, separators=(",", ":"))
    both = f"{canonical}\n{hashlib.sha256(data).hexdigest()}"
    return hashlib.sha256(both.encode()).hexdigest()


def _rounds(folder: Path) -> list[Path]:
    """The folders that `save_checkpoint` named, oldest first; nothing else counts."""
    if not folder.is_dir():
        return []
    found = {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.name == _name(int(match[1])) and path.is_dir():
            found[int(match[1])] = path
    return [found[number] for number in sorted(found)]


def _name(number: int) -> str:
    return f"round-{number:06d}"
