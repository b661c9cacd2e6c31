"""The tables of a run, as the docs hold them, and the table that dispatch reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.checks import failed
from benchmarks.gpu.results import FILE, Results
from rolora import atomic
from rolora_kernels import tuned

TEXT = "tables.md"


def write(results: Results) -> list[Path]:
    """Writes the tables, and the file for rolora_kernels/tuned where anything was tuned."""
    text = "\n".join(lines(results)) + "\n"
    atomic.write_text(results.folder / TEXT, text)
    written = [results.folder / FILE, results.folder / TEXT]
    if results.tuned:
        about = results.about
        name = about["gpu"] or "cpu"
        table = {
            "gpu": name,
            "capability": about["capability"],
            "commit": about["commit"],
            "triton": about["triton"],
            "rows": results.tuned,
        }
        path = results.folder / f"{tuned.file_name(name)}.json"
        atomic.write_text(path, json.dumps(table, indent=1) + "\n")
        written.append(path)
    return written


def lines(results: Results) -> Iterator[str]:
    """Everything that a person wants to see of a run."""
    about, rows = results.about, results.rows
    yield f"## {about['gpu'] or 'CPU, in the interpreter'}"
    yield ""
    yield (
        f"torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, sources "
        f"{about['sources']}"
    )
    yield from _contest(rows, "ceilings", ("name",), ("ms", "tflops", "gb_a_second"))
    yield from _contest(
        rows, "layer", ("M", "N", "K", "r", "phase", "p"), ("ms", "ratio_to_frozen", "error")
    )
    yield from _contest(rows, "primitive", ("primitive", "N", "K", "r", "p"), ("ms", "gb_a_second"))
    yield from _contest(rows, "product", ("M", "N", "K"), ("ms", "ratio_to_product"))
    yield from _contest(rows, "model", ("model", "phase"), ("ms", "ratio_to_peft_phase"))
    yield from _contest(rows, "tokens", ("model", "phase"), ("tokens_a_second",))
    yield from _contest(rows, "cohort", ("clients",), ("ms", "ratio_to_sequential"))
    yield from _contest(rows, "dequantise", ("N", "K"), ("ms", "gb_a_second"))
    yield from _contest(rows, "nf4_layer", ("N", "K"), ("ms",))
    checks = [row for row in rows if row["part"] == "check"]
    wrong = failed(rows)
    yield ""
    yield f"{len(checks)} checks, {len(wrong)} failed"
    yield from (f"- {_told(row)}" for row in wrong)
    lost = [row for row in rows if "problem" in row and row["part"] not in ("check", "config")]
    if lost:
        yield f"\n{len(lost)} contenders have no figure:"
        yield from (f"- {_told(row)}" for row in lost)


def _told(row: dict) -> str:
    return f"{row['unit']}: {row.get('name', '')} {row.get('problem') or row.get('error')}"


def _contest(rows: list[dict], part: str, about: tuple[str, ...], shown: tuple[str, ...]):
    """A markdown table of the rows of a part."""
    own = [row for row in rows if row["part"] == part and any(name in row for name in shown)]
    if not own:
        return
    names = [*about, *([] if "name" in about else ["name"]), *shown]
    yield f"\n### {part}\n"
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in own:
        yield "| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
