"""Subclasses of nn.Linear: taken where their forward gives what nn.Linear's does, else refused."""

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from rolora import LoRAConfig, attach, save_adapter


class Same(nn.Linear):
    def forward(self, x):
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OffByLittle(nn.Linear):
    def forward(self, x):
        return super().forward(x * (1 + 1e-4))


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return nn.functional.dropout(y, 0.5) if self.training else y


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class WithMore(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [True, False])
def test_one_that_computes_the_same_is_adapted(bias, dtype, mode):
    model = nn.Sequential(Same(64, 48, bias=bias)).to(dtype).train(mode)
    report = attach(model, LoRAConfig(rank=4, target_modules=["0"]))
    assert report.replaced == ["0"] and model[0].training is mode


@pytest.mark.parametrize("kind", [Doubled, OffByLittle, NoisyInTraining, Clipped, WithMore])
def test_one_that_computes_more_is_refused_by_name(kind):
    model = nn.Sequential(kind(64, 48)).eval()
    with pytest.raises(ValueError, match=f"0: cannot adapt .*{kind.__name__}"):
        attach(model, LoRAConfig(rank=4, target_modules=["0"]))
    assert type(model[0]) is kind and not model[0].training


def test_falcon_s_adapter_is_peft_s(tmp_path):
    torch.manual_seed(0)
    config = hf.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    )
    model, other = (hf.FalconForCausalLM(config).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    report = attach(model, LoRAConfig(rank=4, target_modules="auto"))
    for layer in report.layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
        theirs.disable_adapter_layers()
        assert (model(ids).logits - theirs(ids).logits).abs().max() > 0.05
