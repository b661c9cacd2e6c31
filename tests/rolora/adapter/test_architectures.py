"""The table of architectures: some of its rows are made anew, all of them are there."""

import re

import pytest

from benchmarks import architectures, mixtures


@pytest.mark.parametrize(
    "name, auto",
    [
        ("falcon", ("query_key_value",)),
        ("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
        ("mixtral", ("q_proj", "v_proj")),
        ("gpt_bigcode", ("c_attn",)),
        ("deberta-v2", ("query_proj", "value_proj")),
        ("modernbert", ("Wqkv",)),
    ],
)
def test_rows_agree_with_peft(name, auto):
    row = architectures.examine(name)
    assert row.auto == auto and row.agrees(), row


def test_the_judge_sees_a_wrong_factor(monkeypatch):
    def wrong(ours, theirs):
        same(ours, theirs)
        layer = next(m for m in theirs.modules() if hasattr(m, "lora_B"))
        layer.lora_B["default"].weight.data.mul_(1.01)

    same = architectures._same_factors
    monkeypatch.setattr(architectures, "_same_factors", wrong)
    row = architectures.examine("llama")
    assert not row.agrees() and row.outputs > architectures._GATE


@pytest.mark.parametrize(
    ("name", "names", "routed"),
    [
        ("gpt_oss", ("experts.gate_up_proj", "experts.down_proj"), True),
        ("llama4_text", ("experts.gate_up_proj", "experts.down_proj"), False),
    ],
)
def test_experts_agree_with_peft(name, names, routed):
    found = architectures.examine(name).experts
    assert found.names == names and found.routed == routed
    assert found.worst < architectures._GATE and found.unadapted < 0.1


def test_the_judge_of_experts_sees_a_wrong_factor(monkeypatch):
    def wrong(ours, judge):
        same(ours, judge)
        next(p for n, p in judge.named_parameters() if "lora_B" in n).data.mul_(1.01)

    same = mixtures._same_factors
    monkeypatch.setattr(mixtures, "_same_factors", wrong)
    found = mixtures.examine(lambda: architectures.build("olmoe"), architectures.inputs("olmoe"))
    assert found.worst > 10 * architectures._GATE


def test_the_page_has_a_row_for_every_architecture():
    page = architectures.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| `", page, re.MULTILINE)
    assert rows[1:] == [*architectures.CAUSAL, *architectures.ENCODERS], "after the heading"
    adapted = re.findall(r"^\| (\S+) \|.*`, (?:routed|as W \+ Δ) \|", page, re.MULTILINE)
    assert adapted == list(mixtures.MIXTURES)
    assert len(rows) > 40 and page.count("| agrees |") == len(rows) - 1
