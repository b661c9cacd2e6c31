"""Options that are texts with a grammar of their own: layers, targets, ranks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from rolora.config.options.names import TRACKERS
from rolora.errors import BadInput

_LAST = re.compile(r"\s*last\s+([0-9]{1,9})\s+of\s+([0-9]{1,9})\s*")


def parse_ranks(text: str | None) -> tuple[int, ...] | None:
    """ "2,4,8" → (2, 4, 8)."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise BadInput(f"--client-ranks {text!r}: expected whole numbers above 0, such as 2,4,8")
    return tuple(map(int, parts))


def parse_trackers(text: str | None) -> tuple[str, ...]:
    """ "tensorboard,wandb" → names, each once; none of None and of "none"."""
    if text is None or text == "none":
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in TRACKERS:
            raise BadInput(
                f"--track {text}: expected {', '.join(TRACKERS)} or none{nearest(name, TRACKERS)}"
            )
    return names


def parse_layers(text: str | None, blocks: int | None = None) -> tuple[int, ...] | None:
    """ "18-23" or "0,2,4-5" → indices; "last 6 of 24" → as large a part of the model's `blocks`,
    one at least. Of an unknown number of blocks only the text is checked.
    """
    if text is None:
        return None
    part_of = _LAST.fullmatch(text)
    if part_of:
        some, whole = map(int, part_of.groups())
        if not 0 < some <= whole:
            raise BadInput(f"--layers {text!r}: expected 1 to {whole} of {whole}")
        if blocks is None:
            return None
        return tuple(range(blocks - max(1, round(some * blocks / whole)), blocks))
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if (
            not first.isdigit()
            or (last and not last.isdigit())
            or (last and int(last) < int(first))
        ):
            raise BadInput(
                f"--layers {text!r}: expected indices and ranges, such as 18-23 or 0,2,4-5, or a "
                "part, such as 'last 6 of 24'"
            )
        indices += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(indices)))


def parse_targets(text: str) -> str | tuple[str, ...]:
    """ "q_proj,v_proj" → names, "none" → no name; "auto", "all-linear" and regular expressions stay
    as they are.
    """
    if text.strip() == "none":
        return ()
    if text in ("auto", "all-linear") or not all(c.isalnum() or c in "_., " for c in text):
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_parameters(text: str | None) -> tuple[str, ...]:
    """ "experts.gate_up_proj,experts.down_proj" → ends of parameters' paths."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not names:
        raise BadInput(
            f"--target-parameters {text!r}: expected the ends of parameters' paths, such as "
            "experts.gate_up_proj,experts.down_proj"
        )
    return names


def nearest(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
