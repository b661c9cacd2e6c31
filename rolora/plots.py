"""Pictures of a run, drawn into its folder where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path


def draw(rows: list[dict], headline: str, folder: Path) -> list[Path]:
    """`<headline>.png` and `loss.png` against rounds; an empty list where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    evaluated = [row for row in rows if row["eval"] is not None]
    trained = [row for row in rows if row["train_loss"] is not None]
    series = {
        headline: [("held out", evaluated, lambda row: row["eval"][headline])],
        "loss": [("held out", evaluated, lambda row: row["eval"]["loss"]), ("training", trained, lambda row: row["train_loss"])],
    }
    folder.mkdir(exist_ok=True)
    paths = []
    for name, lines in series.items():
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for label, chosen, value in lines:
            axes.plot([row["round"] for row in chosen], [value(row) for row in chosen], marker=".", label=label)
        axes.set(xlabel="round", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths
