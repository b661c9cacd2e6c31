"""What a run of `rolora.train` trains, and what it leaves in its folder."""

import json
import tomllib

import pytest
import torch

from rolora import evaluate as evaluate_command
from tests.benchmark_files import write_commonsense
from tests.rolora.commands import rows, small

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("method", ["rolora", "fedavg", "ffa", "flexlora"])
def test_a_run_learns_and_leaves_its_folder(family, method, files, tmp_path, call):
    # Eight rounds at a smaller rate hardly teach the RoBERTa anything, whichever the method.
    flags = small(files, family, method=method, rounds=8, lr=2e-2, dropout=0.1)
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


def test_weight_decay_never_touches_the_factor_that_rests(files, tmp_path, call):
    """With a decay that would shrink anything it touches by a third: after round 1 (B), A is as it
    was drawn.
    """
    from safetensors.torch import load_file

    def state(folder, number):
        return load_file(folder / "checkpoints" / f"round-{number:06d}" / "state.safetensors")

    stays = {"weight-decay": 30.0, "no-equal-factors": True}  # a hand-over turns what rests
    call(*small(files, rounds=2, **stays, **{"output-dir": tmp_path / "run"}))
    start, first, second = (state(tmp_path / "run", n) for n in range(3))
    assert (start["published/A"] == first["published/A"]).all() and not (
        start["published/A"] == second["published/A"]
    ).all()
    assert (first["published/B"] == second["published/B"]).all()
