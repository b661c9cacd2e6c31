"""The model of GPU times: what it assumes of traffic is what the contenders' own code does."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks import traffic
from benchmarks.gpu import contenders
from benchmarks.roofline import model
from benchmarks.roofline.machines import MACHINES, SHARES
from benchmarks.roofline.tables import table, variants
from benchmarks.roofline.variants import VARIANTS, Group, Launch

M, K, N, R = 256, 192, 320, 4


@pytest.mark.parametrize("phase", ["A", "B"])
@pytest.mark.parametrize("name", ["peft_phase", "peft_bf16", "manual"])
def test_the_bytes_of_others_are_those_of_their_code(name, phase):
    problem = contenders.Problem(M, N, K, R, phase, 0.0, "cpu")

    def count(make):
        step = make(problem).step(problem)
        step(0)
        return traffic.eager(lambda: step(0)).bytes

    counted = count(getattr(contenders, name)) - count(contenders.frozen)
    modelled = model.extra_bytes(name, Group(M, K, (N,), R, phase))
    assert modelled == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_our_bytes_are_those_that_our_kernels_declare(phase):
    # traffic.ours is held against the addresses that the kernels touch (test_traffic.py)
    declared = traffic.ours(8192, 4096, 4096, 16, phase).bytes - traffic.frozen(8192, 4096, 4096)
    modelled = model.extra_bytes("pointers", Group(8192, 4096, (4096,), 16, phase))
    assert modelled == pytest.approx(declared, rel=0.02)


def test_a_merged_weight_costs_what_it_reads_and_writes():
    group = Group(8192, 4096, (4096,), 16, "B")
    weight, x, dy = 2 * 4096 * 4096, 2 * 8192 * 4096, 2 * 8192 * 4096
    assert model.extra_bytes("merged", group) == pytest.approx(2 * 2 * weight + x + dy, rel=0.05)
    assert model.extra_bytes("merged_producer", group) == pytest.approx(4 * weight + dy, rel=0.05)
    packed = Group(8192, 4096, (4096,), 16, "B", nf4=True)
    # dB's partials are an eighth of dY here
    assert model.extra_bytes("merged", packed) == pytest.approx(x + dy, rel=0.08)
    kept = Group(8192, 4096, (4096,), 16, "B", steps=4)
    assert model.extra_bytes("merged_kept", kept) == pytest.approx(weight / 2 + x + dy, rel=0.08)


def test_the_totals_of_llama_are_those_of_bytes_counted_by_hand(monkeypatch):
    # 790 TFLOP/s and 4.3 TB/s for everything, no gaps: the frozen products' arithmetic, and the
    # bytes that each project's code moves beside them
    monkeypatch.setattr(model, "SHARES", dict.fromkeys(SHARES, (790 / (0.8 * 989), 4.3 / 4.32)))
    monkeypatch.setattr(model, "GAP", 0.0)
    M, layers = 8192, 32
    MK, MN = M * layers * (6 * 4096 + 11008), M * layers * (5 * 4096 + 2 * 11008)
    W = layers * (4 * 4096**2 + 3 * 4096 * 11008)
    frozen = 1e3 * 4.0 * M * W / 790e12
    extra = {
        "frozen": 0,
        "peft_default": 36 * MK + 20 * MN,
        "peft_phase": 10 * MK + 20 * MN,
        "manual": 10 * MK + 8 * MN,
        "vendor": 6 * MK + 8 * MN,  # S and dX; Y, T and dB
        "tma": 2 * MK + 2 * MN,
        "merged": 2 * MK + 2 * MN + 2 * 4 * W,
        "merged_vendor": 2 * MK + 2 * MN + 2 * 8 * W,
    }
    for name, nbytes in extra.items():
        got = model.total(name, MACHINES["H200"], "llama-2-7b", M, 16, shared=False)
        assert got == pytest.approx(frozen + 1e3 * nbytes / 4.3e12, rel=5e-3), name


def test_a_model_that_others_made_gives_nearly_the_same():
    # (H100, H200) in ms: made from builds' instructions, products at .93 of 790 TFLOP/s and all
    # traffic at .85 of 3.0 and 4.3 TB/s. Merged: it lies between our two ways to merge.
    others = {
        "frozen": (287, 291),
        "peft_bf16": (428, 391),
        "manual": (384, 360),
        "vendor": (363, 346),
        "skinny": (343, 333),
        "pointers": (492, 494),
        "tma": (362, 363),
    }

    def ours(name, gpu):
        return model.total(name, MACHINES[gpu], "llama-2-7b", 8192, 16, shared=False)

    for name, figures in others.items():
        for gpu, figure in zip(("H100", "H200"), figures, strict=True):
            assert ours(name, gpu) == pytest.approx(figure, rel=0.04), (name, gpu)
    for gpu, figure in (("H100", 335), ("H200", 325)):
        assert ours("merged", gpu) < figure < ours("merged_vendor", gpu)


def test_a_product_and_a_copy_by_hand():
    h200 = MACHINES["H200"]
    product = Launch("vendor product", 2 * 8192 * 4096**2, 0, 0)
    # 2.75e11 FLOP at .93 of .8 of 989 TFLOP/s, and 2 µs
    assert model.milliseconds(product, h200, 2) == pytest.approx(0.37356 + 0.002, rel=1e-3)
    walk = Launch("our skinny", 1.0, 4e9, 0)
    # 4 GB at .85 of .9 of 4.8 TB/s
    assert model.milliseconds(walk, h200, 2) == pytest.approx(1.0893 + 0.002, rel=1e-3)


def test_pointers_are_the_usual_way_before_hopper():
    launch = Launch("our pointer product", 1e12, 0, 0)
    old, new = (
        model.milliseconds(launch, MACHINES[gpu], 2) * MACHINES[gpu].bf16
        for gpu in ("A100", "H100")
    )
    assert old < new


def test_every_variant_is_a_contender_of_the_gpu_command():
    known = {f"ours {name}" for name in contenders.plans()} | {"ours tma", "frozen"}
    known |= {"ours merged", "ours merged, skinny"}
    for _, _, contender in VARIANTS.values():
        assert contender in known or not contender or hasattr(contenders, contender)


def test_measured_figures_stand_beside_modelled_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "MEASURED", tmp_path)
    shape = {"part": "layer", "name": "frozen", "M": 8192, "r": 16, "phase": "B", "p": 0.0}
    sizes = [(4096, 4096, 1.0), (11008, 4096, 3.0), (4096, 11008, 5.0)]
    rows = [shape | {"N": N, "K": K, "ms": ms} for N, K, ms in sizes]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"about": {"gpu": "NVIDIA H200"}, "rows": rows}))
    h100, h200 = variants()[0]["H100"], variants()[0]["H200"]
    assert h200["measured_ms"] == 32 * (4 * 1.0 + 2 * 3.0 + 5.0) and h100["measured_ms"] is None
    table()
    assert "| frozen linears |" in (text := capsys.readouterr().out) and "H200 480" in text
    file.write_text(json.dumps({"about": {"gpu": "NVIDIA H200"}, "rows": rows[:2]}))
    assert variants()[0]["H200"]["measured_ms"] is None
