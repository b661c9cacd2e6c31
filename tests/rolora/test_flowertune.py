"""FlowerTune's settings: its prompts, its messages as PEFT and NumPy make them, the costs that its
board shows, and what a run of ours was told to send.
"""

import io
import json

import numpy as np
import peft
import pytest
import transformers as hf

from rolora import config
from rolora.config import Optimisation, presets
from rolora.errors import BadInput
from rolora.federated import compatibility, methods, wire
from rolora.federated.rates import learning_rate
from rolora.recipes import flowertune
from rolora.recipes.benchmarks import BENCHMARKS
from rolora.run import job, traffic
from tests import models, templates
from tests.rolora.commands import rows

SETTINGS = ("general", "finance", "medical", "code")
ROW = {"instruction": "Say it.", "input": "loudly", "output": "IT"}
# What the template's `reformat` and `formatting_prompts_func` make of that row, by hand.
OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEXTS = {
    "general": f"{OPENING}\n### Instruction:\nSay it.\n### Response: IT",
    "finance": f"{OPENING}\n### Instruction:\nSay it. loudly\n### Response: IT",
    "medical": f"{OPENING}\n### Instruction:\nloudly\n### Response: IT",
    "code": f"{OPENING}\n### Instruction:\nSay it. loudly\n### Response: IT",
}


def write(folder, count=400):
    folder.mkdir()
    found = [ROW | {"instruction": f"Say {i}."} for i in range(count)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_prompts_are_the_template_s(setting, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    name = f"flowertune-{setting}"
    (row,), none = flowertune.load(name, str(tmp_path))
    assert none is None and row["prompt"] + row["response"] == TEXTS[setting]
    assert row["prompt"].endswith("### Response:"), "loss is on what follows that"
    tokenizer = templates.tokenizer(None)
    recipe = BENCHMARKS[name].make(tokenizer, 512, "cpu")
    (example,) = recipe.encode([row])
    whole = tokenizer(TEXTS[setting])["input_ids"]
    assert example.ids == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(example.ids[example.start :]) == " IT</s>"


def test_a_row_without_an_answer_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(BadInput, match="flowertune-code, row 1: columns instruction, expected"):
        flowertune.load("flowertune-code", str(tmp_path))


def test_a_message_is_what_peft_and_numpy_make_of_it():
    model = peft.get_peft_model(
        models.build("mistral"), peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    )
    arrays = [value.numpy() for value in peft.get_peft_model_state_dict(model).values()]
    written = 0
    for array in arrays:
        held = io.BytesIO()
        np.save(held, array, allow_pickle=False)
        written += held.getbuffer().nbytes
    assert flowertune.message_bytes(array.shape for array in arrays) == written


# The shapes of two baselines of the board for general NLP, and the GB (of 2³⁰ bytes, rounded up)
# that it gives as their costs: flower.ai/benchmarks/llm-leaderboard/nlp.
BOARD = {
    "mistral": (40.7, hf.MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, architectures=["MistralForCausalLM"])),
    "llama": (27.4, hf.LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])),
}  # fmt: skip


