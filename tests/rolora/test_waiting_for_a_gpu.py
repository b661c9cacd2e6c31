"""A training step makes the host wait for its device once, after backward: counted on a CPU by what
would wait on a GPU.
"""

import json
import traceback
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rolora.cohort.batched import Batched
from rolora.cohort.sequential import Sequential
from rolora.recipes import long_vocabulary
from tests.rolora.test_batched import prepared, started

# Theirs: whether a mask hides anything (transformers), steps that lie on the CPU (torch.optim),
# moves of a tensor to where it is (clip_grad_norm_). Ours on the host, before a batch is sent.
FOREIGN = ("/transformers/", "/torch/optim/", "/torch/nn/utils/clip_grad")
ON_THE_HOST = ("sent",)
# Sizes that follow from values: the host has to know them.
BY_VALUE = ("nonzero", "masked_select", "unique", "is_nonzero", "_local_scalar_dense", "equal")


def where() -> str | None:
    """The line of ours, or of another library's, that asked; None for one of FOREIGN."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if any(part in frame.filename for part in FOREIGN) or frame.name in ON_THE_HOST:
            return None
        if "/rolora" in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.split('/')[-1]}:{frame.name}"
    return None


class Waits(TorchDispatchMode):
    """What would wait on a GPU while this is active, by the line that asks."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in BY_VALUE or by_mask:
            self.found.append((name, where()))
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Copies to another device that the host would wait for."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        devices = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, torch.device)]
        if name in ("tensor", "to", "as_tensor") and devices and not kwargs.get("non_blocking"):
            self.found.append((name, where()))
        if name in ("cpu", "numpy", "cuda", "tolist"):
            self.found.append((name, where()))
        return func(*args, **kwargs)


def waits_of(cohort, orders):
    waits = Waits()
    with waits, Copies(waits.found):
        list(cohort.train(orders))
    return [(line, name) for name, line in waits.found if line is not None]


@pytest.fixture
def instructions(tmp_path):
    rows = [{"prompt": f"{n} {n}", "completion": "yes " * (1 + n % 5)} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("recipe", ["classification", "causal", "packed"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_step_waits_once_and_after_backward(
    recipe, accumulation, engine, files, instructions, monkeypatch
):
    """Three steps more, with dropout, wait three times more, where the losses are added up."""
    if recipe == "packed" and engine == "batched":
        pytest.skip("rows of --packing are several examples")
    monkeypatch.setattr(long_vocabulary, "LONG", 1)
    flags = {"dropout": 0.1, "gradient_accumulation": accumulation}
    family = "roberta"
    if recipe != "classification":
        family = "llama"
        flags |= {"train_file": str(instructions), "eval_file": str(instructions)}
        flags |= {"packing": recipe == "packed"}
    made = prepared(files, family, **flags)
    waits = []
    for steps in (3, 6):
        trainer = made.trainer()
        trainer.config = replace(trainer.config, steps=steps)
        orders = started(made, "B")[:2]
        cohort = Sequential(trainer)
        if engine == "batched":
            cohort = Batched(trainer, made.report.heads, 2)
        waits.append(Counter(waits_of(cohort, orders)))
    more = waits[1] - waits[0]
    place, times = ("client.py:_added", 6) if engine == "sequential" else ("together.py:_tally", 3)
    assert more == {(place, "tolist"): times}


def test_the_hooks_see_what_waits(monkeypatch):
    """Every kind of wait that the loop once had."""
    x = torch.arange(4.0)
    waits = Waits()
    monkeypatch.setattr("tests.rolora.test_waiting_for_a_gpu.where", lambda: "here")
    with waits, Copies(waits.found):
        x.sum().item()
        x[x > 1]
        x[x > 1] = 0.0
        torch.tensor(3, device=torch.device("cpu"))
        x.to(torch.device("cpu"))
        x.to(torch.device("cpu"), non_blocking=True)
        x.cpu()
        x.tolist()
        bool((x > 1).all())
    assert len(waits.found) == 8
