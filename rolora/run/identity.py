"""The options that make a run what it is, and stay when it is resumed."""

from __future__ import annotations

import os
from typing import Any

from rolora.config import PLACES, Config
from rolora.errors import BadInput

# Of a run that was begun before these options were there.
BEFORE = {"control_variates": False, "equal_factors": False, "realign_moments": False}


def of(config: Config) -> dict[str, Any]:
    """The options that a run may not change on its way."""
    # Where the data lie is free: their digest is not.
    free = {"output_dir", "rounds", "cohort_chunk", "train_file", "eval_file", "dataset", "track"}
    free |= {"secure_roster"}  # which grows with the federation
    free |= {"base_sharding", "cuda_graphs"}  # which change nothing of what is computed
    return {name: value for name, value in config.values().items() if name not in free}


def require_same(config: Config, begun: dict[str, Any]) -> None:
    """Raises BadInput for a config.toml that was edited after the run began."""
    begun = BEFORE | begun
    for name, value in of(config).items():
        if name not in begun or begun[name] == value:
            continue
        if name not in PLACES or value != os.path.abspath(str(begun[name])):
            raise BadInput(
                f"--resume: config.toml says {name} = {value!r}, the run was begun with "
                f"{begun[name]!r}: restore it, or start a new run"
            )
