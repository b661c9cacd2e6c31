"""What a run does with the frozen base: its dtype, its attention and its matmuls."""

import json

import pytest
import torch

from rolora import config
from rolora.adapter.frozen import FrozenLinear
from rolora.hf import machine
from rolora.run import job
from rolora_kernels import explain as explain_kernels
from rolora_kernels import gemm
from tests.rolora.commands import rows, small


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_base_trains(dtype, files, tmp_path, call):
    code, _, err = call(
        *small(
            files, dtype=dtype, **{"output-dir": tmp_path / "run", "gradient-checkpointing": True}
        )
    )
    run = rows(tmp_path / "run")
    assert (code, err) == (0, "") and run[-1]["eval"]["loss"] < run[0]["eval"]["loss"]


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"dtype": "bf16"}, "eager"),
        ({}, "sdpa"),
        ({"dtype": "bf16", "attn": "sdpa"}, "sdpa"),
        ({"attn": "eager"}, "eager"),
    ],
)
def test_the_attention_of_short_texts_in_16_bits(given, wanted, files):
    """A CPU's is eager, and what was asked for stands."""
    made = job.prepare(
        config.resolve(
            {
                "model": str(files["llama"]),
                "train_file": str(files["train"]),
                "max_length": 128,
                "clients": 3,
                "device": "cpu",
            }
            | given
        )
    )
    assert made.config.system.attn == made.model.config._attn_implementation == wanted
    assert machine.pick_attention("auto", torch.device("cpu"), torch.bfloat16, 129) == "sdpa"
    assert machine.pick_attention("auto", torch.device("cuda"), torch.bfloat16, 128) == "sdpa"


def test_a_run_s_frozen_matmuls_are_direct_where_that_is_faster(files, tmp_path, call, monkeypatch):
    """The kernels' record says so, and a run that asks for vendor libraries has them forced."""
    monkeypatch.setattr(gemm, "_WORTH", 0)
    monkeypatch.setattr(gemm, "ahead", lambda: True)
    linears = [
        m
        for m in job.prepare(
            config.resolve(
                {
                    "model": str(files["llama"]),
                    "train_file": str(files["train"]),
                    "clients": 3,
                    "max_length": 32,
                    "device": "cpu",
                }
            )
        ).model.modules()
        if type(m) is FrozenLinear
    ]
    assert linears and not any(p.requires_grad for linear in linears for p in linear.parameters())
    explain_kernels(clear=True)
    code, out, err = call(
        *small(files, backend="torch", rounds=1, device="cpu", **{"output-dir": tmp_path / "run"})
    )
    assert (code, err) == (
        0,
        "",
    ) and "kernels: torch (forced by use_backend; oneDNN, called directly)" in out
    kernels = json.loads((tmp_path / "run" / "summary.json").read_text())["kernels"]
    assert "forced by use_backend; oneDNN, called directly" in {
        k["reason"] for k in kernels if "lora_linear" in k["operations"]
    }
