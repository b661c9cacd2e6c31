"""The paper's presets: every one end to end on small models, and the figures that its plan has."""

import json

import pytest
import transformers as hf

from rolora import evaluate as evaluate_command
from rolora.config import presets
from tests.benchmark_files import (
    HUB_COLUMNS,
    write_commonsense,
    write_glue,
)
from tests.rolora.commands import rows

pytestmark = pytest.mark.slow

SMALL = (
    "--clients",
    4,
    "--rounds",
    2,
    "--local-steps",
    2,
    "--layers",
    "1-2",
    "--engine",
    "sequential",
)


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_glue_presets_end_to_end(task, files, tmp_path, call):
    data = write_glue(tmp_path / "data", task)
    code, _, err = call(
        "--preset",
        f"{task}-20-r4",
        "--model",
        files["roberta"],
        "--dataset",
        data,
        *SMALL,
        "--max-length",
        32,
        "--batch-size",
        4,
        "--eval-every",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    last = rows(tmp_path / "run")[-1]["eval"]
    also = {"qqp": {"f1"}, "mnli": {"accuracy/mismatched"}}
    assert set(last) == {"accuracy", "loss"} | also.get(task, set())
    code, out, err = call(
        "--adapter",
        tmp_path / "run" / "adapter",
        "--dataset",
        data,
        "--json",
        command=evaluate_command.command,
    )
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(last)


@pytest.mark.parametrize("name", ["commonsense", "alpaca", "codealpaca"])
def test_llama_presets_end_to_end(name, files, tmp_path, call):
    if name == "commonsense":
        data = write_commonsense(tmp_path / "data", rows=4)
    else:
        data = tmp_path / "data"
        data.mkdir()
        data.joinpath("train.jsonl").write_text(
            "".join(
                json.dumps(
                    {"instruction": f"Say {i}.", "input": "loudly" * (i % 2), "output": str(i)}
                )
                + "\n"
                for i in range(60)
            )
        )
    code, _, err = call(
        "--preset",
        name,
        "--model",
        files["llama"],
        "--dataset",
        data,
        *SMALL,
        "--max-length",
        100,
        "--eval-every",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    last = rows(tmp_path / "run")[-1]["eval"]
    assert (
        ("answered" in last and "likelihood_accuracy/piqa" in last)
        if name == "commonsense"
        else "perplexity" in last
    )
    if name == "commonsense":
        code, out, err = call(
            "--adapter",
            tmp_path / "run" / "adapter",
            "--dataset",
            data,
            "--json",
            command=evaluate_command.command,
        )
        assert (code, err) == (0, "") and json.loads(out) == pytest.approx(last)


@pytest.fixture(scope="module")
def shapes(files, tmp_path_factory):
    """Folders with the configurations of RoBERTa-large and Llama-2-7B and a small tokenizer: no
    weights, which a plan does not need.
    """
    made = {}
    for name, family, settings in (
        (
            "roberta",
            "roberta",
            hf.RobertaConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=514,
                architectures=["RobertaForMaskedLM"],
            ),
        ),
        (
            "llama",
            "llama",
            hf.LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                vocab_size=32000,
                max_position_embeddings=4096,
                architectures=["LlamaForCausalLM"],
            ),
        ),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        settings.save_pretrained(made[name])
        hf.AutoTokenizer.from_pretrained(files[family]).save_pretrained(made[name])
    return made


# KiB of one factor in fp32 (2 projections × blocks × r × 1024 × 4 bytes; Llama: 4 × 6 or 8 blocks ×
# r × 4096 × 4 bytes).
FIGURES = {
    "sst2-3-r4": 192,
    "qnli-50-r4": 288,
    "qnli-50-r8": 576,
    "mnli-20-r4": 288,
    "qqp-3-r8": 576,
    "rte-50-r4": 256,
    "commonsense": 3072,
    "alpaca": 4096,
    "codealpaca": 4096,
}


@pytest.mark.parametrize("preset", FIGURES)
def test_the_plan_has_the_paper_s_figures(preset, shapes, tmp_path, call):
    benchmark = presets.PRESETS[preset]["benchmark"]
    if benchmark == "commonsense":
        data = write_commonsense(tmp_path / "data", rows=20)
    elif benchmark in HUB_COLUMNS:
        data = write_glue(tmp_path / "data", benchmark, count=120)
    else:
        data = tmp_path / "data"
        data.mkdir()
        data.joinpath("train.jsonl").write_text(
            (json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n") * 200
        )
    model = shapes["roberta" if benchmark in HUB_COLUMNS else "llama"]
    code, out, err = call("--preset", preset, "--model", model, "--dataset", data, "--dry-run")
    assert (code, err) == (0, "")
    kib = FIGURES[preset]
    assert f"factors in fp32: A: {kib:,} KiB, B: {kib:,} KiB" in out
    if model == shapes["llama"]:
        assert "6,7" in out.split("frozen parameters")[0].splitlines()[-1], "Llama-2-7B's own count"
        assert (
            f"{2 * kib * 256:,} factor parameters" in out
            and f"{kib * 260:,} bytes up a client and round" in out  # a scale of 4 a 256 values
        )
    clients, rounds = presets.PRESETS[preset]["clients"], presets.PRESETS[preset]["rounds"]
    assert f"clients: {clients}, {clients} a round" in out and f"rounds: {rounds} of rolora" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (("--benchmark", "cola"), "--benchmark 'cola' is not one of"),
        (
            ("--preset", "qnli-50-r4", "--train-file", "x.tsv"),
            "--benchmark qnli reads its own data",
        ),
        (("--preset", "qnli-50-r5"), "preset 'qnli-50-r5' is not one of"),
        (
            ("--benchmark", "rte", "--dataset", "{empty}", "--model", "{roberta}"),
            "has no train file",
        ),
    ],
)
def test_bad_input(args, message, files, tmp_path, call):
    (tmp_path / "empty").mkdir()
    code, _, err = call(
        *(a.format(empty=tmp_path / "empty", roberta=files["roberta"]) for a in args),
        "--output-dir",
        tmp_path / "new",
    )
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()
