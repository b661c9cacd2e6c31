"""FlowerTune's leaderboard of federated tuning (Gao et al. 2025, arXiv 2506.02961): the data and
prompts of its four settings, and what its own program sends.

The facts are those of Flower's template (`flwr new`, framework FlowerTune) and of the board's pages
at flower.ai/benchmarks/llm-leaderboard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rolora.recipes import instructions

# No empty lines, unlike Stanford Alpaca's own, and one prompt whether there is an input or not.
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n### Instruction:\n{asked}\n### Response:"
)
_NPY_HEADER = 128  # bytes that NumPy's format puts before a small array


@dataclass(frozen=True)
class Setting:
    """`asked(row)` is what a row's prompt asks."""

    hub: str
    asked: Callable[[dict], str]


def _instruction_alone(row: dict) -> str:
    return row["instruction"]


def _instruction_and_input(row: dict) -> str:
    return f"{row['instruction']} {row.get('input') or ''}"


def _input_alone(row: dict) -> str:
    return row.get("input") or ""


SETTINGS = {
    "flowertune-general": Setting("flwrlabs/alpaca-gpt4", _instruction_alone),
    "flowertune-finance": Setting("flwrlabs/fingpt-sentiment-train", _instruction_and_input),
    "flowertune-medical": Setting("flwrlabs/medical-meadow-medical-flashcards", _input_alone),
    "flowertune-code": Setting("flwrlabs/code-alpaca-20k", _instruction_and_input),
}


def load(name: str, source: str | None) -> tuple[list[dict], None]:
    """(rows with `prompt` and `response`, None: there is no evaluation set)."""
    setting = SETTINGS[name]
    rows = instructions.read(name, source, setting.hub)
    return [
        {"prompt": _PROMPT.format(asked=setting.asked(row)), "response": f" {row['output']}"}
        for row in rows
    ], None


@dataclass(frozen=True)
class Yardstick:
    """What another program's run of the same job sends, for a plan to hold ours against.

    `message_bytes(shapes)`: of one message, from the shapes of all factors; `budget`: bytes that
    its rules allow a whole run, both ways; `differences`: what of it cannot be the same here.
    """

    name: str
    message_bytes: Callable[[Iterable[tuple[int, ...]]], int]
    budget: int
    differences: tuple[str, ...]


def message_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """Of a message of FlowerTune's: every factor in fp32, each as an array of NumPy's format."""
    return sum(4 * math.prod(shape) + _NPY_HEADER for shape in shapes)


YARDSTICK = Yardstick(
    name="FlowerTune",
    message_bytes=message_bytes,
    budget=200_000 << 20,  # its tracker counts 200,000 MB of 2²⁰ bytes
    differences=(
        "one factor a round trains and travels (--method fedavg: both)",
        "changes travel in 8 bits (--exchange-dtype fp32: in 32)",
        "4 bits are NF4, theirs FP4 by bitsandbytes' default",
        "an answer ends with the end token, theirs has none",
        "the split and the draws are ours: the same numbers, from other generators",
        "a part is held out to be evaluated on, theirs trains on all",
        "their scores come from their own evaluation programs, which read adapter/",
    ),
)
