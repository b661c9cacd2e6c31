"""Launches: on the device of their operands, in one place, few for a mask and compiled seldom."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import rolora_kernels
from rolora_kernels import dispatch, dropping, lora_linear, tune
from rolora_kernels.codecs import CODECS
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.dropping import add_dropped, zero_dropped
from rolora_kernels.exchange import pack_change
from rolora_kernels.triton_ops import blocks
from rolora_kernels.triton_ops import launch as launching
from rolora_kernels.weights import NF4

PACKAGE = Path(rolora_kernels.__file__).parent
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the interpreter",
)


@pytest.fixture
def launches(monkeypatch):
    """What is launched, by the name of its kernel."""
    seen, right = [], launching.on_device

    def spy(tensor):
        seen.append(tensor)
        return right(tensor)

    monkeypatch.setattr(launching, "on_device", spy)
    return seen


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Dispatch takes the CPU for a GPU, whose kernels the interpreter runs."""
    monkeypatch.setattr(dropping, "by_kernel", lambda x: x.dtype != torch.float64)


def philox_by_hand(column: int, row: int, key: int) -> int:
    """The signed 16-bit lane that decides an element, Philox-4x32-7 in Python's own integers
    (Salmon et al., SC 2011): eight lanes a block, the low half of a word first.
    """
    low = 2**32 - 1
    c, k = [column // 8, row, 0, 0], [key & low, key >> 32 & low]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    lane = c[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
    return lane - (lane >> 15 << 16)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.75, 1.0])
def test_a_mask_is_one_launch_and_bit_for_bit_that_of_a_cpu(p, dtype, launches, as_on_a_gpu):
    key = torch.tensor(-(2**61) + 12345)
    x = torch.randn(37, 530).to(dtype)
    x[3, 5], x[4, 6] = float("inf"), float("nan")  # dropped they are zero
    drop = Dropout(p, key)
    kept = np.array(
        [
            [philox_by_hand(c, r, int(key)) >= round(p * 2**16) - 2**15 for c in range(530)]
            for r in (0, 1, 36)
        ]
    )
    assert np.array_equal(keep_mask(range(37), 530, drop)[[0, 1, 36]].numpy(), kept)
    ours = zero_dropped(x, drop)
    assert len(launches) == 1
    truth = torch.where(keep_mask(range(37), 530, drop), x, torch.zeros((), dtype=dtype))
    assert torch.equal(ours.view(torch.uint8), truth.view(torch.uint8))
    turned = zero_dropped(x.t().contiguous().t(), drop)  # any strides
    assert torch.equal(turned.contiguous().view(torch.uint8), truth.view(torch.uint8))


@interpreted
def test_a_cohorts_rows_have_their_own_keys_and_places(as_on_a_gpu):
    x, keys = torch.randn(24, 36), torch.tensor([7, -7]).repeat_interleave(12)
    drop = Dropout(0.4, keys, torch.arange(12).repeat(2) + 3)
    assert torch.equal(zero_dropped(x, drop), torch.where(keep_mask(range(24), 36, drop), x, 0.0))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_sum_is_one_launch_and_rounded_once(dtype, launches, as_on_a_gpu):
    drop = Dropout(0.3125, torch.tensor(5))  # a multiple of the mask's steps, 2**-16
    out, x = torch.randn(40, 72).to(dtype), torch.randn(40, 72).to(dtype)
    exact = out.double() + torch.where(keep_mask(range(40), 72, drop), x.double(), 0.0) / 0.6875
    in_fp32 = (out.double().abs() + x.double().abs() / 0.6875) * 2.0**-23
    given = add_dropped(out, x, drop)
    assert given is out and len(launches) == 1
    once = exact.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)
    assert ((out.double() - exact).abs() <= once + in_fp32).all()


@interpreted
def test_vendor_libraries_with_dropout_launch_one_mask_a_use(launches, as_on_a_gpu):
    t = tune.operands("cpu", 40, 48, 32, 4, torch.float32)
    drop = Dropout(0.2, torch.tensor(3))
    for name in ("shrink", "base_dx", "grad_A"):
        truth = tune.truth(name, t, drop)
        launches.clear()
        assert tune.error(tune.call(name, "torch", t, drop), truth) < 1e-6
        assert len(launches) == 1, name


