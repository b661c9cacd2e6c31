"""The rows that a configuration names: to train on, to look at during a run, to test at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rolora import builtin
from rolora.config import Config
from rolora.data import cells, files
from rolora.data.streamed import chosen
from rolora.errors import BadInput
from rolora.federated import sampling
from rolora.recipes import choosing


@dataclass(frozen=True)
class Rows:
    """`held` is evaluated during the run, `test` once at its end; None where they are the same.

    `held_out`: whether `held` is a part of the training rows.
    """

    train: Sequence[dict]
    held: Sequence[dict]
    test: Sequence[dict] | None
    held_out: bool


def read(config: Config) -> tuple[Rows, Config]:
    """The rows, their columns checked, and the configuration with the task type that they tell."""
    d = config.data
    train, evaluation = _named(config)
    if d.eval_file is not None:
        evaluation = files.read_file(d.eval_file)
    config = choosing.settle(config, files.columns_of(train))
    train = files.with_numbers(train)
    require_columns(config, train, training_name(config))
    _require_clients(config, train, training_name(config))
    if evaluation is not None:
        evaluation = files.with_numbers(evaluation)
        require_columns(config, evaluation, evaluation_name(config))
    return _split(config, train, evaluation), config


def training_name(config: Config) -> str:
    """What an error calls the training data."""
    return config.data.train_file or config.data.dataset or "the data"


def evaluation_name(config: Config) -> str:
    """What an error calls the data to evaluate on."""
    return config.data.eval_file or "the evaluation data"


def read_evaluation(config: Config) -> tuple[Sequence[dict], Config]:
    """The rows to evaluate on, and the configuration with the task type that they tell."""
    d = config.data
    known = choosing.benchmark(config)
    rows: Sequence[dict] | None = None
    if d.eval_file is not None:
        rows = files.read_file(d.eval_file)
    elif known is not None:
        rows = known.load(d.dataset)[1]
    elif d.dataset is not None:
        rows = files.read_hub(d.dataset, d.dataset_config, ["validation", "test"])
    if not rows:
        raise BadInput(
            f"data set {d.dataset or d.benchmark!r} has no split 'validation' or 'test': give "
            "--eval-file"
        )
    config = choosing.settle(config, files.columns_of(rows))
    rows = files.with_numbers(rows)
    require_columns(config, rows, d.eval_file or d.dataset or d.benchmark or "the data")
    return _limited(config, rows), config


def require_columns(config: Config, rows: Sequence[dict], where: str) -> None:
    """Raises BadInput for a row without a column that the task needs."""
    files.require_columns(rows, choosing.columns(config), where)


def _require_clients(config: Config, rows: Sequence[dict], where: str) -> None:
    """Raises BadInput for a training row that does not say whose it is, where that is asked."""
    if config.federation.partition != "column":
        return
    if config.data.client_column is None:
        raise BadInput("--partition column needs --client-column: whose example a row is")
    column = files.Column(config.data.client_column, cells.label)
    files.require_columns(rows, {"--client-column": column}, where)


def _named(config: Config) -> tuple[Sequence[dict], Sequence[dict] | None]:
    """(training rows, the evaluation rows that come with them)."""
    d = config.data
    if d.train_file is not None:
        return files.read_file(d.train_file), None
    known = choosing.benchmark(config)
    if known is not None:
        return known.load(d.dataset)
    if d.dataset is not None:
        train = files.read_hub(d.dataset, d.dataset_config, ["train"])
        if train is None:
            raise BadInput(f"data set {d.dataset!r} has no split 'train': give --train-file")
        return train, files.read_hub(d.dataset, d.dataset_config, ["validation", "test"])
    if d.model is None:
        return (
            files.read_file(builtin.TEXT / "train.jsonl"),
            files.read_file(builtin.TEXT / "eval.jsonl"),
        )
    raise BadInput(
        f"--model {d.model} is given without data: give --train-file (and --eval-file), or "
        "--dataset"
    )


def _split(config: Config, train: Sequence[dict], evaluation: Sequence[dict] | None) -> Rows:
    """A part of the training rows is held out where that is asked, or nothing else is there."""
    fraction = config.data.validation_fraction
    if fraction is None:
        fraction = 0.1 if evaluation is None else 0.0
    if fraction == 0.0:
        if evaluation is None:
            raise BadInput(
                "nothing to evaluate on: give --eval-file, or a --validation-fraction above 0"
            )
        return Rows(train, _limited(config, evaluation), None, False)
    cut = max(1, round(fraction * len(train)))
    if cut >= len(train):
        raise BadInput(
            f"--validation-fraction {fraction} of {len(train)} examples leaves none to train on"
        )
    order = sampling.generator(config.run.seed, "validation").permutation(len(train))
    held = chosen(train, np.sort(order[:cut]))
    rest = chosen(train, np.sort(order[cut:]))
    test = None if evaluation is None else _limited(config, evaluation)
    return Rows(rest, _limited(config, held), test, True)


def _limited(config: Config, rows: Sequence[dict]) -> Sequence[dict]:
    """The first --eval-max-examples of a seeded shuffle, in their own order."""
    most = config.data.eval_max_examples
    if most is None or most >= len(rows):
        return rows
    order = sampling.generator(config.run.seed, "eval").permutation(len(rows))
    return chosen(rows, np.sort(order[:most]))
