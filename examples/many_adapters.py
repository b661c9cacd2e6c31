"""Many adapters on one base in one step, outside any federation: eight tasks, one forward.

    python examples/many_adapters.py

The frozen product is computed once over all rows; each task has its own B. Prints every task's loss
before and after, and how far the step is from training each adapter alone.
"""

import torch

from rolora_kernels import lora_linear

torch.manual_seed(0)
TASKS, ROWS, IN, OUT, RANK = 8, 32, 64, 48, 4
weight = torch.randn(OUT, IN) / IN**0.5
A = torch.randn(RANK, IN) / IN**0.5  # everybody's, frozen
B = torch.zeros(TASKS, OUT, RANK, requires_grad=True)  # one a task

x = torch.randn(TASKS * ROWS, IN)  # task by task
targets = x @ weight.t() + 0.3 * torch.randn(TASKS * ROWS, OUT)


def losses(B):
    """The loss of every task [TASKS], in one call."""
    y = lora_linear(x, weight, A.expand(TASKS, RANK, IN), B, 2.0)
    return (y - targets).square().reshape(TASKS, -1).mean(1)


def alone(task):
    """The gradient of one task's B, computed by itself."""
    own = B[task].detach().clone().requires_grad_()
    rows = slice(task * ROWS, (task + 1) * ROWS)
    y = lora_linear(x[rows], weight, A, own, 2.0)
    (y - targets[rows]).square().mean().backward()
    return own.grad


start = losses(B)
start.sum().backward()
error = max((B.grad[task] - alone(task)).abs().max().item() for task in range(TASKS))
optimizer = torch.optim.AdamW([B], lr=1e-2)
for _ in range(50):
    optimizer.zero_grad()
    losses(B).sum().backward()
    optimizer.step()
end = losses(B)
for task in range(TASKS):
    print(f"task {task}: {start[task]:.4f} -> {end[task]:.4f}")
print(f"largest difference of a gradient from training alone: {error:.1e}")
assert error < 1e-6 and (end < start).all()
