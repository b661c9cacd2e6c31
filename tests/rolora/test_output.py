"""What a run says while it goes, and what it leaves when it cannot go on."""

import json

import pytest

from rolora import evaluate, report
from rolora.run import kernels, progress
from rolora_kernels.dispatch import Choice
from tests.rolora.commands import rows, small


def choice(operation, backend, reason, calls):
    return Choice(operation, backend, reason, "[8, 8]", "float32", "cpu", 1, calls)


def test_kernels_are_a_line_for_each_backend_and_a_record_for_each_reason():
    taken = [
        choice("lora_linear", "torch", "default", 7),
        choice("lora_linear", "torch", "client axis", 90),
        choice("pack", "triton", "on a GPU", 3),
        choice("grads", "torch", "default", 5),
    ]
    assert kernels.lines(taken) == ["kernels: torch (client axis)"]
    assert kernels.lines(taken[2:]) == ["kernels: triton (on a GPU)", "kernels: torch (default)"]
    longer = choice("lora_linear", "torch", "client axis; oneDNN", 1)
    assert kernels.lines([*taken, longer]) == ["kernels: torch (client axis; oneDNN)"]
    assert kernels.records(taken) == [
        {
            "backend": "torch",
            "reason": "default",
            "operations": ["grads", "lora_linear"],
            "calls": 12,
        },
        {
            "backend": "torch",
            "reason": "client axis",
            "operations": ["lora_linear"],
            "calls": 90,
        },
        {"backend": "triton", "reason": "on a GPU", "operations": ["pack"], "calls": 3},
    ]


def row(number):
    return {
        "round": number,
        "phase": "B",
        "train_loss": 1.0,
        "eval": None,
        "tokens": 5,
        "clients": 3,
        "seconds": 1.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "failures": [],
    }


@pytest.mark.parametrize("first", [0, 1, 4])  # a new run; one that is resumed before these rounds
def test_what_is_left_is_told_from_the_rounds_alone(first, monkeypatch, capsys):
    """Rounds of 10 seconds; what came before them counts for nothing."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = progress.Reporter(6, 3, "accuracy")
    now[0] += 500.0  # a model is loaded, an engine measured
    reporter.begin()
    for number in range(first, 6):
        now[0] += 77.0 if number == 0 else 10.0
        reporter.round_done(row(number) | ({"phase": None} if number == 0 else {}))
    said = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [line.rpartition("left ")[2] for line in said] == [
        f"{(6 - number) * 10 // 60}:{(6 - number) * 10 % 60:02d}"
        for number in range(max(first, 1), 6)
    ]


def test_paths_in_brackets_are_no_markup(files, tmp_path, call):
    run = tmp_path / "mine [v2] [/red] [bold]"
    code, out, err = call(*small(files, rounds=1, **{"output-dir": run}))
    assert (code, err) == (0, "") and f"run folder: {run}\n" in out
    reporter = progress.Reporter(1, 1, "accuracy")
    with reporter.console.capture() as shown:
        reporter.console._force_terminal, reporter.console.width = True, 200
        reporter.table("plan", [("model", f"{run}")])
    assert str(run) in shown.get()


def test_a_run_that_diverges_at_once_leaves_nothing(files, tmp_path, call):
    run = tmp_path / "run"
    code, _, err = call(*small(files, lr=1e9, rounds=2, **{"output-dir": run}))
    assert code == 2 and "lower --lr" in err and f"nothing was kept in {run}" in err
    assert err.count("\n") == 1 and not run.exists()
    assert call(*small(files, rounds=2, **{"output-dir": run}))[0] == 0, "the same command, mended"


def test_a_run_that_diverges_later_leaves_its_last_adapter(files, tmp_path, call, monkeypatch):
    from rolora.federated.server import QuorumMissed, Server

    advance = Server._round

    def lost(self, number):
        if number == 3:
            raise QuorumMissed("round 3: 0 of 3 updates were accepted")
        return advance(self, number)

    monkeypatch.setattr(Server, "_round", lost)
    run = tmp_path / "run"
    code, _, err = call(*small(files, rounds=6, **{"eval-every": 4, "output-dir": run}))
    monkeypatch.undo()
    assert code == 2 and f"round 2 is the last good one: {run}/adapter" in err
    assert err.count("\n") == 1 and [r["round"] for r in rows(run)] == [0, 1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 2 and "0 of 3 updates" in summary["diverged"]
    args = ("--adapter", run / "adapter", "--eval-file", files["eval"], "--json")
    code, out, _ = call(*args, command=evaluate.command)
    assert code == 0 and json.loads(out) == pytest.approx(summary["eval"])
    code, out, err = call(run, "-o", tmp_path / "r.png", command=report.command)
    assert code == 2 and "diverged" in err and err.count("\n") == 1
