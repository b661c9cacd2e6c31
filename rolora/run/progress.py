"""What a run says while it goes: bars and a table on a terminal, plain lines when piped, one line
with --quiet.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class Reporter:
    """Speaks for one run of `rounds` rounds; `headline` is the metric that a line shows."""

    def __init__(self, rounds: int, clients: int, headline: str, quiet: bool = False):
        self.console = Console(highlight=False, soft_wrap=True)
        self.rounds, self.clients, self.headline, self.quiet = rounds, clients, headline, quiet
        self.bar: Progress | None = None
        self.begin()
        if self.console.is_terminal and not quiet:
            self.bar = Progress(
                TextColumn("round {task.fields[number]}/" + str(rounds) + " {task.fields[phase]}"),
                BarColumn(),
                TextColumn("{task.completed} of {task.total} clients, elapsed"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("round", total=clients, number=0, phase="")

    def begin(self) -> None:
        """The clock of what is left starts: the next round is the first that it counts."""
        self.began, self.counted = time.monotonic(), 0

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def client_done(self, number: int, done: int, phase: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, number=number, phase=phase)

    def round_done(self, row: dict) -> None:
        """One line: round, phase, loss, metric, tokens a second, MB up and down, time left."""
        number = row["round"]
        parts = [f"round {number}/{self.rounds}", row["phase"] or "start"]
        if number > 0 and row["clients"] == 0:
            parts.append("nobody took part")
        if row["train_loss"] is not None:
            parts.append(f"loss {row['train_loss']:.4f}")
        if row["eval"] is not None:
            if self.headline != "loss":  # which stands there anyway
                parts.append(f"{self.headline} {row['eval'][self.headline]:.4f}")
            parts.append(f"eval loss {row['eval']['loss']:.4f}")
        if row["tokens"]:
            if "staleness" not in row:  # else its answers were trained in other rounds too
                parts.append(f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s")
            parts.append(f"up {row['bytes_up'] / 1e6:.2f} MB down {row['bytes_down'] / 1e6:.2f} MB")
            if "epsilon" in row:
                parts.append(f"ε {row['epsilon']:.3g}")
        if "simulated_seconds" in row:
            parts.append(f"at {row['simulated_seconds']:,.0f} simulated s")
        if number > 0:
            self.counted += 1
            left = (time.monotonic() - self.began) / self.counted * (self.rounds - number)
            parts.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
        self.say("  ".join(parts))
        for failure in row["failures"]:
            self.say(f"  not counted: {failure}")
        if number == 0:
            self.begin()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns on a terminal, `name: value` lines when piped."""
        if self.quiet:
            return
        if not self.console.is_terminal:
            for name, value in rows:
                self.say(f"{name}: {value}")
            return
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        for name, value in rows:
            table.add_row(name, Text(value))  # a path may hold what rich takes for markup
        self.console.print(table)
