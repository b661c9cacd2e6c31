"""What lies beside PEFT's files in an adapter's folder: how it is to be evaluated and what it was
trained on (`rolora.json`), and its card. And where the base is that the folder names.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rolora import atomic, builtin, config
from rolora.config import Config
from rolora.config.options import Task
from rolora.errors import BadInput
from rolora.run import card
from rolora.run.card import Facts

_KEPT = {field.name for field in dataclasses.fields(Task)} | {"benchmark", "quantize"}
SIDECAR, CARD = "rolora.json", "README.md"
_BUILTIN = ("rolora", "builtin", "model")  # the end of its path, wherever rolora is installed
# What a tokenizer's files are called.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
              "vocab.*", "merges.txt", "*.model", "additional_chat_templates/*")  # fmt: skip
_PLACES = 3  # folders above the adapter's in which its base may lie


@dataclass(frozen=True)
class Kept:
    """What `rolora.json` says: options of `--` names, the classes in the head's order, and what a
    card tells of the run.
    """

    options: dict[str, Any]
    labels: list[str] | None
    facts: Facts | None = None


def write(folder: Path, kept: Kept, base: str) -> None:
    """Both files; `base` as PEFT's configuration names it."""
    whole: dict[str, Any] = {"options": kept.options, "labels": kept.labels}
    if kept.facts is not None:
        whole["trained"] = asdict(kept.facts)
    atomic.write_text(folder / SIDECAR, json.dumps(whole, indent=2) + "\n")
    atomic.write_text(folder / CARD, card.text(base, kept.labels, kept.facts))


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
        facts = card.read(stored["trained"]) if "trained" in stored else None
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
    return Kept(options, labels, facts)


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
    _copy(folder, target, (SIDECAR, CARD, *_TOKENIZER))


def copy_tokenizer(folder: Path, target: Path) -> None:
    """The tokenizer's files, a chat template among them."""
    _copy(folder, target, _TOKENIZER)


def _copy(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
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
