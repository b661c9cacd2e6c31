"""Runs that were killed, stopped or are asked for more go on to the bits of one that was never interrupted."""

import signal

import pytest

from tests.rolora.commands import bits, rows, small

pytestmark = pytest.mark.slow

KILLED = """
import os, signal
from rolora import cli, train
from rolora.federated.server import Server

whole = Server._round


def dying(self, number):
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, number)


Server._round = dying
cli.run(train.command)
"""


def test_a_killed_run_resumes_to_the_same_bits(files, tmp_path, call, python):
    flags = small(files, rounds=6, **{"clients-per-round": 2, "dropout": 0.1})
    call(*flags, "--output-dir", tmp_path / "whole")
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    code, out, _ = python.run(program, *flags, "--output-dir", tmp_path / "killed")
    assert code == -signal.SIGKILL and "round 3/6" in out
    code, out, err = call("--resume", "--output-dir", tmp_path / "killed")
    assert (code, err) == (0, "") and "resumed after round" in out
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    code, out, _ = call("--resume", "--output-dir", tmp_path / "killed")
    assert code == 0 and bits(tmp_path / "killed") == bits(tmp_path / "whole"), (
        "a finished run is finished"
    )


def test_ctrl_c_keeps_the_checkpoint_and_prints_how_to_go_on(files, tmp_path, python):
    flags = small(files, rounds=400, **{"checkpoint-every": 1000})
    process = python.start("-m", "rolora.train", *flags, "--output-dir", tmp_path / "run")
    process.wait_for("\nround 2/400")
    process.send_signal(signal.SIGINT)
    code, out, _ = process.finished()
    assert code == 130
    assert (
        out.splitlines()[-1]
        == f"interrupted; to go on: python -m rolora.train --resume --output-dir {tmp_path / 'run'}"
    )
    done = rows(tmp_path / "run")[-1]["round"]
    assert (tmp_path / "run" / "checkpoints" / f"round-{done:06d}").is_dir()


def test_resume_refuses_changes_but_takes_more_rounds(files, tmp_path, call):
    run = tmp_path / "run"
    call(*small(files, rounds=2, **{"output-dir": run}))
    before = bits(run)
    code, _, err = call("--resume", "--output-dir", run, "--lr", 0.5)
    assert (
        code == 2
        and "--lr 0.5 differs from the run's 0.01: leave it out, or start a new run" in err
    )
    code, _, err = call("--resume", "--output-dir", run, "--rounds", 1)
    assert code == 2 and "only a larger number can be given" in err
    assert bits(run) == before
    code, _, _ = call("--resume", "--output-dir", run, "--rounds", 4)
    assert code == 0 and [r["round"] for r in rows(run)] == [0, 1, 2, 3, 4]
    call(*small(files, rounds=4, **{"output-dir": tmp_path / "whole"}))
    assert bits(run) == bits(tmp_path / "whole")


def test_resume_without_a_valid_checkpoint_starts_over(files, tmp_path, call):
    import shutil

    run = tmp_path / "run"
    call(*small(files, rounds=2, **{"output-dir": run}))
    before = bits(run)
    shutil.rmtree(run / "checkpoints")
    code, out, _ = call("--resume", "--output-dir", run)
    assert code == 0 and "no valid checkpoint: starting at round 0" in out and bits(run) == before


@pytest.mark.parametrize(
    "flags",
    [
        {"exchange-dtype": "int8"},
        {"aggregation": "median"},
        {"aggregation": "trimmed-mean", "trim-fraction": 0.34},
        {"server-momentum": 0.9, "server-lr": 0.5},
        {"max-weight": 20, "max-update-norm": 5},
        {"weighting": "uniform"},
        {"lr-a": 1e-3, "lr-b": 2e-2, "lr-schedule": "linear", "lr-schedule-a": "cosine"},
        {"weight-decay": 10.0, "deadline": 600},
        {"balance": True},
        {"equal-factors": True, "realign-moments": True},
        {
            **{"equal-factors": True, "realign-moments": True, "error-feedback": True},
            **{"exchange-dtype": "int4", "engine": "batched"},
        },
        {"local-coordinates": True},
        {"init": "orthogonal", "schedule": "BBA"},
        {"method": "fedsvd"},
        {"method": "flora"},
        {"method": "fedex"},
        {"method": "fedsa"},
        {"method": "lora-a2", "client-ranks": "1,3"},
        {"method": "flexlora", "client-ranks": "2,4"},
        {"no-carry-moments": True},
        {"carry-moments": True, "method": "fedsa"},
        {"carry-moments": True, "method": "fedavg", "engine": "batched"},
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_option_of_the_federation_trains_and_resumes_to_the_same_bits(
    flags, files, tmp_path, call
):
    flags = small(files, **flags)
    assert call(*flags, "--output-dir", tmp_path / "whole")[0] == 0
    shorter = [3 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    assert call(*shorter, "--output-dir", tmp_path / "parts")[0] == 0
    before = bits(tmp_path / "parts")[1]
    if "linear" not in flags:  # a schedule knows the number of rounds from the start
        assert call("--resume", "--output-dir", tmp_path / "parts", "--rounds", 4)[0] == 0
        assert (
            bits(tmp_path / "parts") == bits(tmp_path / "whole")
            and bits(tmp_path / "parts")[1] != before
        )
