"""Trackio: a run in its local database, or in the Space or server that the user's settings name
(TRACKIO_SPACE_ID, TRACKIO_SERVER_URL).
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from typing import Any

import trackio

from rolora.run.trackers import PROJECT, About


class Trackio:
    def __init__(self, about: About):
        begun = about.identity or {}
        project = begun.get("project") or about.project or PROJECT
        # Trackio finds a run by its name: this one's is no other's.
        name = begun.get("name") or f"{about.name}-{secrets.token_hex(4)}"
        self.identity: dict[str, Any] = {"project": project, "name": name}
        self.last = int(begun.get("last", -1))
        with _quiet():
            self._run = trackio.init(
                project=project,
                name=name,
                config=about.options,
                resume="must" if begun else "never",
                auto_log_cpu=False,
                embed=False,
            )
        self.where = f"run {name}, trackio show --project {project}"
        for setting in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            if os.environ.get(setting):
                self.where = f"run {name} of project {project}, sent to where {setting} says"

    def send(self, round: int, values: dict[str, float]) -> None:
        self._run.log(values, step=round)

    def close(self, status: str) -> None:
        with _quiet():
            trackio.finish()


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Without what Trackio prints, of which `where` is said in one line."""
    return contextlib.redirect_stdout(io.StringIO())


def begin(about: About) -> Trackio:
    return Trackio(about)
