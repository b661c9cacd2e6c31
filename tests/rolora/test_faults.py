"""The fault matrix: crashes at every point, dying clients, and no word to anybody outside."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rolora.federated import codec
from rolora.federated.local import TrainingFailed
from rolora.federated.wire import Update
from rolora_kernels.codecs import CODECS
from tests.rolora.federated import toy
from tests.rolora.rank_jobs import ONE_THREAD

ROOT = Path(__file__).parents[2]
KILL_POINTS = "tests.rolora.kill_points"


def flags(files, **extra):
    given = {
        "model": files["llama"],
        "train-file": files["train"],
        "eval-file": files["eval"],
        "task-type": "classification",
        "clients": 3,
        "clients-per-round": 2,
        "rounds": 3,
        "local-steps": 1,
        "batch-size": 4,
        "eval-max-examples": 8,
        "rank": 2,
        "max-length": 16,
        "device": "cpu",
        "engine": "sequential",
    } | extra
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_with_the_same_bits(files, tmp_path, python):
    """Before and half-way through writes, before fsyncs, renames, new and removed files. The end: adapter, every row, checkpoints,
    and nothing beside them. ROLORA_POINTS sets how many points (100 were tried: all the same)."""
    count = os.environ.get("ROLORA_POINTS", "36")
    words = ("-m", KILL_POINTS, tmp_path, count, "--", *flags(files))
    code, out, err = python.run(*words, cwd=ROOT, env=ONE_THREAD)
    assert code == 0, err[-2000:]
    about, *points = map(json.loads, out.splitlines())
    assert about["points"] >= 100 and len(about["kinds"]) == 7 and len(points) == int(count)
    assert all(point["killed"] for point in points), [p for p in points if not p["killed"]]
    assert all(point["same"] for point in points), [p for p in points if not p["same"]]
    assert sum(point["how"] == "resumed" for point in points) > 0.9 * len(points)


INTERRUPTED = {
    "every round": {},
    "carried moments, every third": {"checkpoint-every": 3, "optimizer": "adamw", "lr": 0.01},
    "own factors, every third": {"checkpoint-every": 3, "method": "fedsa"},
    "int8, server momentum, rare evaluation": {
        "checkpoint-every": 2,
        "eval-every": 2,
        "exchange-dtype": "int8",
        "server-momentum": 0.5,
    },
    "asynchronous, every third": {
        "checkpoint-every": 3,
        "buffer": 1,
        "client-speeds": "tail",
        "staleness-limit": 3,
    },
    "a term, batched": {"checkpoint-every": 4, "method": "flora", "engine": "batched"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", INTERRUPTED)
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(variant, files, tmp_path, python):
    """At calls of our own functions in training, evaluation, recording and saving: adapter, every row, checkpoints. ROLORA_MOMENTS
    sets how many moments (200 each were tried: all the same)."""
    moments = os.environ.get("ROLORA_MOMENTS", "4")
    given = flags(files, **{"rounds": 5, **INTERRUPTED[variant]})
    words = ("-m", KILL_POINTS, tmp_path, moments, "--interrupt", "--", *given)
    code, out, err = python.run(*words, cwd=ROOT, env=ONE_THREAD)
    assert code == 0, err[-2000:]
    about, *points = map(json.loads, out.splitlines())
    assert about["points"] > 1000 and len(points) == int(moments)
    assert all(point["killed"] for point in points), [p for p in points if not p["killed"]]
    assert all(point["same"] for point in points), [p for p in points if not p["same"]]


@pytest.mark.slow
def test_five_cold_kills(files, tmp_path, call, python):
    rng = random.Random(0)
    common = flags(files, rounds=6, **{"exchange-dtype": "int8", "server-momentum": 0.5})
    command = ["-m", "rolora.train", *common, "--output-dir"]
    assert python.run(*command, tmp_path / "whole", env=ONE_THREAD)[0] == 0

    def end(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timeless = [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")}
            for row in rows
        ]
        return timeless, (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    for number in range(5):
        folder = tmp_path / f"killed-{number}"
        process = python.start(*command, folder, env=ONE_THREAD)
        process.wait_for(f"\nround {number}/6")
        try:
            process.wait(rng.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        code, _, err = call("--resume", "--output-dir", folder)
        assert (code, err) == (0, "") and end(folder) == end(tmp_path / "whole")
        assert [row["round"] for row in end(folder)[0]] == list(range(7)), "every round once"


class Pull:
    """Clients whose training goes half-way from what is published to a target of their own: the mean converges to the targets'."""

    def __init__(self, layout):
        self.layout, self.held, self.saw = layout, {}, []
        rng = np.random.default_rng(0)
        self.targets = {
            kind: torch.from_numpy(rng.normal(size=(len(toy.WEIGHTS), size)).astype(np.float32))
            for kind, size in layout.sizes.items()
        }

    def train(self, task, published, client_state):
        self.saw.append((task.round, task.client, {k: v.clone() for k, v in published.items()}))
        kinds = self.layout.travelling(task.phase)
        change = torch.cat(
            [0.5 * (self.targets[kind][task.client] - published[kind]) for kind in kinds]
        )
        if self.dies(task):
            raise TrainingFailed("died", "killed")
        key = codec.key(1, task.round, f"client {task.client}")
        return Update(
            task.run,
            task.round,
            task.phase,
            task.client,
            task.layout,
            task.versions,
            toy.WEIGHTS[task.client],
            1.0,
            5,
            5,
            CODECS[task.exchange_dtype].encode(change, key),
        ), client_state

    def dies(self, task):
        return False


