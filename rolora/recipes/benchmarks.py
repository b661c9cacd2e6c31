"""The benchmarks by name, with their data, prompts and metrics: the paper's (section 5 there), and
FlowerTune's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rolora.recipes import Recipe, commonsense, flowertune, glue, instructions
from rolora.recipes.answer_sentence import AnswerSentence
from rolora.recipes.causal_lm import CausalLM
from rolora.recipes.classification import Classification
from rolora.recipes.flowertune import YARDSTICK, Yardstick


@dataclass(frozen=True)
class Benchmark:
    """load(source) → (training rows, evaluation rows or None), `source` a folder, a hub name or
    None for the usual one; make(tokenizer, max_length, device) → its recipe. `yardstick`: another
    program's traffic, where the benchmark counts it.
    """

    task_type: str
    load: Callable[[str | None], tuple[list[dict], list[dict] | None]]
    make: Callable[..., Recipe]
    yardstick: Yardstick | None = None


def _glue(name: str) -> Benchmark:
    task = glue.TASKS[name]
    pair = "text_pair" if len(task.texts[0]) > 1 else None

    def make(tokenizer, max_length: int, device) -> Classification:
        return Classification(
            tokenizer,
            task.labels,
            max_length,
            "text",
            "label",
            pair,
            device,
            positive=task.labels[1] if name == "qqp" else None,
        )

    return Benchmark("classification", lambda source: glue.load(name, source), make)


def _instructions(name: str) -> Benchmark:
    return Benchmark("causal-lm", lambda source: instructions.load(name, source), _responding)


def _flowertune(name: str) -> Benchmark:
    return Benchmark(
        "causal-lm", lambda source: flowertune.load(name, source), _responding, YARDSTICK
    )


def _responding(tokenizer, max_length: int, device) -> CausalLM:
    return CausalLM(tokenizer, max_length, "response", "prompt", device=device)


BENCHMARKS = {
    **{name: _glue(name) for name in glue.TASKS},
    "commonsense": Benchmark(
        "multiple-choice",
        commonsense.load,
        lambda tokenizer, max_length, device: AnswerSentence(
            tokenizer, max_length, commonsense.read, device
        ),
    ),
    **{name: _instructions(name) for name in instructions.HUBS},
    **{name: _flowertune(name) for name in flowertune.SETTINGS},
}
