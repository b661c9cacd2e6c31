"""What a tracker's own reader finds of a run: every round once, with the run folder's numbers, though the run
was cut off and gone on with; and nothing that leaves the machine unasked.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from rolora.run import trackers
from tests.rolora.commands import bits, rows, small

ROOT = Path(__file__).parent.parent.parent


# The run folder's names of what the trackers call otherwise.
SAME = {
    "train/loss": lambda row: row["train_loss"],
    "eval/accuracy": lambda row: row["eval"] and row["eval"]["accuracy"],
    "bytes/up": lambda row: row["bytes_up"],
    "clients/loss_median": lambda row: row["client_loss"] and row["client_loss"][1],
}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """No settings of the person who runs the tests, and a folder of their own to write in."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)


def cut_off_and_resumed(call, files, folder, names):
    """Rounds 3 and 4 are recorded and tracked, and then done again: their checkpoints were lost."""
    flags = {"output-dir": folder, "track": names, "clients": 2, "local-steps": 1}
    code, out, err = call(*small(files, rounds=4, **flags))
    assert (code, err) == (0, ""), err
    for number in (3, 4):
        for path in (folder / "checkpoints").glob(f"*{number:04d}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, more, err = call("--resume", "--output-dir", folder, "--rounds", 6)
    assert (code, err) == (0, "") and "resumed after round 2" in more, more + err
    assert [row["round"] for row in rows(folder)] == list(range(7))
    return out, more


def check(found, folder):
    """`found`: name → (step, value), in the reader's order."""
    for name, value in SAME.items():
        expected = [(row["round"], value(row)) for row in rows(folder) if value(row) is not None]
        assert [step for step, _ in found[name]] == [step for step, _ in expected], name
        assert [x for _, x in found[name]] == pytest.approx([x for _, x in expected], rel=1e-6), (
            name
        )
    total = 0
    for (step, value), row in zip(found["bytes/total"], rows(folder), strict=True):
        total += row["bytes_up"] + row["bytes_down"]
        assert (step, value) == (row["round"], pytest.approx(total))


def test_tensorboard_reads_every_round_once(files, call, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = cut_off_and_resumed(call, files, tmp_path / "run", "tensorboard")
    assert f"tensorboard: tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in out
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    found = {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }
    check(found, tmp_path / "run")
    (text,) = reader.Tensors("options/text_summary")
    assert b'"rank": 4' in text.tensor_proto.string_val[0]
    assert str(files["root"]).encode() not in text.tensor_proto.string_val[0]


def test_mlflow_reads_every_round_once_of_one_run(files, call, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    cut_off_and_resumed(call, files, tmp_path / "run", "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("rolora")
    (run,) = client.search_runs([experiment.experiment_id])
    found = {
        name: [
            (metric.step, metric.value)
            for metric in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }
    check(found, tmp_path / "run")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["rank"] == "4" and run.data.params["train_file"] == "train.jsonl"


def test_mlflow_says_where_the_run_is_not(files, call, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    flags = {"output-dir": tmp_path / "run", "track": "mlflow", "rounds": 1}
    assert call(*small(files, **flags))[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    again = ("--resume", "--output-dir", tmp_path / "run", "--rounds", 2)
    code, _, err = call(*again)
    assert code == 2 and "is not in sqlite:///" in err and err.count("\n") == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # then the store that the run was begun in is taken
    assert call(*again)[0] == 0
    assert not list(tmp_path.glob("mlruns"))


def records(path):
    """The records of a `.wandb` file, a log of LevelDB's after 7 bytes: blocks of 32 KiB, in which a piece is a
    checksum (4 bytes), its length (2) and whether it is whole, or a first, middle or last part (1).
    """
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def segments(folder):
    """The history of W&B's own files: name → (step, value). Its service writes them after a run
    has ended, up to when the service itself ends, as it does with a program.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()

    found, ids = {}, set()
    paths = sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )
    for path in paths:
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found.setdefault(name, []).append(
                    (record.history.step.num, json.loads(item.value_json))
                )
    return found, ids, len(paths)


def test_wandb_without_a_login_is_offline_and_goes_on_with_its_run(files, call, tmp_path):
    pytest.importorskip("wandb")
    out, more = cut_off_and_resumed(call, files, tmp_path / "run", "wandb")
    found, ids, count = segments(tmp_path / "run")
    for text in (out, more):
        ((place,),) = [re.findall(r"^wandb: offline, to be sent by: wandb sync (.*)$", text, re.M)]
        assert len(list(Path("/").glob(place.removeprefix("/")))) == 2
    check(found, tmp_path / "run")
    assert count == 2 and len(ids) == 1


def test_trackio_reads_every_round_once(files, call, tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    cut_off_and_resumed(call, files, tmp_path / "run", "trackio")
    (name,) = SQLiteStorage.get_runs("rolora")
    assert name.startswith("run-")
    found = {}
    for line in SQLiteStorage.get_logs("rolora", name):
        for key, value in line.items():
            found.setdefault(key, []).append((line["step"], value))
    check(found, tmp_path / "run")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_nothing_leaves_the_machine_unless_the_users_settings_say_so(name, files, tmp_path):
    """A proxy for all that is sent anywhere hears nothing; of wandb with a login, it does."""
    pytest.importorskip(name)
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                heard.append(connection.recv(4096))
                connection.close()

        Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = {
            key: address for key in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        }
        flags = {"output-dir": tmp_path / "run", "track": name, "rounds": 1}
        unset = ("WANDB_ERROR_REPORTING", "NO_PROXY", "no_proxy")
        environment = {key: value for key, value in os.environ.items() if key not in unset}
        done = subprocess.run(
            [sys.executable, "-m", "rolora.train", *map(str, small(files, **flags))],
            env=environment | proxies | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert heard == []
        if name == "wandb":  # which the test could not tell apart otherwise
            told = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": address, "WANDB_INIT_TIMEOUT": "3"}
            environment |= told | {"PYTHONPATH": str(ROOT)}
            flags["output-dir"] = tmp_path / "online"
            command = [sys.executable, "-m", "rolora.train", *map(str, small(files, **flags))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 2 and "--track wandb cannot be used" in done.stderr
            assert heard and not (tmp_path / "online").exists()


def test_tracking_changes_no_number(files, call, tmp_path):
    pytest.importorskip("tensorboard")
    for name, extra in (("plain", {}), ("tracked", {"track": "tensorboard"})):
        assert call(*small(files, rounds=2, **extra, **{"output-dir": tmp_path / name}))[0] == 0
    assert bits(tmp_path / "plain") == bits(tmp_path / "tracked")


@pytest.mark.parametrize(
    "track, expected",
    [
        ("tensorbord", "--track tensorbord: expected tensorboard, wandb, mlflow, trackio or none"),
        ("wandb,", "--track wandb,: expected"),
        ("none,wandb", "--track none,wandb: expected"),
    ],
)
def test_bad_input(track, expected, files, call, tmp_path):
    code, _, err = call(*small(files, track=track, **{"output-dir": tmp_path / "run"}))
    assert code == 2 and expected in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_one_line_before_anything_is_read(files, call, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._PACKAGES, "wandb", "no_such_package")
    code, _, err = call(*small(files, track="wandb", **{"output-dir": tmp_path / "run"}))
    assert code == 2 and "pip install '.[wandb]'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
