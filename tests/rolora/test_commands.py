"""The commands as a person uses them: runs, resume, Ctrl-C, and one clear line for everything that
is wrong.
"""

import json
import os
import signal
import subprocess
import sys
import tomllib

import pytest
import torch

from rolora import cli, config
from rolora import evaluate as evaluate_command
from rolora.adapter.frozen import FrozenLinear
from rolora.hf import machine
from rolora.run import job
from rolora_kernels import explain as explain_kernels
from rolora_kernels import gemm
from tests.rolora.commands import bits, command_line, rows, small
from tests.rolora.recipes.test_recipes import write_commonsense


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("method", ["rolora", "fedavg", "ffa", "flexlora"])
def test_a_run_learns_and_leaves_its_folder(family, method, files, tmp_path, call):
    flags = small(files, family, method=method, rounds=8, lr=5e-3, dropout=0.1)
    code, out, err = call(*flags, "--local-steps", 6, "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    run = rows(tmp_path / "run")
    assert [r["round"] for r in run] == list(range(9)) and run[0]["phase"] is None
    assert [r["phase"] for r in run[1:3]] == {"rolora": ["B", "A"], "ffa": ["B", "B"]}.get(
        method, ["BOTH", "BOTH"]
    )
    assert run[-1]["eval"]["loss"] < run[0]["eval"]["loss"] - 0.004
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval"] == run[-1]["eval"] and summary["bytes_up"] == sum(
        r["bytes_up"] for r in run
    )
    assert (
        f"held-out accuracy: {summary['eval']['accuracy']:.4f}" in out and "kernels: torch" in out
    )
    code, out, _ = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--eval-file",
        files["eval"],
        "--json",
        command=evaluate_command.command,
    )
    assert code == 0 and json.loads(out) == pytest.approx(run[-1]["eval"])


@pytest.mark.parametrize(
    "method", ["rolora", "flora", "fedex"]
)  # the last two save what they added to the base too
def test_the_saved_adapter_is_what_peft_evaluates(method, files, tmp_path, call):
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    call(*small(files, "roberta", method=method, **{"output-dir": tmp_path / "run"}))
    base = AutoModelForSequenceClassification.from_pretrained(files["roberta"], num_labels=3)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    tokenizer, right = AutoTokenizer.from_pretrained(files["roberta"]), 0
    held = [json.loads(line) for line in files["eval"].read_text().splitlines()]
    with torch.no_grad():
        for row in held:
            ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
            right += ["hill", "sea", "town"][model(**ids).logits.argmax()] == row["label"]
    last = rows(tmp_path / "run")[-1]
    assert right / len(held) == last["eval"]["accuracy"] and model.peft_config[
        "default"
    ].r == 4 + last.get("term_rank", 0)
    assert method == "rolora" or (last["term_rank"] > 0 and last["term_error"] >= 0)


def test_personal_adapters_are_saved_for_each_client(files, tmp_path, call):
    assert call(*small(files, method="fedsa", **{"output-dir": tmp_path / "run"}))[0] == 0
    each = [
        call(
            "--adapter",
            tmp_path / "run" / "adapter" / f"client-{client:04d}",
            "--eval-file",
            files["eval"],
            "--json",
            command=evaluate_command.command,
        )
        for client in range(3)
    ]
    judged = [json.loads(out)["accuracy"] for code, out, _ in each if code == 0]
    last = rows(tmp_path / "run")[-1]["eval"]
    assert (
        last["accuracy"] == pytest.approx(sum(judged) / 3)
        and "accuracy_spread_over_clients" in last
    )


@pytest.mark.parametrize(
    "flags, headline",
    [
        ({"prompt-column": "prompt", "response-column": "response"}, "exact_match"),
        (
            {"prompt-column": "prompt", "choices-column": "choices", "label-column": "answer"},
            "accuracy",
        ),
        ({"task-type": "causal-lm"}, "loss"),
        ({"task-type": "causal-lm", "metric": "token_accuracy"}, "token_accuracy"),
        ({"metric": "loss"}, "loss"),
    ],
)
def test_other_tasks(flags, headline, files, tmp_path, call):
    code, out, err = call(
        *small(files, **flags, **{"output-dir": tmp_path / "run", "target-modules": "all-linear"})
    )
    assert (code, err) == (0, "") and f"held-out {headline.replace('_', ' ')}" in out
    run = rows(tmp_path / "run")
    assert run[-1]["eval"]["loss"] < run[0]["eval"]["loss"]
    code, out, err = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--eval-file",
        files["eval"],
        "--json",
        command=evaluate_command.command,
    )
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(run[-1]["eval"])


