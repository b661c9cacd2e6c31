"""Reports of runs that differ in much: labels that a person can read, pictures where nothing covers
anything, and nothing overwritten unasked.
"""

import json

import pytest

from rolora import report
from rolora.run import labels
from tests.rolora.run_folders import made

figure_module = pytest.importorskip("matplotlib.figure")


OPTIONS = dict(method="rolora", rank=8, lr=1e-3, model="/data/models/a", balance=False)


@pytest.mark.parametrize(
    "runs, texts, untold",
    [
        ([{}, {}], ["rolora", "rolora"], []),
        ([{"lr": 0.5}, {}], ["rolora+lr=0.5", "rolora+lr=0.001"], []),
        ([{"balance": True}, {}], ["rolora+balance", "rolora"], []),
        # One option tells them apart: the others are named elsewhere.
        (
            [{"rank": 4}, {"model": "/data/models/b", "rank": 2, "lr": 1.0}, {"model": "c"}],
            ["rolora+model=a", "rolora+model=b", "rolora+model=c"],
            ["rank", "lr"],
        ),
        (
            [{"model": "/x/a/model"}, {"model": "/x/b/model"}],
            ["rolora+model=a/model", "rolora+model=b/model"],
            [],
        ),
        (
            [{"model": "o/" + "n" * 60 + "1"}, {"model": "o/" + "n" * 60 + "2"}],
            [f"rolora+model=…{'n' * 30}{number}" for number in (1, 2)],
            [],
        ),
        ([{"method": "ffa"}, {"lr": 1.0, "method": "/m/own.py"}], ["ffa", "own.py"], ["lr"]),
    ],
)
def test_labels_say_as_little_as_tells_runs_apart(runs, texts, untold):
    found = labels.of([OPTIONS | run for run in runs])
    assert found.texts == texts and found.untold == untold


@pytest.mark.parametrize("number", [2, 5, 12])
def test_nothing_covers_anything_in_a_picture(number, tmp_path, call, monkeypatch):
    runs = [
        made(
            tmp_path,
            f"run{i}",
            scale=1 + 60 * i,
            method=("rolora", "fedavg")[i % 2],
            model=f"/a/long/path/to/many/models/and-a-name-that-goes-on-and-on-{i // 2}",
            train_file=f"/data/{i}/train.jsonl",
        )
        for i in range(number)
    ]
    figures, save = [], figure_module.Figure.savefig

    def saved(self, *args, **options):
        figures.append(self)
        return save(self, *args, **options)

    monkeypatch.setattr(figure_module.Figure, "savefig", saved)
    code, out, err = call(*runs, "--output", tmp_path / "r.png", command=report.command)
    monkeypatch.undo()
    assert (code, err) == (0, "") and "differ in it: " in out
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    frame, box = figure.bbox, legend.get_window_extent()
    assert len(legend.get_texts()) == number
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
    for panel in figure.axes:
        own = panel.get_tightbbox()
        assert own.width > frame.width / 8 and own.height > frame.height / 4
        assert not own.overlaps(box)
        if panel.get_xlabel() == "round":
            assert all(float(tick).is_integer() for tick in panel.get_xticks())
    far = [panel.get_xscale() for panel in figure.axes if "MB" in panel.get_xlabel()]
    assert far == ["log", "log"], "a run of 61 times the bytes must not hide the other"


@pytest.mark.parametrize("clocked", [(1, 2), (1,)])
def test_a_picture_has_simulated_seconds_where_all_runs_have_them(
    clocked, tmp_path, call, monkeypatch
):
    runs = [made(tmp_path, f"run-{number}", seed=number) for number in (1, 2)]
    for number in clocked:
        path = runs[number - 1] / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[1:]:
            row["simulated_seconds"] = 7.0 * row["round"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = []
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *args, **options: figures.append(self)
    )
    code, _, err = call(*runs, "--output", tmp_path / "r.png", command=report.command)
    assert (code, err) == (0, "")
    labels_seen = {panel.get_xlabel(): panel for panel in figures[0].axes}
    wanted = "simulated seconds" if len(clocked) == 2 else "seconds of rounds"
    assert {"simulated seconds", "seconds of rounds"} & labels_seen.keys() == {wanted}
    if len(clocked) == 2:
        assert list(labels_seen[wanted].get_lines()[0].get_xdata()) == [0.0, 7.0, 14.0, 21.0]


def test_nothing_is_overwritten_unasked(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = made(tmp_path, "run")
    for name in ("report.png", "report.csv"):
        (tmp_path / name).write_text("mine")
        code, _, err = call(run, command=report.command)
        assert code == 2 and err == (
            f"error: {name} exists: name another --output, or add --overwrite\n"
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for extra in ((), ("--overwrite",)):
        assert call(run, *extra, command=report.command)[0] == 0


def test_runs_that_came_to_nothing_are_one_line(tmp_path, call):
    good = made(tmp_path, "good")
    empty = made(tmp_path, "empty", rounds=0)
    lost = made(tmp_path, "lost", rounds=0, summary={"diverged": "lr", "headline": "accuracy"})
    code, out, err = call(good, empty, "-o", tmp_path / "r.png", command=report.command)
    assert code == 2 and f"{empty} ended before the first round: leave it out" in err
    assert out == "" and err.count("\n") == 1 and not (tmp_path / "r.png").exists()
    code, _, err = call(lost, "-o", tmp_path / "r.png", command=report.command)
    assert code == 2 and f"{lost} diverged: there is nothing to show" in err
    code, out, err = call(good, lost, "-o", tmp_path / "r.png", command=report.command)
    assert (code, err) == (0, "") and f"{lost} diverged: it counts as 0" in out


def test_a_run_without_a_method_is_one_line(tmp_path, call):
    run = made(tmp_path, "run")
    (run / "config.toml").write_text("[run]\nseed = 1\n")
    code, _, err = call(run, "-o", tmp_path / "r.png", command=report.command)
    assert code == 2 and "it names no method" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", '{"round": 0, "ev'),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", "3"),
        ("metrics.jsonl", '{"round": 0, "eval": {"accuracy": 1, "loss": 1}}'),
        ("metrics.jsonl", '{"round": 0, "eval": 3, "bytes_up": 0, "bytes_down": 0, "seconds": 1}'),
        ("metrics.jsonl", "[" * 100_000),
        ("summary.json", "[1]"),
        ("summary.json", '{"headline": "other"}'),
        ("summary.json", '{"headline": '),
        ("config.toml", "x = "),
        ("config.toml", "federation = 3"),
    ],
)
def test_what_is_damaged_is_one_line(name, text, tmp_path, call):
    run = made(tmp_path, "run")
    (run / name).write_text(text)
    if name == "metrics.jsonl":  # a half line after whole ones too
        again = made(tmp_path, "again")
        with open(again / name, "a") as file:
            file.write(text)
    for path in tmp_path.iterdir():
        code, out, err = call(path, "-o", tmp_path / "r.png", command=report.command)
        assert code == 2 and "damaged" in err and err.count("\n") == 1, err
        assert not (tmp_path / "r.png").exists()
