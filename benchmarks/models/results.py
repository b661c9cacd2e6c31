"""Where the rows are kept."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).parent.parent / "results" / "models.json"


def rows(part: str) -> list[dict]:
    """The rows of one part: speed, quantised, attention or matmuls."""
    return json.loads(PATH.read_text(encoding="utf-8"))[part]
