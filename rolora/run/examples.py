"""Rows that become examples; what is cut, and what there is nothing to learn from, is counted."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from rolora.data import streamed
from rolora.data.files import numbered
from rolora.data.stored import Unstorable, store
from rolora.errors import BadInput
from rolora.recipes import Measure, Recipe

_QUANTILES = (0, 50, 90, 99, 100)
_AT_ONCE = 2000  # rows that are encoded at a time where there are many


@dataclass
class Tally:
    """Of all examples, the dropped ones too: `tokens` before any cut, and how many were `cut`;
    `dropped`: numbers of rows by reason. `place`: where examples lie, if not in memory as few do.
    """

    tokens: array = field(default_factory=lambda: array("q"))
    cut: array = field(default_factory=lambda: array("q"))
    dropped: dict[str, list[int]] = field(default_factory=dict)
    place: str | None = None

    @property
    def lost(self) -> int:
        """How many examples were dropped."""
        return sum(map(len, self.dropped.values()))

    def add(self, measures: Sequence[Measure]) -> None:
        self.tokens.extend(measure.tokens for measure in measures)
        self.cut.extend(measure.cut for measure in measures)

    def text(self) -> str:
        """Lengths before any cut, what the cut took, and what was dropped, in words."""
        place = [] if self.place is None else [self.place]
        if not len(self.tokens):
            return "; ".join(place)
        lengths, cut = np.asarray(self.tokens), np.asarray(self.cut)
        quantiles = np.percentile(lengths, _QUANTILES, method="nearest")
        shown = " / ".join(str(int(length)) for length in quantiles)
        parts = [f"{len(lengths)} of {shown} tokens (least / median / 90 % / 99 % / most)"]
        over, tokens = int((cut > 0).sum()), int(cut.sum())
        if over:
            parts.append(
                f"--max-length cuts {over} ({over / len(lengths):.1%}) and "
                f"{tokens / max(int(lengths.sum()), 1):.1%} of all tokens"
            )
        else:
            parts.append("none cut")
        for reason, numbers in self.dropped.items():
            parts.append(f"{len(numbers)} dropped ({reason}: row {_some(numbers)})")
        return "; ".join([*parts, *place])


def encode(
    recipe: Recipe, rows: Sequence[dict], unlearnable: str, where: str, part: str = ""
) -> tuple[Sequence[Any], Sequence[dict], Tally]:
    """(examples that something can be learned from, their rows, what was counted).

    `unlearnable`: "drop", or "refuse" for an error at the first row with nothing to learn from.
    `where` names the file in errors, `part` what of it these rows are. Many examples are encoded
    some at a time, and lie on disk. Raises BadInput for a row that does not fit, and where every
    row would be dropped.
    """
    encoding = _Encoding(recipe, unlearnable, where)
    if len(rows) <= streamed.IN_MEMORY:
        examples: Sequence[Any] = encoding.learnable([], rows)
    else:
        examples = encoding.stored(rows)
    if encoding.places is not None:
        rows = streamed.chosen(rows, np.flatnonzero(np.concatenate(encoding.places)))
    tally = encoding.tally
    if tally.lost and not len(examples):
        reasons = ", ".join(f"{reason} (row {_some(n)})" for reason, n in tally.dropped.items())
        raise BadInput(f"{where}: there is nothing to learn from in any row{part}: {reasons}")
    return examples, rows, tally


class _Encoding:
    """Rows that become examples, some at a time."""

    def __init__(self, recipe: Recipe, unlearnable: str, where: str):
        self.recipe, self.unlearnable, self.where = recipe, unlearnable, where
        self.tally = Tally()
        self.places: list[np.ndarray] | None = None  # bool: which rows stay, where examples tell

    def stored(self, rows: Sequence[dict]) -> Sequence[Any]:
        """All examples, on disk; in memory where they cannot be there, which the tally says."""
        try:
            examples = store(filter(None, self._parts(rows)))
        except Unstorable as error:
            self.tally, self.places = Tally(place=f"in memory: {error}"), None
            return [example for part in self._parts(rows) for example in part]
        self.tally.place = "on disk"
        return examples

    def _parts(self, rows: Sequence[dict]) -> Iterator[list[Any]]:
        """A recipe may tell from the first row how all are to be read: it is part of every part."""
        waiting = iter(rows)
        first, part = [next(waiting)], list(islice(waiting, _AT_ONCE))
        yield self.learnable([], first + part)
        while part := list(islice(waiting, _AT_ONCE)):
            yield self.learnable(first, part)

    def learnable(self, before: list[dict], rows: Sequence[dict]) -> list[Any]:
        """The examples of `rows`, which stand after the rows `before` that are no new ones."""
        try:
            examples = self.recipe.encode([*before, *rows])[len(before) :]
        except BadInput as error:
            raise BadInput(f"{self.where}: {error}") from None
        if not examples or not hasattr(examples[0], "measure"):
            return examples
        measures = [example.measure() for example in examples]
        self.tally.add(measures)
        for (number, _), measure in zip(numbered(rows), measures, strict=True):
            if measure.lacks is None:
                continue
            if self.unlearnable == "refuse":
                raise BadInput(
                    f"{self.where}: row {number}: {measure.lacks}: mend or remove it, or give "
                    "--unlearnable drop"
                )
            self.tally.dropped.setdefault(measure.lacks, []).append(number)
        stay = np.array([measure.lacks is None for measure in measures])
        self.places = [*(self.places or ()), stay]
        return [example for example, stays in zip(examples, stay, strict=True) if stays]


def _some(numbers: list[int]) -> str:
    """The first numbers of rows."""
    more = ", …" if len(numbers) > 3 else ""
    return ", ".join(map(str, numbers[:3])) + more
