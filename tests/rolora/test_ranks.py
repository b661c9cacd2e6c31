"""torchrun: several ranks are one federation.

The same bits at any number of ranks, one writer, and a dead rank that ends the job with a line.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.rolora.commands import bits, rows, small
from tests.rolora.rank_jobs import finished, ranks, torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "extra",
    [{"dropout": 0.1, "exchange-dtype": "int8"}, {"method": "fedavg", "clients-per-round": 3}],
    ids=["rolora, int8", "fedavg, 3 of 5 clients"],
)
def test_the_same_bits_at_one_two_and_three_ranks(extra, files, tmp_path, call, python):
    flags = small(files, clients=5, rounds=3, threads=1, **extra)
    assert call(*flags, "--output-dir", tmp_path / "0")[0] == 0
    for count in (1, 2, 3):
        code, out, err = ranks(python, count, *flags, "--output-dir", tmp_path / str(count))
        assert code == 0, err[-2000:]
        assert out.count("round 3/3") == 1, "one rank speaks"
        assert bits(tmp_path / str(count)) == bits(tmp_path / "0")


def test_a_method_of_ones_own_at_two_ranks(files, tmp_path, call, python):
    program = Path(__file__).parents[2] / "examples" / "own_method.py"
    flags = small(files, clients=3, rounds=2, threads=1, method=program)
    assert call(*flags, "--output-dir", tmp_path / "0")[0] == 0
    code, _, err = ranks(python, 2, *flags, "--output-dir", tmp_path / "2")
    assert code == 0, err[-2000:]
    assert bits(tmp_path / "2") == bits(tmp_path / "0")


KEPT = {
    "moments": ({"carry-moments": True}, {"no-carry-moments": True}),
    "control variates": (
        {"control-variates": True, "optimizer": "sgd", "lr": 0.1},
        {"no-control-variates": True, "optimizer": "sgd", "lr": 0.1},
    ),
    "what rounding left": (
        {"error-feedback": True, "exchange-dtype": "int4"},
        {"exchange-dtype": "int4"},
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_clients_keep_stays_with_them_at_any_number_of_ranks(
    kept, files, tmp_path, call, python
):
    """Also in the checkpoint that another number of ranks goes on from."""
    with_it, without = KEPT[kept]
    common = {"clients": 5, "rounds": 4, "threads": 1, "clients-per-round": 3, "schedule": "BA"}
    flags = small(files, **common, **with_it)
    assert call(*flags, "--output-dir", tmp_path / "0")[0] == 0
    plain = small(files, **common, **without)
    assert call(*plain, "--output-dir", tmp_path / "plain")[0] == 0
    shorter = [2 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    code, _, err = ranks(python, 3, *shorter, "--output-dir", tmp_path / "3")
    assert code == 0, err[-2000:]
    code, _, err = ranks(python, 2, "--resume", "--rounds", 4, "--output-dir", tmp_path / "3")
    assert code == 0, err[-2000:]
    assert bits(tmp_path / "3") == bits(tmp_path / "0") != bits(tmp_path / "plain")


HELD = """
import time
from pathlib import Path
from rolora import cli, train
from rolora.federated.server import Server

hold, whole = Path({hold!r}), Server._round


def held(self, number):
    while number == 3 and hold.exists():
        time.sleep(0.02)
    return whole(self, number)


