"""Dispatch follows the measured table: by primitive and nearest shape, with its configurations."""

import json
import os

import pytest
import torch

from rolora_kernels import explain, grouped_lora_linear, lora_linear, tuned

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the interpreter",
)
launch = pytest.importorskip("rolora_kernels.triton_ops.launch", exc_type=ImportError)
all_specs = pytest.importorskip("rolora_kernels.triton_ops.spec", exc_type=ImportError).all_specs


def row(primitive, sizes, winner, rank=16, dtype="bfloat16", dropout=False, **configs):
    return {
        "primitive": primitive,
        "dtype": dtype,
        "rank": rank,
        "sizes": sizes,
        "dropout": dropout,
        "winner": winner,
        "configs": configs,
    }


@pytest.fixture
def install():
    yield lambda *rows: tuned.install(
        {"gpu": "a GPU", "capability": [9, 0], "commit": "abc", "rows": rows}, "cpu"
    )
    tuned.install({}, "cpu")


def taken(M, K, N, r, dtype=torch.bfloat16, p=0.0):
    explain(clear=True)
    x, W = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    B = torch.randn(N, r, requires_grad=True)
    lora_linear(
        x, W, torch.randn(r, K), B, 1.0, dropout_p=p, dropout_key=1 if p else None
    ).sum().backward()
    (choice,) = explain(clear=True)
    return choice.backend, choice.reason


def test_each_primitive_goes_to_the_winner_at_the_nearest_shape(install):
    install(
        row("shrink", [64, 32], "triton"),
        row("shrink", [512, 32], "torch"),
        row("expand_base", [64, 48, 32], "tma"),
        row("base_dx", [64, 48, 32], "triton"),
        row("grad_A", [64, 32], "torch"),
    )
    assert taken(64, 32, 48, 4) == (
        "triton[shrink,expand_base:tma,base_dx]",
        "measured on a GPU at abc, nearest shape",
    )
    assert taken(400, 32, 48, 4)[0] == "triton[expand_base:tma,base_dx]"
    assert (
        taken(64, 32, 48, 4, torch.float16)[0] == "triton[shrink,expand_base:tma,base_dx]"
    )  # bf16's rows
    assert (
        taken(64, 32, 50, 4)[0] == "triton[shrink,expand_base,base_dx]"
    )  # TMA cannot address rows of 50: pointers
    assert taken(64, 32, 48, 4, torch.float32)[0] == "torch"


def test_a_rank_that_was_not_measured_takes_the_nearest(install):
    install(
        row("shrink", [64, 32], "triton", rank=16),
        row("shrink", [64, 32], "torch", rank=64),
        row("grads_of_dy", [64, 48], "triton", rank=16),
        row("grads_of_dy", [64, 48], "torch", rank=64),
    )
    assert taken(64, 32, 48, 24)[0] == "triton[shrink,grads_of_dy]"
    assert taken(64, 32, 48, 48)[0] == "torch"


def test_a_groups_own_ranks_choose_what_each_linear_is_called_for(install):
    """q, k, v of rank 16: one shrink of 48, but an expand and a grads_of_dy of 16 each."""
    install(
        row("shrink", [64, 32], "triton", rank=64),
        row("shrink", [64, 32], "torch", rank=16),
        row("expand_base", [64, 48, 32], "triton", rank=16),
        row("expand_base", [64, 48, 32], "torch", rank=32),
        row("grads_of_dy", [64, 48], "triton", rank=16),
        row("grads_of_dy", [64, 48], "torch", rank=64),
    )
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    Ws = [torch.randn(48, 32, dtype=torch.bfloat16)] * 3
    As, Bs = [torch.randn(16, 32)] * 3, [torch.randn(48, 16, requires_grad=True)] * 3
    explain(clear=True)
    grouped_lora_linear(x, Ws, As, Bs, [1.0] * 3, [None] * 3)
    (choice,) = explain(clear=True)
    assert choice.backend == "triton[shrink,expand_base,grads_of_dy]"


