"""HumanEval, MMLU and whatever else lm-evaluation-harness knows, on a model with our adapter (extra
`eval`).
"""

from __future__ import annotations

from typing import Any

from rolora.errors import BadInput


def evaluate(
    model,
    tokenizer,
    tasks: list[str],
    *,
    batch_size: int,
    limit: int | None,
    folder: str | None,
    unsafe_code: bool,
) -> dict[str, float]:
    """`task/metric` → value, as the harness names them.

    `folder` holds task files of one's own; `unsafe_code` allows tasks that run what the model wrote
    (HumanEval); `limit`: so many examples of each.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput(
            f"--harness needs the package lm-eval ({error.name} is missing): pip install "
            "'.[eval]' in your clone"
        ) from None
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise BadInput(
            f"--harness {unknown[0]}: lm-eval knows no such task; `lm-eval ls tasks` lists them, "
            "--harness-tasks DIR adds some"
        )
    try:
        found: dict[str, Any] = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            confirm_run_unsafe_code=unsafe_code,
            bootstrap_iters=0,
        )["results"]
    except ValueError as error:
        if "unsafe" in str(error).lower():
            raise BadInput(
                f"--harness {','.join(tasks)} runs code that the model wrote: give "
                "--run-unsafe-code, in a sandbox"
            ) from None
        raise BadInput(f"--harness {','.join(tasks)}: {str(error).splitlines()[0][:200]}") from None
    except (OSError, ConnectionError) as error:
        raise BadInput(
            f"--harness {','.join(tasks)}: its data could not be fetched: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
