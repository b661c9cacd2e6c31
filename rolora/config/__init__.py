"""Configuration: frozen dataclasses, one tree; defaults < preset < TOML file < flags, resolved
once.

Imports no torch, so that `--help` and a wrong flag are answered at once.
"""

from rolora.config import presets
from rolora.config.membership import OPEN, parse_membership
from rolora.config.options import (
    BENCHMARKS,
    INITS,
    METHODS,
    PLACES,
    SCHEDULES,
    TASK_TYPES,
    WIRES,
    Adapter,
    Asynchrony,
    Data,
    Exchange,
    Federation,
    Optimisation,
    Privacy,
    Run,
    System,
    Task,
)
from rolora.config.parsing import (
    nearest,
    parse_layers,
    parse_parameters,
    parse_ranks,
    parse_targets,
    parse_trackers,
)
from rolora.config.resolving import KIND_NAMES, check, read_toml, resolve, whole_paths
from rolora.config.tree import Config, option_type, options, sections, settled

__all__ = [
    "BENCHMARKS",
    "INITS",
    "KIND_NAMES",
    "METHODS",
    "OPEN",
    "PLACES",
    "SCHEDULES",
    "TASK_TYPES",
    "WIRES",
    "Adapter",
    "Asynchrony",
    "Config",
    "Data",
    "Exchange",
    "Federation",
    "Optimisation",
    "Privacy",
    "Run",
    "System",
    "Task",
    "check",
    "nearest",
    "option_type",
    "options",
    "parse_layers",
    "parse_membership",
    "parse_parameters",
    "parse_ranks",
    "parse_targets",
    "parse_trackers",
    "presets",
    "read_toml",
    "resolve",
    "sections",
    "settled",
    "whole_paths",
]