def test_what_was_measured_without_dropout_says_nothing_of_a_call_with_it(install):
    """A configuration that won at p = 0 need not compile with a mask; where no mask lies it stays."""
    install(
        row("shrink", [64, 32], "triton", triton={"BLOCK_M": 128}),
        row("expand_base", [64, 48, 32], "tma"),
        row("base_dx", [64, 48, 32], "tma", tma={"BLOCK_N": 256, "SPECIALISED": 1}),
        row("base_dx", [64, 48, 32], "triton", dropout=True, triton={"BLOCK_N": 64}),
    )
    assert taken(64, 32, 48, 4)[0] == "triton[shrink,expand_base:tma,base_dx:tma]"
    assert taken(64, 32, 48, 4, p=0.1)[0] == "triton[expand_base:tma,base_dx]"
    like, specs = torch.empty(0, dtype=torch.bfloat16), all_specs()
    sizes = (64, 48, 32)

    def config(kernel, dropout):
        own = sizes if kernel != "shrink" else (64, 32)
        primitive = "base_dx" if kernel == "base_tma" else None
        return launch.config_for(specs[kernel], like, 16, own, primitive, dropout)

    assert (config("shrink", False).BLOCK_M, config("shrink", True).BLOCK_M) == (128, 64)
    assert config("base_tma", False).BLOCK_N == 256
    masked = config("base_tma", True)
    assert (masked.BLOCK_N, masked.SPECIALISED, masked.num_warps) == (128, 0, 8)
    assert config("base_dx", True).BLOCK_N == 64


def test_a_configuration_of_another_rank_is_taken_only_with_its_block_of_ranks(install):
    """Kernels that walk over ranks are what was measured then; the others keep what is shipped."""
    install(
        row("base_dx", [64, 48, 32], "triton", rank=16, triton={"BLOCK_N": 256}),
        row("grads_of_dy", [64, 48], "triton", rank=16, triton={"BLOCK_N": 512}),
    )
    like, specs = torch.empty(0, dtype=torch.bfloat16), all_specs()
    base_dx = launch.config_for(specs["base_dx"], like, 48, (64, 48, 32))
    assert (base_dx.BLOCK_N, base_dx.BLOCK_R) == (256, 16)
    grads = launch.config_for(specs["grads_of_dy"], like, 48, (64, 48))
    assert grads == specs["grads_of_dy"].shipped(2, 64)


def test_launches_take_the_tables_configuration(install):
    like = torch.empty(0, dtype=torch.bfloat16)
    specs = all_specs()
    shrink, base_dx, base_tma = specs["shrink"], specs["base_dx"], specs["base_tma"]
    shipped = launch.config_for(shrink, like, 16, (64, 32))
    install(
        row("shrink", [64, 32], "torch", triton={"BLOCK_M": 16, "num_warps": 2}),
        row("base_dx", [64, 48, 32], "tma", triton={"BLOCK_N": 64}, tma={"BLOCK_N": 256}),
    )
    chosen = launch.config_for(shrink, like, 16, (100, 32))
    assert (chosen.BLOCK_M, chosen.num_warps, chosen.BLOCK_K) == (16, 2, shipped.BLOCK_K)
    assert launch.config_for(shrink, like, 32, (100, 32)).num_warps == shipped.num_warps
    assert launch.config_for(base_dx, like, 16, (64, 48, 32), "base_dx").BLOCK_N == 64
    assert launch.config_for(base_tma, like, 16, (64, 48, 32), "base_dx").BLOCK_N == 256
    assert launch.config_for(base_tma, like, 16, (64, 48, 32), "expand_base").BLOCK_N == 128


def test_a_gpu_without_a_table_reads_one_of_its_capability(monkeypatch, tmp_path):
    (tmp_path / "NVIDIA_H200.json").write_text(
        json.dumps({"gpu": "NVIDIA H200", "capability": [9, 0], "rows": []})
    )
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    for name, capability, expected in (
        ("NVIDIA H200", (9, 0), True),
        ("NVIDIA GH200", (9, 0), True),
        ("NVIDIA B200", (10, 0), False),
    ):
        tuned.install({}, "nothing")  # empties the caches
        assert (tuned._of(name, capability) is not None) == expected
    tuned.install({}, "nothing")
