"""What the records say, as Markdown: the jobs, every method on every job, and both sides in short.

Runs are paired by their seeds, so a difference is a mean over seeds with its standard error. The
reference is RoLoRA as it is by default: in int8, or in bf16 where more runs are in that.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite import records
from benchmarks.suite.jobs import IMAGES_ROUNDS, JOBS, SIDES, Job
from rolora.experiments.digits import SPLITS
from rolora.recipes import metrics
from rolora.run import front, plots

REFERENCES = (("rolora", "int8"), ("rolora", "bf16"))
Who = tuple[str, str, str]  # method, wire, times its rounds


@dataclass(frozen=True)
class Recorded:
    """A record as `rolora.run.front` looks at a run: rows of bytes and evaluations."""

    record: records.Record

    @property
    def headline(self) -> str:
        return str(self.record["headline"])

    @property
    def final(self) -> float:
        return records.final(self.record)

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows, sent, total = [], 0.0, 0.0
        for number, up, both, value in self.record["curve"]:
            rows.append(
                {
                    "round": number,
                    "bytes_up": (up - sent) * 1e6,
                    "bytes_down": (both - total - (up - sent)) * 1e6,
                    "eval": {self.headline: value},
                }
            )
            sent, total = up, both
        return rows


def held_out(job: str, folder: Path = records.FOLDER) -> dict[tuple[str, str, int], list[Recorded]]:
    """(method, wire, rounds) → the runs on held-out data, by seed. Of runs that were repeated under
    another configuration the newest count.
    """
    newest: dict[tuple[str, str, int, int], records.Record] = {}
    for record in records.read(job, folder):
        if record["on"] == "held-out":
            newest[record["method"], record["wire"], record["rounds"], record["seed"]] = record
    groups: dict[tuple[str, str, int], list[Recorded]] = defaultdict(list)
    for (method, wire, rounds, _), record in sorted(newest.items()):
        groups[method, wire, rounds].append(Recorded(record))
    return dict(groups)


def reference_of(
    job: Job, groups: Mapping[tuple[str, str, int], list[Recorded]]
) -> tuple[str, str, int] | None:
    """The default at a job's own rounds, in that of its precisions which has the most runs; None
    where it has none.
    """
    there = [who for pair in REFERENCES if (who := (*pair, own_rounds(job))) in groups]
    return max(there, key=lambda who: len(groups[who]), default=None)


def own_rounds(job: Job) -> int:
    """The rounds that a job has where `--length` is not given."""
    return IMAGES_ROUNDS[job.images] if job.split is not None else int(job.options["rounds"])


def called(job: Job, who: tuple[str, str, int]) -> str:
    """`METHOD WIRE`, and ` in N` where its rounds are not the job's own."""
    method, wire, rounds = who
    return f"{method} {wire}" + (f" in {rounds}" if rounds != own_rounds(job) else "")


def kind(job: Job, groups: Mapping[Any, Sequence[Recorded]]) -> str:
    """A job's kind, apart from others' where what it is judged by is a loss."""
    lower = metrics.lower_is_better(next(iter(groups.values()))[0].headline)
    return f"{job.kind}, loss" if lower else job.kind


def paired(mine: Sequence[Recorded], theirs: Sequence[Recorded]) -> tuple[float, float | None]:
    """The mean difference over the seeds that both have, and its standard error (None of one);
    positive where `mine` is better. Raises ValueError where they share no seed.
    """
    other = {run.record["seed"]: run.final for run in theirs}
    gaps = [run.final - other[run.record["seed"]] for run in mine if run.record["seed"] in other]
    if not gaps:
        raise ValueError("no seed in common")
    if metrics.lower_is_better(mine[0].headline):
        gaps = [-gap for gap in gaps]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return statistics.fmean(gaps), error


def jobs() -> None:
    """The jobs and the side that each is on."""
    print(
        "| job | side | model, text | split | clients a round | local steps | rounds | "
        "rates tried |"
    )
    print("|---" * 8 + "|")
    for job in JOBS:
        rates = ", ".join(f"{rate:g}" for rate in job.rates)
        print("| " + " | ".join([job.name, job.side, *_described(job), rates]) + " |")


def _described(job: Job) -> list[str]:
    """Model and text, split, clients a round, local steps and rounds."""
    if job.split is not None:
        clients, labels = SPLITS[job.split]
        split = f"{labels} label{'s' * (labels > 1)} a client" if labels else "even"
        rounds = str(own_rounds(job))
        return [f"two layers, {job.images}", split, f"all {clients}", "5 epochs", rounds]
    options = job.options
    on_tokens = options.get("task_type") == "causal-lm"
    model = "encoder" if job.text is not None and not on_tokens else "built-in"
    text = f"{job.text or 'built-in text'}{', next tokens' * on_tokens}"
    splits = {
        "dirichlet": f"Dirichlet {options.get('dirichlet_alpha')}",
        "column": f"column {options.get('client_column')}",
        "iid": "even",
    }
    everyone = options.get("clients", "the column's")
    asked = options.get("clients_per_round")
    part = f"all {everyone}" if asked is None else f"{asked} of {everyone}"
    part = part.replace("all the", "all of the")
    split = splits[options["partition"]]
    return [f"{model}, {text}", split, part, str(options["local_steps"]), str(options["rounds"])]


