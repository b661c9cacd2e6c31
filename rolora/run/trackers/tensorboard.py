"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

import json
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rolora.run.trackers import About

FOLDER = "tensorboard"


class TensorBoard:
    """Events of a round are on the disk when `send` returns."""

    def __init__(self, about: About):
        folder = about.folder / FOLDER
        begun = any(folder.glob("events.out.tfevents.*"))
        self.identity: dict[str, Any] = {}
        self.last = about.round if begun else -1
        self.where = f"tensorboard --logdir {folder}"
        # Readers drop what the run had written of the rounds that it does again.
        self._writer = SummaryWriter(str(folder), purge_step=self.last + 1 if begun else None)
        if not begun:
            shown = json.dumps(about.options, indent=2, default=str)
            self._writer.add_text("options", f"```\n{shown}\n```")
            self._writer.flush()

    def send(self, round: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


def begin(about: About) -> TensorBoard:
    return TensorBoard(about)
