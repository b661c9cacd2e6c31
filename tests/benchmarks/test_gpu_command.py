"""The GPU command survives: a contender that fails, hangs or takes the process down loses its own
row, a run that is killed goes on where it was, and nothing is needed that a bare machine lacks.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import layers
from benchmarks.gpu import about, clock, contenders, kernels, parts
from benchmarks.gpu import bench as module
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.results import FILE, Results
from benchmarks.gpu.sizes import FULL
from rolora.errors import BadInput
from rolora_kernels import tuned

ROOT = Path(__file__).parent.parent.parent
# What the machine does not have.
ABSENT = ("datasets", "bitsandbytes", "pyarrow", "tomli_w", "matplotlib", "trl", "liger_kernel")
PLANTED = """
import os, time

def contenders(problem):
    def raises(problem): raise RuntimeError("planted\\nand more")
    def hangs(problem): time.sleep(1e6)
    def dies(problem): os.abort()
    return {"raises": raises, "hangs": hangs, "dies": dies}
"""


@pytest.fixture
def bare(tmp_path):
    """An environment in which what the machine lacks cannot be imported, and there is no git."""
    (tmp_path / "site").mkdir()
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(blocked)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PATH": str(tmp_path), "TRITON_INTERPRET": "1"}


def command(folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--smoke",
        "--output",
        str(folder),
        *flags,
    ]


@pytest.mark.slow
def test_who_raises_hangs_or_dies_loses_his_own_row(tmp_path, bare):
    planted, folder = tmp_path / "planted.py", tmp_path / "results"
    planted.write_text(PLANTED)
    flags = ("--only", "layer M=8 ", "--also", str(planted), "--patience", "25")
    done = subprocess.run(command(folder, *flags), env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / FILE).read_text())
    rows = {row["name"]: row for row in results["rows"] if row["part"] == "layer"}
    assert rows["raises"]["problem"] == "RuntimeError: planted"
    assert rows["hangs"]["problem"] == "nothing came for 25 s"
    assert rows["dies"]["problem"] == "the process ended with signal SIGABRT"
    others = {name: row for name, row in rows.items() if name not in ("raises", "hangs", "dies")}
    assert {"frozen", "peft_default", "peft_phase", "manual", "ours vendor"} <= set(others)
    assert all(row["ms"] > 0 and "problem" not in row for row in others.values())
    assert len(rows) == sum(row["part"] == "layer" for row in results["rows"])  # each once
    assert "3 contenders have no figure" in done.stdout


@pytest.mark.slow
def test_a_killed_run_is_whole_and_goes_on(tmp_path, bare):
    folder = tmp_path / "results"
    flags = ("--only", "ceilings", "--only", "nf4", "--only", "cohort clients=1")
    process = subprocess.Popen(command(folder, *flags), env=bare, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not ((found := Results.load(folder)) and found.done):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = json.loads((folder / FILE).read_text())
    assert before["done"][0] == "ceilings" and len(before["done"]) < 3
    done = subprocess.run(command(folder, *flags), env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    after = json.loads((folder / FILE).read_text())
    assert after["done"] == ["ceilings", "cohort clients=1", "nf4 N=32 K=48"]
    assert after["rows"][: len(before["rows"])] == before["rows"]
    assert (folder / "tables.md").read_text().count("### ceilings") == 1
    row = next(row for row in after["tuned"] if row["primitive"] == "dequantise")
    assert json.loads((folder / "cpu.json").read_text())["rows"] == [row]


def test_results_of_another_machine_or_version_are_not_mixed(tmp_path):
    Results.open(tmp_path, {"torch": "2.11.0", "gpu": None}).save()
    with pytest.raises(BadInput, match=r"measured with torch '2.11.0', this is '2.12.0'"):
        Results.open(tmp_path, {"torch": "2.12.0", "gpu": None})
    (tmp_path / FILE).write_text("{}{")
    with pytest.raises(BadInput, match="no file of this command"):
        Results.open(tmp_path, {"torch": "2.12.0"})


@pytest.fixture
def bench(tmp_path):
    known = {"gpu": None, "capability": None, "commit": "abc", "l2_bytes": 0, "smoke": False}
    yield Bench(Results(tmp_path, known), "cpu", 60.0, None)
    tuned.install({}, "cpu")


def test_a_contender_that_fails_late_loses_its_row_and_no_other(bench):
    calls = iter(range(100))

    def fails_at_the_fifth(i):
        if next(calls) == 5:
            raise ValueError("fifth")

    makes = {"base": lambda: Entry(lambda i: None), "late": lambda: Entry(fails_at_the_fifth)}
    bench.do(Unit("part x", lambda bench: bench.contest("part", makes, "base", inner=1)))
    rows = {row.get("name"): row for row in bench.results.rows}
    assert rows["late"]["problem"] == "ValueError: fifth" and "ms" not in rows["late"]
    assert rows["base"]["rounds"] == 15 and rows["base"]["ratio_to_base"] == 1.0
    assert Results.load(bench.results.folder).done == ["part x"]


def test_an_error_ends_the_process_only_where_it_takes_the_device_along(bench, monkeypatch):
    def work(bench):
        bench.attempt("part", "wrong", lambda: 1 / 0)
        bench.attempt("part", "right", lambda: 1)

    bench.device = "cuda"
    monkeypatch.setattr(module, "_lost", lambda: False)
    bench.do(Unit("part x", work))
    assert bench.results.rows[0]["problem"] == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(module, "_lost", lambda: True)
    with pytest.raises(module.Doomed, match="division by zero"):
        bench.do(Unit("part y", work))
    told = json.loads((bench.results.folder / module.NOW).read_text())
    assert (told["contender"], told["problem"]) == ("wrong", "ZeroDivisionError: division by zero")


def test_without_peft_only_its_own_rows_are_lost(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    importlib.reload(layers)
    problem = contenders.Problem(4, 16, 24, 2, "B", 0.0, "cpu")
    makes = {
        "frozen": lambda: Entry(contenders.frozen(problem).step(problem)),
        "peft_phase": lambda: Entry(contenders.peft_phase(problem).step(problem)),
    }
    bench.do(Unit("layer x", lambda bench: bench.contest("layer", makes, "frozen", inner=1)))
    rows = {row.get("name"): row for row in bench.results.rows}
    assert rows["frozen"]["ms"] > 0 and rows["peft_phase"]["problem"].startswith("ModuleNotFound")


def test_compiled_kernels_serve_only_the_triton_and_gpu_that_they_were_made_for(tmp_path):
    made, here = tmp_path / "made" / "key", tmp_path / "here"
    made.mkdir(parents=True)
    (made / "k.cubin").write_bytes(b"code")
    (made / "k.ttir").write_text("only explains")
    group = {"child_paths": {"k.cubin": "/elsewhere/k.cubin", "k.ttir": "/elsewhere/k.ttir"}}
    (made / "__grp__k.json").write_text(json.dumps(group))
    archive = tmp_path / "kernels.tar.gz"
    assert kernels.pack(tmp_path / "made", archive, 90) == 1
    count, manifest = kernels.unpack(archive, here, 90)
    assert count == 1 and manifest["sources"] == about.sources()
    found = json.loads((here / "key" / "__grp__k.json").read_text())
    assert found == {"child_paths": {"k.cubin": str(here / "key" / "k.cubin")}}
    assert kernels.unpack(archive, tmp_path / "other", 80)[0] == 0
    assert not (tmp_path / "other").exists()
    for name, kind in (("../out", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
        kernels.pack(tmp_path / "made", archive, 90)
        with tarfile.open(archive) as old, tarfile.open(tmp_path / "bad.tar", "w") as new:
            for member in old.getmembers():
                new.addfile(member, old.extractfile(member))
            hostile = tarfile.TarInfo(name)
            hostile.type, hostile.linkname = kind, "/etc/passwd"
            new.addfile(hostile)
        with pytest.raises(BadInput, match="is no plain file below its folder"):
            kernels.unpack(tmp_path / "bad.tar", tmp_path / "bad", 90)
        assert not (tmp_path / "bad").exists() and not (tmp_path / "out").exists()
    archive.write_text("no archive")
    with pytest.raises(BadInput, match="no archive of benchmarks"):
        kernels.unpack(archive, here, 90)


def test_tables_are_written_of_what_was_measured_anywhere(tmp_path, monkeypatch, capsys):
    known = {"gpu": "G", "capability": [9, 0], "torch": "2", "triton": "3", "commit": "c"}
    rows = [{"unit": "ceilings", "part": "ceilings", "name": "copy", "ms": 1.5}]
    tuned_row = {"primitive": "shrink", "winner": "torch"}
    Results(tmp_path, known | {"sources": "s"}, rows, ["ceilings"], {}, [tuned_row]).save()
    monkeypatch.setattr(sys, "argv", ["gpu", "--tables", "--output", str(tmp_path)])
    assert main() == 0
    assert "| copy | 1.5 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "G.json").read_text())["rows"] == [tuned_row]
    monkeypatch.setattr(sys, "argv", ["gpu", "--tables", "--output", str(tmp_path / "no")])
    assert main() == 2 and "holds no results" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--output", str(folder)])
        assert main() == 2 and "nothing can be written there" in capsys.readouterr().err


def test_what_a_layer_follows_is_measured_before_the_layer():
    keys = [unit.key for unit in parts.units(FULL)]
    assert len(keys) == len(set(keys))
    merged = max(i for i, key in enumerate(keys) if key.startswith("primitive merged "))
    assert merged < min(i for i, key in enumerate(keys) if key.startswith("layer "))
    masked = [i for i, key in enumerate(keys) if key.startswith("primitive") and "p=0.05" in key]
    with_mask = [i for i, key in enumerate(keys) if key.startswith("layer") and "p=0.05" in key]
    assert masked and max(masked) < min(with_mask)
    assert "merged" in contenders.plans() and "merged" not in contenders.plans(0.05)


def test_a_part_that_fails_is_a_row_and_what_it_tuned_is_taken_back(bench):
    def run(bench):
        bench.results.tuned.append({"primitive": "shrink"})
        raise RuntimeError("no")

    bench.do(Unit("part", run))
    assert bench.results.rows[0]["problem"] == "RuntimeError: no"
    assert bench.results.tuned == [] and bench.results.done == ["part"]


def test_a_contest_after_the_deadline_has_the_fewest_rounds_that_count(bench):
    bench.end = 0.0
    makes = {"base": lambda: Entry(lambda i: None)}
    bench.do(Unit("part", lambda bench: bench.contest("part", makes, "base")))
    assert bench.results.rows[0]["rounds"] == 3


def test_launches_that_were_not_queued_are_timed_again(monkeypatch):
    waits = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return waits[-1] < 8e-3  # the device began before all was launched

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: waits.append(cycles / clock.CYCLES_A_SECOND)
    )
    turns = []
    call = turns.append
    timer = Clock("cuda")
    sample = timer.sample(call, 3)
    assert waits == [2e-3, 4e-3, 8e-3] and sample.queued and sample.ms == 2.0
    assert turns == list(range(9))  # every call has the next input
    timer.sample(call, 3)
    assert waits[3:] == [8e-3]


def test_inputs_in_turn_leave_nothing_in_the_cache():
    l2 = 50 << 20
    for nbytes in (1 << 20, 64 << 20, 1 << 30):
        count = clock.copies(nbytes, l2)
        assert count == 32 or count * nbytes >= 4 * l2


def test_the_commit_is_read_without_git():
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert git.startswith(about.commit()) or about.commit() == "unknown"
    assert len(about.sources()) == 16
