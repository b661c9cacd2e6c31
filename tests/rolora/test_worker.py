"""The resident worker that a federation between owners talks to: what it answers, and to whom."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tomli_w

from rolora import config, job
from rolora.federated import wire
from rolora.federated.layout import fingerprint
from rolora.worker import ask
from tests.models import sentences


@pytest.fixture
def running(files, tmp_path):
    """start(*flags) → (socket, process) of a worker on a small configuration."""
    configuration = {
        "model": str(files["llama"]),
        "train_file": str(files["train"]),
        "eval_file": str(files["eval"]),
        "clients": 3,
        "local_steps": 2,
        "batch_size": 4,
        "rank": 2,
        "max_length": 32,
        "task_type": "classification",
        "device": "cpu",
        "threads": 1,
    }
    path, started = tmp_path / "run.toml", []
    path.write_text(tomli_w.dumps(configuration))

    def start(*flags, socket=tmp_path / "w.sock"):
        command = [
            sys.executable,
            "-m",
            "rolora.worker",
            "--config",
            path,
            "--client",
            "1",
            "--socket",
            socket,
            *flags,
        ]
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        end = time.monotonic() + 60
        while not socket.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return str(socket), process

    start.configuration = config.resolve(configuration)
    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


def task(made, client=1, **changed):
    published = job.initial_factors(made)
    fields = dict(
        run="r",
        round=1,
        phase="B",
        client=client,
        layout=made.layout.hash,
        versions=dict.fromkeys(published, 0),
        fingerprints={k: fingerprint(v) for k, v in published.items()},
        exchange_dtype="bf16",
        lr=1e-2,
        full=published,
        delta={},
    )
    return wire.Task(**fields | changed)


def test_a_worker_trains_as_the_local_run_does_and_refuses_the_rest(running):
    path, process = running()
    made = job.prepare(running.configuration)
    assert json.loads(ask(path, b"H")) == {
        "client": 1,
        "layout": made.layout.hash,
        "examples": len(made.clients[1]),
    }
    assert os.stat(path).st_mode & 0o777 == 0o600
    order = task(made)
    answer = ask(path, wire.encode_task(order))
    assert answer[:1] == b"U"
    theirs, (ours, _) = (
        wire.decode_update(answer[1:], 1 << 20),
        made.trainer().train(order, order.full, {}),
    )
    assert (theirs.change == ours.change).all() and theirs.loss == ours.loss
    assert (
        ask(path, wire.encode_task(task(made, client=2)))
        == b"Ftask refused: a task of client 2 came to client 1"
    )
    assert ask(path, b"nonsense").startswith(b"Ftask refused: ")
    lost = {k: "0" * 16 for k in order.fingerprints}
    assert b"the published A is not the server's" in ask(
        path, wire.encode_task(task(made, full={}, fingerprints=lost))
    )
    assert ask(path, wire.encode_task(task(made, layout="0" * 16))).startswith(b"Fother layout: ")
    assert process.poll() is None, "it still serves"
    _, second = running()
    out, err = second.communicate(timeout=60)
    assert (
        second.returncode == 2
        and err == f"error: --socket {path}: a worker is listening there already\n"
    )


def test_a_workers_own_examples_and_bad_ones(running, tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in sentences(37, 5))
    )
    path, _ = running("--train-file", tmp_path / "mine.jsonl")
    assert json.loads(ask(path, b"H"))["examples"] == 37
    made = job.prepare(running.configuration)
    assert wire.decode_update(ask(path, wire.encode_task(task(made)))[1:], 1 << 20).weight == 37
    for name, content, message in (
        ("odd", '{"words": "x"}\n', "has no column 'text'"),
        ("new", '{"text": "x", "label": "moon"}\n', "label 'moon' (row 1) does not occur"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(content)
        _, process = running(
            "--train-file", tmp_path / f"{name}.jsonl", socket=tmp_path / f"{name}.sock"
        )
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and message in err and err.count("\n") == 1
    _, process = running("--client", "7", socket=tmp_path / "seven.sock")
    assert (
        process.communicate(timeout=60)[1]
        == "error: --client 7: this configuration has clients 0 to 2\n"
    )


def test_a_worker_keeps_its_moments_and_goes_back_when_a_round_is_asked_again():
    from rolora.worker import _train

    given = []

    class Trainer:
        def train(self, task, published, state):
            given.append((task.run, task.round, dict(state)))
            return None, {"last": (task.run, task.round)}

    class Peer:
        published = None

        def receive(self, task):
            pass

    states: dict = {}
    for run, number in (("a", 1), ("a", 2), ("a", 3), ("a", 2), ("a", 7), ("b", 8), ("b", 9)):
        order = wire.Task(
            run=run,
            round=number,
            phase="B",
            client=1,
            layout="x",
            versions={},
            fingerprints={},
            exchange_dtype="fp32",
            lr=1.0,
            full={},
            delta={},
        )
        try:
            _train(wire.encode_task(order), 1, Trainer(), Peer(), 1 << 20, states)
        except AttributeError:
            pass  # there is no update to encode
    after = [state.get("last") for _, _, state in given]
    assert after == [None, ("a", 1), ("a", 2), ("a", 1), ("a", 2), None, ("b", 8)]
