"""FSDP1 with `use_orig_params=True`, in one process: its views of frozen parameters require grad.
The same model without FSDP judges.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp

from rolora import LoRAConfig, attach, get_adapter_state_dict, set_phase
from rolora.adapter.model import adapted_layers
from rolora.adapter.tensors import adapter_tensors


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """A group of three, whose bias is frozen too, and a layer that stands alone."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x * 1.0
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x) + self.v_proj(x)))


def made():
    torch.manual_seed(0)
    model = Block()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    attach(model, LoRAConfig(rank=2, target_modules=names), seed=0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(3))
    return model


def test_training_in_turns_is_that_of_the_model_alone(group):
    alone, wrapped = (
        made(),
        fsdp.FullyShardedDataParallel(made(), use_orig_params=True, device_id=torch.device("cpu")),
    )
    x, ends = torch.randn(5, 8), []
    base = {k: v.clone() for k, v in alone.state_dict().items() if "lora_" not in k}
    for model in (alone, wrapped):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for phase in ("B", "A", "BOTH", None):
            set_phase(model, phase)
            loss = model(x).square().sum()
            if phase is not None:
                loss.backward()
            optimizer.step(), optimizer.zero_grad()
        ends.append([loss, *get_adapter_state_dict(model).values()])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    after = wrapped.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in base.items())
    start = get_adapter_state_dict(made()).values()
    assert all((a - b).abs().max() > 0.05 for a, b in zip(start, ends[1][1:], strict=True))


def test_a_weight_that_a_user_wants_trained_is_still_refused():
    model = made()
    model.o_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight and bias are frozen here"):
        model(torch.randn(5, 8))


def test_sharded_factors_are_not_saved_as_they_lie():
    model = made()
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    for _, layer in adapted_layers(model):
        layer.lora_A.data = layer.lora_A.data.flatten()[:5]  # as a rank of two holds it
    with pytest.raises(ValueError, match=r"q_proj are sharded.*summon_full_params"):
        get_adapter_state_dict(model)
    taken = adapter_tensors(model, None, torch.float32, whole)
    wanted = get_adapter_state_dict(made())
    assert taken.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in taken.items())