Server._round = held
cli.run(train.command)
"""


def test_a_dead_rank_ends_the_job_and_another_number_of_ranks_goes_on(files, tmp_path, call):
    """The ranks wait before round 3 until one of them is dead."""
    hold, program = tmp_path / "hold", tmp_path / "rolora_held.py"
    hold.touch()
    program.write_text(HELD.format(hold=str(hold)))
    flags = small(files, clients=4, rounds=6, threads=1)
    call(*flags, "--output-dir", tmp_path / "whole")
    process = torchrun(3, *flags, "--output-dir", tmp_path / "run", program=(program,))
    try:
        for line in process.stdout:
            if line.startswith("round 2/6"):
                break
        children = psutil.Process(process.pid).children()
        ranks = [child.pid for child in children if str(program) in child.cmdline()]
        assert len(ranks) == 3
        os.kill(ranks[2], signal.SIGKILL)
    finally:
        hold.unlink()
    code, out, err = finished(process)
    assert code != 0
    # the others notice in their next all-reduce, or torchrun ends them first; both say how to go on
    assert (
        "lost another rank" in err
        or "interrupted; to go on: python -m rolora.train --resume" in out
    )
    assert rows(tmp_path / "run")[-1]["round"] < 6
    code, out, err = finished(torchrun(2, "--resume", "--output-dir", tmp_path / "run"))
    assert code == 0, err[-2000:]
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"aggregation": "median"},
            "error: --aggregation median needs every client's change in one process",
        ),
        ({"method": "flora"}, "error: --method flora needs every client's change in one process"),
        ({"method": "fedsa"}, "error: --method fedsa keeps factors with the clients"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_what_is_not_one_sum_is_refused_once(flags, message, files, tmp_path, python):
    code, _, err = ranks(python, 2, *small(files, **flags, **{"output-dir": tmp_path / "run"}))
    assert code != 0 and err.count(message) == 1
    assert not (tmp_path / "run").exists()


PROGRAM = """
from rolora import cli, train
from rolora.federated.server import Server

whole = Server.run


def watched(self):
    whole(self)
    print("state", sorted(self.state.fingerprints().items()), flush=True)


Server.run = watched
cli.run(train.command)
"""


OTHER_CPU = """
import os

from rolora.federated import methods, turn


def rounded(layout, published, frozen):
    found = turn.equal(layout, published, frozen)
    for matrices in (found or {}).values():
        matrices *= 1 + 1e-6 * int(os.environ["RANK"])
    return found


methods.HAND_OVERS["equal_factors"] = rounded
"""


def test_every_rank_turns_factors_as_the_first_one_does(files, tmp_path, python):
    """Ranks on other CPUs than its own would find another SVD's last bits."""
    script = tmp_path / "program.py"
    script.write_text(OTHER_CPU + PROGRAM)
    flags = small(files, clients=4, rounds=3, threads=1)
    path = tmp_path / "run"
    code, out, err = ranks(python, 2, *flags, "--output-dir", path, program=(script,))
    assert code == 0, err[-2000:]
    states = [line for line in out.splitlines() if line.startswith("state")]
    assert len(states) == 2 and states[0] == states[1]
    assert "handed over by --equal-factors" in out


def test_every_rank_ends_with_the_same_noise_and_the_same_poisson_draw(files, tmp_path, python):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    options = {"clients-per-round": 2, "sampling": "poisson", "dp-clip": 0.1, "dp-noise": 1.0}
    flags = small(files, clients=5, rounds=4, threads=1, **options)
    path = tmp_path / "run"
    code, out, err = ranks(python, 2, *flags, "--output-dir", path, program=(script,))
    assert code == 0, err[-2000:]
    states = [line for line in out.splitlines() if line.startswith("state")]
    assert len(states) == 2 and states[0] == states[1]
    assert [row["rejected"] for row in rows(path)] == [{}] * 5
    assert json.loads((path / "privacy.json").read_text()) == {"releases": 4}


ENDING = """
import os, sys, torch
from rolora import cli
from rolora.errors import BadInput
from rolora.transport.ranks import join


def body():
    if "RANK" in os.environ:
        join(torch.device("cpu"))
    if {wrong}:
        raise BadInput("wrong")
    sys.stdout.write("said")  # no end of line: it waits in the buffer


class Held:
    def __del__(self, write=os.write):  # as a tensor that a thread of gloo lets go of
        write(2, b"torn down")


held = Held()
cli.run(cli.command("train", "", [], body))
"""


@pytest.mark.parametrize("wrong, code", [(False, 0), (True, 2)])
def test_a_rank_ends_with_what_it_said_and_is_not_torn_down(wrong, code):
    program = [sys.executable, "-c", ENDING.format(wrong=wrong)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for rank in ({}, {"WORLD_SIZE": "1", "RANK": "0"} | meeting):
        ended = subprocess.run(program, capture_output=True, text=True, env=os.environ | rank)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout == ("" if wrong else "said") and wrong == ("wrong" in ended.stderr)
        assert ("torn down" in ended.stderr) == (not rank)
