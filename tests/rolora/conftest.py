"""Small model folders with real tokenizers, and data files, made once a session; commands called in
this process.
"""

import importlib
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rolora import cli
from rolora import train as train_command
from tests.models import make_files
from tests.rolora import pictures


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True)
def unpainted(monkeypatch):
    pictures.unpainted(monkeypatch.setattr)


@pytest.fixture
def call(capsys):
    def call(*args, command=train_command.command):
        """(exit code, standard output, standard error), of the command alone"""
        assert "WORLD_SIZE" not in os.environ, "a rank ends its process, which here is pytest"
        capsys.readouterr()  # what the test itself has had printed, such as transformers' progress
        before = signal.getsignal(signal.SIGTERM)
        argv, sys.argv = sys.argv, ["rolora", *map(str, args)]
        try:
            with pytest.raises(SystemExit) as stop:
                cli.run(command)
        finally:
            sys.argv = argv
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def flower(monkeypatch):
    """The transport's module, with Flower's names stood in for."""
    app = ModuleType("flwr.app")
    app.ArrayRecord = app.ConfigRecord = app.RecordDict = dict
    app.Array = app.Message = SimpleNamespace
    monkeypatch.setitem(sys.modules, "flwr", ModuleType("flwr"))
    monkeypatch.setitem(sys.modules, "flwr.app", app)
    ours = ("rolora.transport.flower", "rolora.transport.flower_bytes")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("rolora.transport.flower")
    yield module
    for name in ours:
        sys.modules.pop(name, None)
