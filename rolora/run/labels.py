"""Short names for runs, from what differs among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

_FIRST = ("method", "model", "dataset", "benchmark", "train_file", "task_type")  # if they tell
_LONGEST = 32  # characters of a value


@dataclass(frozen=True)
class Labels:
    """`texts`: one a run, the same for runs that differ in nothing. `untold`: options that differ
    too, but are not needed to tell the runs apart.
    """

    texts: list[str]
    untold: list[str]


def of(runs: Sequence[dict[str, Any]]) -> Labels:
    """Labels of runs with these options: the method, and as few others as tell all of them
    apart.
    """
    names = list(dict.fromkeys(name for options in runs for name in options))
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    told = {name: [_told(options.get(name)) for options in runs] for name in names}
    differing = [name for name in names if len(set(told[name])) > 1]
    chosen = ["method"]
    wanted = _kinds(told, differing)
    while _kinds(told, chosen) < wanted:
        rest = [name for name in differing if name not in chosen]
        chosen.append(max(rest, key=lambda name: _kinds(told, [*chosen, name])))
    shown = {name: _short(told[name]) for name in chosen}
    texts = [
        "+".join(_part(name, shown[name][run]) for name in chosen if shown[name][run])
        for run in range(len(runs))
    ]
    return Labels(texts, [name for name in differing if name not in chosen])


def _kinds(told: dict[str, list[str]], names: Sequence[str]) -> int:
    """How many runs these options tell apart."""
    return len(set(zip(*(told[name] for name in names), strict=True))) if names else 1


def _told(value: Any) -> str:
    """A value as text; nothing for an option that is off or was not there."""
    if value is None or value is False:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _part(name: str, text: str) -> str:
    if name == "method":
        return text
    flag = name.replace("_", "-")
    return flag if text == "True" else f"{flag}={text}"


def _short(texts: Sequence[str]) -> list[str]:
    """The ends of paths and of long texts, as far as they still differ as the whole does."""
    kinds = len(set(texts))
    for parts in range(1, 20):
        ends = ["/".join(PurePath(text).parts[-parts:]) for text in texts]
        if len(set(ends)) == kinds:
            break
    else:
        ends = list(texts)
    cut = [text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}" for text in ends]
    return cut if len(set(cut)) == kinds else ends
