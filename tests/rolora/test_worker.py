"""The resident worker that a federation between owners talks to: what it answers, and to whom."""

import json
import os
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import tomli_w
import torch

from rolora import config
from rolora.errors import BadInput
from rolora.federated import wire
from rolora.federated.layout import fingerprint
from rolora.run import job
from rolora.transport import unix
from rolora.transport.resident import Resident
from rolora.worker import ask
from tests.models import sentences
from tests.rolora.rank_jobs import ONE_THREAD


def listens(path):
    with sockets.socket(sockets.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def running(files, tmp_path, python):
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

    def start(*flags, socket=tmp_path / "w.sock", launcher=()):
        command = ["-m", "rolora.worker", "--config", path]
        command += ["--client", "1", "--socket", socket, *flags]
        if launcher:  # its ranks are fresh interpreters
            words = map(str, (sys.executable, *launcher, *command))
            process = subprocess.Popen(list(words), env=os.environ | ONE_THREAD)
        else:
            process = python.start(*command, env=ONE_THREAD)
        started.append(process)
        while not listens(socket) and process.poll() is None:
            time.sleep(0.05)
        return str(socket), process

    start.configuration = config.resolve(configuration)
    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


def task(made, client=1, **changed):
    published = made.initial_factors()
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


def test_a_client_of_two_processes_answers_as_one(running):
    """Each holds half of the base; the first one answers, until it is stopped."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    path, process = running("--base-sharding", launcher=ranks)
    made = job.prepare(running.configuration)
    order = task(made)
    for _ in range(2):  # the second finds the client as it was before the first
        answer = wire.decode_update(ask(path, wire.encode_task(order))[1:], 1 << 20)
        ours, _ = made.trainer().train(order, order.full, {})
        assert (answer.change == ours.change).all() and answer.loss == ours.loss
    assert ask(path, b"nonsense").startswith(b"Ftask refused: ")
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=600)
    assert len(children) == 2 and not any(child.is_running() for child in children)


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
    code, _, err = second.finished()
    assert code == 2 and err == f"error: --socket {path}: a worker is listening there already\n"
    process.kill()
    started, trained, *refused = process.finished()[1].splitlines()
    assert started.endswith(f"examples, listening on {path}")
    sizes = f"{len(wire.encode_task(order))} bytes in, {len(answer) - 1} bytes out, "
    assert trained.startswith(f"client 1: round 1 B: loss {ours.loss:.4f}, ") and sizes in trained
    words = [line.split(": ")[1:3] for line in refused]
    assert words == [["no update", "task refused"]] * 3 + [["no update", "other layout"]]


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
        code, _, err = process.finished()
        assert code == 2 and message in err and err.count("\n") == 1
    _, process = running("--client", "7", socket=tmp_path / "seven.sock")
    assert process.finished()[2] == "error: --client 7: this configuration has clients 0 to 2\n"


def test_a_worker_keeps_its_moments_and_goes_back_when_a_round_is_asked_again():
    given = []

    class Trainer:
        def train(self, task, published, state):
            given.append((task.run, task.round, dict(state)))
            update = wire.Update(
                task.run, task.round, "B", 1, "x", {}, 1, 0.0, 1, 1, torch.zeros(1)
            )
            return update, {"last": (task.run, task.round)}

    class Peer:
        published, versions, layout = None, None, SimpleNamespace(hash="x")

        def receive(self, task):
            pass

    resident = Resident(1, Trainer(), Peer(), 1 << 20)
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
        assert resident.answer(wire.encode_task(order))[:1] == b"U"
    after = [state.get("last") for _, _, state in given]
    assert after == [None, ("a", 1), ("a", 2), ("a", 1), ("a", 2), None, ("b", 8)]


def test_hostile_tasks_neither_end_a_worker_nor_poison_it(running, tmp_path):
    path, process = running()
    fresh, _ = running(socket=tmp_path / "fresh.sock")
    made = job.prepare(running.configuration)
    good = made.initial_factors()
    prints = {kind: fingerprint(flat) for kind, flat in good.items()}

    def full(**changed):
        buffers = good | changed
        return dict(
            full=buffers,
            versions=dict.fromkeys(buffers, 0),
            fingerprints={kind: fingerprint(flat) for kind, flat in buffers.items()},
        )

    refused = {
        "a short A": full(A=good["A"][:-1]),
        "A of two axes": full(A=good["A"].view(1, -1)),
        "A in fp64": full(A=good["A"].double()),
        "a term": full(term=torch.zeros(made.layout.term_unit)),
        "a strange kind": full(secret=torch.zeros(3)),
        "a change of a strange kind": dict(delta={"C": torch.zeros(3, dtype=torch.bfloat16)}),
        "a change of a peer that is new": dict(
            full={}, delta={"A": torch.zeros(len(good["A"]), dtype=torch.bfloat16)}
        ),
        "a turn of a head": dict(turn={"head": torch.zeros(3, dtype=torch.float64)}),
        "other values": dict(full=good | {"A": good["A"] + 1}),
        "no proof": dict(fingerprints={}),
        "proof of a part": dict(fingerprints={"A": prints["A"]}),
        "strange versions": dict(versions={"A": "one"}),
        "a phase that does not exist": dict(phase="C"),
        "a round past every count": dict(round=1 << 200),
        "an exchange dtype that does not exist": dict(exchange_dtype="fp7"),
    }
    for name, changed in refused.items():
        answer = ask(path, wire.encode_task(task(made, **changed)))
        assert answer.startswith(b"Ftask refused: "), name
    failed = dict(run="r", round=1 << 40, lr=-1.0, **full(A=good["A"] + 1))
    assert ask(path, wire.encode_task(task(made, **failed))).startswith(b"Ftask failed: ")
    for junk in (b"", b"U", b"HH", bytes(40), b"\xff" * 100):
        assert ask(path, junk).startswith(b"Ftask refused: ")
    nothing_held = wire.encode_task(task(made, full={}))
    assert b"is not the server's" in ask(path, nothing_held), "nothing of a refused task stays"
    honest = wire.encode_task(task(made))
    assert ask(path, honest) == ask(fresh, honest) and process.poll() is None


def test_silent_connections_block_nobody(tmp_path, monkeypatch):
    """Who waited for a silent one here would wait for eleven days."""
    monkeypatch.setattr(unix, "_PATIENCE", 1e6)
    path = str(tmp_path / "w.sock")
    server = unix.listening(tmp_path / "w.sock")
    serving = (server, b"hello", lambda request: b"done " + request, 1 << 20)
    threading.Thread(target=unix.serve, args=serving, daemon=True).start()
    silent = [sockets.socket(sockets.AF_UNIX) for _ in range(5)]
    for connection in silent:
        connection.connect(path)
    silent[0].sendall(b"\xff" * 8)  # over the limit
    silent[1].sendall(bytes(3))  # half a length
    with ThreadPoolExecutor() as asking:
        assert asking.submit(ask, path, b"H").result(timeout=1800) == b"hello"
        assert asking.submit(ask, path, b"task").result(timeout=1800) == b"done task"
    for connection in silent:
        connection.close()


def test_what_is_not_a_socket_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(BadInput, match="exists and is not a socket"):
            unix.listening(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"
    unix.listening(tmp_path / "dead").close()
    with unix.listening(tmp_path / "dead"):
        with pytest.raises(BadInput, match="a worker is listening there already"):
            unix.listening(tmp_path / "dead")
