"""The commands as a person meets them: help, names, the plan, where options come from."""

import os
import subprocess
import sys
import tomllib

import pytest

from rolora import cli
from rolora import evaluate as evaluate_command
from tests.rolora.commands import command_line, small


def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, call):
    code, out, err = call(*small(files, **{"output-dir": tmp_path / "run", "dry-run": True}))
    assert (code, err) == (0, "") and not (tmp_path / "run").exists()
    # q and v of 3 layers of width 32, rank 4, and a head of 3 x 32
    assert "trained: 1,536 factor parameters in all; round 1: B, 864, round 2: A, 864" in out
    assert (
        "int8, 880 bytes up a client and round" in out  # 864 values and 4 scales of 4 bytes
        and "A: 3 KiB, B: 3 KiB, head: 0 KiB" in out
    )
    assert "model.layers.0.self_attn.q_proj" in out


def test_toml_presets_and_flags_in_that_order(files, tmp_path, call):
    (tmp_path / "c.toml").write_text(
        "rounds = 3\n[federation]\nclients = 2\nlocal-steps = 1\n[adapter]\nrank = 2\n"
    )
    code, _, err = call(
        "--config",
        tmp_path / "c.toml",
        "--model",
        files["llama"],
        "--train-file",
        files["train"],
        "--eval-file",
        files["eval"],
        "--rank",
        4,
        "--output-dir",
        tmp_path / "run",
        "--max-length",
        32,
    )
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (code, err) == (0, "")
    assert (
        stored["federation"]["rounds"],
        stored["federation"]["clients"],
        stored["adapter"]["rank"],
    ) == (3, 2, 4)
    assert stored["resolved"]["torch"] and stored["system"]["dtype"] == "fp32"


def test_help_is_grouped_and_loads_no_torch():
    """Without torch it answers in a fifth of a second; no time is asserted, because machines are
    noisy.
    """
    done = subprocess.run(command_line("--help"), capture_output=True, text=True, check=True)
    for group in (
        "Model and data:",
        "Federation:",
        "LoRA:",
        "Optimisation:",
        "Exchange:",
        "System:",
        "Run:",
    ):
        assert group in done.stdout
    probe = "import sys, rolora, rolora.train, rolora.evaluate; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout
    assert out == "False False\n"


def test_quiet_prints_one_line(files, tmp_path, call):
    code, out, _ = call(*small(files, **{"output-dir": tmp_path / "run", "quiet": True}))
    assert code == 0 and out.count("\n") == 1 and out.startswith("held-out accuracy ")


def test_evaluate_names_what_is_wrong(files, tmp_path, call):
    for args, message in (
        ((), "nothing to evaluate"),
        (("--adapter", tmp_path), "is not an adapter folder"),
        (("--model", files["llama"]), "nothing to evaluate on"),
    ):
        code, _, err = call(*args, command=evaluate_command.command)
        assert code == 2 and message in err and err.count("\n") == 1
    code, out, _ = call(
        "--model",
        files["llama"],
        "--eval-file",
        files["eval"],
        "--task-type",
        "causal-lm",
        "--max-length",
        64,
        command=evaluate_command.command,
    )
    assert code == 0 and "perplexity: " in out


@pytest.mark.parametrize("program", [("-m", "rolora"), ("-m", "rolora.__main__")])
def test_the_commands_have_one_name(program):
    def run(*args):
        made = subprocess.run(
            [sys.executable, *program, *args], capture_output=True, text=True, timeout=1800
        )
        return made.returncode, made.stdout, made.stderr

    code, out, err = run()
    assert (code, err) == (0, "")
    for name in ("train", "evaluate", "compare", "report", "export", "worker"):
        assert f"\n  {name} " in out
    code, out, _ = run("train", "--help")
    assert code == 0 and "--local-steps" in out
    code, out, err = run("trian")
    assert code == 2 and "did you mean train?" in err and err.count("\n") == 1
    code, out, err = run("train", "--rouns", "3")
    assert code == 2 and "'--rounds'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, "1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"KMP_BLOCKTIME": "1"}, None),
    ],
)
def test_threads_spin_briefly_while_they_wait_unless_the_environment_says_otherwise(
    given, wanted, monkeypatch
):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what it is now comes back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == wanted
    assert os.environ.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")
