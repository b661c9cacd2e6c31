"""What a private run has released so far: counted before the noise of a release is drawn.

A round that runs again after a crash is a second release of the same clients' data, so it is
charged again. The count is on disk before anything of the release exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rolora import atomic
from rolora.errors import BadInput

NAME = "privacy.json"


class Ledger:
    """The number of releases, in the file `path` (mode 0600) or, without one, in memory; `most`:
    how many a run may make.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.releases = 0
        self.most: int | None = None

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger of a run to go on with; raises BadInput where its count cannot be known."""
        ledger = cls(path)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            count = stored["releases"]
        except FileNotFoundError:
            raise BadInput(
                f"--resume: {path} is missing, so how much privacy is spent cannot be known: "
                "start a new run"
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BadInput(
                f"--resume: {path} cannot be read ({type(error).__name__}), so how much privacy is "
                "spent cannot be known: start a new run"
            ) from None
        if type(count) is not int or not 0 <= count < 1 << 53:
            raise BadInput(f"--resume: {path} says {count!r:.80} releases: start a new run")
        ledger.releases = count
        return ledger

    def begin(self) -> None:
        """Writes the count of a run that has released nothing yet."""
        self._write(self.releases)

    def charge(self) -> None:
        """Counts one release more; call it before the noise is drawn."""
        self._write(self.releases + 1)
        self.releases += 1

    @property
    def is_spent(self) -> bool:
        """Whether no release may follow."""
        return self.most is not None and self.releases >= self.most

    def attempts(self, most: int) -> Iterator[int]:
        """0, 1, … below `most`: a first attempt at a round, and others while they may be charged
        too.
        """
        for attempt in range(most):
            if attempt and self.is_spent:
                return
            yield attempt

    def _write(self, releases: int) -> None:
        if self.path is not None:
            text = json.dumps({"releases": releases}) + "\n"
            atomic.write_text(self.path, text, mode=0o600)
