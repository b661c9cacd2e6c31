"""Configuration: frozen dataclasses, one tree.

Values come from defaults, a preset, a TOML file and flags, in that order.

Every field is a flag (`batch_size` is `--batch-size`) and a TOML key in its section's table.
Imports no torch.
"""

from rolora.config.options.asynchrony import Asynchrony
from rolora.config.options.data import Data, Task
from rolora.config.options.machine import Run, System
from rolora.config.options.names import (
    BENCHMARKS,
    INITS,
    METHODS,
    PLACES,
    SCHEDULES,
    SPEEDS,
    TASK_TYPES,
    WIRES,
)
from rolora.config.options.training import Adapter, Exchange, Federation, Optimisation, Privacy

__all__ = [
    "BENCHMARKS",
    "INITS",
    "METHODS",
    "PLACES",
    "SCHEDULES",
    "SPEEDS",
    "TASK_TYPES",
    "WIRES",
    "Adapter",
    "Asynchrony",
    "Data",
    "Exchange",
    "Federation",
    "Optimisation",
    "Privacy",
    "Run",
    "System",
    "Task",
]