class Mortal(Pull):
    def dies(self, task):
        return np.random.default_rng((task.round, task.client)).random() < 0.3


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_three_in_ten_clients_die_every_round_and_the_rest_converge(dtype):
    """Deaths cost their own contributions: the end is as near to the optimum of those who live as a mean over 70 % can be, and every
    stale client that comes back holds exactly what the server published."""
    rows, published = [], {}
    server = toy.server(
        rounds=60,
        dtype=dtype,
        trainer=Mortal,
        on_round=rows.append,
        on_checkpoint=lambda s: published.update({s.state.round + 1: dict(s.state.published)}),
    )
    start = dict(server.state.published)
    server.run()
    deaths = sum(row["rejected"].get("died", 0) for row in rows)
    assert 0.2 < deaths / (60 * 6) < 0.4 and all(row["clients"] >= 1 for row in rows[1:])
    weights = torch.tensor(toy.WEIGHTS, dtype=torch.float64)
    for kind in ("A", "B", "head"):
        optimum = (server.trainer.targets[kind].double() * weights[:, None]).sum(0) / weights.sum()
        spread = server.trainer.targets[kind].double().std()
        before, after = (
            (start[kind] - optimum).square().mean().sqrt(),
            (server.state.published[kind] - optimum).square().mean().sqrt(),
        )
        assert after < 0.5 * spread and after < before
    for number, _, held in server.trainer.saw:
        for kind in held:
            assert torch.equal(held[kind], published[number][kind])
    immortal = toy.server(rounds=60, dtype=dtype, trainer=Pull)
    immortal.run()
    for kind in ("A", "B", "head"):
        optimum = (immortal.trainer.targets[kind].double() * weights[:, None]).sum(
            0
        ) / weights.sum()
        assert (immortal.state.published[kind] - optimum).abs().max() < 1e-2


_WATCH = """
import json, runpy, socket, sys
seen = []
def audit(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        seen.append([event, str(args[1:] if event.startswith("socket.c") or event == "socket.sendto" else args)])
sys.addaudithook(audit)
folder, sys.argv = sys.argv[1], ["train", *sys.argv[2:]]
try:
    runpy.run_module("rolora.train", run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
json.dump({"code": code, "seen": seen}, open(folder + "/seen.json", "w"))
"""


@pytest.mark.parametrize(
    "more", [{}, {"backend": "triton", "rounds": 1, "clients": 2}], ids=["plain", "kernels"]
)
def test_a_run_opens_no_connection(files, tmp_path, more):
    """Every connection and every name looked up is an audit event of the interpreter's; a run has none, hub variables unset."""
    given = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    names = {k: v for k, v in given.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    subprocess.run(
        [
            sys.executable,
            "-c",
            _WATCH,
            tmp_path,
            *flags(files, **more),
            "--output-dir",
            tmp_path / "run",
        ],
        capture_output=True,
        env=names,
    )
    result = json.loads((tmp_path / "seen.json").read_text())
    assert result == {"code": 0, "seen": []}
