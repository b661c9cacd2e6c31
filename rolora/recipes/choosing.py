"""Which recipe a configuration and its data ask for, and how it is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rolora.config import TASK_TYPES, Config, Task
from rolora.data.files import Column
from rolora.errors import BadInput
from rolora.recipes import Recipe
from rolora.recipes.benchmarks import BENCHMARKS, Benchmark

_PROTOCOL = (
    "peft_task_type",
    "headline",
    "columns",
    "build",
    "encode",
    "skew_labels",
    "collate",
    "loss",
    "losses",
    "evaluate",
)


# Options that would be ignored by the other kinds of task.
_OF = {
    "loss_on": ("chat",),
    "chat_template": ("chat", "preference"),
    "dpo_beta": ("preference",),
    "dpo_label_smoothing": ("preference",),
    "packing": ("causal-lm", "chat"),
}


def load(task_type: str | None) -> type[Recipe]:
    """The recipe of a task type that is settled, from the file of its name, or from a file of
    one's own. Raises BadInput for a file that is no recipe.
    """
    assert task_type is not None
    if task_type.endswith(".py"):
        return _of_file(task_type)
    return import_module(f"rolora.recipes.{task_type.replace('-', '_')}").RECIPE


def _require_own_options(task: Task) -> None:
    """Raises BadInput for an option that the kind of task would ignore; one's own may read it."""
    if task.task_type is None or task.task_type.endswith(".py"):
        return
    for name, kinds in _OF.items():
        if getattr(task, name) not in (None, False) and task.task_type not in kinds:
            raise BadInput(
                f"--{name.replace('_', '-')} is for {' and '.join(kinds)} data, and these are for "
                f"{task.task_type}: leave it out"
            )


def _of_file(path: str) -> type[Recipe]:
    loader = SourceFileLoader(f"rolora_recipe_{Path(path).stem}", path)
    module = ModuleType(loader.name)
    module.__file__ = path
    try:
        loader.exec_module(module)
    except FileNotFoundError:
        raise BadInput(f"--task-type {path} does not exist") from None
    except Exception as error:  # whatever a file of someone's own does wrong
        raise BadInput(
            f"--task-type {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    recipe: Any = getattr(module, "RECIPE", None)
    missing = [name for name in _PROTOCOL if not hasattr(recipe, name)]
    if missing:
        raise BadInput(
            f"--task-type {path}: RECIPE, a class as rolora/recipes/__init__.py describes it, has "
            f"no {', '.join(missing)}"
        )
    return recipe


def benchmark(config: Config) -> Benchmark | None:
    """The benchmark that the data are of; a folder or the name "commonsense" alone is that one."""
    d = config.data
    if d.benchmark is not None:
        return BENCHMARKS[d.benchmark]
    if d.train_file is not None or d.dataset is None:
        return None
    if d.dataset == "commonsense" or Path(d.dataset).is_dir():
        return BENCHMARKS["commonsense"]
    return None


def settle(config: Config, columns: Iterable[str]) -> Config:
    """The configuration with its task type: as given, or told from the options and the columns of
    the rows. Raises BadInput where neither tells.
    """
    known, task = benchmark(config), config.task
    if known is not None:
        return config.with_values(task_type=known.task_type)
    if task.task_type is not None:
        return config
    for name in TASK_TYPES:
        if load(name).is_asked(task):
            return config.with_values(task_type=name)
    for name in TASK_TYPES:
        if load(name).is_told(task, dict.fromkeys(columns)):
            return config.with_values(task_type=name)
    raise BadInput(
        f"cannot tell the task from the columns {', '.join(columns)}: give --task-type, and the "
        "columns with --text-column and --label-column, --prompt-column and --response-column, or "
        "--choices-column; conversations are told from messages, conversations, instruction and "
        "output, or prompt and completion, pairs from chosen and rejected"
    )


def columns(config: Config) -> dict[str, Column]:
    """Flag → column, of what every row must have; nothing for a benchmark, which has seen to it."""
    if benchmark(config) is not None:
        return {}
    return _settled(config).columns(config.task)


def _settled(config: Config) -> type[Recipe]:
    assert config.task.task_type is not None, "`settle` comes first"
    return load(config.task.task_type)


def build(
    config: Config,
    tokenizer,
    rows: Sequence[dict],
    device: torch.device,
    labels: list[str] | None = None,
) -> Recipe:
    """The recipe of a settled configuration; `labels` as in `Recipe.build`."""
    known = benchmark(config)
    _require_own_options(config.task)
    if known is not None:
        return known.make(tokenizer, config.task.max_length, device)
    try:
        return _settled(config).build(config.task, tokenizer, rows, device, labels)
    except ValueError as error:  # a template that is none
        raise BadInput(str(error)) from None
