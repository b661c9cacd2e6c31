"""Tuning makes rows that dispatch reads: the fastest configuration that computes what is true."""

import os

import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import Plan, explain, lora_linear, tune, tuned
from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops import launch
from rolora_kernels.triton_ops.spec import all_specs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the interpreter",
)
SLOW, FAST = ({"BLOCK_M": 32, "BLOCK_K": k, "num_warps": 4, "num_stages": 3} for k in (128, 64))
NO_BLOCK = {"BLOCK_M": 24}  # Triton wants powers of two
BROKEN = {"BLOCK_M": 64, "BLOCK_K": 32}


class Bench:
    """A clock that likes our kernels, in the configuration FAST most."""

    def __init__(self):
        self.table, self.kept = {"gpu": "a GPU", "capability": [9, 0], "commit": "abc"}, []

    def use_table(self, rows):
        self.rows = rows
        tuned.install({**self.table, "rows": rows}, "cpu")

    def time(self, call, inner):
        return 1.0 if self.rows[0]["configs"]["triton"] == FAST else 2.0

    def interleaved(self, calls, *, tables):
        return {name: [3.0 if name == "torch" else 1.0] * 3 for name in calls}

    def add(self, part, **values):
        self.kept.append((part, values))


@pytest.fixture
def bench():
    yield Bench()
    tuned.install({}, "cpu")


def test_the_fastest_configuration_that_is_right_becomes_a_row(bench, monkeypatch):
    t = tune.operands("cpu", 40, 48, 32, 4, torch.bfloat16)
    right = tune.call

    def sometimes_wrong(name, candidate, t, dropout=None):
        found = right(name, candidate, t, dropout)
        if candidate == "torch":
            return found
        config = launch.config_for(all_specs()[name], t["x"], 4, (40, 48))
        return [value * 1.1 for value in found] if config.BLOCK_K == 32 else found

    monkeypatch.setattr(tune, "call", sometimes_wrong)
    grid = {("shrink", "triton"): [SLOW, NO_BLOCK, BROKEN, FAST]}
    row, times = tune.measure(bench, "shrink", t, grid)
    assert row == {
        "primitive": "shrink",
        "dtype": "bfloat16",
        "rank": 16,
        "sizes": [40, 48],
        "dropout": False,
        "winner": "triton",
        "configs": {"triton": FAST},
    }
    assert grid["shrink", "triton"] == [FAST, SLOW]  # what is wrong is not tried again
    assert set(times) == {"torch", "triton", "triton tuned"}
    ((part, about),) = bench.kept
    assert part == "config" and about["config"] == str(NO_BLOCK) and about["problem"]
    tuned.install({**bench.table, "rows": [row]}, "cpu")
    assert launch.config_for(all_specs()["shrink"], t["x"], 4, (40, 48)).BLOCK_K == FAST["BLOCK_K"]


def test_a_mask_is_measured_on_its_own(bench):
    t = tune.operands("cpu", 40, 48, 32, 4, torch.bfloat16)
    grid = {("shrink", "triton"): [FAST]}
    row, _ = tune.measure(bench, "shrink", t, grid, Dropout(0.1, torch.tensor(3)))
    assert row["dropout"] and row["configs"] == {"triton": FAST}
    table = {**bench.table, "rows": [row]}
    tuned.install(table, "cpu")
    spec = all_specs()["shrink"]
    assert launch.config_for(spec, t["x"], 4, (40, 48), dropout=True).BLOCK_K == FAST["BLOCK_K"]
    assert launch.config_for(spec, t["x"], 4, (40, 48)) == spec.shipped(2, 16)
    with pytest.raises(ValueError, match="shrink, base_dx, grad_A alone, not in grads_of_dy"):
        tune.measure(bench, "grads_of_dy", t, {}, Dropout(0.1, torch.tensor(3)))


@pytest.mark.parametrize("name", tune.primitives())
def test_every_candidate_computes_what_is_true(name):
    t = tune.operands("cpu", 40, 48, 32, 4, torch.bfloat16)
    truth = tune.truth(name, t)
    for candidate in ("torch", *tune.candidates(name)):
        assert tune.fits(candidate, t)
        assert tune.error(tune.call(name, candidate, t), truth) <= tune.GATE


def test_what_only_walks_over_memory_is_measured_first():
    assert tune.primitives() == ["grads_of_dy", "shrink", "grad_A", "expand_base", "base_dx"]
    assert list(tune.candidates("base_dx")) == ["triton", "tma"]


@pytest.mark.parametrize("fastest", ["rule", "torch", "triton"])
def test_a_merged_weight_wins_over_the_whole_rule_or_not(bench, monkeypatch, fastest):
    """The row that it makes is what dispatch follows; every call computes before it is timed."""
    ran = []

    def interleaved(calls, *, tables):
        explain(clear=True)
        for call in calls.values():
            call()
        ran.extend(choice.backend for choice in explain(clear=True))
        return {name: [1.0 if name == fastest else 2.0] * 3 for name in calls}

    monkeypatch.setattr(bench, "interleaved", interleaved)
    t = tune.operands("cpu", 64, 48, 32, 4, torch.bfloat16)
    row, _ = tune.measure_merged(bench, t, Plan(shrink="triton"))
    assert ran == ["triton[shrink]", "merged+triton[shrink]", "merged+triton[shrink,merge]"]
    assert row["winner"] == fastest.replace("rule", "none")
    bench.use_table([row])
    lora_linear(t["x"], t["W"], t["A"], t["B"], 1.0)
    (choice,) = explain(clear=True)
    assert (
        choice.backend
        == {"rule": "torch", "torch": "merged", "triton": "merged+triton[merge]"}[fastest]
    )
