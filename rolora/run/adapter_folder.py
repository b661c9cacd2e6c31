"""What lies beside PEFT's files in an adapter's folder: how it is to be evaluated (`rolora.json`),
and a card that says how PEFT loads it. And where the base is that the folder names.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora import atomic, builtin, config
from rolora.config import Config
from rolora.config.options import Task
from rolora.errors import BadInput

_KEPT = {field.name for field in dataclasses.fields(Task)} | {"benchmark", "quantize"}
SIDECAR, CARD = "rolora.json", "README.md"
_BUILTIN = ("rolora", "builtin", "model")  # the end of its path, wherever rolora is installed
_LISTED = 100  # classes that the card lists
# What a tokenizer's files are called.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
              "vocab.*", "merges.txt", "*.model", "additional_chat_templates/*")  # fmt: skip
_PLACES = 3  # folders above the adapter's in which its base may lie


@dataclass(frozen=True)
class Kept:
    """What `rolora.json` says: options of `--` names, and the classes in the head's order."""

    options: dict[str, Any]
    labels: list[str] | None


def write(folder: Path, kept: Kept, base: str) -> None:
    """Both files; `base` as PEFT's configuration names it."""
    text = json.dumps({"options": kept.options, "labels": kept.labels}, indent=2)
    atomic.write_text(folder / SIDECAR, text + "\n")
    atomic.write_text(folder / CARD, card(base, kept.labels))


def read(folder: Path) -> Kept | None:
    """What is beside the adapter; None for a folder that another program wrote.

    Raises BadInput, naming the file, for what is damaged or no value of an option. What would
    decide of the machine here (threads, device) is left out.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        given, labels = stored["options"], stored["labels"]
        texts = labels is None or all(isinstance(label, str) for label in labels)
        if not isinstance(given, dict) or not texts:
            raise TypeError("options are a table, labels are texts")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{path} is damaged: remove it and give the columns as flags") from None
    options = {}
    for name, value in given.items():
        if name in _KEPT and value is not None:
            options[name] = value
    try:
        config.check(Config().with_values(**options))
    except BadInput as error:
        raise BadInput(
            f"{path} holds what no option takes, {error}: remove it and give the columns as flags"
        ) from None
    return Kept(options, labels)


def to_record(model: str | None) -> str:
    """How an adapter names its base, so that it is found from any folder: a hub id, or a whole
    path.
    """
    if model is None:
        return str(builtin.MODEL)
    path = Path(model)
    return str(path.absolute()) if path.exists() else model


def copy(folder: Path, target: Path) -> None:
    """What lies beside PEFT's files, the tokenizer's among it, to another adapter's folder."""
    for pattern in (SIDECAR, CARD, *_TOKENIZER):
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                place = target / path.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_bytes(place, path.read_bytes())


def find_base(folder: Path, name: str) -> str:
    """The model that `name`, as the adapter in `folder` has it, stands for here: the built-in one
    by its name, a folder where it was, or one of that name beside the adapter, or a hub id.
    """
    path = Path(name)
    if path.parts[-3:] == _BUILTIN:
        return str(builtin.MODEL)
    if path.is_dir():
        return str(path.absolute())
    absolute = folder.absolute()
    for place in (absolute, *list(absolute.parents)[:_PLACES]):
        for tail in dict.fromkeys((name, path.name)):
            if (place / tail / "config.json").is_file():
                return str(place / tail)
    if path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise BadInput(
            f"--adapter {folder}: its base {name} is not here: give --model, or put the base's "
            f"folder {path.name} beside the adapter's"
        )
    return name


def named_from_anywhere(folder: Path, name: str) -> str:
    """`name` as another adapter's folder may have it: its whole path, where it is here."""
    try:
        return find_base(folder, name)
    except BadInput:
        return name


def card(base: str, labels: list[str] | None) -> str:
    """A model card: what the base is, and a program that loads the adapter with PEFT."""
    said = "" if Path(base).exists() else f"base_model: {json.dumps(base)}\n"
    if labels is None:
        return _CARD.format(said=said, base=base, classes="", program=_CAUSAL.format(base=base))
    listed = [f"{i}. `{' '.join(label.split())}`" for i, label in enumerate(labels[:_LISTED])]
    if len(labels) > _LISTED:
        listed.append(f"\nand {len(labels) - _LISTED} more, in `{SIDECAR}`.")
    classes = (
        f"A classifier of {len(labels)} classes: its base is loaded with "
        f"`num_labels={len(labels)}`.\nIn the order of its outputs:\n\n"
    )
    classes += "\n".join(listed) + "\n\n"
    program = _CLASSIFIER.format(base=base)
    return _CARD.format(said=said, base=base, classes=classes, program=program)


_CARD = """---
library_name: peft
tags: [lora, federated, rolora]
{said}---

# A LoRA adapter trained by RoLoRA

Base model: `{base}`

{classes}```python
{program}```

`python -m rolora.evaluate --adapter .` reads from `rolora.json` how it is to be evaluated.
"""
_CAUSAL = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, folder)
"""
_CLASSIFIER = """import json

from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
labels = json.load(open(f"{{folder}}/rolora.json"))["labels"]
base = AutoModelForSequenceClassification.from_pretrained(
    {base!r},
    num_labels=len(labels),
    id2label=dict(enumerate(labels)),
    pad_token_id=tokenizer.pad_token_id,
)
model = PeftModel.from_pretrained(base, folder)
"""
