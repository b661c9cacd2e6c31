"""GLUE's single sentences and pairs, as the benchmark distributes them (Wang et al., ICLR 2019).

From the hub (`nyu-mll/glue`), or from a folder with the hub's files (`train*.parquet`,
`validation*.parquet`) or GLUE's own (`train.tsv`, `dev.tsv`; MNLI's `dev_matched.tsv` and
`dev_mismatched.tsv`). Rows come as `text`, `text_pair`, `label`. The test sets have no labels, so
what GLUE calls the development set is what runs are judged on. Metric: accuracy; QQP also F1 of its
second class, MNLI also the mismatched half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.data.files import find, read_file, read_hub
from rolora.errors import BadInput
from rolora.recipes.classification import PART

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """Columns of the hub's files and of GLUE's own, labels in the order of their numbers, and the
    second evaluation set.
    """

    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    mismatched: bool = False


TASKS = {
    "sst2": Task((("sentence",),), ("label",), ("negative", "positive")),
    "qnli": Task((("question", "sentence"),), ("label",), ("entailment", "not_entailment")),
    "mnli": Task(
        (("premise", "hypothesis"), ("sentence1", "sentence2")),
        ("label", "gold_label"),
        ("entailment", "neutral", "contradiction"),
        mismatched=True,
    ),
    "qqp": Task(
        (("question1", "question2"),), ("label", "is_duplicate"), ("not_duplicate", "duplicate")
    ),
    "rte": Task((("sentence1", "sentence2"),), ("label",), ("entailment", "not_entailment")),
}


def load(name: str, source: str | None) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of a task; `source` is None for the hub, or a folder."""
    task = TASKS[name]
    parts = {"": ("validation", "dev")}
    if task.mismatched:
        parts = {
            "": ("validation_matched", "dev_matched"),
            "mismatched": ("validation_mismatched", "dev_mismatched"),
        }
    if source is None or not Path(source).is_dir():
        train: Sequence[dict] | None = read_hub(source or HUB, name, ["train"])
        held = {
            part: read_hub(source or HUB, name, list(stems[:1])) for part, stems in parts.items()
        }
    else:
        train = _local(Path(source), ("train",))
        held = {part: _local(Path(source), stems) for part, stems in parts.items()}
    rows = [
        row | ({PART: part} if part else {})
        for part, found in held.items()
        for row in _normal(task, found or [], f"{name} {part}")
    ]
    return _normal(task, train or [], name), rows


def _local(folder: Path, stems: tuple[str, ...]) -> list[dict]:
    rows: list[dict] = []
    for path in find(folder, stems):
        if path.suffix != ".tsv":
            rows += read_file(path)
            continue
        found, wrong = read_plain_tsv(path)
        if wrong:
            print(
                f"{path}: {wrong} of {wrong + len(found)} rows have a wrong number of fields and "
                "are left out",
                flush=True,
            )
        rows += found
    return rows


def read_plain_tsv(path: Path) -> tuple[list[dict], int]:
    """(rows, how many had a wrong number of fields) of a TSV without quoting: GLUE's sentences hold
    unbalanced quotes.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (ValueError, UnicodeDecodeError):
        raise BadInput(f"{path} is empty or not UTF-8 text") from None
    names = first.split("\t")
    rows = [line.split("\t") for line in lines if line]
    good = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    if not good:
        raise BadInput(f"{path} holds no rows")
    return good, len(rows) - len(good)


def _normal(task: Task, rows: Sequence[dict], where: str) -> list[dict]:
    """Rows as text, text_pair and label by name; those without a label (-1) are left out."""
    if not rows:
        raise BadInput(
            f"{where}: no rows: give the hub's data set, or a folder with train and validation "
            "(dev) files"
        )
    texts = next((names for names in task.texts if all(name in rows[0] for name in names)), None)
    label = next((name for name in task.label if name in rows[0]), None)
    if texts is None or label is None:
        raise BadInput(
            f"{where} has columns {', '.join(map(str, rows[0]))}, expected "
            f"{' and '.join(task.texts[0])}, {task.label[0]}"
        )
    numbers = {str(i): name for i, name in enumerate(task.labels)}
    normal = []
    for row in rows:
        value = str(row[label])
        value = numbers.get(value, value)
        if value in task.labels:
            normal.append(
                {"text": row[texts[0]], "label": value}
                | ({"text_pair": row[texts[1]]} if len(texts) > 1 else {})
            )
    if not normal:
        raise BadInput(f"{where}: no row has a label among {', '.join(task.labels)}")
    return normal
