"""Options of the model and the data, and of how rows become examples."""

from __future__ import annotations

from dataclasses import dataclass

from rolora.config.options.declared import option
from rolora.config.options.names import BENCHMARKS, TASK_TYPES


@dataclass(frozen=True)
class Data:
    """Model and data"""

    model: str | None = option(
        None, "Hugging Face id or folder; without it the built-in model and text", metavar="ID|DIR"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    dataset: str | None = option(
        None, "hub data set, or a folder of the benchmark's files", metavar="ID|DIR"
    )
    benchmark: str | None = option(
        None, "read the data, and judge, as this benchmark does", choices=BENCHMARKS
    )
    dataset_config: str | None = option(None, "configuration of the hub data set")
    train_file: str | None = option(None, "JSONL, JSON, CSV, TSV or Parquet", metavar="FILE")
    eval_file: str | None = option(None, "held-out examples in the same columns", metavar="FILE")
    validation_fraction: float | None = option(
        None,
        "part of the training data held out and evaluated every round (0.1 without an eval file, "
        "else 0; the eval file "
        "is then looked at once, at the end)",
        least=0,
        most=0.9,
    )
    client_column: str | None = option(None, "whose example it is (--partition column)")
    eval_max_examples: int | None = option(
        None, "evaluate on the first so many of a seeded shuffle", least=1
    )
    eval_batch_size: int = option(64, "examples a batch in evaluation", least=1, most=10**9)


@dataclass(frozen=True)
class Task:
    """Task: how rows become examples"""

    task_type: str | None = option(
        None,
        "what is trained, or FILE.py: a recipe of your own; told from the columns if not given",
        choices=TASK_TYPES,
    )
    text_column: str = option("text", "classification: the text")
    text_pair_column: str | None = option(None, "classification: a second text")
    label_column: str = option("label", "the label; multiple choice: index or text of the answer")
    prompt_column: str | None = option(None, "causal LM, multiple choice: the prompt")
    response_column: str | None = option(None, "causal LM: what carries loss")
    choices_column: str | None = option(None, "multiple choice: a list, or JSON text of one")
    prompt_template: str | None = option(
        None, "fills columns in, such as '{context} Q: {question} A:'"
    )
    max_length: int = option(256, "tokens an example is cut to", least=8, most=10**7)
    metric: str | None = option(
        None,
        "what tables show first and rates are chosen by, of those that the task is evaluated by; "
        "accuracy, or for text the loss, and exact match where answers are short",
        metavar="NAME",
    )
    loss_on: str | None = option(
        None,
        "chat: the assistant's turns (if not given), its last one, or every token",
        choices=("assistant", "last", "all"),
    )
    chat_template: str | None = option(
        None,
        "chat, preference: a Jinja template, or a file with one, in place of the tokenizer's",
        metavar="FILE",
    )
    packing: bool = option(
        False, "causal LM, chat: several examples in a row of a batch, which do not see each other"
    )
    unlearnable: str = option(
        "drop",
        "rows with nothing to learn from, as where --max-length cuts the answer away",
        choices=("drop", "refuse"),
    )
    dpo_beta: float | None = option(
        None, "preference: weight of the reward (0.1)", above=0, most=1e6
    )
    dpo_label_smoothing: float | None = option(
        None, "preference: share of pairs that are the wrong way round (0)", least=0, most=0.5
    )
