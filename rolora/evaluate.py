"""`python -m rolora.evaluate`: metrics of an adapter, or of a bare model, on held-out examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rolora import builtin, cli, config
from rolora.config import Config
from rolora.errors import BadInput
from rolora.run import sidecar

HELP = """Evaluates an adapter folder on a file.

What the adapter was trained on (task, columns, labels, base model) is read from the folder where
the flags do not say it; an
adapter of the built-in model is evaluated on the built-in text."""

_OPTIONS = {
    "model",
    "revision",
    "dataset",
    "dataset_config",
    "benchmark",
    "task_type",
    "eval_file",
    "text_column",
    "text_pair_column",
    "label_column",
    "prompt_column",
    "response_column",
    "choices_column",
    "prompt_template",
    "max_length",
    "eval_max_examples",
    "eval_batch_size",
    "dtype",
    "quantize",
    "liger",
    "attn",
    "backend",
    "device",
    "threads",
    "seed",
}
FLAGS = [
    cli.Flag(
        ["--adapter"], metavar="DIR", group="Adapter", help="a PEFT folder, such as RUN/adapter"
    ),
    *cli.config_flags(_OPTIONS),
    cli.Flag(
        ["--harness"],
        metavar="TASK,…",
        group="lm-evaluation-harness",
        help="evaluate on its tasks instead, such as mmlu,humaneval",
    ),
    cli.Flag(
        ["--harness-tasks"],
        metavar="DIR",
        group="lm-evaluation-harness",
        help="a folder with task files of your own",
    ),
    cli.Flag(
        ["--harness-limit"],
        type=int,
        group="lm-evaluation-harness",
        help="so many examples of each task",
    ),
    cli.Flag(
        ["--run-unsafe-code"],
        is_flag=True,
        group="lm-evaluation-harness",
        help="let tasks run code that the model wrote",
    ),
    cli.Flag(
        ["--json", "as_json"],
        is_flag=True,
        group="Run",
        help="print the metrics as one JSON object",
    ),
]


def evaluate(
    adapter: str | None,
    as_json: bool,
    harness: str | None,
    harness_tasks: str | None,
    harness_limit: int | None,
    run_unsafe_code: bool,
    **given: Any,
) -> None:
    flags = {name: value for name, value in given.items() if value is not None}
    if adapter is None and "model" not in flags:
        raise BadInput("nothing to evaluate: give --adapter DIR, or --model for a bare model")
    labels = None
    if adapter is not None:
        remembered, labels = _remembered(Path(adapter))
        flags = remembered | flags
    settled = config.check(Config().with_values(**flags))
    if harness is not None:
        _print(
            _by_harness(settled, adapter, harness, harness_tasks, harness_limit, run_unsafe_code),
            as_json,
        )
        return
    if (
        settled.data.eval_file is None
        and settled.data.dataset is None
        and settled.data.benchmark is None
    ):
        if settled.data.model not in (None, str(builtin.MODEL)):
            raise BadInput("nothing to evaluate on: give --eval-file or --dataset")
        settled = settled.with_values(eval_file=str(builtin.TEXT / "eval.jsonl"))
    from rolora.run.evaluation import evaluate_adapter  # torch is loaded here

    _print(evaluate_adapter(settled, adapter, labels), as_json)


def _by_harness(
    settled: Config,
    adapter: str | None,
    tasks: str,
    folder: str | None,
    limit: int | None,
    unsafe_code: bool,
) -> dict:
    if settled.task.task_type == "classification":
        raise BadInput("--harness asks a causal LM: this adapter is a classifier's")
    from rolora.hf import harness
    from rolora.run import base_model

    hf_config = base_model.read_config(settled)
    settled = base_model.settle(settled, hf_config)
    tokenizer = base_model.load_tokenizer(settled, hf_config)
    model = base_model.load_adapted(settled, hf_config, tokenizer, adapter, None)
    return harness.evaluate(
        model,
        tokenizer,
        [task.strip() for task in tasks.split(",") if task.strip()],
        folder=folder,
        limit=limit,
        batch_size=settled.data.eval_batch_size,
        unsafe_code=unsafe_code,
    )


def _print(metrics: dict[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            print(f"{name}: {value:.4f}")


def _remembered(folder: Path) -> tuple[dict[str, Any], list[str] | None]:
    """(options, labels) that the adapter folder says about itself."""
    from rolora.adapter.files import read_adapter

    options, labels = sidecar.read(folder)
    try:
        peft, _ = read_adapter(folder)
    except ValueError as error:
        raise BadInput(f"--adapter {error}") from None
    if peft.get("base_model_name_or_path"):
        options["model"] = peft["base_model_name_or_path"]
    return options, labels


command = cli.command("evaluate", HELP, FLAGS, evaluate)

if __name__ == "__main__":
    cli.run(command)
