"""Where the numbers of a run go besides its folder: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker's run has a step a round, and is gone on with when the run is resumed: `trackers.json` in
the run folder says which it is. Nothing leaves the machine unless the tracker's settings say so.
Imports none of them before a run asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rolora import atomic
from rolora.config import PLACES, Config, parse_trackers
from rolora.errors import BadInput
from rolora.run.folder import RunFolder
from rolora.run.trackers import numbers

STATE = "trackers.json"
PROJECT = "rolora"
# name → the package that it is imported as. Its module here is of the same name.
_PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
_WAIT = 60.0  # seconds before a tracker that failed is tried again
_TEXT = 500  # characters of an option's value


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    Attributes:
        folder: the run folder, in which a tracker may keep its own.
        project: None where none was given: what the tracker's environment says, or PROJECT.
        options: the resolved options, without folders of this machine.
        identity: what `identity` of the tracker was when the run began; None for a new one.
        round: the last round that stands; what a resumed run did beyond it is done again.
    """

    folder: Path
    name: str
    project: str | None
    options: dict[str, Any]
    identity: dict[str, Any] | None
    round: int


class Tracker(Protocol):
    """A run of one tracker, open.

    Attributes:
        identity: what finds this run again, in JSON.
        last: the last round that it holds; -1 for none.
        where: how a person looks at it.
    """

    identity: dict[str, Any]
    last: int
    where: str

    def send(self, round: int, values: dict[str, float]) -> None:
        """Keeps the numbers of a round, for good before it returns where that is possible."""

    def close(self, status: str) -> None:
        """`status`: finished, killed (by a person) or failed."""


def require(config: Config) -> None:
    """Raises BadInput for a tracker whose package is not installed."""
    for name in parse_trackers(config.run.track):
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise BadInput(
                f"--track {name} needs the package `{name}`: pip install '.[{name}]' in your "
                "clone, or leave it out"
            )


class Trackers:
    """The open trackers of one run: each is sent whatever rounds it lacks.

    One that fails is told of, and tried again later: a run does not end because of it.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path / STATE, say
        self._open: dict[str, Tracker] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._again: dict[str, float] = {}

    def begin(self, config: Config, rows: Sequence[dict]) -> None:
        """Opens what the configuration names. Raises BadInput where one cannot be used."""
        names = parse_trackers(config.run.track)
        if not names:
            return
        self._state = self._read()
        options = _shareable(config)
        for name in names:
            module = importlib.import_module(f"rolora.run.trackers.{name}")
            about = About(
                self._path.parent.absolute(),
                self._path.parent.absolute().name,
                config.run.track_project,
                options,
                self._state.get(name),
                len(rows) - 1,
            )
            try:
                tracker = module.begin(about)
            except BadInput:
                raise
            except Exception as error:  # whatever its library, a server or a disk raises
                raise BadInput(
                    f"--track {name} cannot be used ({_line(error)}): mend it, or leave it out"
                ) from None
            self._open[name] = tracker
            self._keep(name, tracker)
            self._say(f"{name}: {tracker.where}")
        self.send(rows)

    def send(self, rows: Sequence[dict], last_chance: bool = False) -> None:
        """Sends to each what it lacks of the recorded rounds."""
        for name, tracker in self._open.items():
            if time.monotonic() < self._again.get(name, 0.0) and not last_chance:
                continue
            try:
                for number in range(tracker.last + 1, len(rows)):
                    tracker.send(number, numbers.of(rows[: number + 1]))
                    tracker.last = number
                    self._keep(name, tracker)
                self._again.pop(name, None)
            except Exception as error:  # as above
                lost = f"{name} did not take round {tracker.last + 1} ({_line(error)})"
                if last_chance:  # said with --quiet too
                    print(f"{lost}: it lacks what the run folder has", file=sys.stderr)
                elif name not in self._again:
                    self._say(f"{lost}: the run goes on, and it is tried again")
                self._again[name] = time.monotonic() + _WAIT

    def close(self, status: str, rows: Sequence[dict]) -> None:
        self.send(rows, last_chance=True)
        for name, tracker in self._open.items():
            try:
                tracker.close(status)
            except Exception as error:  # as above
                self._say(f"{name} was not closed ({_line(error)})")
        self._open = {}

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.is_file():
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(name): dict(identity) for name, identity in stored.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise BadInput(
                f"{self._path} is damaged: restore it, or remove it to begin new runs of the "
                "trackers"
            ) from None

    def _keep(self, name: str, tracker: Tracker) -> None:
        self._state[name] = tracker.identity | {"last": tracker.last}
        atomic.write_text(self._path, json.dumps(self._state, indent=2) + "\n")


@contextmanager
def opened(
    config: Config, folder: RunFolder, resumed: bool, say: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of the run in `folder`; closed with how it ended. A new run that one of them
    cannot take leaves nothing.
    """
    found = Trackers(folder.path, say)
    status = "failed"
    try:
        try:
            found.begin(config, folder.rows)
        except BadInput:
            if not resumed:
                folder.discard()
            raise
        yield found
        status = "finished"
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        found.close(status, folder.rows)


def _shareable(config: Config) -> dict[str, Any]:
    """The options that are set; a folder or a file of this machine by its name alone."""
    found: dict[str, Any] = {}
    for name, value in config.values().items():
        if value is None:
            continue
        if isinstance(value, str):
            local = name in PLACES and Path(value).exists()
            value = Path(value).name if local or value.endswith(".py") else value[:_TEXT]
        found[name] = value
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