def results(side: str | None = None, folder: Path = records.FOLDER) -> None:
    """Every method on every job that has runs: quality, bytes, and the fronts that it is on."""
    print(
        "| job | side | method | wire | rounds | rate | quality ± standard error | against rolora "
        "| MB up | MB both | front up, both | runs | commit, date |"
    )
    print("|---" * 13 + "|")
    for job in JOBS:
        groups = held_out(job.name, folder)
        if side not in (None, job.side) or not groups:
            continue
        points = {who: front.point(who[0], who[1], runs) for who, runs in groups.items()}
        headline = next(iter(groups.values()))[0].headline
        lower = metrics.lower_is_better(headline)
        fronts = {way: front.front(list(points.values()), way, lower) for way in front.WAYS}
        for who, runs in groups.items():
            point, last = points[who], runs[-1].record
            on = ", ".join("yes" if point in fronts[way] else "no" for way in front.WAYS)
            print(
                f"| {job.name} | {job.side} | {who[0]} | {who[1]} | {who[2]} | {last['rate']:g} | "
                f"{point.value:.4f}{error_text(point.error)} | {_against(job, groups, who)} | "
                f"{point.MB['up']:.2f} | {point.MB['both']:.2f} | {on} | {len(runs)} | "
                f"{last['commit']}, {last['date']} |"
            )


def summary(folder: Path = records.FOLDER) -> None:
    """By side, kind of job and contender: on how many jobs it has run twice, the median difference
    from the reference, the worst difference, and on how many jobs it is on the front up.
    """
    print(
        "| side | optimizer, clients | method | wire | times its rounds | jobs | "
        "median against rolora | worst | on the front (up) |"
    )
    print("|---" * 9 + "|")
    gaps: dict[tuple[str, str], dict[Who, list[float]]] = {}
    leads: dict[tuple[str, str], dict[Who, int]] = {}
    for job in JOBS:
        groups = held_out(job.name, folder)
        who = reference_of(job, groups)
        if who is None:
            continue
        reference = groups[who]
        key = (job.side, kind(job, groups))
        own = gaps.setdefault(key, defaultdict(list))
        led = leads.setdefault(key, defaultdict(int))
        points = {who: front.point(who[0], who[1], runs) for who, runs in groups.items()}
        lower = metrics.lower_is_better(reference[0].headline)
        best = front.front(list(points.values()), "up", lower)
        for (method, wire, rounds), runs in groups.items():
            shown = (method, wire, f"{rounds / own_rounds(job):.3g}")
            gap, error = paired(runs, reference)
            if error is None:  # of one seed
                continue
            own[shown].append(gap)
            led[shown] += points[method, wire, rounds] in best
    for key, own in sorted(gaps.items(), key=lambda item: (SIDES.index(item[0][0]), item)):
        for shown, found in sorted(own.items(), key=lambda item: -statistics.median(item[1])):
            print(
                "| " + " | ".join([*key, *shown]) + f" | {len(found)} | "
                f"{statistics.median(found):+.4f} | {min(found):+.4f} | {leads[key][shown]} |"
            )


def figures(folder: Path = records.FOLDER) -> dict[str, str]:
    """`suite JOB METHOD WIRE`: the mean quality; the same with `MB`: megabytes up; and
    `suite JOB METHOD WIRE - METHOD WIRE`: the difference by seed, positive where the first is
    better. `WIRE in N` are runs of N rounds where the job has another number.
    """
    found = {}
    for job in JOBS:
        groups = held_out(job.name, folder)
        for who, runs in groups.items():
            point, name = front.point(who[0], who[1], runs), f"suite {job.name} {called(job, who)}"
            found[name] = f"{point.value:.3f}".replace("0.", ".", 1)
            found[f"{name} MB"] = f"{point.MB['up']:.2f}".replace("0.", ".", 1)
            for other, theirs in groups.items():
                if other != who and {r.record["seed"] for r in runs} & {
                    r.record["seed"] for r in theirs
                }:
                    gap, error = paired(runs, theirs)
                    text = "" if error is None else f" ± {error:.3f}"
                    found[f"{name} - {called(job, other)}"] = f"{gap:+.3f}{text}"
    return found


def draw(place: Path, folder: Path = records.FOLDER) -> list[Path]:
    """A picture of the front for every job that has runs."""
    drawn = []
    for job in JOBS:
        groups = held_out(job.name, folder)
        if not groups:
            continue
        points = [front.point(who[0], who[1], runs) for who, runs in groups.items()]
        headline = next(iter(groups.values()))[0].headline
        lower = metrics.lower_is_better(headline)
        place.mkdir(parents=True, exist_ok=True)
        if plots.draw_front(points, headline, lower, place / f"{job.name}.png"):
            drawn.append(place / f"{job.name}.png")
    return drawn


def _against(
    job: Job, groups: dict[tuple[str, str, int], list[Recorded]], who: tuple[str, str, int]
) -> str:
    reference = reference_of(job, groups)
    if reference is None or who == reference:
        return "–"
    try:
        gap, error = paired(groups[who], groups[reference])
    except ValueError:
        return "–"
    return f"{gap:+.4f}{error_text(error)}"


def error_text(error: float | None) -> str:
    """` ± error`, and nothing of one run."""
    return "" if error is None else f" ± {error:.4f}"
