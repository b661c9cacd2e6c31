"""The bench that parts measure on: contenders side by side, each of which can only lose its own
row.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.clock import Clock, Sample, copies
from benchmarks.gpu.results import NOW, Results
from rolora_kernels import tuned

LEAST = 3  # rounds of a contest that count, where time runs out


class Doomed(Exception):
    """The device is lost to this process: it has to end, and another one goes on."""


@dataclass(frozen=True)
class Unit:
    """Some contenders on one problem, measured and saved together. `key` starts with its part's
    name; `limit`: seconds that one contender may take, compilation included.
    """

    key: str
    run: Callable[[Bench], None]
    limit: float = 60.0

    @property
    def part(self) -> str:
        return self.key.split(" ")[0]


@dataclass
class Entry:
    """A contender that is ready: its call, and what its row holds besides the time."""

    call: Callable[[int], object]
    about: dict = field(default_factory=dict)


class Bench:
    """What a worker has: device, clock, deadline, results."""

    def __init__(self, results: Results, device: str, seconds: float, patience: float | None):
        self.results, self.device = results, device
        self.smoke: bool = results.about["smoke"]
        self.clock = Clock(device)
        self.end, self.patience = time.monotonic() + seconds, patience
        self.table_name = results.about["gpu"] or "cpu"
        self.unit = Unit("none", lambda bench: None)
        self.rows: list[dict] = []
        self.use_table([])  # what is measured must not follow an older table

    def late(self) -> bool:
        return time.monotonic() > self.end

    def do(self, unit: Unit) -> None:
        """Measures a unit and saves it; what goes wrong in it is a row."""
        self.unit, self.rows = unit, []
        self.use_table(self.results.tuned)
        began = time.monotonic()
        tuned_before = len(self.results.tuned)
        self.note(None)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what the unit before has left in pieces
        try:
            unit.run(self)
        except Doomed:
            raise
        except Exception as problem:
            self._raise_if_fatal(problem)
            del self.results.tuned[tuned_before:]
            self.add(unit.part, problem=one_line(problem))
        for name, why in self.results.lost.get(unit.key, {}).items():
            if not any(row.get("name") == name for row in self.rows):
                self.add(unit.part, name=name, problem=why)
        self.results.rows += self.rows
        self.results.rows.append(
            {"unit": unit.key, "part": "time", "seconds": round(time.monotonic() - began, 2)}
        )
        self.results.done.append(unit.key)
        self.results.save()

    def note(self, contender: str | None, problem: str | None = None) -> None:
        """Tells who watches what begins now."""
        limit = self.unit.limit if self.patience is None else self.patience
        now = {"unit": self.unit.key, "contender": contender, "limit": limit, "problem": problem}
        path = self.results.folder / NOW
        part = path.with_suffix(".part")
        part.write_text(json.dumps(now | {"at": time.time()}))
        part.replace(path)  # not flushed to the disk: it is read while this process lives

    def add(self, part: str, **values) -> None:
        """Keeps a row of the unit, and prints it."""
        self.rows.append({"unit": self.unit.key, "part": part, **values})
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(part, *shown, flush=True)

    def attempt(self, part: str, name: str, work: Callable[[], object], **about) -> object | None:
        """What a contender's work gives; None, and a row with the problem, where it fails."""
        if name in self.results.lost.get(self.unit.key, {}):
            return None  # it took an earlier process down, and has its row in the end
        self.note(name)
        try:
            found = work()
            self.clock.sync()
            return found
        except Exception as problem:
            self._raise_if_fatal(problem)
            self.add(part, name=name, problem=one_line(problem), **about)
            return None

    def contest(
        self,
        part: str,
        makes: Mapping[str, Callable[[], Entry]],
        base: str,
        *,
        rounds: int = 15,
        inner: int = 4,
        flops: float = 0.0,
        moved: float = 0.0,
        tables: Mapping[str, list[dict]] | None = None,
        **about,
    ) -> dict[str, list[Sample]]:
        """Makes contenders, times them in rotation, and adds a row for each. `tables`: rows that
        dispatch follows while that contender is made and timed.
        """
        entries: dict[str, Entry] = {}
        follow = tables or {}
        for name, make in makes.items():
            self.use_table(follow.get(name, self.results.tuned))
            made = self.attempt(part, name, lambda make=make: _warm(make(), self.clock), **about)
            if isinstance(made, Entry):
                entries[name] = made
        times = self._rotate(part, entries, rounds, inner, follow, about)
        self.use_table(self.results.tuned)
        for name, samples in times.items():
            rates = {}
            ms = statistics.median(s.ms for s in samples)
            if flops:
                rates["tflops"] = flops / ms / 1e9
            if moved:
                rates["gb_a_second"] = moved / ms / 1e6
            row = {"name": name, **_summary(samples), **rates, **entries[name].about, **about}
            if base in times:
                row[f"ratio_to_{base}"] = statistics.median(
                    a.ms / b.ms for a, b in zip(samples, times[base], strict=False)
                )
            self.add(part, **row)
        return times

    def _rotate(self, part, entries, rounds, inner, follow, about) -> dict[str, list[Sample]]:
        rounds, inner = (1, 1) if self.smoke else (rounds, inner)
        times: dict[str, list[Sample]] = {name: [] for name in entries}
        order = random.Random(0)
        for number in range(rounds):
            if number >= LEAST and self.late():
                break
            for name in order.sample(list(times), len(times)):
                self.use_table(follow.get(name, self.results.tuned))
                call = entries[name].call
                sample = self.attempt(
                    part, name, lambda call=call: self.clock.sample(call, inner), **about
                )
                if isinstance(sample, Sample):
                    times[name].append(sample)
                else:
                    del times[name]
        return times

    def copies(self, nbytes: int) -> int:
        """How many inputs of so many bytes a contest takes in turn."""
        return 1 if self.device == "cpu" else copies(nbytes, self.results.about["l2_bytes"])

    def use_table(self, rows: list[dict]) -> None:
        """From now on dispatch follows these rows."""
        about = self.results.about
        table = {
            "gpu": self.table_name,
            "capability": about["capability"],
            "commit": about["commit"],
            "rows": rows,
        }
        tuned.install(table if rows else {}, self.table_name)

    def _raise_if_fatal(self, problem: Exception) -> None:
        if self.device == "cuda" and _lost():
            self.note(self._noted(), one_line(problem))
            raise Doomed(one_line(problem)) from problem

    def _noted(self) -> str | None:
        return json.loads((self.results.folder / NOW).read_text())["contender"]


def _lost() -> bool:
    """Whether the device answers nothing more in this process, as after an illegal access."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as problem:
        return not isinstance(problem, torch.OutOfMemoryError)
    return False


def _warm(entry: Entry, clock: Clock) -> Entry:
    entry.call(clock.turn)
    return entry


def _summary(samples: list[Sample]) -> dict:
    ms = [sample.ms for sample in samples]
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 2 else [min(ms), ms[0], max(ms)]
    return {
        "ms": statistics.median(ms),
        "q1": quartiles[0],
        "q3": quartiles[-1],
        "host_ms": statistics.median(sample.host_ms for sample in samples),
        "queued": all(sample.queued for sample in samples),
        "rounds": len(samples),
    }


def one_line(problem: BaseException) -> str:
    """An error as a row holds it."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:300]
