"""Instruction data in Alpaca's format: `instruction`, `input`, `output` (Taori et al.

2023), CodeAlpaca likewise (Chaudhary 2023).

From the hub, or a folder with a `train*` file. The prompts are Stanford Alpaca's two: with an input
and without.
"""

from __future__ import annotations

from pathlib import Path

from rolora.data.files import find, read_file, read_hub
from rolora.errors import BadInput

HUBS = {"alpaca": "tatsu-lab/alpaca", "codealpaca": "sahil2801/CodeAlpaca-20k"}
PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### "
    "Input:\n{input}\n\n### Response:\n"
)


def load(name: str, source: str | None) -> tuple[list[dict], None]:
    """(rows with `prompt` and `response`, None: there is no evaluation set)."""
    rows = read(name, source, HUBS[name])
    return [{"prompt": prompt(row), "response": row["output"]} for row in rows], None


def read(name: str, source: str | None, hub: str) -> list[dict]:
    """The rows of a folder or a hub data set, `hub` where none is named; their columns checked."""
    if source is None or not Path(source).is_dir():
        rows = list(read_hub(source or hub, None, ["train"]) or ())
    else:
        rows = [row for path in find(Path(source), ("train",)) for row in read_file(path)]
    for number, row in enumerate(rows, 1):
        if not {"instruction", "output"} <= row.keys():
            raise BadInput(
                f"{name}, row {number}: columns {', '.join(map(str, row))}, expected instruction, "
                "input, output"
            )
    return rows


def prompt(row: dict) -> str:
    return (_WITH_INPUT if row.get("input") else PLAIN).format(
        instruction=row["instruction"], input=row.get("input")
    )
