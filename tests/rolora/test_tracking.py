"""A tracker that fails, and how the end of a run reaches one, with a tracker that the test holds."""

import json
import sys

import pytest

from rolora.config import Config
from rolora.errors import BadInput
from rolora.run import trackers
from rolora.run.folder import RunFolder


class Fake:
    """A tracker that fails when it is told to."""

    def __init__(self, about):
        self.identity, self.last, self.where, self.got = {"id": "x"}, -1, "here", []
        self.fails = set()

    def send(self, round, values):
        if round in self.fails:
            self.fails.discard(round)
            raise ConnectionError("no answer\nfrom the server")
        self.got.append((round, values))

    def close(self, status):
        self.status = status


@pytest.fixture
def fake(monkeypatch):
    from types import ModuleType, SimpleNamespace

    made = []
    module = ModuleType("rolora.run.trackers.tensorboard")
    module.begin = lambda about: made.append(Fake(about)) or made[-1]
    monkeypatch.setitem(sys.modules, "rolora.run.trackers.tensorboard", module)
    monkeypatch.setattr(trackers, "_WAIT", 0.0)
    return SimpleNamespace(made=made, config=Config().with_values(track="tensorboard"))


def row(number):
    return {"round": number, "bytes_up": 1, "bytes_down": 2, "rejected": {}, "eval": None}


def test_a_tracker_that_fails_is_told_of_and_gets_what_it_lacks(fake, tmp_path):
    said, recorded = [], [row(0)]
    folder = RunFolder(tmp_path, recorded)
    with trackers.opened(fake.config, folder, False, said.append) as open_ones:
        (made,) = fake.made
        made.fails = {1}
        for number in (1, 2, 3):
            recorded.append(row(number))
            open_ones.send(recorded)
    assert [number for number, _ in made.got] == [0, 1, 2, 3]
    assert [values["bytes/total"] for _, values in made.got] == [3, 6, 9, 12]
    assert made.status == "finished" and said[0] == "tensorboard: here"
    assert said[1:] == [
        "tensorboard did not take round 1 (ConnectionError: no answer from the server): the run "
        "goes on, and it is tried again"
    ]
    assert json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]["last"] == 3


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, "killed"), (ValueError, "failed")])
def test_how_a_run_ended_is_told(error, status, fake, tmp_path):
    with pytest.raises(error), trackers.opened(fake.config, RunFolder(tmp_path), False, print):
        raise error
    assert fake.made[0].status == status


def test_a_damaged_state_is_one_line(fake, tmp_path):
    (tmp_path / "trackers.json").write_text("[3]")
    with pytest.raises(BadInput, match="damaged"):
        trackers.Trackers(tmp_path, print).begin(fake.config, [])
