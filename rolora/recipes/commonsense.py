"""The paper's commonsense data: eight multiple-choice sets, merged (section 5 there).

Prompts and answers are those of LLM-Adapters (Hu et al., EMNLP 2023); BoolQ's passage is given
before its question, which they leave out. Each set is read from the hub by the name below, or from
`DIR/<set>/train.*` and `DIR/<set>/{test,validation}.*` with the hub's columns. Sets that exist on
the hub only as loading scripts are read from their Parquet branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rolora.data.files import find, read_file, read_hub
from rolora.errors import BadInput
from rolora.recipes.instructions import PLAIN
from rolora.recipes.multiple_choice import SET

# set -> (hub name, configuration, evaluation split). The test splits of some sets have no labels.
SETS = {
    "boolq": ("google/boolq", None, "validation"),
    "piqa": ("ybisk/piqa@refs/convert/parquet", None, "validation"),
    "siqa": ("allenai/social_i_qa@refs/convert/parquet", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}


def load(source: str | None) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of all sets; every row carries its set under SET.

    `source` is None or "commonsense" for the hub, or a folder.
    """
    train: list[dict] = []
    evaluation: list[dict] = []
    folder = None if source in (None, "commonsense") else Path(source)
    if folder is not None and not folder.is_dir():
        raise BadInput(
            f"--dataset {source}: expected 'commonsense' or a folder with {', '.join(SETS)}"
        )
    for name, (hub, config, split) in SETS.items():
        parts: Sequence[Sequence[dict] | None]
        if folder is None:
            parts = [read_hub(hub, config, [part]) for part in ("train", split)]
        elif (folder / name).is_dir():
            parts = [
                [row for path in find(folder / name, stems) for row in read_file(path)]
                for stems in (("train",), ("test", "validation"))
            ]
        else:
            continue
        for rows, part in zip((train, evaluation), parts, strict=True):
            rows += [{**row, SET: name} for row in part or ()]
    if not train:
        raise BadInput(f"--dataset {source} holds none of {', '.join(SETS)}")
    return train, evaluation


def read(row: dict) -> tuple[str, list[str], int]:
    """(prompt, names of the choices, index of the answer) in each set's own columns: LLM-Adapters'
    instructions in Alpaca's prompt.
    """
    instruction, names, answer = _READ[row[SET]](row)
    return (
        PLAIN.format(instruction=f"{instruction}\n\nAnswer format: {'/'.join(names)}"),
        names,
        answer,
    )


def _ask(question: str, name: str, choices: list[str], answer: int) -> tuple[str, list[str], int]:
    listed = " ".join(f"{name.capitalize()}{i}: {choice}" for i, choice in enumerate(choices, 1))
    return f"{question}\n\n{listed}", [f"{name}{i}" for i in range(1, len(choices) + 1)], answer


def _boolq(row: dict) -> tuple[str, list[str], int]:
    question = (
        f"Please answer the following question with true or false, question: {row['question']}?"
    )
    return (
        f"{row['passage']}\n\n{question}" if row.get("passage") else question,
        ["true", "false"],
        int(not _truth(row["answer"])),
    )


def _truth(value) -> bool:
    return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1")


def _keyed(row: dict, question: str) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return _ask(
        f"Please choose the correct answer to the question: {row[question]}",
        "answer",
        list(choices["text"]),
        list(choices["label"]).index(row["answerKey"]),
    )


_READ = {
    "boolq": _boolq,
    "piqa": lambda r: _ask(
        f"Please choose the correct solution to the question: {r['goal']}",
        "solution",
        [r["sol1"], r["sol2"]],
        int(r["label"]),
    ),
    "siqa": lambda r: _ask(
        f"Please choose the correct answer to the question: {r['context']} {r['question']}",
        "answer",
        [r["answerA"], r["answerB"], r["answerC"]],
        int(r["label"]) - 1,
    ),
    "hellaswag": lambda r: _ask(
        f"Please choose the correct ending to complete the given sentence: {r['ctx']}",
        "ending",
        list(r["endings"]),
        int(r["label"]),
    ),
    "winogrande": lambda r: _ask(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{r['sentence']}",
        "option",
        [r["option1"], r["option2"]],
        int(r["answer"]) - 1,
    ),
    "arc_easy": lambda r: _keyed(r, "question"),
    "arc_challenge": lambda r: _keyed(r, "question"),
    "openbookqa": lambda r: _keyed(r, "question_stem"),
}
