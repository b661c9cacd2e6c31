"""Where a worker's tasks come from, as its flags say it."""

import sys

import pytest

from rolora.worker import command


@pytest.mark.parametrize(
    "flags, line",
    [
        ([], "give one of --superlink HOST:PORT and --socket PATH: where tasks come from"),
        (["--socket", "w.sock", "--superlink", "h:1"], "give one of --superlink HOST:PORT"),
        (
            ["--socket", "w.sock", "--node-key", "k"],
            "--node-key and --insecure go with --superlink",
        ),
    ],
)
def test_where_tasks_come_from_is_one_place(call, flags, line):
    code, _, err = call("--config", "run.toml", "--client", 0, *flags, command=command)
    assert code == 2 and err.startswith("error: ") and line in err


def test_a_node_without_flower_is_told_what_to_install(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "rolora.transport.flower_node", raising=False)
    flags = ("--config", "run.toml", "--client", 0, "--superlink", "here:1")
    code, _, err = call(*flags, command=command)
    assert code == 2 and err.endswith("install '.[flower]'\n")
