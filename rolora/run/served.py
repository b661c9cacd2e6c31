"""A run whose clients are Flower's nodes: what the ServerApp calls."""

from __future__ import annotations

from pathlib import Path

from rolora import config
from rolora.errors import BadInput
from rolora.run.folder import RunFolder, refuse_used
from rolora.run.session import Session
from rolora.transport.flower import FlowerTransport


def serve(grid, run_config: dict) -> None:
    """The ServerApp.

    The run that `rolora-config` (a TOML file on the server) describes, with Flower's nodes as its
    clients.
    """
    try:
        settled = config.resolve({}, run_config["rolora-config"])
        if settled.run.output_dir is None:
            raise BadInput(
                f"{run_config['rolora-config']} names no output_dir: a served run needs one"
            )
        folder = RunFolder(Path(settled.run.output_dir))
        resume = bool(run_config.get("resume", False))
        if not resume:
            refuse_used(folder.path)
        Session(settled, folder, resume, quiet=False, transport=FlowerTransport(grid)).run()
    except BadInput as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
