"""The table of architectures: some of its rows are made anew, all of them are there."""

import re

import pytest

from benchmarks import architectures


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


def test_the_page_has_a_row_for_every_architecture():
    page = architectures.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| `", page, re.MULTILINE)
    assert rows[1:] == [*architectures.CAUSAL, *architectures.ENCODERS], "after the heading"
    assert len(rows) > 40 and page.count("| agrees |") == len(rows) - 1
