"""What the study set out to reach, and what it did: RoLoRA on every judging job beside the best
rival in bf16, and beside the best in int8.

What RoLoRA is held against rivals with is named here: its default, and ways to spend what it saves.
All that have run are shown.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite import records, tables
from benchmarks.suite.jobs import JOBS, JUDGE, Job
from benchmarks.suite.tables import Recorded, error_text, held_out, own_rounds, paired
from rolora.recipes import metrics
from rolora.run import front

OURS = "rolora"
# Method, wire, and how many times the job's rounds.
_BEFORE = "equal-factors=false"  # with AdamW, as it was until the choosing jobs had decided
CONTENDERS: tuple[tuple[str, str, float], ...] = (
    (OURS, "int8", 1.0),
    (OURS, "int8", 1.5),
    (f"{OURS}+error-feedback", "int4", 1.0),
    (f"{OURS}+error-feedback", "int4", 1.5),
    (f"{OURS}*2", "int8", 1.0),
    (f"{OURS}+{_BEFORE}", "int8", 1.0),
    (f"{OURS}+{_BEFORE}", "int8", 1.5),
    # As much work as six steps in the job's rounds.
    (f"{OURS}+local-steps=4+{_BEFORE}", "int8", 1.5),
    (f"{OURS}+error-feedback+{_BEFORE}", "int4", 1.5),
)
RIVALS_WIRES = ("bf16", "int8")
Groups = Mapping[tuple[str, str, int], list[Recorded]]


@dataclass(frozen=True)
class Beside:
    """A rival, our share of its bytes up, and how far ahead of it we are by seed."""

    rival: str
    share: float
    gap: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.rival} | {self.share:.0%} | {self.gap:+.4f}{error_text(self.error)}"


def beside(job: Job, groups: Groups, ours: tuple[str, str, int], wire: str) -> Beside | None:
    """`ours` beside the best rival at a wire and the job's own rounds; None where none has run
    twice.

    Rivals with fewer runs than others are left out: a mean of few seeds wins by chance.
    """
    rivals = {
        who: front.point(who[0], who[1], runs)
        for who, runs in groups.items()
        if who[1:] == (wire, own_rounds(job)) and not who[0].startswith(OURS)
    }
    most = max((len(groups[who]) for who in rivals), default=0)
    rivals = {who: point for who, point in rivals.items() if len(groups[who]) == most}
    if min(most, len(groups[ours])) < 2:
        return None
    lower = metrics.lower_is_better(groups[ours][0].headline)
    best = max(rivals, key=lambda who: -rivals[who].value if lower else rivals[who].value)
    gap, error = paired(groups[ours], groups[best])
    sent = front.point(ours[0], ours[1], groups[ours]).MB["up"]
    return Beside(best[0], sent / rivals[best].MB["up"], gap, error)


def table(folder: Path = records.FOLDER) -> None:
    """A row for every judging job and contender, and below them the medians over a kind's jobs."""
    print(
        "| job | RoLoRA | wire | times its rounds | best rival in bf16 | of its bytes | "
        "ahead of it | best rival in int8 | of its bytes | ahead of it |"
    )
    print("|---" * 10 + "|")
    gaps: dict[tuple[str, ...], list[tuple[float, ...]]] = defaultdict(list)
    for job in JOBS:
        groups = held_out(job.name, folder) if job.side == JUDGE else {}
        for method, wire, times in CONTENDERS:
            ours = (method, wire, round(times * own_rounds(job)))
            if ours not in groups:
                continue
            found = [beside(job, groups, ours, rivals) for rivals in RIVALS_WIRES]
            there = [one for one in found if one is not None]
            if len(there) == len(RIVALS_WIRES):
                cells = [job.name, method, wire, f"{times:g}", *map(str, there)]
                print("| " + " | ".join(cells) + " |")
                how = (tables.kind(job, groups), method, wire, f"{times:g}")
                gaps[how].append(tuple(one.gap for one in there))
    for (kind, *who), own in gaps.items():
        if len(own) < 2:
            continue
        medians = [f"{statistics.median(gap):+.4f}" for gap in zip(*own, strict=True)]
        cells = [f"median of {len(own)}, {kind}", *who]
        for median in medians:
            cells += ["", "", median]
        print("| " + " | ".join(cells) + " |")