def test_the_commonsense_preset_end_to_end(files, tmp_path, call):
    data = write_commonsense(tmp_path / "data", rows=10)
    code, out, err = call(
        "--model",
        files["llama"],
        "--preset",
        "commonsense",
        "--dataset",
        data,
        "--layers",
        "1-2",
        "--clients",
        5,
        "--rounds",
        2,
        "--local-steps",
        2,
        "--max-length",
        64,
        "--output-dir",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (
        stored["adapter"]["target_modules"] == "q_proj,k_proj,v_proj,o_proj"
        and stored["federation"]["batch_size"] == 1
    )
    assert "accuracy/winogrande" in rows(tmp_path / "run")[-1]["eval"]


def test_partial_participation_partitions_and_validation(files, tmp_path, call):
    code, out, err = call(
        *small(
            files,
            partition="column",
            **{
                "client-column": "owner",
                "clients-per-round": 2,
                "validation-fraction": 0.2,
                "output-dir": tmp_path / "run",
            },
        )
    )
    assert (code, err) == (0, "") and "4, 2 a round, " in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"] is not None and summary["test"] != summary["eval"]
    assert all(row["clients"] == 2 for row in rows(tmp_path / "run")[1:])


def test_no_train_head_freezes_it_and_still_saves_it(files, tmp_path, call):
    from safetensors.torch import load_file

    heads = []
    for number in (1, 3):
        call(
            *small(
                files,
                rounds=number,
                **{"no-train-head": True, "output-dir": tmp_path / f"run{number}"},
            )
        )
        heads.append(
            load_file(tmp_path / f"run{number}" / "adapter" / "adapter_model.safetensors")[
                "base_model.model.score.weight"
            ]
        )
    assert (heads[0] == heads[1]).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_base_trains(dtype, files, tmp_path, call):
    code, _, err = call(
        *small(
            files, dtype=dtype, **{"output-dir": tmp_path / "run", "gradient-checkpointing": True}
        )
    )
    run = rows(tmp_path / "run")
    assert (code, err) == (0, "") and run[-1]["eval"]["loss"] < run[0]["eval"]["loss"]


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"dtype": "bf16"}, "eager"),
        ({}, "sdpa"),
        ({"dtype": "bf16", "attn": "sdpa"}, "sdpa"),
        ({"attn": "eager"}, "eager"),
    ],
)
def test_the_attention_of_short_texts_in_16_bits(given, wanted, files):
    """A CPU's is eager, and what was asked for stands."""
    made = job.prepare(
        config.resolve(
            {
                "model": str(files["llama"]),
                "train_file": str(files["train"]),
                "max_length": 128,
                "clients": 3,
                "device": "cpu",
            }
            | given
        )
    )
    assert made.config.system.attn == made.model.config._attn_implementation == wanted
    assert machine.pick_attention("auto", torch.device("cpu"), torch.bfloat16, 129) == "sdpa"
    assert machine.pick_attention("auto", torch.device("cuda"), torch.bfloat16, 128) == "sdpa"


