"""What to try where a run does not learn."""

from __future__ import annotations

_LITTLE = 0.1  # of the held-out loss before training


def advice(rows: list[dict], lr: float) -> str | None:
    """One line where the held-out loss hardly fell, or rose, since before training; else None.

    `rows` are those of `metrics.jsonl`, `lr` the rate of the run.
    """
    losses = [row["eval"]["loss"] for row in rows if row["eval"] is not None]
    if len(losses) < 2:
        return None
    before, now = losses[0], losses[-1]
    if now > before:
        return (
            f"the held-out loss rose from {before:.3f} to {now:.3f}: try --lr {lr / 4:.2g} (it is "
            f"{lr:.2g}), or fewer --local-steps"
        )
    if now > (1 - _LITTLE) * before:
        return (
            f"the held-out loss fell only from {before:.3f} to {now:.3f}: if there is more to "
            f"learn, try --lr {lr * 4:.2g} (it is {lr:.2g}), more --rounds or more --local-steps"
        )
    return None
