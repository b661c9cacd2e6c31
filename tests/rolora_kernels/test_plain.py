"""The plain path is the general rule bit for bit, and what a layer remembers of a call is forgotten
when anything changes that it follows from.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from rolora import RoLoRALinear
from rolora_kernels import explain, grouped_lora_linear, lora_linear, settled, use_backend
from rolora_kernels.repeated import RepeatedCall


@pytest.fixture(autouse=True)
def fresh():
    settled.forget()
    explain(clear=True)
    yield
    settled.forget()


def problem(lead, K, sizes, ranks, dtype, biases, phase, need_x):
    torch.manual_seed(5)
    x = torch.randn(*lead, K).to(dtype).requires_grad_(need_x)
    Ws = [(torch.randn(n, K) / K**0.5).to(dtype) for n in sizes]
    As = [torch.randn(r, K).requires_grad_(phase != "B") for r in ranks]
    Bs = [torch.randn(n, r).requires_grad_(phase != "A") for n, r in zip(sizes, ranks, strict=True)]
    bs = [torch.randn(n).to(dtype) if biases else None for n in sizes]
    return x, Ws, As, Bs, bs


def results(x, Ws, As, Bs, bs, scalings, used):
    """Outputs and gradients, by one linear's way or a group's."""
    if len(Ws) == 1:
        ys = (lora_linear(x, Ws[0], As[0], Bs[0], scalings[0], bs[0]),)
    else:
        ys = grouped_lora_linear(x, Ws, As, Bs, scalings, bs)
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) for y in ys]
    torch.autograd.backward([ys[g] for g in used], [dys[g] for g in used])
    leaves = [x, *As, *Bs]
    found = [*ys, *(t.grad for t in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize(
    "lead, K, sizes, ranks, scaling, biases, need_x, used",
    [
        ((8,), 64, (64,), (8,), 2.0, True, True, [0]),
        ((3, 5), 33, (17,), (3,), 0.7, False, True, [0]),
        ((2, 130), 192, (96,), (16,), 0.5, True, False, [0]),
        ((1,), 8, (6,), (1,), 1.0, True, True, [0]),
        ((0,), 8, (6,), (2,), 2.0, True, True, [0]),
        ((4, 9), 48, (40, 16, 24), (8, 4, 8), 2.0, True, True, [0, 1, 2]),
        ((7,), 20, (12, 8), (3, 2), 1.3, False, True, [1]),
        ((2, 60), 96, (64, 64), (8, 8), 1.0, True, False, [0, 1]),
    ],
)
def test_it_is_the_general_rule_bit_for_bit(
    lead, K, sizes, ranks, scaling, biases, need_x, used, dtype, phase, monkeypatch
):
    given = problem(lead, K, sizes, ranks, dtype, biases, phase, need_x)
    scalings = [scaling * 2**g for g in range(len(sizes))]
    ours = results(*given, scalings, used)
    kinds = list(settled._kinds.values())
    assert [kind.plain for kind in kinds] == [True]
    settled.forget()
    monkeypatch.setattr(settled, "_all_by_torch", lambda *a: False)
    truth = results(*given, scalings, used)
    assert [kind.plain for kind in settled._kinds.values()] == [False]
    for a, b in zip(ours, truth, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous()
            assert torch.equal(a, b)


def test_backward_under_autocast_and_a_gradient_of_the_gradients():
    (x, Ws, As, Bs, bs) = problem((4,), 16, (12,), (2,), torch.float32, True, "B", True)
    y = lora_linear(x, Ws[0], As[0], Bs[0], 2.0, bs[0])
    with torch.autocast("cpu"):
        y.sum().backward()
    expected = Ws[0].sum(0) + 2.0 * (Bs[0].detach().sum(0) @ As[0])
    torch.testing.assert_close(x.grad, expected.expand(4, -1), rtol=1e-5, atol=1e-5)
    y = lora_linear(x, Ws[0], As[0], Bs[0], 2.0, bs[0])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dx.sum().backward()


def layer(**options):
    torch.manual_seed(0)
    made = RoLoRALinear.from_linear(nn.Linear(16, 12), rank=2, alpha=4, **options)
    nn.init.normal_(made.lora_B)
    made.set_phase("B")
    return made


def lookups(monkeypatch):
    """A list that grows when a kind is looked up."""
    seen, right = [], settled.kind_of
    monkeypatch.setattr(settled, "kind_of", lambda *a: seen.append(1) or right(*a))
    return seen


def test_the_kind_of_a_layers_last_call_holds_until_something_changes(monkeypatch):
    made, x = layer(), torch.randn(5, 16)
    plain = made(x)
    seen = lookups(monkeypatch)
    for _ in range(3):
        assert torch.equal(made(torch.randn(5, 16) * 0 + x), plain)
    assert not seen
    assert [c.calls for c in explain()] == [4]
    made(torch.randn(6, 16))
    made(torch.randn(2, 3, 16))
    made.set_phase("A")
    made(torch.randn(2, 3, 16)).sum().backward()
    assert made.lora_A.grad is not None and made.lora_B.grad is None
    assert len(seen) == 3
    with torch.autocast("cpu"):
        assert made(x).dtype == torch.bfloat16
    with use_backend("reference"):
        torch.testing.assert_close(made(x), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(made(x), plain)
    assert len(seen) == 6
    made.double()
    assert made(x.double()).dtype == torch.float64 and len(seen) == 7


def test_another_tensor_in_a_layer_is_settled_anew(monkeypatch):
    made, x = layer(), torch.randn(5, 16)
    made(x)
    seen = lookups(monkeypatch)
    made.lora_A, made.lora_B = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(12, 3))
    truth = nn.functional.linear(x, made.weight + made.delta(), made.bias)
    torch.testing.assert_close(made(x), truth, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1 and explain()[-1].shape.endswith("r=3")
    made.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen here"):
        made(x)


def test_what_is_remembered_is_not_copied():
    made, x = layer(), torch.randn(5, 16)
    y = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other._call._kind is None and torch.equal(other(x), y)
    assert isinstance(pickle.loads(pickle.dumps(made._call)), RepeatedCall)


def test_a_parametrised_factor_is_read_through_its_parametrisation():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    made, x = layer(), torch.randn(5, 16)
    path = made(x) - nn.functional.linear(x, made.weight, made.bias)
    nn.utils.parametrize.register_parametrization(made, "lora_A", Doubled())
    twice = made(x) - nn.functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(twice, 2 * path, rtol=1e-4, atol=1e-5)


def test_a_transform_of_torch_func_is_refused_where_the_rule_is_called_by_itself():
    x, W, A, B = torch.randn(3, 4, 16), torch.randn(12, 16), torch.randn(2, 16), torch.randn(12, 2)
    B.requires_grad_()
    for call in (
        lambda x: lora_linear(x, W, A, B, 1.0),
        lambda x: grouped_lora_linear(x, [W, W], [A, A], [B, B], [1.0, 1.0], [None, None])[0],
    ):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.vmap(call)(x)


@pytest.mark.parametrize("linears", [1, 2])
def test_factors_of_a_cohort_after_the_layer_s_own(linears):
    """One client, so that all but the axis of clients is as in the call before."""
    scalings = (0.5,) * linears
    x, Ws, As, Bs, bs = problem(
        (6,), 8, (5,) * linears, (3,) * linears, torch.float32, True, "", True
    )
    call = RepeatedCall()

    def outputs(As, Bs):
        if linears == 1:
            return (call.one(x, Ws[0], As[0], Bs[0], 0.5, bs[0]),)
        return call.group(x, Ws, As, Bs, scalings, bs)

    own = [outputs(As, Bs) for _ in range(2)][1]
    cohort = outputs([A[None] for A in As], [B[None] for B in Bs])
    for y, z in zip(own, cohort, strict=True):
        torch.testing.assert_close(y, z)
    for y, z in zip(own, outputs(As, Bs), strict=True):
        assert torch.equal(y, z)