def test_a_run_s_frozen_matmuls_are_direct_where_that_is_faster(files, tmp_path, call, monkeypatch):
    """The kernels' record says so, and a run that asks for vendor libraries has them forced."""
    monkeypatch.setattr(gemm, "_WORTH", 0)
    monkeypatch.setattr(gemm, "ahead", lambda: True)
    linears = [
        m
        for m in job.prepare(
            config.resolve(
                {
                    "model": str(files["llama"]),
                    "train_file": str(files["train"]),
                    "clients": 3,
                    "max_length": 32,
                    "device": "cpu",
                }
            )
        ).model.modules()
        if type(m) is FrozenLinear
    ]
    assert linears and not any(p.requires_grad for linear in linears for p in linear.parameters())
    explain_kernels(clear=True)
    code, out, err = call(
        *small(files, backend="torch", rounds=1, device="cpu", **{"output-dir": tmp_path / "run"})
    )
    assert (code, err) == (
        0,
        "",
    ) and "kernels: torch (forced by use_backend; oneDNN, called directly)" in out
    kernels = json.loads((tmp_path / "run" / "summary.json").read_text())["kernels"]
    assert "forced by use_backend; oneDNN, called directly" in {
        k["reason"] for k in kernels if "lora_linear" in k["operations"]
    }


def test_init_adapter_goes_on_from_a_saved_one(files, tmp_path, call):
    call(*small(files, alpha=8, **{"output-dir": tmp_path / "one"}))
    code, _, err = call(
        *small(
            files,
            rank=8,
            **{"output-dir": tmp_path / "two", "init-adapter": tmp_path / "one" / "adapter"},
        )
    )
    assert (code, err) == (0, "")
    assert rows(tmp_path / "two")[0]["eval"] == pytest.approx(
        rows(tmp_path / "one")[-1]["eval"], rel=1e-4
    )
    stored = tomllib.loads((tmp_path / "two" / "config.toml").read_text())["adapter"]
    assert (stored["rank"], stored["alpha"]) == (4, 8.0), "the adapter decides, and the run says so"
    code, _, err = call("--resume", "--output-dir", tmp_path / "two", "--rounds", 5)
    assert (code, err) == (0, "") and len(rows(tmp_path / "two")) == 6


def test_an_a_first_round_changes_nothing(files, tmp_path, call):
    """With B = 0 the gradient of A is exactly zero: a schedule that trains A first wastes a round,
    in bits.
    """
    call(
        *small(
            files,
            schedule="AB",
            rounds=2,
            **{"no-train-head": True, "output-dir": tmp_path / "run"},
        )
    )
    run = rows(tmp_path / "run")
    assert [r["phase"] for r in run] == [None, "A", "B"]
    assert run[1]["eval"] == run[0]["eval"] != run[2]["eval"]


