"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Whatever a run wrote (labels, options, samples) is text here and never markup.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

_ROUNDS = 500  # the most rounds that a table shows, the newest
_COLUMNS = (
    ("round", "round"),
    ("phase", "phase"),
    ("training loss", "train_loss"),
    ("bytes up", "bytes_up"),
    ("bytes down", "bytes_down"),
    ("clients", "clients"),
    ("tokens", "tokens"),
    ("seconds", "seconds"),
)
# Only what stands in the page itself is used, whatever gets into it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
_LIVE = "; script-src 'self'; connect-src 'self'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .7rem; text-align: left; }
td.number { text-align: right; }
img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .5rem; }
.wide { overflow-x: auto; }
.state { color: #666; font-weight: normal; }
"""


@dataclass(frozen=True)
class Section:
    """What the page tells of one run.

    Attributes:
        name: a heading. state: such as `round 3 of 10`.
        rows: of metrics.jsonl. options: of config.toml.
        samples: (prompt, what the model wrote, what the data say) of the last evaluation.
    """

    name: str
    state: str
    rows: list[dict]
    options: dict[str, Any]
    samples: list[tuple[str, str, str]] = field(default_factory=list)


def text(
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    picture: bytes | None,
    runs: Sequence[Section],
    live: bool = False,
) -> str:
    """The whole page: a table (`lines`, the first its head), notes under it, a picture (SVG) and a
    section a run. `live`: asks for itself again and again.
    """
    policy = _POLICY + (_LIVE if live else "")
    script = '<script src="live.js" defer></script>\n' if live else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>RoLoRA report</title>\n<style>{_STYLE}</style>\n{script}</head>\n<body>\n"
        f"<h1>RoLoRA report</h1>\n<main>\n{body(lines, notes, picture, runs)}</main>\n"
        "</body>\n</html>\n"
    )


def body(
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    picture: bytes | None,
    runs: Sequence[Section],
) -> str:
    """What is between the page's `<main>` tags."""
    parts = []
    if lines:
        parts.append(_table(lines[0], lines[1:]))
    parts += [f"<p>{escape(note)}</p>\n" for note in notes]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.append(
            '<img alt="the metric and the loss against rounds, bytes and seconds, and how far '
            f'clients are apart" src="data:image/svg+xml;base64,{data}">\n'
        )
    parts += [_section(number, run) for number, run in enumerate(runs)]
    return "".join(parts)


def _section(number: int, run: Section) -> str:
    parts = [
        f'<section id="run{number}">\n<h2>{escape(run.name)} '
        f'<span class="state">{escape(run.state)}</span></h2>\n'
    ]
    if run.rows:
        parts.append(_details(f"rounds{number}", "Rounds", _rounds(run.rows), open=True))
    if run.samples:
        shown = "".join(
            f"<p>{escape(prompt)}</p>\n<pre>{escape(wrote)}</pre>\n<p>The data say:</p>\n"
            f"<pre>{escape(said)}</pre>\n"
            for prompt, wrote, said in run.samples
        )
        parts.append(_details(f"samples{number}", "What the model writes", shown))
    options = [(name, str(value)) for name, value in run.options.items()]
    parts.append(_details(f"options{number}", "Options", _table(("option", "value"), options)))
    return "".join(parts) + "</section>\n"


def _details(name: str, title: str, inside: str, open: bool = False) -> str:
    opened = " open" if open else ""
    return (
        f'<details id="{name}"{opened}>\n<summary>{escape(title)}</summary>\n'
        f'<div class="wide">{inside}</div>\n</details>\n'
    )


def _rounds(rows: list[dict]) -> str:
    shown = rows[-_ROUNDS:]
    evaluated = [row["eval"] for row in shown if row.get("eval")]
    names = list(dict.fromkeys(name for judged in evaluated for name in judged))
    head = [title for title, _ in _COLUMNS] + [f"held-out {name}" for name in names]
    cells = []
    for row in reversed(shown):
        judged = row.get("eval") or {}
        values = [row.get(key) for _, key in _COLUMNS] + [judged.get(name) for name in names]
        cells.append([_cell(value) for value in values])
    table = _table(head, cells)
    if len(rows) > len(shown):
        table += f"<p>The newest {len(shown)} of {len(rows)}; metrics.jsonl has all.</p>\n"
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = ["<table>\n<thead><tr>"]
    parts += [f"<th>{escape(name)}</th>" for name in head]
    parts.append("</tr></thead>\n<tbody>\n")
    for line in lines:
        parts.append("<tr>")
        for value in line:
            kind = ' class="number"' if value[:1].isdigit() or value == "–" else ""
            parts.append(f"<td{kind}>{escape(value)}</td>")
        parts.append("</tr>\n")
    parts.append("</tbody>\n</table>\n")
    return "".join(parts)
