"""Weights & Biases: a run in RUN/wandb, sent to its server where the user has chosen that.

The user has where WANDB_MODE or wandb's settings say so, or a login is kept. Otherwise the run is
offline, and `wandb sync` sends it.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
from typing import Any
from urllib.parse import urlsplit

# wandb reports its own errors to its makers, offline too, unless the user says else.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb

from rolora.run.trackers import PROJECT, About

_CODES = {"finished": 0, "failed": 1, "killed": 130}


class WandB:
    def __init__(self, about: About):
        mode = _mode()
        begun = about.identity or {}
        self.identity: dict[str, Any] = {"id": begun.get("id") or secrets.token_hex(4)}
        self._run = wandb.init(
            project=about.project or os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", about.name),
            id=self.identity["id"],
            resume="allow" if mode == "online" else None,
            dir=str(about.folder),
            mode=mode,
            config=about.options,
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
        self.last = int(begun.get("last", -1))
        if self._run.resumed:
            self.last = self._run.step - 1
        self.where = str(mode)
        if mode == "online":
            self.where = str(self._run.url)
        elif mode == "offline":
            own = f"{shlex.quote(str(about.folder))}/wandb/offline-run-*-{self.identity['id']}"
            self.where = f"offline, to be sent by: wandb sync {own}"

    def send(self, round: int, values: dict[str, float]) -> None:
        self._run.log(values, step=round, commit=True)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=_CODES[status])


def _mode() -> Any:
    """online, offline, disabled or shared: what the user's settings say, and without a login
    offline.
    """
    settings = wandb.setup().settings
    mode = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
    if mode == "online" and not _login(settings):
        return "offline"
    return mode


def _login(settings: Any) -> bool:
    """Whether a key of the server is kept where wandb looks for one."""
    if settings.api_key or any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))):
        return True
    host = urlsplit(settings.base_url).hostname or ""
    names = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for name in filter(None, names):
        try:
            known = netrc.netrc(os.path.expanduser(name)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if {host, host.removeprefix("api.")} & known.keys():
            return True
    return False


def begin(about: About) -> WandB:
    return WandB(about)
