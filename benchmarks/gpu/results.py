"""What a run has measured so far: one JSON file that is whole at every moment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rolora import atomic
from rolora.errors import BadInput

FILE = "gpu.json"
NOW = "now.json"  # what is being measured, for who watches over the process that measures


@dataclass
class Results:
    """`rows`: what was measured; `done`: the keys of the units that are complete; `lost`: unit →
    contender → why it has no row; `tuned`: the rows of a table for rolora_kernels/tuned.
    """

    folder: Path
    about: dict
    rows: list[dict] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    tuned: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Results | None:
        """The results that a folder holds, None where it holds none."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(folder, **json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as problem:
            raise BadInput(
                f"{path} is no file of this command ({problem}): name another folder"
            ) from None

    @classmethod
    def open(cls, folder: Path, about: dict) -> Results:
        """The results to go on with, or new ones. Raises BadInput where the folder's were measured
        with something else: two machines or two versions make no table.
        """
        found = cls.load(folder)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, about)
        other = [name for name, value in about.items() if found.about.get(name) != value]
        if other:
            name = other[0]
            raise BadInput(
                f"{folder / FILE} was measured with {name} {found.about.get(name)!r}, this is "
                f"{about[name]!r}: name another folder"
            )
        return found

    def save(self) -> None:
        kept = asdict(self)
        del kept["folder"]
        atomic.write_text(self.folder / FILE, json.dumps(kept, indent=1) + "\n")

    def lose(self, unit: str, contender: str | None, why: str) -> None:
        """A contender has no row in a unit; without one named, the whole unit is given up."""
        if contender is None:
            self.rows.append({"unit": unit, "part": unit.split(" ")[0], "problem": why})
            self.done.append(unit)
        else:
            self.lost.setdefault(unit, {})[contender] = why
        self.save()
