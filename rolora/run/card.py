"""An adapter's model card: what it was made of and how, in the hub's metadata and in words, and a
program that loads it. Holds no path of the machine that it was made on.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rolora.errors import BadInput

_LISTED = 100  # classes that the card lists
_TYPES: dict[str, Any] = {
    "task": str,
    "method": str,
    "rounds": int,
    "clients": int,
    "clients_per_round": int,
    "data": list,
    "metrics": dict,
    "judged_on": str,
    "bytes_up": int,
    "bytes_down": int,
    "privacy": (str, type(None)),
    "license": (str, type(None)),
}


@dataclass(frozen=True)
class Facts:
    """What a card tells of a run.

    Attributes:
        data: (what for, the hub's id or a file's name without its folders, examples) of each part.
        metrics: of the published adapter on `judged_on`, one of those names; empty where each
            client has an adapter of its own.
        bytes_up, bytes_down: of all messages.
        privacy: what is promised, in words. license: the base's, where it is known.
    """

    task: str
    method: str
    rounds: int
    clients: int
    clients_per_round: int
    data: list[tuple[str, str, int]]
    metrics: dict[str, float]
    judged_on: str
    bytes_up: int
    bytes_down: int
    privacy: str | None = None
    license: str | None = None


def read(stored: Any) -> Facts:
    """What `rolora.json` holds of them. Raises TypeError or ValueError for anything else."""
    if not isinstance(stored, dict) or stored.keys() != {field.name for field in fields(Facts)}:
        raise TypeError("what was trained is a table of known names")
    for name, kind in _TYPES.items():
        if not isinstance(stored[name], kind) or isinstance(stored[name], bool):
            raise TypeError(f"{name} is no {kind}")
    data = []
    for use, name, count in stored["data"]:
        if not (isinstance(use, str) and isinstance(name, str) and isinstance(count, int)):
            raise TypeError("data are names and numbers")
        data.append((use, name, count))
    for value in stored["metrics"].values():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("metrics are numbers")
    return Facts(**stored | {"data": data})


def name_of_data(name: str) -> str:
    """How a card names data: a hub's id as it is, a file by its name without its folders."""
    path = Path(name)
    return name if is_hub_id(name) and not path.exists() else path.name


