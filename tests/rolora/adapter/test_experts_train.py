"""Experts that train beside PEFT's: the same curve, on a 4-bit base too, and however many experts a
token has.
"""

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import load_adapter, set_phase
from rolora.adapter.model import adapted_layers
from tests.mixtures import EXPERTS, ROUTED, build, inputs


def theirs(model, drawn=True, **options):
    asked = dict(r=4, lora_alpha=6, target_modules=[], target_parameters=list(EXPERTS))
    made = peft.get_peft_model(model, peft.LoraConfig(**asked | options))
    for name, parameter in made.named_parameters():
        if drawn and "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def close(a, b, gate=1e-5):
    return (a - b).abs().max() <= gate * b.abs().max()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_curve_is_pefts(family, tmp_path):
    judge = theirs(build(family), drawn=False, target_modules=["q_proj"])
    judge.save_pretrained(tmp_path)
    ours = build(family)
    load_adapter(ours, tmp_path)
    set_phase(ours, "BOTH")
    curves = []
    for model in (judge, ours):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=2.0)
        curves.append([])
        for _ in range(12):
            loss = model(**inputs()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][0] - curves[0][-1] > 0.05, "it trains"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5


@pytest.mark.parametrize("chosen", [1, 4])
@pytest.mark.parametrize("rank", [4, 48])  # 48: above a side of each matrix
def test_one_expert_a_token_or_all_of_them(chosen, rank, tmp_path):
    def made():
        torch.manual_seed(0)
        config = ROUTED["qwen3_moe"]()
        config.num_experts_per_tok = chosen
        return hf.AutoModelForCausalLM.from_config(config).eval()

    judge = theirs(made(), r=rank)
    judge.save_pretrained(tmp_path)
    ours = made()
    load_adapter(ours, tmp_path)
    assert close(ours(**inputs()).logits, judge(**inputs()).logits)


def test_a_4_bit_base_keeps_its_experts_dense_and_they_are_adapted(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # On CPUs that have the instructions bitsandbytes multiplies in bf16, which is no judge here.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    # of whole blocks: on some CPUs bitsandbytes reads rows that end within one wrongly
    build("qwen3_moe", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    stored = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def made():
        return hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=stored, dtype=torch.float32
        ).eval()

    judge = theirs(made(), target_modules=["q_proj"])
    judge.save_pretrained(tmp_path / "adapter")
    ours = made()
    load_adapter(ours, tmp_path / "adapter")
    quantised = {path.rpartition(".")[2]: x.quantised for path, x in adapted_layers(ours)}
    assert quantised == {"q_proj": "nf4", "gate_up_proj": None, "down_proj": None}
    set_phase(ours, "BOTH")
    wanted, found = judge(**inputs()), ours(**inputs())
    assert close(found.logits, wanted.logits)
    found.loss.backward()
    assert all(layer.lora_A.grad.any() for _, layer in adapted_layers(ours))
