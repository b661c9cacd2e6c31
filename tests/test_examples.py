"""Every file of examples/ runs as its first lines say."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.models import make_files
from tests.rolora.commands import rows, small

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAMS = ("layer_in_a_loop", "hf_trainer", "many_adapters")
FOLDERS = {
    "chat": "token_accuracy: ",
    "preference": "reward_accuracy: ",
    "experts": "token_accuracy: ",
}
MODEL = "tiny_model"  # what the folders' commands train
FEDERATION = "federation"  # tests/test_federation_example.py
GIVEN = {"own_method": "--method", "custom_recipe": "--task-type"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def run(users_python, tmp_path):
    def run(*command):
        code, out, err = users_python.run(*command, cwd=tmp_path)
        assert code == 0, err[-2000:]
        return out

    return run


def test_every_example_is_run_here_and_told_in_the_readme():
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*PROGRAMS, *GIVEN, MODEL}
    folders = {path.name for path in EXAMPLES.iterdir() if (path / "run.sh").exists()}
    assert folders == set(FOLDERS)
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in text for name in found)
    assert all(f"`{name}/`" in text for name in {*folders, FEDERATION})


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_and_prints(name, run):
    assert " -> " in run(EXAMPLES / f"{name}.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_the_commands_of_a_folder_run_and_train(name, tmp_path, users_python):
    """The metrics of the adapter are better than those of the model before training."""
    (tmp_path / "bin").mkdir()
    users_python.on_path(tmp_path / "bin")
    done = subprocess.run(
        ["bash", EXAMPLES / name / "run.sh"],
        cwd=tmp_path,
        env=users_python.environment | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"a tiny model -> tiny-{name}" in done.stdout
    loss = float(done.stdout.rpartition("\nloss: ")[2].split()[0])
    assert FOLDERS[name] in done.stdout
    assert loss < 0.95 * rows(tmp_path / "runs" / name)[0]["eval"]["loss"]


@pytest.mark.parametrize("name", GIVEN)
def test_a_file_is_given_to_train(name, files, tmp_path, run):
    flags = small(files, rounds=2, **{"output-dir": tmp_path / "run"})
    run("-m", "rolora.train", *flags, GIVEN[name], EXAMPLES / f"{name}.py")
    assert len(rows(tmp_path / "run")) == 3
    adapter = tmp_path / "run" / "adapter"
    held_out = ["--eval-file", files["eval"]]
    if GIVEN[name] == "--task-type":  # a program, which no adapter folder has run
        held_out += ["--task-type", EXAMPLES / f"{name}.py"]
    metrics = run("-m", "rolora.evaluate", "--adapter", adapter, *held_out)
    assert "loss: " in metrics
