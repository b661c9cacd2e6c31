"""The paper's commonsense data: eight multiple-choice sets, merged (PAPER.md section 5).

Each set is read from the hub by the name below, or from `DIR/<set>/train.*` and `DIR/<set>/{test,validation}.*` with the
hub's columns. Sets that exist on the hub only as loading scripts are read from their Parquet branch.
"""

from __future__ import annotations

from pathlib import Path

from rolora.errors import BadInput
from rolora.recipes.data import SUFFIXES, read_file, read_hub

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


def load(source: str) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of all sets; every row carries its set under "task". `source` is "commonsense" for
    the hub, or a folder."""
    train, evaluation = [], []
    folder = None if source == "commonsense" else Path(source)
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--dataset {source}: expected 'commonsense' or a folder with {', '.join(SETS)}")
    for name, (hub, config, split) in SETS.items():
        if folder is None:
            parts = read_hub(hub, config, ["train"]), read_hub(hub, config, [split])
        else:
            if not (folder / name).is_dir():
                continue
            parts = _local(folder / name, ("train",)), _local(folder / name, ("test", "validation"))
        for rows, part in zip((train, evaluation), parts, strict=True):
            rows += [{**row, "task": name} for row in part or ()]
    if not train:
        raise BadInput(f"--dataset {source} holds none of {', '.join(SETS)}")
    return train, evaluation


def read(row: dict) -> tuple[str, list[str], int]:
    """(prompt, choices, index of the answer) in each set's own columns."""
    return _READ[row["task"]](row)


def _local(folder: Path, stems: tuple[str, ...]) -> list[dict]:
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return read_file(folder / f"{stem}{suffix}")
    raise BadInput(f"{folder} has no {' or '.join(stems)} file ({', '.join(SUFFIXES)})")


def _ask(question: str, choices: list[str]) -> str:
    return f"Question: {question}\nChoices: {'; '.join(choices)}\nAnswer:"


def _asked(question: str, choices: list[str], answer: int) -> tuple[str, list[str], int]:
    return _ask(question, choices), choices, answer


def _keyed(row: dict, question: str) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return _asked(row[question], list(choices["text"]), list(choices["label"]).index(row["answerKey"]))


_READ = {
    "boolq": lambda r: _asked(f"{r['passage']}\n{r['question']}?", ["false", "true"], int(r["answer"])),
    "piqa": lambda r: _asked(r["goal"], [r["sol1"], r["sol2"]], int(r["label"])),
    "siqa": lambda r: _asked(f"{r['context']} {r['question']}", [r["answerA"], r["answerB"], r["answerC"]], int(r["label"]) - 1),
    "hellaswag": lambda r: (r["ctx"], list(r["endings"]), int(r["label"])),
    "winogrande": lambda r: _asked(f"What is the blank? {r['sentence']}", [r["option1"], r["option2"]], int(r["answer"]) - 1),
    "arc_easy": lambda r: _keyed(r, "question"),
    "arc_challenge": lambda r: _keyed(r, "question"),
    "openbookqa": lambda r: _keyed(r, "question_stem"),
}
