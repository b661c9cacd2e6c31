"""Reports count rounds and bytes to a target, and refuse what is no run."""

import json
import statistics

import pytest

from rolora import report
from tests.rolora.comparisons import read_csv


def made_run(path, method, seed, accuracies, **options):
    path.mkdir(parents=True)
    path.joinpath("config.toml").write_text(
        f'[federation]\nmethod = "{method}"\n[run]\nseed = {seed}\n[optimisation]\nlr = {options.get("lr", 0.1)}\n'
    )
    text = "".join(
        json.dumps(
            {
                "round": n,
                "eval": {"accuracy": a, "loss": 1 - a},
                "train_loss": 1.0 if n else None,
                "bytes_up": 1000 * n,
                "bytes_down": 3000 * n,
                "seconds": 2.0,
                "client_loss": [0.5, 1.0, 2.0] if n else None,
            }
        )
        + "\n"
        for n, a in enumerate(accuracies)
    )
    path.joinpath("metrics.jsonl").write_text(text)
    return path


def test_a_report_of_losses_counts_to_a_target_from_above(tmp_path, call):
    run = made_run(tmp_path / "a", "rolora", 0, [0.1, 0.5, 0.8])
    (run / "summary.json").write_text('{"headline": "loss"}')
    code, out, err = call(run, "--output", tmp_path / "r.png", command=report.command)
    assert (code, err) == (0, "") and f"target: loss {0.2 / 0.95:.4f}" in out
    (line,) = read_csv(tmp_path / "r.csv")
    assert float(line["loss"]) == pytest.approx(0.2) and float(line["rounds to target"]) == 2
    code, out, _ = call(
        run, "--target", 0.5, "--output", tmp_path / "s.png", command=report.command
    )
    assert float(read_csv(tmp_path / "s.csv")[0]["rounds to target"]) == 1


def test_a_report_counts_rounds_and_bytes_to_the_target(tmp_path, call):
    runs = [
        made_run(tmp_path / "a0", "rolora", 0, [0.1, 0.5, 0.8]),
        made_run(tmp_path / "a1", "rolora", 1, [0.1, 0.7, 0.6]),
        made_run(tmp_path / "b", "fedavg", 0, [0.1, 0.2, 0.3]),
        made_run(tmp_path / "c", "rolora", 0, [0.1, 0.2, 0.4], lr=0.5),
    ]
    code, out, err = call(
        *runs, "--target", 0.5, "--output", tmp_path / "r.png", command=report.command
    )
    assert (code, err) == (0, "")
    lines = {line["method"]: line for line in read_csv(tmp_path / "r.csv")}
    assert list(lines) == ["rolora+lr=0.1", "fedavg+lr=0.1", "rolora+lr=0.5"]
    first = lines["rolora+lr=0.1"]
    assert float(first["accuracy"]) == pytest.approx(0.7) and float(first["std"]) == pytest.approx(
        statistics.stdev([0.8, 0.6])
    )
    assert float(first["rounds to target"]) == 1 and float(first["MB to target"]) == pytest.approx(
        4e-3
    )
    assert lines["fedavg+lr=0.1"]["rounds to target"] == "" and float(
        first["MB up"]
    ) == pytest.approx(3e-3)
    assert (
        "| rolora+lr=0.1 | 2 | 2 | 0.7000 | 0.1414 | 1 | 0.00 |" in out
        and (tmp_path / "r.png").stat().st_size > 5000
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (("nowhere",), "nowhere holds no run"),
        ((), "Missing argument 'RUN…'"),
        (("{run}", "--output", "x.txt"), "expected a .png"),
        (("{torn}",), "is damaged"),
    ],
)
def test_bad_input_of_reports(args, message, tmp_path, call):
    made_run(tmp_path / "run", "ffa", 0, [0.1])
    torn = made_run(tmp_path / "torn", "ffa", 0, [0.1])
    torn.joinpath("metrics.jsonl").write_text('{"round": 0, "ev')
    code, _, err = call(
        *(a.format(run=tmp_path / "run", torn=torn) for a in args), command=report.command
    )
    assert code == 2 and message in err and err.count("\n") == 1
