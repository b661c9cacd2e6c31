"""A kill after each part, and in each part, of the process that measures and of the command itself:
everything has its row once in the end, and a contender that was being measured says why it has none.

A stub measures: it keeps to the worker's protocol (what is done, what is measured now) and kills
where it is told to.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import figures, parts, supervisor
from benchmarks.gpu.results import FILE, Results
from benchmarks.gpu.sizes import FULL

ROOT = Path(__file__).parent.parent.parent
PARTS = list(dict.fromkeys(unit.part for unit in parts.units(FULL)))
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.results import NOW, Results
from benchmarks.gpu.supervisor import end_with_parent

end_with_parent()
folder, how, parts = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
results = Results.open(folder, {"gpu": "G", "smoke": False})
results.save()

def once(place):
    mark = folder / f"killed {place}"
    if mark.exists():
        return
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)

for part in parts:
    if part in results.done:
        continue
    now = {"unit": part, "contender": "ours", "limit": 60, "problem": None}
    (folder / NOW).write_text(json.dumps(now))
    lost = results.lost.get(part, {})
    if how == "in" and "ours" not in lost:
        once(part)
    row = {"unit": part, "part": part, "name": "ours"}
    results.rows.append(row | ({"problem": lost["ours"]} if lost else {"ms": 1.0}))
    results.done.append(part)
    results.save()
    if how == "after":
        once(part)
    if how == "slow":
        time.sleep(0.1)
"""
COMMAND = """
import sys
from pathlib import Path
from benchmarks.gpu.supervisor import supervise

folder, worker, names = sys.argv[1:]
sys.exit(supervise(Path(folder), 5, [], [worker, folder, "slow", names]))
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return str(path)


def rows(folder):
    found = json.loads((folder / FILE).read_text())
    assert found["done"] == PARTS and [row["unit"] for row in found["rows"]] == PARTS
    return found["rows"]


def test_the_parts_are_those_of_a_run():
    assert {"ceilings", "check", "primitive", "product", "layer", "model", "cohort", "nf4"} <= set(
        PARTS
    )


@pytest.mark.parametrize("how", ["after", "in"])
def test_a_process_that_is_killed_at_each_part_is_replaced(worker, tmp_path, how, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    given = [worker, str(folder), how, ",".join(PARTS)]
    assert supervisor.supervise(folder, 5, [], given) == 0
    found = rows(folder)
    if how == "after":
        assert all(row["ms"] == 1.0 for row in found)
    else:
        assert {row["problem"] for row in found} == {"the process ended with signal SIGKILL"}
    assert len(list(folder.glob("killed *"))) == len(PARTS)
    assert capsys.readouterr().out.count("lost ") == len(PARTS)


def test_a_command_that_is_killed_after_each_part_goes_on_where_it_was(worker, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    command = [sys.executable, "-c", COMMAND, str(folder), worker, ",".join(PARTS)]
    for number in range(1, len(PARTS) + 1):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while not ((found := Results.load(folder)) and len(found.done) >= number):
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert subprocess.run(command).returncode == 0
    assert all(row["ms"] == 1.0 for row in rows(folder))


def test_the_docs_table_says_that_no_gpu_has_run_this(tmp_path, capsys):
    figures.table(tmp_path)
    assert "| no GPU has run this | – |" in capsys.readouterr().out
    about = {"gpu": "NVIDIA H200", "smoke": False}
    place = {"part": "layer", "M": 8192, "N": 4096, "K": 4096, "r": 16, "phase": "B", "p": 0.0}
    measured = {"frozen": (2.5, 1.0), "peft_phase": (3.5, 1.4), "ours vendor": (2.9, 1.16)}
    found = [
        place | {"name": name, "ms": ms, "ratio_to_frozen": ratio}
        for name, (ms, ratio) in measured.items()
    ]
    found += [place | {"name": "ours", "ms": 2.8, "ratio_to_frozen": 1.12}]
    found += [place | {"name": "ours", "p": 0.05, "ms": 9.0, "ratio_to_frozen": 3.0}]
    (tmp_path / "g.json").write_text(json.dumps({"about": about, "rows": found}))
    figures.table(tmp_path)
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row == "| NVIDIA H200 | 8192×4096×4096×16, B | 2.5 | 1.12 | 1.40 | – |"
