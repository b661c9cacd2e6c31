"""Mixtures of experts: attention adapters in both engines; layers that some tokens never reach."""

import json

import peft
import pytest
import torch
import transformers as hf

from rolora import evaluate, export
from rolora.adapter.model import adapted_layers
from rolora.cohort.batched import why_not
from rolora.federated import methods, moments
from rolora.federated.layout import Layout
from tests.rolora.cohorts import compare, prepared
from tests.rolora.commands import bits, rows, small
from tests.rolora.test_families import SIZE, saved

pytestmark = pytest.mark.slow

EXPERTS = dict(
    num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
)
FAMILIES = {
    "qwen2_moe": lambda v: hf.Qwen2MoeConfig(
        vocab_size=v, shared_expert_intermediate_size=16, **EXPERTS, **SIZE
    ),
    "qwen3_moe": lambda v: hf.Qwen3MoeConfig(vocab_size=v, head_dim=8, **EXPERTS, **SIZE),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_adapters_train_alike_in_both_engines(family, files, tmp_path):
    folder = saved(FAMILIES[family], hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    made = prepared({**files, "moe": folder}, "moe", task_type="causal-lm")
    assert why_not(made.trainer(), made.report.heads) is None
    compare(made, "B", 3)


def test_adapters_within_a_mixture_are_refused_by_its_name(files, tmp_path):
    folder = saved(FAMILIES["qwen2_moe"], hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    given = {"task_type": "causal-lm", "target_modules": "all-linear"}
    made = prepared({**files, "moe": folder}, "moe", **given)
    assert "mlp is a Qwen2MoeSparseMoeBlock, which regroups" in why_not(made.trainer(), ())


def test_a_factor_that_no_gradient_came_to_has_moments_of_zero(files):
    made = prepared(files)
    layout: Layout = made.layout
    parameters = layout.parameters(made.model, "B")
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        for p in parameters[1:]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    found = moments.gather(optimizer, layout, made.model, ("B",))
    first = parameters[0].numel()
    assert (found["exp_avg.B"][:first] == 0).all() and (found["exp_avg_sq.B"][:first] == 0).all()
    assert torch.allclose(found["exp_avg.B"][first:], torch.tensor(1 - 0.9**3))
    assert found["step.B"].item() == 3


def test_the_plan_says_how_much_of_a_mixture_is_not_adapted(files, tmp_path, call):
    folder = saved(FAMILIES["qwen3_moe"], hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    flags = small(files, **{"task-type": "causal-lm", "target-modules": "all-linear"})
    flags[flags.index("--model") + 1] = folder
    code, out, err = call(*flags, "--dry-run")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and "embed" not in name
    }
    experts = sum(n for name, n in sizes.items() if "experts" in name)
    rest = sum(n for name, n in sizes.items() if "lm_head" in name or ".gate.weight" in name)
    share, left = (n / sum(sizes.values()) for n in (experts, experts + rest))
    assert (code, err) == (0, "") and 0.2 < share < left - 0.01
    said = (
        f"{left:.0%} of the linear parameters are not adapted, {share:.0%} in experts "
        "(--target-parameters experts.gate_up_proj,experts.down_proj adapts them)"
    )
    assert said in " ".join(out.split())
    whole = f"{rest / sum(sizes.values()):.0%} of the linear parameters are not adapted "
    flags += ["--target-parameters", "experts.gate_up_proj,experts.down_proj"]
    code, out, _ = call(*flags, "--dry-run")
    assert code == 0 and whole in " ".join(out.split()) and "in experts" not in out
    code, out, _ = call(*flags, "--quantize", "nf4", "--dry-run")
    assert code == 0 and f"base in nf4, {experts:,} parameters of experts dense" in out
    code, out, _ = call(*small(files), "--dry-run")
    assert code == 0 and "experts" not in out


STACKS = {"target_parameters": "experts.gate_up_proj,experts.down_proj"}


@pytest.fixture
def moe(files, tmp_path):
    folder = saved(FAMILIES["qwen3_moe"], hf.AutoModelForCausalLM, files, "llama", tmp_path / "m")
    return {**files, "moe": folder}


@pytest.mark.parametrize(("phase", "chunk"), [("A", 3), ("B", 3), ("BOTH", 3), ("BOTH", 1)])
def test_experts_of_many_clients_are_routed_together(phase, chunk, moe):
    method = {"method": "fedavg"} if phase == "BOTH" else {}
    made = prepared(moe, "moe", task_type="causal-lm", **STACKS, **method)
    assert why_not(made.trainer(), made.report.heads) is None
    compare(made, phase, chunk, 3e-3)


def flags(moe, **extra):
    columns = {"task-type": "causal-lm", "target-parameters": STACKS["target_parameters"]}
    return small(moe, "moe", **{"eval-max-examples": 8}, **columns | extra)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_run_over_experts_that_was_cut_off_ends_the_same(engine, moe, tmp_path, call):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*flags(moe, engine=engine, **{"output-dir": whole}))[0] == 0
    given = flags(moe, engine=engine, rounds=3, **{"output-dir": cut})
    assert call(*given)[0] == 0
    code, _, err = call("--resume", "--output-dir", cut, "--rounds", 4)
    assert (code, err) == (0, "") and bits(cut) == bits(whole)


OPTIONS = {
    "flexlora": {"client-ranks": "2,4"},
    "flora": {"client-ranks": "2,4"},
    "lora-a2": {"client-ranks": "1,2"},
    "rolora": {"balance": True, "exchange-dtype": "int8"},
    "fedavg": {"aggregation": "median", "clients": 5},
}


def test_a_method_for_linears_alone_says_so(moe, tmp_path, call):
    code, _, err = call(*flags(moe, method="fed-sb", **{"output-dir": tmp_path / "run"}))
    assert code == 2 and "--target-parameters" in err and err.count("\n") == 1


@pytest.mark.parametrize("method", [m for m in methods.NAMES if not methods.load(m).narrows])
def test_every_method_takes_experts_one_by_one(method, moe, tmp_path, call):
    extra = OPTIONS.get(method, {})
    code, _, err = call(*flags(moe, method=method, **{"output-dir": tmp_path / "run"}, **extra))
    assert (code, err) == (0, "")
    found = rows(tmp_path / "run")
    assert len(found) == 5 and found[-1]["eval"]["loss"] < found[0]["eval"]["loss"]
    base = hf.AutoModelForCausalLM.from_pretrained(moe["moe"])
    folder = tmp_path / "run" / "adapter"
    if method == "fedsa":
        return
    model = peft.PeftModel.from_pretrained(base, folder)
    assert any("experts.base_layer.lora_A" in name for name, _ in model.named_parameters())


def test_an_expert_is_an_adapter_of_its_own_in_the_layout(moe):
    made = prepared(moe, "moe", task_type="causal-lm", rank=2, **STACKS)
    adapters = made.layout.adapters()
    path = "model.layers.1.mlp.experts.gate_up_proj"
    assert adapters[f"{path}[3]"] == (2, 32, 32) and f"{path}[4]" not in adapters
    layer = dict(adapted_layers(made.model))[path]
    torch.nn.init.normal_(layer.lora_B)
    held = made.layout.gather(made.model, ("A", "B"))
    assert torch.equal(made.layout.views(held, "B")[f"{path}[3]"], layer.lora_B[3])
    assert [p.shape for p in made.layout.parameters(made.model, "A")][-1] == (4, 2, 16)


def test_adapted_experts_are_evaluated_and_exported(moe, tmp_path, call):
    run = tmp_path / "run"
    assert call(*flags(moe, rounds=2, **{"output-dir": run}))[0] == 0
    data = ["--eval-file", moe["eval"], "--eval-max-examples", 8]
    code, out, err = call("--adapter", run / "adapter", *data, command=evaluate.command)
    assert (code, err) == (0, ""), err
    assert f"{rows(run)[-1]['eval']['loss']:.4f}"[:5] in out
    for extra, name in ((["--to", "vllm"], "--to vllm"), (["--bake"], "--bake")):
        where = ["--adapter", run / "adapter", "--output-dir", tmp_path / "refused"]
        code, _, err = call(*where, *extra, command=export.command)
        assert code == 2 and f"{name}: this adapter has factors of parameters (exp" in err
    where = ["--adapter", run / "adapter", "--to", "merged", "--output-dir", tmp_path / "whole"]
    assert call(*where, command=export.command)[0] == 0
    whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base = hf.AutoModelForCausalLM.from_pretrained(moe["moe"])
    model = peft.PeftModel.from_pretrained(base, run / "adapter")
    ids = torch.arange(5, 25).view(2, 10)
    wanted, found = model(input_ids=ids).logits, whole(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_run_starts_from_experts_that_peft_wrote_with_its_ranks_and_goes_on(moe, tmp_path, call):
    base = hf.AutoModelForCausalLM.from_pretrained(moe["moe"])
    asked = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["experts.down_proj"],
        rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 3},
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    given = {"init-adapter": tmp_path / "theirs", "exchange-dtype": "int8"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*flags(moe, **given, **{"output-dir": whole}))[0] == 0
    assert call(*flags(moe, rounds=3, **given, **{"output-dir": cut}))[0] == 0
    code, _, err = call("--resume", "--output-dir", cut, "--rounds", 4)
    assert (code, err) == (0, "") and bits(cut) == bits(whole)
    stored = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert stored["target_parameters"] == ["experts.down_proj"] and stored["target_modules"] == []
    fresh = hf.AutoModelForCausalLM.from_pretrained(moe["moe"])
    model = peft.PeftModel.from_pretrained(fresh, whole / "adapter")
    ranks = {p.shape[0] // 4 for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {2, 3}


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"target-parameters": "experts.gate_pro"}, "nearest: experts.gate_up_proj"),
        ({"target-parameters": ","}, "expected the ends of parameters' paths"),
        ({"dropout": 0.1}, "target_parameters does not go with dropout=0.1"),
        (
            {"rank": 17, "target-modules": "none"},
            "rank 17 does not fit a 32x16 matrix of model.layers.0.mlp.experts.down",
        ),
        ({"init": "pissa"}, "is made of a linear's weight"),
    ],
)
def test_bad_input_has_one_line(extra, text, moe, call):
    code, _, err = call(*flags(moe, **extra), "--dry-run")
    assert code == 2 and text in err and err.count("\n") == 1
