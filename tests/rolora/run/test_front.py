"""Fronts, budgets and targets, against tables that are worked out by hand."""

from dataclasses import dataclass, field

import pytest

from rolora.run import front, plots


@dataclass
class Made:
    """A run of given bytes and values: round 0 costs nothing."""

    up: list[float]
    values: list[float | None]
    headline: str = "accuracy"
    down: float = 0.0
    rows: list = field(init=False)

    def __post_init__(self):
        self.rows = [
            {
                "round": n,
                "bytes_up": up,
                "bytes_down": self.down if n else 0,
                "eval": None if value is None else {self.headline: value},
            }
            for n, (up, value) in enumerate(zip([0, *self.up], self.values, strict=True))
        ]

    @property
    def final(self):
        return self.values[-1]


def at(MB, value, name="m"):
    return front.Point(name, "bf16", 1, value, None, {"up": MB, "both": 2 * MB})


def test_the_front_is_what_nothing_cheaper_or_as_cheap_beats():
    points = [at(1, 0.5), at(2, 0.4), at(2, 0.6), at(3, 0.6), at(4, 0.9), at(0.5, 0.1)]
    assert [(p.MB["up"], p.value) for p in front.front(points, "up", lower=False)] == [
        (0.5, 0.1),
        (1, 0.5),
        (2, 0.6),
        (4, 0.9),
    ]
    assert [(p.MB["up"], p.value) for p in front.front(points, "up", lower=True)] == [(0.5, 0.1)]
    twins = [at(1, 0.5, "a"), at(1, 0.5, "b")]
    assert front.front(twins, "up", lower=False) == twins


def test_points_budgets_and_targets():
    runs = [
        Made([1e6, 1e6, 2e6], [0.1, 0.5, None, 0.7], down=1e6),
        Made([1e6, 1e6, 4e6], [0.1, 0.3, 0.6, 0.9], down=1e6),
    ]
    point = front.point("m", "int8", runs)
    assert (point.rounds, point.value) == (3, pytest.approx(0.8))
    assert point.error == pytest.approx(0.1)  # stdev .1414 over √2
    assert point.MB == {"up": 5.0, "both": 8.0}
    assert [front.within(run, "up", 2e6) for run in runs] == [0.5, 0.6]
    assert [front.within(run, "both", 2e6) for run in runs] == [0.5, 0.3]
    assert front.within(runs[0], "up", 0.9e6) is None, "what round 0 had cost nothing and is no run"
    assert [front.megabytes_to(run, "up", 0.55) for run in runs] == [4.0, 2.0]
    assert front.megabytes_to(runs[0], "both", 0.95) is None
    table = front.table([(point, runs)], target=0.8, budget=2e6)
    assert table[0]["within 2 MB up"] == pytest.approx(0.55)
    assert table[0]["MB up to target"] is None, "one of two is not most of them"
    assert table[0]["front, up"] == "yes"


def test_a_smaller_loss_is_the_better_one():
    runs = [Made([1e6, 1e6], [3.0, 2.0, 1.0], headline="loss")]
    cheap = [Made([1e5, 1e5], [3.0, 2.5, 2.4], headline="loss")]
    bad = [Made([2e6, 1e6], [3.0, 2.0, 1.5], headline="loss")]
    groups = [(front.point(n, "bf16", r), r) for n, r in (("a", runs), ("b", cheap), ("c", bad))]
    found = front.table(groups, target=2.0, budget=None)
    assert [line["front, up"] for line in found] == ["yes", "yes", "no"]
    assert [line["MB up to target"] for line in found] == [1.0, None, 2.0]


def test_the_picture_is_drawn(tmp_path):
    points = [at(1, 0.5, "a"), at(2, 0.6, "a"), at(1.5, 0.4, "b")]
    assert plots.draw_front(points, "accuracy", False, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000