def is_hub_id(name: str, bare: bool = False) -> bool:
    """Whether the hub could have a repository of this name, which is not a folder here. `bare`: or
    one without an owner, as old models have.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owned = name.count("/") == 1 or (bare and "/" not in name)
    if not owned or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def text(
    base: str,
    labels: Sequence[str] | None,
    facts: Facts | None = None,
    merged: bool = False,
    license: str | None = None,
) -> str:
    """The card of an adapter of `base`, or of a model that it was `merged` into. `labels`: a
    classifier's classes in the order of its outputs. `license`: the base's, where `facts` do not
    tell it.
    """
    if facts is not None and facts.license is not None:
        license = facts.license
    known = is_hub_id(base, bare=True)
    shown = base if known else f"{Path(base).name} (a folder)"
    kind = "SequenceClassification" if labels is not None else "CausalLM"
    program = (_MERGED if merged else _PROGRAM).format(
        kind=kind,
        json="import json\n\n" if labels is not None and not merged else "",
        base=repr(base) if known else "PeftConfig.from_pretrained(folder).base_model_name_or_path",
        config="" if known else "PeftConfig, ",
        read=_READ if labels is not None and not merged else "",
        more=_MORE if labels is not None and not merged else "",
    )
    title = "A LoRA adapter trained by RoLoRA"
    if merged:
        title = "A model with a LoRA adapter of RoLoRA's merged into it"
    parts = [
        f"---\n{_metadata(base if known else None, labels, facts, merged, license)}\n---",
        f"# {title}",
        f"Base model: `{_plain(shown)}`",
        *_classes(labels),
        *([] if facts is None else _story(facts)),
        f"```python\n{program}```",
    ]
    if not merged:
        parts.append(
            "`python -m rolora.evaluate --adapter .` reads from `rolora.json` how it is to be "
            "evaluated."
        )
    return "\n\n".join(parts) + "\n"


def _metadata(
    base: str | None,
    labels: Sequence[str] | None,
    facts: Facts | None,
    merged: bool,
    license: str | None,
) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-generation" if labels is None else "text-classification"
    known: dict[str, Any] = {
        "base_model": base,
        "license": license,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": task,
        "tags": ["lora", "federated", "rolora"],
    }
    if base is not None:
        known["base_model_relation"] = "merge" if merged else "adapter"
    if facts is not None:
        found = dict.fromkeys(name for _, name, _ in facts.data if is_hub_id(name))
        known["datasets"] = list(found) or None
        judged = facts.judged_on or "held out"
        results = [
            EvalResult(
                task_type=task,
                dataset_type=judged,
                dataset_name=judged,
                metric_type=name,
                metric_value=value,
            )
            for name, value in facts.metrics.items()
            if math.isfinite(value)
        ]
        if results:
            known |= {"model_name": "rolora", "eval_results": results}
    return ModelCardData(**known).to_yaml()


def _story(facts: Facts) -> list[str]:
    """What was done, as paragraphs and tables of the card."""
    who = f"{facts.clients:,} clients"
    if facts.clients_per_round < facts.clients:
        who += f", {facts.clients_per_round:,} a round"
    rows = [
        ("task", facts.task),
        ("method", facts.method),
        ("rounds", f"{facts.rounds:,}"),
        ("clients", who),
        *((f"data: {use}", f"{name}, {count:,} examples") for use, name, count in facts.data),
        ("messages up", f"{facts.bytes_up:,} bytes"),
        ("messages down", f"{facts.bytes_down:,} bytes"),
    ]
    if facts.privacy:
        rows.append(("privacy", facts.privacy))
    if facts.license:
        rows.append(("license of the base", facts.license))
    told = ["## How it was trained", _table(("", ""), rows)]
    if facts.metrics:
        where = f"On `{_plain(facts.judged_on)}`, which it was not trained on:"
        metrics = [(name, f"{value:.4f}") for name, value in facts.metrics.items()]
        told += ["## How good it is", where, _table(("metric", "value"), metrics)]
    return [*told, "## How to load it"]


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _plain(value: str) -> str:
    """A text that closes no code span and opens no line."""
    return " ".join(value.replace("`", "'").split())


def _cell(value: str) -> str:
    """A text in a table: no markup of its own."""
    return re.sub(r"([\\|<>\[\]*_`])", r"\\\1", " ".join(value.split()))


def _classes(labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        return []
    listed = [f"{i}. `{_plain(label)}`" for i, label in enumerate(labels[:_LISTED])]
    if len(labels) > _LISTED:
        listed.append(f"\nand {len(labels) - _LISTED} more, in `rolora.json`.")
    count = len(labels)
    about = (
        f"A classifier of {count} classes: its base is loaded with `num_labels={count}`.\n"
        "In the order of its outputs:"
    )
    return [about, "\n".join(listed)]


def require_named(base: str | None) -> str:
    """The base's id on the hub. Raises BadInput where it is named by a folder of this machine, or
    not at all.
    """
    if base is None or not is_hub_id(base, bare=True):
        what = "no base" if base is None else f"its base by a folder of this machine, {base}"
        raise BadInput(
            f"the adapter names {what}: give --model OWNER/NAME, what the hub calls it, or nobody "
            "can load it there"
        )
    return base


_PROGRAM = """{json}from peft import {config}PeftModel
from transformers import AutoModelFor{kind}, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
{read}base = AutoModelFor{kind}.from_pretrained(
    {base},{more}
)
model = PeftModel.from_pretrained(base, folder)
"""
_READ = """labels = json.load(open(f"{folder}/rolora.json"))["labels"]
"""
_MORE = """
    num_labels=len(labels),
    id2label=dict(enumerate(labels)),
    pad_token_id=tokenizer.pad_token_id,"""
_MERGED = """from transformers import AutoModelFor{kind}, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelFor{kind}.from_pretrained(folder)
"""
