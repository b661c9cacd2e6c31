"""`rolora.json`, beside PEFT's files: how the adapter is to be evaluated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rolora import config
from rolora.config import Config
from rolora.config.options import Task
from rolora.errors import BadInput

SIDECAR = "rolora.json"
_KEPT = {field.name for field in dataclasses.fields(Task)} | {"benchmark", "quantize"}


def read(folder: Path) -> tuple[dict[str, Any], list[str] | None]:
    """(options, labels) that an adapter folder says about itself; ({}, None) where it says nothing.

    Raises BadInput, naming the file, for what is damaged or no value of an option.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return {}, None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        given, labels = stored["options"], stored["labels"]
        texts = labels is None or all(isinstance(label, str) for label in labels)
        if not isinstance(given, dict) or not texts:
            raise TypeError("options are a table, labels are texts")
    except (ValueError, KeyError, TypeError):
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
    return options, labels
