"""The layer in a training loop of one's own: B and A of two linears take turns.

    python examples/layer_in_a_loop.py

Prints the loss before and after, and what every layer computed its operations with.
"""

import torch
from torch import nn

from rolora import LoRAConfig, attach, explain, set_phase

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

x, y = torch.randn(256, 64), torch.randint(8, (256,))
losses = []
for step in range(200):
    # Ten steps of B, then ten of A. The factor that rests has no gradient, and is not touched.
    set_phase(model, "BA"[step // 10 % 2])
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print("\n".join(explain(model)))
assert losses[-1] < losses[0] / 2