def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, call):
    code, out, err = call(*small(files, **{"output-dir": tmp_path / "run", "dry-run": True}))
    assert (code, err) == (0, "") and not (tmp_path / "run").exists()
    # q and v of 3 layers of width 32, rank 4, and a head of 3 x 32
    assert "trained: 1,536 factor parameters in all; round 1: B, 864, round 2: A, 864" in out
    assert (
        "bf16, 1,728 bytes up a client and round" in out
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


KILLED = """
import os, signal
from rolora import cli, train
from rolora.federated.server import Server

whole = Server._round


def dying(self, number):
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, number)


Server._round = dying
cli.run(train.command)
"""


def test_a_killed_run_resumes_to_the_same_bits(files, tmp_path, call):
    flags = small(files, rounds=6, **{"clients-per-round": 2, "dropout": 0.1})
    call(*flags, "--output-dir", tmp_path / "whole")
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    command = [sys.executable, program, *flags, "--output-dir", tmp_path / "killed"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and "round 3/6" in done.stdout
    code, out, err = call("--resume", "--output-dir", tmp_path / "killed")
    assert (code, err) == (0, "") and "resumed after round" in out
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    code, out, _ = call("--resume", "--output-dir", tmp_path / "killed")
    assert code == 0 and bits(tmp_path / "killed") == bits(tmp_path / "whole"), (
        "a finished run is finished"
    )


def test_ctrl_c_keeps_the_checkpoint_and_prints_how_to_go_on(files, tmp_path, call):
    flags = small(files, rounds=400, **{"checkpoint-every": 1000})
    process = subprocess.Popen(
        command_line(*flags, "--output-dir", tmp_path / "run"),
        stdout=subprocess.PIPE,
        text=True,
        # A suite that was started by `nohup … &` hands an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("round 2/400"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert (
        lines[-1].strip()
        == f"interrupted; to go on: python -m rolora.train --resume --output-dir {tmp_path / 'run'}"
    )
    done = rows(tmp_path / "run")[-1]["round"]
    assert (tmp_path / "run" / "checkpoints" / f"round-{done:06d}").is_dir()


def test_resume_refuses_changes_but_takes_more_rounds(files, tmp_path, call):
    run = tmp_path / "run"
    call(*small(files, rounds=2, **{"output-dir": run}))
    before = bits(run)
    code, _, err = call("--resume", "--output-dir", run, "--lr", 0.5)
    assert (
        code == 2
        and "--lr 0.5 differs from the run's 0.01: leave it out, or start a new run" in err
    )
    code, _, err = call("--resume", "--output-dir", run, "--rounds", 1)
    assert code == 2 and "only a larger number can be given" in err
    assert bits(run) == before
    code, _, _ = call("--resume", "--output-dir", run, "--rounds", 4)
    assert code == 0 and [r["round"] for r in rows(run)] == [0, 1, 2, 3, 4]
    call(*small(files, rounds=4, **{"output-dir": tmp_path / "whole"}))
    assert bits(run) == bits(tmp_path / "whole")


def test_resume_without_a_valid_checkpoint_starts_over(files, tmp_path, call):
    import shutil

    run = tmp_path / "run"
    call(*small(files, rounds=2, **{"output-dir": run}))
    before = bits(run)
    shutil.rmtree(run / "checkpoints")
    code, out, _ = call("--resume", "--output-dir", run)
    assert code == 0 and "no valid checkpoint: starting at round 0" in out and bits(run) == before


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


@pytest.mark.parametrize(
    "flags",
    [
        {"exchange-dtype": "int8"},
        {"aggregation": "median"},
        {"aggregation": "trimmed-mean", "trim-fraction": 0.34},
        {"server-momentum": 0.9, "server-lr": 0.5},
        {"max-weight": 20, "max-update-norm": 5},
        {"weighting": "uniform"},
        {"lr-a": 1e-3, "lr-b": 2e-2, "lr-schedule": "linear", "lr-schedule-a": "cosine"},
        {"weight-decay": 10.0, "deadline": 600},
        {"balance": True},
        {"local-coordinates": True},
        {"init": "orthogonal", "schedule": "BBA"},
        {"method": "fedsvd"},
        {"method": "flora"},
        {"method": "fedex"},
        {"method": "fedsa"},
        {"method": "lora-a2", "client-ranks": "1,3"},
        {"method": "flexlora", "client-ranks": "2,4"},
        {"no-carry-moments": True},
        {"carry-moments": True, "method": "fedsa"},
        {"carry-moments": True, "method": "fedavg", "engine": "batched"},
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_option_of_the_federation_trains_and_resumes_to_the_same_bits(
    flags, files, tmp_path, call
):
    flags = small(files, **flags)
    assert call(*flags, "--output-dir", tmp_path / "whole")[0] == 0
    shorter = [3 if flags[i - 1] == "--rounds" else part for i, part in enumerate(flags)]
    assert call(*shorter, "--output-dir", tmp_path / "parts")[0] == 0
    before = bits(tmp_path / "parts")[1]
    if "linear" not in flags:  # a schedule knows the number of rounds from the start
        assert call("--resume", "--output-dir", tmp_path / "parts", "--rounds", 4)[0] == 0
        assert (
            bits(tmp_path / "parts") == bits(tmp_path / "whole")
            and bits(tmp_path / "parts")[1] != before
        )


def test_weight_decay_never_touches_the_factor_that_rests(files, tmp_path, call):
    """With a decay that would shrink anything it touches by a third: after round 1 (B), A is as it
    was drawn.
    """
    from safetensors.torch import load_file

    def state(folder, number):
        return load_file(folder / "checkpoints" / f"round-{number:06d}" / "state.safetensors")

    call(*small(files, rounds=2, **{"weight-decay": 30.0, "output-dir": tmp_path / "run"}))
    start, first, second = (state(tmp_path / "run", n) for n in range(3))
    assert (start["published/A"] == first["published/A"]).all() and not (
        start["published/A"] == second["published/A"]
    ).all()
    assert (first["published/B"] == second["published/B"]).all()


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