@pytest.mark.parametrize("family", BOARD)
def test_the_board_s_costs_come_out(family, tmp_path, call):
    cost, settings = BOARD[family]
    settings.save_pretrained(tmp_path / "model")
    templates.tokenizer(None).save_pretrained(tmp_path / "model")
    data = write(tmp_path / "data")
    flags = ("--preset", "flowertune-general", "--model", tmp_path / "model", "--dataset", data)
    code, out, err = call(*flags, "--dry-run")
    assert (code, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    theirs = float(lines["FlowerTune's own"].split("; ")[1].split(" MiB")[0].replace(",", ""))
    assert cost - 0.1 < theirs / 1024 <= cost
    assert "of the 200,000 MiB that it allows" in lines["FlowerTune's own"]
    assert lines["clients"].startswith("20, 2 a round") and "base in nf4" in lines["model"]
    assert "NF4, theirs FP4" in lines["not the same"] and "modelled" in lines["traffic"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_presets_are_the_template_s(setting):
    preset = config.resolve({}, preset=f"flowertune-{setting}")
    f = preset.federation
    clients, fraction = {"general": (20, 0.1), "finance": (50, 0.1), "medical": (20, 0.1), "code": (10, 0.2)}[setting]  # fmt: skip
    assert (f.clients, f.clients_per_round, f.rounds) == (clients, round(fraction * clients), 200)
    assert (f.local_steps, f.batch_size, preset.task.max_length) == (10, 16, 512)
    assert (preset.adapter.rank, preset.adapter.alpha, preset.adapter.dropout) == (32, 64.0, 0.075)
    o: Optimisation = preset.optimisation
    rates = [learning_rate(o, 200, "B", number) for number in (1, 100, 200)]
    assert rates[0] == 5e-5 and rates[2] == pytest.approx(1e-6)
    by_their_template = 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + np.cos(np.pi * 100 / 200))
    assert rates[1] == pytest.approx(by_their_template, rel=0.01)


def small(files, data, **more):
    flags = presets.PRESETS["flowertune-general"] | {
        "model": str(files["llama"]),
        "dataset": str(data),
        "quantize": "none",
        "gradient_checkpointing": False,
        "clients": 5,
        "rounds": 12,
        "local_steps": 1,
        "batch_size": 2,
        "rank": 4,
        "max_length": 64,
        "engine": "sequential",
        "eval_every": 12,
    }
    return flags | more


@pytest.mark.parametrize(
    "method, dtype, own",
    [
        ("rolora", "bf16", {}),
        ("rolora", "int8", {"equal_factors": False}),
        ("rolora", "bf16", {"equal_factors": False, "schedule": "BBA"}),
        ("rolora", "int8", {"equal_factors": True, "schedule": "BBA"}),
        ("rolora", "bf16", {"balance": True, "schedule": "BBA"}),
        ("rolora", "int4", {"clients_per_round": 5}),
        ("fedavg", "int8", {}),
        ("ffa", "fp32", {}),
    ],
)
def test_what_is_told_beforehand_is_what_a_run_sends(
    method, dtype, own, files, tmp_path, call, monkeypatch
):
    data = write(tmp_path / "data", 60)
    flags = small(files, data, method=method, exchange_dtype=dtype) | own
    made = job.prepare(config.resolve(flags), weights=False)
    told = traffic.predicted(made.config, made.layout, compatibility.load(made.config))
    args = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        on = f"--{'' if value else 'no-'}{flag}"
        args += [on] if isinstance(value, bool) else [f"--{flag}", value]
    sent = {"down": 0, "up": 0}
    task, update = wire.encode_task, wire.encode_update

    def down(message):
        parts = (message.full, message.delta, message.turn)
        sent["down"] += sum(tensor.nbytes for part in parts for tensor in part.values())
        return task(message)

    def up(message):
        sent["up"] += message.change.nbytes
        return update(message)

    monkeypatch.setattr(wire, "encode_task", down)
    monkeypatch.setattr(wire, "encode_update", up)
    code, _, err = call(*args, "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert sent == {"down": told.down, "up": told.up}
    found = rows(tmp_path / "run")[1:]
    headers = sum(row["bytes_down"] + row["bytes_up"] for row in found) - told.both
    assert 0 < headers < 4096 * sum(row["clients"] for row in found)


@pytest.mark.parametrize("more", [{"method": "fedsvd"}, {"sampling": "poisson"}, {"method": "lora-a2"}, {"membership": "2:-0"}, {"rounds": 10**9}])  # fmt: skip
def test_what_cannot_be_told_beforehand_is_not(more, files, tmp_path):
    flags = small(files, write(tmp_path / "data", 60), **more)
    made = job.prepare(config.resolve(flags), weights=False)
    method = methods.load(made.config.federation.method)
    assert traffic.predicted(made.config, made.layout, method) is None
    assert "not told beforehand" in dict(traffic.rows(made, method))["traffic"]
