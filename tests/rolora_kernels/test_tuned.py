"""Dispatch follows the measured table: by primitive and nearest shape, with its configurations."""

import json
import os

import pytest
import torch

from rolora_kernels import explain, lora_linear, tuned

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the interpreter",
)
launch = pytest.importorskip("rolora_kernels.triton_ops.launch", exc_type=ImportError)
all_specs = pytest.importorskip("rolora_kernels.triton_ops.spec", exc_type=ImportError).all_specs


def row(primitive, sizes, winner, rank=16, dtype="bfloat16", **configs):
    return {
        "primitive": primitive,
        "dtype": dtype,
        "rank": rank,
        "sizes": sizes,
        "winner": winner,
        "configs": configs,
    }


@pytest.fixture
def install():
    yield lambda *rows: tuned.install(
        {"gpu": "a GPU", "capability": [9, 0], "commit": "abc", "rows": rows}, "cpu"
    )
    tuned.install({}, "cpu")


def taken(M, K, N, r, dtype=torch.bfloat16):
    explain(clear=True)
    x, W = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    lora_linear(
        x, W, torch.randn(r, K), torch.randn(N, r, requires_grad=True), 1.0
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
    assert taken(64, 32, 48, 48)[0] == "torch"  # no row of this padded rank


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


def test_warp_specialisation_is_for_the_architecture_that_bears_it():
    base_tma = all_specs()["base_tma"]
    assert base_tma.shipped(2, 32, (9, 0)).SPECIALISED
    assert not base_tma.shipped(2, 32, (10, 0)).SPECIALISED
