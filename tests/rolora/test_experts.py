"""Mixtures of experts: attention adapters in both engines; layers that some tokens never reach."""

import pytest
import torch
import transformers as hf

from rolora.cohort.batched import why_not
from rolora.federated import moments
from rolora.federated.layout import Layout
from tests.rolora.commands import small
from tests.rolora.test_batched import compare, prepared
from tests.rolora.test_families import SIZE, saved

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
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(n for name, n in sizes.items() if "experts" in name) / sum(sizes.values())
    assert (code, err) == (0, "") and share > 0.2
    assert f"not the experts, which are {share:.0%} of the frozen parameters" in out
    code, out, _ = call(*small(files), "--dry-run")
    assert code == 0 and "experts" not in out
