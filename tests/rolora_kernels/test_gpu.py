"""Tier 2 at real sizes, on a GPU: `pytest -m gpu`.

The judge is the plain formula in float64 on the same device.
"""

import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import explain, grouped_lora_linear, lora_linear, triton_ops, use_backend
from rolora_kernels.codecs import CODECS
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.exchange import pack_change
from rolora_kernels.weights import NF4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GATES = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (3e-3, 4e-3), torch.float16: (4e-4, 4e-4)}
SHAPES = [(2048, 4096, 4096), (2048, 4096, 11008), (1000, 11008, 4096)]  # M, K, N
TMA = "triton[shrink,expand_base:tma,grads_of_dy,base_dx:tma,grad_A]"


def rms(value, truth):
    return ((value.double() - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item()


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("backend", ["torch", "triton", TMA])
@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize(
    "r, p", [(1, 0.0), (8, 0.25), (12, 0.0), (16, 0.5), (64, 0.0), (256, 0.25)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule_at_the_sizes_of_llama(shape, r, p, dtype, backend, poisoned_empty):
    if backend == TMA and (dtype == torch.float32 or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("TMA is for 16-bit types on sm_90 and later")
    M, K, N = shape
    x, W, dy = (
        random(M, K, dtype=dtype),
        random(N, K, dtype=dtype, scale=K**-0.5),
        random(M, N, dtype=dtype),
    )
    A, B, key, s = (
        random(r, K, scale=K**-0.5),
        random(N, r, scale=r**-0.5),
        torch.tensor(5, device="cuda"),
        0.7,
    )
    mask = keep_mask(range(M), K, Dropout(p, key.cpu())).double().cuda() / (1 - p) if p else 1.0
    wide, wide_dy, a, b = x.double() * mask, dy.double(), A.to(dtype).double(), B.to(dtype).double()
    T = s * wide_dy @ b
    truth = {
        "y": x.double() @ W.double().t() + s * (wide @ a.t()) @ b.t(),
        "dx": wide_dy @ W.double() + (T @ a) * mask,
        "dA": T.t() @ wide,
        "dB": s * wide_dy.t() @ (wide @ a.t()),
    }
    for t in (x, A, B):
        t.requires_grad_()
    explain(clear=True)
    with use_backend(backend):
        y = lora_linear(x, W, A, B, s, None, dropout_p=p, dropout_key=key)
        y.backward(dy)
    assert [c.backend for c in explain(clear=True)] == [backend]
    outer, factor = GATES[dtype]
    for name, value, gate in (
        ("y", y, outer),
        ("dx", x.grad, outer),
        ("dA", A.grad, factor),
        ("dB", B.grad, factor),
    ):
        assert rms(value, truth[name]) <= gate, (name, rms(value, truth[name]))


@pytest.mark.parametrize("backend", ["triton", TMA])
def test_groups_at_the_size_of_llama(backend):
    if backend == TMA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this GPU")
    M, K = 2048, 4096
    x = random(M, K, dtype=torch.bfloat16).requires_grad_()
    Ws = [random(n, K, dtype=torch.bfloat16, scale=K**-0.5) for n in (4096, 1024, 1024)]
    As, Bs = (
        [random(16, K, scale=K**-0.5) for _ in Ws],
        [random(len(W), 16).requires_grad_() for W in Ws],
    )
    dys = [random(M, len(W), dtype=torch.bfloat16) for W in Ws]
    with use_backend(backend):
        ys = grouped_lora_linear(x, Ws, As, Bs, [0.5] * 3, [None] * 3)
    torch.autograd.backward(ys, dys)
    S = [x.detach().double() @ A.bfloat16().double().t() for A in As]
    dx = sum(
        dy.double() @ W.double()
        + 0.5 * (dy.double() @ B.detach().bfloat16().double()) @ A.bfloat16().double()
        for dy, W, A, B in zip(dys, Ws, As, Bs, strict=True)
    )
    assert (
        rms(x.grad, dx) <= 6e-3
    )  # each later linear of a group reads dX as the one before rounded it
    for B, dy, s in zip(Bs, dys, S, strict=True):
        assert rms(B.grad, 0.5 * dy.double().t() @ s) <= 4e-3


@pytest.mark.parametrize("tma", [False, True])
def test_addresses_pass_two_to_the_31(tma):
    """Y of 200,000 × 11,008: the last rows lie beyond 2^31 elements."""
    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this GPU")
    M, K, N, r = 200_000, 128, 11_008, 16
    x, W, S, B = (random(*s, dtype=torch.bfloat16) for s in ((M, K), (N, K), (M, r), (N, r)))
    y = triton_ops.expand_base(x, W, S, B, 0.5, None, tma=tma)
    assert (
        rms(y[-300:], x[-300:].double() @ W.double().t() + 0.5 * S[-300:].double() @ B.double().t())
        <= 3e-3
    )
    T, dB = triton_ops.grads_of_dy(y, B, S, 1e-3)
    assert rms(T[-300:], 1e-3 * y[-300:].double() @ B.double()) <= 3e-3
    part = sum(
        1e-3 * y[i : i + 20_000, -8:].double().t() @ S[i : i + 20_000].double()
        for i in range(0, M, 20_000)
    )
    assert rms(dB[-8:], part) <= 4e-3


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_at_the_size_of_llama(double):
    N, K, block = 11_008, 4096, 64
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    code = torch.linspace(-1, 1, 16, device="cuda")
    if double:
        absmax = torch.randint(0, 256, (N * K // block,), dtype=torch.uint8, device="cuda")
        nested = (
            torch.rand(256, device="cuda"),
            torch.rand(-(-absmax.numel() // 256), device="cuda"),
            256,
            torch.tensor(0.1, device="cuda"),
        )
    else:
        absmax, nested = torch.rand(N * K // block, device="cuda"), None
    weight = NF4(packed, absmax, code, (N, K), block, nested)
    for dtype in GATES:
        with use_backend("triton"):
            ours = weight.dequantise(dtype)
        with use_backend("torch"):
            assert torch.equal(ours, weight.dequantise(dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_a_change_of_ten_million_values_is_packed(dtype):
    tensors = [random(n) for n in (4096 * 16, 1, 11_008 * 16, 10_000_000)]
    base = [t - random(t.numel(), scale=1e-3) for t in tensors]
    wire, norm, bad = pack_change(tensors, base, CODECS[dtype], key=5)
    change = torch.cat([t - b for t, b in zip(tensors, base, strict=True)])
    assert (
        wire.device.type == "cpu"
        and bad == 0
        and abs(norm / change.double().norm().item() - 1) < 1e-5
    )
    if dtype == "int8":
        blocks = torch.nn.functional.pad(change, (0, -len(change) % 256)).view(-1, 256)
        step = (blocks.abs().amax(1) / 127).repeat_interleave(256)[: len(change)].cpu()
        gap = CODECS[dtype].decode(wire).double() - change.double().cpu()
        assert (gap.abs() <= step * 1.0001).all() and abs(gap.mean()) < 5 * step.mean() / len(
            change
        ) ** 0.5
    else:
        assert torch.equal(wire, change.to(wire.dtype).cpu())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_cohort_of_eight_clients_at_the_size_of_llama(phase, p, backend):
    C, m, K, N, r = 8, 500, 4096, 4096, 16
    x, W, dy = (
        random(C * m, K, dtype=torch.bfloat16),
        random(N, K, dtype=torch.bfloat16, scale=K**-0.5),
        random(C * m, N, dtype=torch.bfloat16),
    )
    A, B = (
        random(*([C] if phase != "B" else []), r, K, scale=K**-0.5),
        random(*([C] if phase != "A" else []), N, r, scale=r**-0.5),
    )
    keys, rows = (
        torch.arange(C, device="cuda").repeat_interleave(m),
        torch.arange(m, device="cuda").repeat(C),
    )
    for t in (x, *(f for f in (A, B) if f.ndim == 3)):
        t.requires_grad_()
    with use_backend(backend):
        y = lora_linear(
            x, W, A, B, 0.5, dropout_p=p, dropout_key=torch.stack([keys, rows]) if p else None
        )
        y.backward(dy)
    for c in range(C):
        own = slice(c * m, (c + 1) * m)
        A_c, B_c = ((f.detach()[c] if f.ndim == 3 else f).bfloat16().double() for f in (A, B))
        mask = (
            keep_mask(range(m), K, Dropout(p, torch.tensor(c))).double().cuda() / (1 - p)
            if p
            else 1.0
        )
        wide, wide_dy = x.detach()[own].double() * mask, dy[own].double()
        T = 0.5 * wide_dy @ B_c
        assert (
            rms(
                y[own], x.detach()[own].double() @ W.double().t() + 0.5 * (wide @ A_c.t()) @ B_c.t()
            )
            <= 3e-3
        )
        assert rms(x.grad[own], wide_dy @ W.double() + (T @ A_c) * mask) <= 3e-3
        if A.ndim == 3:
            assert rms(A.grad[c], T.t() @ wide) <= 4e-3
        if B.ndim == 3:
            assert rms(B.grad[c], 0.5 * wide_dy.t() @ (wide @ A_c.t())) <= 4e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("phase", ["A", "B"])
def test_a_step_makes_the_host_wait_for_nothing(backend, phase):
    """Forward, backward, clipping and the optimizer, with dropout, where waiting is an error."""
    rolora = pytest.importorskip("rolora")
    from rolora.adapter.masks import set_dropout_key

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    net = torch.nn.ModuleDict({name: torch.nn.Linear(256, 256) for name in names}).cuda()
    rolora.attach(net, rolora.LoRAConfig(rank=8, dropout=0.1, target_modules=list(names)))
    rolora.set_phase(net, phase)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    x = random(64, 256)

    def step(number):
        set_dropout_key(net, number)
        h = net["o_proj"](sum(net[name](x) for name in names[:3]))
        loss = h.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with use_backend(backend):
        net.train()
        step(0)  # kernels are compiled and memory is found in the first one
        try:
            torch.cuda.set_sync_debug_mode("error")
            losses = [step(1), step(2)]
            with pytest.raises(RuntimeError, match="synchron"):
                losses[0].item()  # it does look
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses)
