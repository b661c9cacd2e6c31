"""`python -m rolora.report RUN…`: run folders side by side, as a table and one picture, or as an
HTML page, which may be live.
"""

from __future__ import annotations

from pathlib import Path

import click

from rolora import atomic, cli
from rolora.errors import BadInput
from rolora.reporting import live, pages, table
from rolora.reporting.runs import Run, labelled, read
from rolora.run import plots

HELP = """Draws any run folders together: the metric and the loss against rounds, bytes and
seconds, and how far clients are apart.

Runs that differ in nothing but their seed are one line, mean and standard deviation. An .html page
holds the table, the picture, every round and what the models write, and needs nothing else; --serve
shows it of runs that are still going on, to this machine alone."""
_PICTURES = (".png", ".pdf", ".svg")
FLAGS = [
    click.Argument(["runs"], nargs=-1, required=True, metavar="RUN…"),
    cli.Flag(
        ["--output", "-o"],
        metavar="FILE.png|.html",
        help="the picture or the page; a table goes beside it as .csv  [report.png]",
    ),
    cli.Flag(["--overwrite"], is_flag=True, help="replace what --output names"),
    cli.Flag(
        ["--target"],
        type=float,
        help="what rounds and bytes are counted to  [95 % of the best mean; a loss over it by 5 %]",
    ),
    cli.Flag(["--serve"], is_flag=True, help="a live page, until Ctrl-C; writes no file"),
    cli.Flag(
        ["--port"],
        type=click.IntRange(0, 65535),
        help="of the live page on 127.0.0.1; 0: any that is free  [8765]",
    ),
]


def report(
    runs: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    target: float | None,
    serve: bool,
    port: int | None,
) -> None:
    paths = [Path(run) for run in dict.fromkeys(runs)]
    if serve:
        if output is not None or overwrite:
            raise BadInput("--serve writes no file: leave --output and --overwrite out")
        _serve(paths, 8765 if port is None else port, target)
        return
    if port is not None:
        raise BadInput("--port is for --serve: add it, or leave --port out")
    file = Path(output or "report.png")
    if file.suffix.lower() not in (*_PICTURES, ".html"):
        raise BadInput(f"--output {output}: expected a .png, .pdf, .svg or .html file")
    for path in (file, file.with_suffix(".csv")):
        if path.exists() and not overwrite:
            raise BadInput(f"{path} exists: name another --output, or add --overwrite")
    found = [read(path) for path in paths]
    notes = _require_trained(found)
    headlines = {run.headline for run in found}
    if len(headlines) > 1:
        raise BadInput(
            f"these runs have different metrics ({', '.join(sorted(headlines))}): report on them "
            "one kind at a time"
        )
    groups, untold = labelled(found)
    lines, target = table.of(groups, target)
    notes.append(table.target_text(found[0].headline, target))
    if untold:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in untold)
        notes.append(f"in no label, although these runs differ in it: {flags}")
    print(table.as_markdown(lines) + "\n")
    for note in notes:
        print(note)
    if file.suffix.lower() == ".html":
        _write_page(groups, lines, notes, file)
    else:
        write(groups, lines, file)


def _serve(paths: list[Path], port: int, target: float | None) -> None:
    for path in paths:
        if not path.is_dir():
            raise BadInput(f"{path} is no folder: give the --output-dir of a run")
    live.serve(port, pages.Live(paths, target).page)


def _require_trained(runs: list[Run]) -> list[str]:
    """Raises BadInput for runs that ended before a round was evaluated; says which diverged."""
    empty = [str(run.path) for run in runs if not run.diverged and run.rows[-1]["round"] == 0]
    if empty:
        raise BadInput(
            f"{', '.join(empty)} ended before the first round: leave it out, or go on with it"
        )
    diverged = [str(run.path) for run in runs if run.diverged]
    if len(diverged) == len(runs):
        raise BadInput(f"{', '.join(diverged)} diverged: there is nothing to show")
    return [f"{path} diverged: it counts as 0 in the table" for path in diverged]


def write(groups: dict[str, list[Run]], lines: list[dict], picture: Path) -> None:
    """The table as CSV beside the picture, and the picture where matplotlib is installed; says what
    was written.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(picture.with_suffix(".csv"), table.as_csv(lines))
    headline = next(iter(groups.values()))[0].headline
    drawn = plots.draw_together(
        {label: [run.rows for run in runs] for label, runs in groups.items()}, headline, picture
    )
    print(f"{picture.with_suffix('.csv')}" + (f", {picture}" if drawn else f"; {pages.NO_PICTURE}"))


def _write_page(
    groups: dict[str, list[Run]], lines: list[dict], notes: list[str], file: Path
) -> None:
    """The table as CSV beside the page; says what was written."""
    text = pages.static(groups, lines, notes)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file.with_suffix(".csv"), table.as_csv(lines))
    atomic.write_text(file, text)
    print(f"{file.with_suffix('.csv')}, {file}")


command = cli.command("report", HELP, FLAGS, report)

if __name__ == "__main__":
    cli.run(command)
