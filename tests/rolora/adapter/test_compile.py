"""torch.compile of a Llama block: no break, one recompilation for a phase switch, the numbers and
kept bytes of eager.
"""

import pytest
import torch

from rolora import LoRAConfig, attach, set_phase
from rolora.adapter.model import adapted_layers
from rolora_kernels import use_backend
from tests.models import build


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_llama_block_compiles_once_a_phase(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    results = []
    steps = 2 if backend == "triton" else 10  # of each phase
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build("llama")
        attach(model, LoRAConfig(rank=4, target_modules="all-linear"), seed=0)
        for _, layer in adapted_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        block = model.model.layers[0]
        hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
        positions = model.model.rotary_emb(hidden, torch.arange(6)[None])
        graphs = []

        def counting(graph, inputs, graphs=graphs):
            graphs.append(graph)
            from torch._dynamo.backends.debugging import aot_eager

            return aot_eager(graph, inputs)

        def step(x, block=block, positions=positions):
            return block(x, position_embeddings=positions)

        run = torch.compile(step, fullgraph=True, backend=counting) if compiled else step
        losses, grads = [], []
        with use_backend(backend):
            for phase in [*["B"] * steps, *["A"] * steps]:
                set_phase(model, phase)
                x = hidden.clone().requires_grad_()
                loss = run(x).square().mean()
                loss.backward()
                losses.append(loss.item())
                grads.append(x.grad)
                with torch.no_grad():
                    for p in block.parameters():
                        if p.grad is not None:
                            p -= 0.1 * p.grad
                            p.grad = None
        results.append((losses, grads))
        if compiled:
            assert len(graphs) == 2, "one graph for each phase"
    torch.testing.assert_close(
        torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    assert results[0][0][-1] < results[0][0][0]
