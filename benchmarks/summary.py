"""A Markdown table of saved results: `python -m benchmarks.summary RESULT.json` (from
--benchmark-json).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> None:
    result = json.loads(path.read_text())
    machine = result["machine_info"]
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    print(
        f"{machine['gpu'] or cpu}, {machine['threads']} threads, torch {machine['torch']}, PEFT "
        f"{machine['peft']}, "
        f"commit {machine['commit']}\n"
    )
    groups: dict[str, list[dict]] = {}
    for row in result["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    layer = {name: rows for name, rows in groups.items() if name.startswith("layer ")}
    if layer:
        print(
            "| M×K×N×r, dtype, phase | frozen ms | ours / frozen | ours / PEFT, same factor frozen "
            "| ours / PEFT default | ours, merged / ours "
            "| kept bytes a token: ours, PEFT same factor, PEFT default |"
        )
        print("|---|---|---|---|---|---|---|")
    for name, rows in layer.items():
        by = {row["params"]["contender"]: row for row in rows}
        info = by["ours"]["extra_info"]
        kept = ", ".join(
            f"{by[c]['extra_info']['bytes_a_token']:.0f}"
            for c in ("ours", "peft_phase", "peft_default")
        )
        print(
            f"| {name.removeprefix('layer ')} | {by['frozen']['stats']['median'] * 1e3:.1f} | "
            f"{info['ratio_to_frozen']:.3f} "
            f"| {info['ratio_to_peft_phase']:.3f} | {info['ratio_to_peft_default']:.3f} "
            f"| {_merged(by)} | {kept} |"
        )
    others = {name: rows for name, rows in groups.items() if name not in layer}
    if others:
        print("\n| what | contender: median ms |\n|---|---|")
    for name, rows in others.items():
        print(
            f"| {name} | "
            + ", ".join(
                f"{r['params']['contender']} {r['stats']['median'] * 1e3:.2f}" for r in rows
            )
            + " |"
        )


def dropout(path: Path) -> None:
    """Layers with dropout, fp32: what backward keeps, and how ours compares."""
    groups: dict[str, dict[str, dict]] = {}
    for row in json.loads(path.read_text())["benchmarks"]:
        groups.setdefault(row["group"], {})[row["params"]["contender"]] = row
    print("| M×K×N×r, phase | frozen ms | ours / PEFT, same factor frozen | kept MiB: ours, PEFT |")
    print("|---|---|---|---|")
    for name, by in groups.items():
        layer = name.removeprefix("layer ").replace(" fp32 dropout .05 phase", ",")
        kept = ", ".join(
            f"{by[c]['extra_info']['kept_bytes'] / 2**20:.1f}" for c in ("ours", "peft_phase")
        )
        print(
            f"| {layer} | {by['frozen']['stats']['median'] * 1e3:.1f} "
            f"| {by['ours']['extra_info']['ratio_to_peft_phase']:.3f} | {kept} |"
        )


def _merged(by: dict[str, dict]) -> str:
    """The merged weight's time over ours; results from before it was a contender have none."""
    if "ours_merged" not in by:
        return "not measured"
    return f"{by['ours_merged']['extra_info']['ratio_to_ours']:.3f}"


if __name__ == "__main__":
    table(Path(sys.argv[1]))