@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_a_step_makes_a_mask_once(phase, monkeypatch):
    """On a CPU: forward keeps it for dX and dA."""
    made, right = [], dropping.keep_mask
    monkeypatch.setattr(dropping, "keep_mask", lambda *a: made.append(1) or right(*a))
    x, W, A, B = torch.randn(9, 20), torch.randn(12, 20), torch.randn(3, 20), torch.randn(12, 3)
    x.requires_grad_(), A.requires_grad_(phase != "B"), B.requires_grad_(phase != "A")
    drop = Dropout(0.25, torch.tensor(7))
    lora_linear(x, W, A, B, 2.0, dropout_p=0.25, dropout_key=7).sum().backward()
    assert len(made) == 1
    kept = keep_mask(range(9), 20, drop) / 0.75
    ones, leaf = torch.ones(9, 12), x.detach() * kept
    truth = ones @ W + 2.0 * (ones @ B.detach() @ A.detach()) * kept
    torch.testing.assert_close(x.grad, truth, rtol=1e-4, atol=1e-4)
    if phase != "B":
        found = 2.0 * (ones @ B.detach()).t() @ leaf
        torch.testing.assert_close(A.grad, found, rtol=1e-4, atol=1e-4)


def test_masks_without_triton_are_chunks_of_what_a_gpu_bears(monkeypatch):
    """8192 × 4096 in two chunks, not in 128."""
    monkeypatch.setattr(dropping, "by_kernel", lambda x: False)
    calls = []
    monkeypatch.setattr(dropping, "keep_mask", lambda rows, columns, drop: calls.append(len(rows)))
    monkeypatch.setattr(dropping.torch, "where", lambda kept, x, zero, out: x)

    class Fake:
        shape, is_cuda, dtype, device = (8192, 4096), True, torch.float32, torch.device("cpu")

        def __getitem__(self, rows):
            return self

    monkeypatch.setattr(dropping.torch, "empty_like", lambda x: np.empty(x.shape, object))
    zero_dropped(Fake(), Dropout(0.1, torch.tensor(1)))
    assert calls == [4096, 4096]


@interpreted
@pytest.mark.parametrize("name", tune.primitives())
def test_every_primitive_launches_on_its_operands_device(name, launches):
    t = tune.operands("cpu", 40, 48, 32, 4, torch.bfloat16)
    for candidate in tune.candidates(name):
        launches.clear()
        tune.call(name, candidate, t, Dropout(0.2, torch.tensor(3)))
        assert launches and all(isinstance(tensor, torch.Tensor) for tensor in launches)


@interpreted
def test_packing_and_4_bit_weights_launch_on_their_device(launches):
    from rolora_kernels import use_backend

    weight = NF4(torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.ones(16), (8, 8))
    with use_backend("triton"):
        pack_change([torch.ones(10)], None, CODECS["bf16"], key=1)
        weight.dequantise(torch.float32)
    assert len(launches) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in launches)


def test_the_current_device_is_that_of_the_operands(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launching.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)))
    assert entered == [torch.device("cuda", 1)]
    here = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with launching.on_device(torch.empty(0)), launching.on_device(here):
        assert len(entered) == 1


def test_an_interpreter_that_cannot_run_is_named():
    """Triton 3.6's, with a NumPy that no longer makes a scalar of an array of one."""
    for fits in (("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.10.0", "2.4.0")):
        blocks._check_interpreter(*fits)
    with pytest.raises(ImportError, match=r"NumPy 2\.4\.6: install \"numpy<2\.4\""):
        blocks._check_interpreter("3.6.0", "2.4.6")


def test_kernels_are_launched_in_one_place_only():
    """Whatever is called as `something[grid](…)` is a launch, and it stands in again.py."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                if ast.unparse(node.func.value).endswith("kernel"):
                    found.append(path.name)
            if isinstance(node, ast.keyword) and node.arg == "device":
                fixed = isinstance(node.value, ast.Constant) and node.value.value == "cuda"
                assert not fixed, (
                    f"{path.name}:{node.value.lineno}: allocates on the current device"
                )
    assert found == ["again.py"]


def test_4_bit_weights_and_packing_are_ours_on_a_gpu_without_a_table(monkeypatch):
    monkeypatch.setattr(dispatch.tuned, "nearest", lambda *a: None)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda", 1))
    assert dispatch.choose_dequantise(on_a_gpu, torch.Size((8, 8)))[0] == "triton"
    assert dispatch.choose_pack(on_a_gpu.device)[0] == "triton"
    assert dispatch.choose_dequantise(torch.empty(0), torch.Size((8, 8)))[0] == "torch"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose_dequantise(on_a_gpu, torch.Size((8, 8)))[0] == "torch"
