"""A run that Flower serves: where the reason of its end stands, and how it goes on."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import tomli_w

from rolora import config
from rolora.cohort.sequential import Sequential
from rolora.run.federation import message_limit
from rolora.run.job import prepare
from rolora.transport.local import LocalTransport
from tests.rolora.commands import bits, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(flower, monkeypatch):
    monkeypatch.delitem(sys.modules, "rolora.run.served", raising=False)
    yield importlib.import_module("rolora.run.served")
    sys.modules.pop("rolora.run.served", None)


def test_why_a_run_failed_is_an_exception_and_a_file(served, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.toml"
    reason = tmp_path / "run.toml.error"
    for text, message in (
        ('rounds = 2\nmethud = "ffa"\n', "methud"),
        ("rounds = 2\n", f"{path} names no output_dir: a served run needs one"),
    ):
        path.write_text(text)
        # SystemExit would lose it: Flower sends on what an ordinary exception leaves behind
        with pytest.raises(served.ServedRunFailed, match=re.escape(message)) as raised:
            served.serve(None, {"rolora-config": str(path)})
        assert reason.read_text() == capsys.readouterr().out == f"error: {raised.value}\n"
    with pytest.raises(served.ServedRunFailed, match="rolora-config is not given"):
        served.serve(None, {"rolora-config": ""})
    monkeypatch.setattr(served, "_run", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours, which Flower says with its place
        served.serve(None, {"rolora-config": str(path)})
    assert reason.read_text() == "error: ZeroDivisionError: division by zero\n"
    ended = []
    monkeypatch.setattr(served, "_run", lambda *given: ended.append(given))
    served.serve(None, {"rolora-config": str(path), "resume": True})
    assert not reason.exists() and ended == [(None, str(path), True, 120.0)]
    with pytest.raises(served.ServedRunFailed, match="the seconds that the first round waits"):
        served.serve(None, {"rolora-config": str(path), "gathering": "long"})


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(served, monkeypatch, tmp_path, files):
    """`flwr stop` ends the app between two instructions; `resume=true` goes on."""
    values = {
        "model": str(files["llama"]),
        "train_file": str(files["train"]),
        "eval_file": str(files["eval"]),
        "task_type": "classification",
        "clients": 2,
        "rounds": 3,
        "local_steps": 1,
        "batch_size": 4,
        "rank": 2,
        "max_length": 32,
        "device": "cpu",
        "threads": 1,
    }

    class Stopped(BaseException):
        """What no handler takes: as a killed process."""

    class Nodes(LocalTransport):
        """Nodes that are here; the grid is the number of rounds until the app is stopped."""

        def __init__(self, grid, gathering):
            made = prepare(config.resolve(values))
            super().__init__(Sequential(made.trainer()), message_limit(made))
            self.left = grid

        def run_round(self, tasks, deadline=None):
            self.left -= 1
            if self.left < 0:
                raise Stopped
            return super().run_round(tasks, deadline)

    monkeypatch.setattr(served, "FlowerTransport", Nodes)

    def start(name, rounds, **more):
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(values | {"output_dir": str(tmp_path / name)}))
        served.serve(rounds, {"rolora-config": str(path), **more})

    start("whole", 3)
    with pytest.raises(Stopped):
        start("stopped", 1)
    assert rows(tmp_path / "stopped")[-1]["round"] == 1
    start("stopped", 2, resume=True)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_the_run_of_the_guide_is_one(tmp_path):
    """Its run.toml holds options that exist, with values that are allowed."""
    text = (ROOT / "docs" / "guides" / "federate.md").read_text()
    path = tmp_path / "run.toml"
    path.write_text(re.search(r"^```toml\n(model = .*?)^```", text, re.M | re.S)[1])
    settled = config.resolve({}, str(path))
    assert settled.federation.deadline == 600.0 and settled.run.output_dir == "/srv/runs/first"
