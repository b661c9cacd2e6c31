"""Programs in forks are programs: number, streams, folder, environment, signals and end."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
print(os.getpid(), os.getcwd(), sys.argv, os.environ["GIVEN"])
print("said", sys.stdin.read(), file=sys.stderr)
"""
ENDS = {
    "": 0,
    "raise SystemExit(3)": 3,
    "raise SystemExit('why')": 1,
    "1 / 0": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os; os._exit(7)": 7,
}


def test_a_program_has_streams_a_folder_an_environment_and_a_number(python, tmp_path):
    for words in (("-c", PROGRAM), (tmp_path / "program.py",)):
        (tmp_path / "program.py").write_text(PROGRAM)
        started = python.start(
            *words, 1, "two", cwd=tmp_path, env={"GIVEN": "x y"}, typed="and heard"
        )
        assert started.finished()[0] == 0
        first = "-c" if words[0] == "-c" else str(words[0])
        assert started.out == f"{started.pid} {tmp_path} {[first, '1', 'two']} x y\n"
        assert started.err == "said and heard\n" and started.pid != os.getpid()


@pytest.mark.parametrize("text, code", ENDS.items())
def test_a_program_ends_as_one_of_a_fresh_interpreter(text, code, python):
    fresh = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    ended, _, err = python.run("-c", text)
    assert ended == fresh.returncode == code
    last = [said.strip().rpartition("\n")[2] for said in (err, fresh.stderr)]
    assert last[0] == last[1]


def test_what_runs_when_an_interpreter_ends_runs(python):
    text = "import atexit; atexit.register(print, 'bye'); print('said', end=' ')"
    assert python.run("-c", text) == (0, "said bye\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_program(number, python):
    started = python.start("-c", "import time; print('up', flush=True); time.sleep(1e4)")
    started.wait_for("up")
    assert started.poll() is None
    started.send_signal(number)
    assert started.wait() == -number
    with pytest.raises(ProcessLookupError):
        os.kill(started.pid, 0)


def test_who_does_not_end_is_named_and_killed(python):
    started = python.start("-c", "import time; time.sleep(1e4)")
    with pytest.raises(subprocess.TimeoutExpired):
        started.finished(timeout=0.1)
    assert started.wait() == -signal.SIGKILL


def test_a_variable_that_was_read_while_modules_were_loaded_cannot_be_another(python):
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE was '1' .* not '0'"):
        python.start("-c", "", env={"HF_HUB_OFFLINE": "0"})


def test_programs_draw_other_random_numbers(python):
    text = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (python.run("-c", text)[1].split() for _ in range(2))
    assert not set(first) & set(second)
    text = "import torch; print(torch.rand(1).item())"  # seeded in a fresh interpreter
    assert python.run("-c", text) == python.run("-c", text)


@pytest.mark.parametrize("text, code", [("1 / 0", 1), ("raise SystemExit(3)", 3), ("", 0)])
def test_a_python_on_a_path_ends_as_its_program(text, code, python, tmp_path):
    python.on_path(tmp_path)
    ended = subprocess.run(
        [tmp_path / "python", "-c", f"print('said')\n{text}"], capture_output=True
    )
    assert (ended.returncode, ended.stdout) == (code, b"said\n")
