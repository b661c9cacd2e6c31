"""What the model writes after a few held-out prompts, from evaluation to evaluation: the file
`samples.jsonl` of a run folder, a line a prompt and evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from torch import Tensor

from rolora import atomic
from rolora.errors import BadInput
from rolora.federated.methods import Method
from rolora.recipes.generating import WritesText, continuations
from rolora.run.folder import SAMPLES
from rolora.run.job import Job

_ROOM = 128  # tokens that a sample may have


def require_text(job: Job, method: Method) -> None:
    """Raises BadInput where --samples is given and nothing can write them."""
    if not job.config.run.samples:
        return
    if method.kept:
        raise BadInput(
            "--samples: with this --method clients keep factors of their own, and no one model "
            "writes: leave it out"
        )
    if not isinstance(job.recipe, WritesText):
        raise BadInput(
            f"--samples: a {job.config.task.task_type} writes no text: leave it out, or use a "
            "task type that does, such as causal-lm"
        )


def write(job: Job, published: dict[str, Tensor], round: int, folder: Path) -> None:
    """Adds what the published factors write to `samples.jsonl` in `folder`; later rounds that are
    there, of a run that was cut off, go.
    """
    path = folder / SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["round"] < round]
    examples = job.evaluation[: job.config.run.samples]
    recipe = cast(WritesText, job.recipe)
    halves = [recipe.halves(example) for example in examples]
    job.layout.scatter(job.model, published)
    job.model.eval()
    tokenizer = recipe.tokenizer
    texts = continuations(
        job.model,
        tokenizer,
        [prompt for prompt, _ in halves],
        _ROOM,
        job.config.data.eval_batch_size,
        job.device,
    )
    for (prompt, reference), text in zip(halves, texts, strict=True):
        sample = {
            "round": round,
            "prompt": tokenizer.decode(prompt),
            "written": text,
            "reference": tokenizer.decode(reference, skip_special_tokens=True),
        }
        kept.append(json.dumps(sample, ensure_ascii=False))
    atomic.write_text(path, "".join(line + "\n" for line in kept))
