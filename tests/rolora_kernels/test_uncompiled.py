"""What torch.compile leaves alone still computes, and the compiler is not loaded for it."""

import subprocess
import sys

import pytest
import torch

from rolora_kernels import AdapterRows, multi_lora_linear


def test_a_compiled_caller_breaks_there_and_gets_the_same(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    A, B = torch.randn(2, 3, 8), torch.randn(2, 5, 3, requires_grad=True)
    rows = AdapterRows.by_counts((3, 3))
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x):
        return multi_lora_linear(x.sin(), weight, A, B, 0.5, rows=rows).cos()

    compiled = torch.compile(step, backend=counting, dynamic=False)
    for _ in range(2):
        assert torch.equal(compiled(x), step(x))
    assert len(graphs) == 2  # what comes before, and what comes after
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)(x)


def test_nothing_loads_the_compiler():
    code = "import sys, rolora, rolora_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
