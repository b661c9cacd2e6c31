"""Rows that become examples; what is cut, and what there is nothing to learn from, is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rolora.data.files import numbered
from rolora.errors import BadInput
from rolora.recipes import Measure, Recipe

_QUANTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class Tally:
    """`measures` of all examples, the dropped ones too; `dropped`: numbers of rows by reason."""

    measures: list[Measure] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """How many examples were dropped."""
        return sum(map(len, self.dropped.values()))

    def text(self) -> str:
        """Lengths before any cut, what the cut took, and what was dropped, in words."""
        lengths = [m.tokens for m in self.measures]
        quantiles = np.percentile(lengths, _QUANTILES, method="nearest")
        shown = " / ".join(str(int(length)) for length in quantiles)
        parts = [f"{len(lengths)} of {shown} tokens (least / median / 90 % / 99 % / most)"]
        over, tokens = sum(m.cut > 0 for m in self.measures), sum(m.cut for m in self.measures)
        if over:
            parts.append(
                f"--max-length cuts {over} ({over / len(lengths):.1%}) and "
                f"{tokens / max(sum(lengths), 1):.1%} of all tokens"
            )
        else:
            parts.append("none cut")
        for reason, numbers in self.dropped.items():
            parts.append(f"{len(numbers)} dropped ({reason}: row {_some(numbers)})")
        return "; ".join(parts)


def encode(
    recipe: Recipe, rows: Sequence[dict], unlearnable: str, where: str, part: str = ""
) -> tuple[list[Any], Sequence[dict], Tally]:
    """(examples that something can be learned from, their rows, what was counted).

    `unlearnable`: "drop", or "refuse" for an error at the first row with nothing to learn from.
    `where` names the file in errors, `part` what of it these rows are. Raises BadInput for a row
    that does not fit, and where every row would be dropped.
    """
    try:
        examples = recipe.encode(rows)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if not examples or not hasattr(examples[0], "measure"):
        return examples, rows, Tally()
    tally, kept = Tally([example.measure() for example in examples]), []
    for place, (number, _) in enumerate(numbered(rows)):
        reason = tally.measures[place].lacks
        if reason is None:
            kept.append(place)
        elif unlearnable == "refuse":
            raise BadInput(
                f"{where}: row {number}: {reason}: mend or remove it, or give --unlearnable drop"
            )
        else:
            tally.dropped.setdefault(reason, []).append(number)
    if not kept:
        reasons = ", ".join(f"{reason} (row {_some(n)})" for reason, n in tally.dropped.items())
        raise BadInput(f"{where}: there is nothing to learn from in any row{part}: {reasons}")
    return [examples[i] for i in kept], [rows[i] for i in kept], tally


def _some(numbers: list[int]) -> str:
    """The first numbers of rows."""
    more = ", …" if len(numbers) > 3 else ""
    return ", ".join(map(str, numbers[:3])) + more
