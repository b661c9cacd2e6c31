"""Runs that are compared: each in a folder of its own, all of one base model in memory, what is
finished not repeated, and a rate that is chosen on a slice of the training data.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rolora import variants
from rolora.errors import Diverged
from rolora.recipes import metrics
from rolora.reporting.runs import Run, read
from rolora.run.folder import CONFIG, SUMMARY, RunFolder
from rolora.train import resolved, resumed

_TUNING = 1000  # the first seed that judges rates
_SLICE = 0.15  # of the training data, where rates are chosen and no --validation-fraction is given


@dataclass
class Comparison:
    """Runs in `folder`, all of one base model in memory. `given` are the flags that hold for
    all.
    """

    folder: Path
    given: dict[str, Any]
    config_file: str | None
    preset: str | None
    shelf: Any = field(default=None)

    def run(self, name: str, place: str, **values: Any) -> Run:
        """The run of a variant with these options: the one in `folder`, finished where it is not,
        or a new one.
        """
        path = self.folder / place
        if not (path / SUMMARY).is_file():
            self._train(path, self.given | variants.parse(name) | values)
        return read(path)

    def _train(self, path: Path, values: dict[str, Any]) -> None:
        from rolora.hf.shelf import Shelf
        from rolora.run.session import Session

        again = (path / CONFIG).is_file()
        wanted = resolved(values | {"output_dir": str(path)}, self.config_file, self.preset)
        settled = resumed({"output_dir": str(path)}, None, None) if again else wanted
        self.shelf = self.shelf or Shelf()
        session = Session(settled, RunFolder(path), again, quiet=True, shelf=self.shelf)
        try:
            session.run()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", flush=True)
            raise
        except Diverged as error:
            RunFolder(path).summarise({"diverged": str(error), "headline": session.job.headline})

    def best_rate(self, name: str, rates: list[float], seeds: int) -> float:
        """The rate with the best mean, over seeds and the last two evaluations of each, on the
        validation slice; of equal ones that with the lowest loss.
        """
        scores: dict[float, tuple[float, float]] = {}
        for rate in rates:
            runs = [
                self.run(
                    name,
                    f"tuning/{place_of(name)}-lr{rate:g}-seed{seed}",
                    lr=rate,
                    seed=seed,
                    validation_fraction=self.given.get("validation_fraction") or _SLICE,
                )
                for seed in range(_TUNING, _TUNING + seeds)
            ]
            headline = runs[0].headline
            value, loss = (
                statistics.fmean(_settled(run, metric) for run in runs)
                for metric in (headline, "loss")
            )
            scores[rate] = metrics.rank(headline, value, loss)
            print(
                f"{name}: lr {rate:g}: {headline} {value:.4f}, loss {loss:.4f} on the validation "
                f"slice, the mean of the last two evaluations and of {seeds} seeds",
                flush=True,
            )
        return min(scores, key=lambda rate: scores[rate])


def _settled(run: Run, metric: str) -> float:
    if run.diverged:
        return metrics.worst(metric)
    found = [row["eval"][metric] for row in run.rows if row["eval"]]
    return statistics.fmean(found[-2:])


def place_of(name: str) -> str:
    """A variant's text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+=-]", "-", name)
