"""Pictures of runs, drawn where matplotlib is installed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from rolora.run.front import WAYS, Point, front

_COLOURS = 10
_LEGEND = 200  # characters of a line of the legend
_FAR = 20  # times: sums of bytes or seconds that a common scale would press into a corner


def draw(rows: list[dict], headline: str, folder: Path) -> list[Path]:
    """`<headline>.png` and `loss.png` of one run against rounds; an empty list where matplotlib is
    not installed.
    """
    new_figure = _figures()
    if new_figure is None:
        return []
    evaluated = [row for row in rows if row["eval"] is not None]
    trained = [row for row in rows if row["train_loss"] is not None]
    series = {
        headline: [("held out", evaluated, lambda row: row["eval"][headline])],
        "loss": [
            ("held out", evaluated, lambda row: row["eval"]["loss"]),
            ("training", trained, lambda row: row["train_loss"]),
        ],
    }
    folder.mkdir(exist_ok=True)
    paths = []
    for name, lines in series.items():
        figure = new_figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for label, chosen, value in lines:
            axes.plot(
                [row["round"] for row in chosen],
                [value(row) for row in chosen],
                marker=".",
                label=label,
            )
        axes.set(xlabel="round", ylabel=name.replace("_", " "))
        _whole_numbers(axes)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def draw_together(groups: dict[str, list[list[dict]]], headline: str, path: Path) -> bool:
    """One picture of several groups of runs (label → the rows of each run): the headline and the
    loss against rounds, bytes and seconds (simulated ones where all have them), mean and one
    standard deviation over a group's runs, and how far its clients are apart. False without
    matplotlib.
    """
    new_figure = _figures()
    if new_figure is None:
        return False
    across: dict[str, Callable[[list[dict]], list[float]]] = {
        "round": lambda rows: [row["round"] for row in rows],
        "MB of messages, up and down": lambda rows: [
            b / 1e6 for b in accumulate(row["bytes_up"] + row["bytes_down"] for row in rows)
        ],
        "seconds of rounds": lambda rows: list(accumulate(row["seconds"] for row in rows)),
    }
    if all(_has_clock(rows) for runs in groups.values() for rows in runs):
        across["simulated seconds"] = lambda rows: [row.get("simulated_seconds", 0) for row in rows]
        del across["seconds of rounds"]
    metrics = {
        f"held-out {headline.replace('_', ' ')}": lambda row: row["eval"] and row["eval"][headline],
        "held-out loss": lambda row: row["eval"] and row["eval"]["loss"],
    }
    if headline == "loss":  # two rows of pictures all the same
        metrics["training loss"] = lambda row: row["train_loss"]
    columns = max(1, min(len(groups), 4, _LEGEND // (max(map(len, groups)) + 8)))
    lines = -(-len(groups) // columns)
    figure = new_figure(figsize=(15, 6 + 0.2 * lines), layout="constrained")
    axes = figure.subplots(2, 4)
    for number, (label, runs) in enumerate(groups.items()):
        style = {
            "color": f"C{number % _COLOURS}",
            "linestyle": ("-", "--", ":", "-.")[number // _COLOURS % 4],
        }
        for place, (metric, value) in zip(axes, metrics.items(), strict=True):
            for panel, (title, along) in zip(place, across.items(), strict=False):
                _band(panel, [(along(rows), list(map(value, rows))) for rows in runs], label, style)
                panel.set(xlabel=title, ylabel=metric)
        for panel, pick, title in ((axes[0][3], 2, "worst"), (axes[1][3], 0, "best")):
            losses = [
                (
                    [row["round"] for row in rows],
                    [row["client_loss"] and row["client_loss"][pick] for row in rows],
                )
                for rows in runs
                if all("client_loss" in row for row in rows)
            ]
            if losses:
                _band(panel, losses, label, style)
            panel.set(xlabel="round", ylabel=f"training loss of the {title} client")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        if panel.get_xlabel() == "round":
            _whole_numbers(panel)
        else:
            _logarithmic_if_far_apart(panel)
    drawn, names = axes[0][0].get_legend_handles_labels()
    figure.legend(drawn, names, loc="outside lower center", ncols=columns, fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def draw_front(points: Sequence[Point], headline: str, lower: bool, path: Path) -> bool:
    """The headline against megabytes, up and both ways: a line a method through its points, and
    the front that no point beats. False without matplotlib.
    """
    new_figure = _figures()
    if new_figure is None:
        return False
    by_method: dict[str, list[Point]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    figure = new_figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("MB of messages, up", "MB of messages, up and down")
    for panel, way, title in zip(axes, WAYS, titles, strict=True):
        best = front(points, way, lower)
        panel.step(
            [p.MB[way] for p in best],
            [p.value for p in best],
            where="post",
            color="0.6",
            linewidth=4,
            alpha=0.5,
            label="front",
        )
        for number, (method, own) in enumerate(by_method.items()):
            own = sorted(own, key=lambda p: p.MB[way])
            x, y = [p.MB[way] for p in own], [p.value for p in own]
            panel.errorbar(
                x,
                y,
                yerr=[p.error or 0.0 for p in own],
                marker="os^Dv"[number // _COLOURS % 5],
                color=f"C{number % _COLOURS}",
                label=method,
                capsize=2,
            )
            for point, at, value in zip(own, x, y, strict=True):
                panel.annotate(
                    f" {point.wire}", (at, value), fontsize="x-small", color=f"C{number % _COLOURS}"
                )
        panel.set(xlabel=title, ylabel=f"held-out {headline.replace('_', ' ')}", xscale="log")
        panel.grid(alpha=0.3)
    drawn, names = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(names), 4, _LEGEND // (max(map(len, names)) + 8)))
    figure.legend(drawn, names, loc="outside lower center", ncols=columns, fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _band(
    panel, curves: list[tuple[list[float], list[float | None]]], label: str, style: dict
) -> None:
    """Mean and one standard deviation over curves, at the points that all have; x is averaged too
    (bytes and seconds differ little).
    """
    points = [[(x, y) for x, y in zip(*curve, strict=True) if y is not None] for curve in curves]
    shortest = min(map(len, points))
    if shortest == 0:
        return
    columns = [[curve[i] for curve in points] for i in range(shortest)]
    x = [statistics.fmean(x for x, _ in column) for column in columns]
    mean = [statistics.fmean(y for _, y in column) for column in columns]
    spread = [
        statistics.stdev(y for _, y in column) if len(column) > 1 else 0.0 for column in columns
    ]
    panel.plot(x, mean, label=label, marker="." if len(x) < 3 else None, **style)
    panel.fill_between(
        x,
        [m - s for m, s in zip(mean, spread, strict=True)],
        [m + s for m, s in zip(mean, spread, strict=True)],
        alpha=0.15,
        color=style["color"],
    )


def _whole_numbers(panel) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _logarithmic_if_far_apart(panel) -> None:
    ends = [max(line.get_xdata()) for line in panel.get_lines()]
    if ends and min(ends) > 0 and max(ends) > _FAR * min(ends):
        panel.set_xscale("log", nonpositive="mask")


def _figures():
    """matplotlib's Figure, or None. It needs no display, and none of what pyplot loads."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def _has_clock(rows: list[dict]) -> bool:
    """Whether a run's clock was simulated."""
    return all("simulated_seconds" in row for row in rows if row["round"] > 0)
