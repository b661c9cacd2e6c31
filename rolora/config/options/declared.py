"""How an option is declared: a field with its default, its help and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    metavar: str | None = None,
) -> Any:
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "least": least,
            "above": above,
            "most": most,
            "metavar": metavar,
        },
    )
