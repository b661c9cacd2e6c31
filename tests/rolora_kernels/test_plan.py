"""A plan and its text say the same, and each field takes what can compute it."""

from dataclasses import replace
from itertools import product

import pytest

from rolora_kernels.plan import IMPLEMENTATIONS, REFERENCE, RULE, TORCH, TRITON, Plan

MATMULS = ("expand_base", "base_dx")


def test_every_plan_round_trips_through_its_text():
    names, texts = list(IMPLEMENTATIONS), set()
    for kinds in product(*IMPLEMENTATIONS.values()):
        plan = Plan(**dict(zip(names, kinds, strict=True)))
        texts.add(str(plan))
        assert Plan.parse(str(plan)) == plan
        if plan.expand_base == plan.base_dx == "torch":
            merged = replace(plan, merged=True)
            texts.add(str(merged))
            assert Plan.parse(str(merged)) == merged
    assert len(texts) == 2**6 * 3**2 + 2**6  # no two plans share a text
    assert Plan.parse(str(REFERENCE)) == REFERENCE


@pytest.mark.parametrize(
    "text, plan",
    [
        ("torch", TORCH),
        ("triton", TRITON),
        ("reference", REFERENCE),
        ("triton[shrink]", Plan(shrink="triton")),
        ("triton[shrink,base_dx:tma]", Plan(shrink="triton", base_dx="tma")),
        ("triton[dequantise]", Plan(dequantise="triton")),
        ("merged", Plan(merged=True)),
        ("merged+triton[shrink,merge]", Plan(shrink="triton", merge="triton", merged=True)),
    ],
)
def test_texts_that_people_write(text, plan):
    assert Plan.parse(text) == plan and str(plan) == text


def test_one_field_a_primitive():
    assert set(RULE) < set(IMPLEMENTATIONS)
    assert {name for name, kinds in IMPLEMENTATIONS.items() if "tma" in kinds} == set(MATMULS)
    assert TORCH.ours() == {} and set(TRITON.ours()) == set(IMPLEMENTATIONS)
    assert Plan(base_dx="tma").uses_tma() and not TRITON.uses_tma()


@pytest.mark.parametrize(
    "text",
    [
        "cuda-magic",
        "triton[]",
        "triton[shrunk]",
        "triton[shrink:tma]",
        "triton[shrink:torch]",
        "triton[shrink",
        "shrink",
        "",
        "merged+torch",
        "merged+",
        "triton[merged]",
    ],
)
def test_a_text_that_says_no_plan_is_refused_with_the_names(text):
    with pytest.raises(ValueError, match=r"is not torch, triton, .* names of shrink, expand_base"):
        Plan.parse(text)


def test_a_field_takes_only_what_can_compute_it():
    with pytest.raises(ValueError, match="shrink is computed by torch or triton, got 'tma'"):
        Plan(shrink="tma")
    with pytest.raises(ValueError, match="the reference calls no primitive"):
        Plan(shrink="triton", reference=True)
    for other in ({"base_dx": "triton"}, {"expand_base": "tma"}, {"reference": True}):
        with pytest.raises(ValueError, match="a merged weight is multiplied by vendor libraries"):
            Plan(merged=True, **other)
