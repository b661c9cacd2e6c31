"""A run whose clients are Flower's nodes: what the ServerApp calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rolora import atomic, config
from rolora.errors import BadInput
from rolora.run.folder import RunFolder, refuse_used
from rolora.run.session import Session
from rolora.transport.flower import FlowerTransport, Grid

_OPTION = "rolora-config"


class ServedRunFailed(RuntimeError):
    """Why a served run has ended, in one line.

    No SystemExit: Flower sends on what was printed, and tells the run's state, where its app ends
    by an ordinary exception, and loses both where the process ends at once.
    """


def serve(grid: Grid, run_config: Mapping[str, object]) -> None:
    """The ServerApp.

    The run that `rolora-config` (a TOML file on the server) describes, with Flower's nodes as its
    clients. Why it failed stands in a file beside that one too (see `reason_file`).
    """
    given = str(run_config.get(_OPTION, ""))
    try:
        if not given:
            raise BadInput(
                f"{_OPTION} is not given: name the run's TOML file on the server with "
                f"flwr run … --run-config '{_OPTION}=\"/srv/run.toml\"'"
            )
        reason_file(given).unlink(missing_ok=True)
        gathering = _seconds(run_config.get("gathering", 120))
        _run(grid, given, bool(run_config.get("resume", False)), gathering)
    except BadInput as error:
        print(f"error: {error}", flush=True)
        _keep(given, str(error))
        raise ServedRunFailed(str(error)) from None
    except Exception as error:  # Flower says it, with its traceback
        _keep(given, f"{type(error).__name__}: {error}")
        raise


def reason_file(configuration: str) -> Path:
    """`run.toml.error` for a run of `run.toml`; there is none while a run goes well."""
    return Path(f"{configuration}.error")


def _seconds(given: object) -> float:
    if isinstance(given, int | float) and 0 <= given < 1e6:
        return float(given)
    raise BadInput(f"gathering={given}: give the seconds that the first round waits for nodes")


def _run(grid: Grid, configuration: str, resume: bool, gathering: float) -> None:
    # The clients are elsewhere, one in each worker: nothing to measure, and nothing that could be
    # another engine when the run is resumed.
    settled = config.resolve({}, configuration).with_values(engine="sequential")
    if settled.run.output_dir is None:
        raise BadInput(f"{configuration} names no output_dir: a served run needs one")
    folder = RunFolder(Path(settled.run.output_dir))
    if not resume:
        refuse_used(folder.path)
    transport = FlowerTransport(grid, gathering)
    Session(settled, folder, resume, quiet=False, transport=transport).run()


def _keep(configuration: str, reason: str) -> None:
    if not configuration:
        return  # nothing to stand beside
    path = reason_file(configuration)
    try:
        atomic.write_text(path, f"error: {reason}\n")
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror or error}", flush=True)
