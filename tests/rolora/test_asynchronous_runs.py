"""`train --buffer`: the plan, the record, and runs that were killed or stopped and go on."""

import json
import shutil

import pytest

from rolora.federated.buffered.server import BufferedServer
from rolora.run.folder import RunFolder
from tests.rolora.commands import bits, rows, small

ASYNC = {"clients": 4, "buffer": 2, "client-speeds": "tail", "dropout": 0.1}
NEW = ("versions", "staleness", "training", "waiting", "simulated_seconds")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return tmp_path_factory.mktemp("asynchronous") / "whole"


def test_the_record_and_the_plan_say_what_happens(files, whole, call):
    flags = small(files, rounds=6, **ASYNC)
    code, out, err = call(*flags, "--dry-run")
    assert (code, err) == (0, "")
    assert "a round ends after 2 answers, 4 clients train at any time" in out
    assert "speeds are tail: a task takes the clients 2.0 to 20.0 simulated seconds" in out
    code, out, err = call(*flags, "--output-dir", whole)
    assert (code, err) == (0, "") and "simulated s" in out
    found = rows(whole)
    times = [row["simulated_seconds"] for row in found[1:]]
    assert times == sorted(times) and times[-1] < 20.0, "the slow one holds nobody up"
    for row in found[1:]:
        assert all(name in row for name in NEW) and row["clients"] == 2 and not row["rejected"]
    assert found[-1]["versions"] == {"A": 3, "B": 3, "head": 6}
    assert max(row["staleness"][2] for row in found[1:]) >= 1


def test_a_killed_run_resumes_to_the_same_bits(files, whole, tmp_path, call, monkeypatch):
    """What is on the disk when a round is recorded and its checkpoint is not written yet, and when
    it is.
    """
    if not whole.is_dir():
        call(*small(files, rounds=6, **ASYNC), "--output-dir", whole)
    left, append = tmp_path / "left", RunFolder.append

    def copying(self, row):
        if row["round"] == 4:
            shutil.copytree(self.path, left / "before")
        append(self, row)
        if row["round"] == 4:
            shutil.copytree(self.path, left / "after")

    monkeypatch.setattr(RunFolder, "append", copying)
    assert call(*small(files, rounds=6, **ASYNC), "--output-dir", tmp_path / "run")[0] == 0
    monkeypatch.undo()
    for place in ("before", "after"):
        numbers = (left / place / "checkpoints" / "round-000003" / "state.json").read_text()
        assert json.loads(numbers)["book"]["training"], "somebody trains between the rounds"
        code, out, err = call("--resume", "--output-dir", left / place)
        assert (code, err) == (0, "") and "resumed after round 3" in out
        assert bits(left / place) == bits(whole)


@pytest.mark.parametrize("method", ["_take", "_send", "_summed"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    method, files, whole, tmp_path, call, monkeypatch
):
    if not whole.is_dir():
        call(*small(files, rounds=6, **ASYNC), "--output-dir", whole)
    own = getattr(BufferedServer, method)

    def interrupted(self, *given):
        made = own(self, *given)
        if self.state.round == 3:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(BufferedServer, method, interrupted)
    flags = small(files, rounds=6, **ASYNC, **{"checkpoint-every": 10})
    code, out, _ = call(*flags, "--output-dir", tmp_path / "run")
    assert code == 130 and "to go on" in out
    monkeypatch.undo()
    code, out, err = call("--resume", "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "") and "resumed after round 3" in out
    assert bits(tmp_path / "run") == bits(whole)


def test_a_buffer_of_all_that_train_is_a_synchronous_run(files, tmp_path, call):
    given = {"clients": 4, "clients-per-round": 3, "exchange-dtype": "int8"}
    given |= {"no-equal-factors": True}  # which late changes could not be of
    assert call(*small(files, **given), "--output-dir", tmp_path / "plain")[0] == 0
    asynchronous = small(files, **given, buffer=3)
    assert call(*asynchronous, "--output-dir", tmp_path / "buffered")[0] == 0
    (plain, adapters), (ours, buffered) = bits(tmp_path / "plain"), bits(tmp_path / "buffered")
    assert adapters == buffered
    assert [{name: row[name] for name in plain[0]} for row in ours] == plain


@pytest.mark.parametrize(
    "options, said",
    [
        ({"buffer": 4}, "--buffer 4 is over the 3 clients that train at a time"),
        ({"buffer": 2, "balance": True}, "--buffer does not go with --method rolora"),
        ({"staleness-limit": 2}, "--staleness-limit 2 needs --buffer"),
    ],
)
def test_what_cannot_be_is_one_line(options, said, files, tmp_path, call):
    code, _, err = call(*small(files, **options), "--output-dir", tmp_path / "run")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
