"""Many adapters on one base in one step, outside any federation: eight tasks, one forward.

    python examples/many_adapters.py

A batch has sequences of several tasks in any order, not all tasks every time, and some of the base
alone. The frozen product is computed once over all of them; each task has its own A and B, of its
own rank and scaling. Prints every task's loss before and after, and how far a step is from training
each adapter alone.
"""

import torch

from rolora_kernels import AdapterRows, lora_linear, multi_lora_linear

torch.manual_seed(0)
TASKS, LENGTH, IN, OUT = 8, 16, 64, 48
RANKS = [4, 4, 8, 2, 4, 16, 4, 8]
SCALINGS = [16 / rank for rank in RANKS]
weight = torch.randn(OUT, IN) / IN**0.5
As = [(torch.randn(rank, IN) / IN**0.5).requires_grad_() for rank in RANKS]
Bs = [torch.zeros(OUT, rank, requires_grad=True) for rank in RANKS]
change = 0.3 * torch.randn(TASKS, OUT, IN) / IN**0.5  # what each task has to learn


def batch(tasks):
    """x [sequences, LENGTH, IN] of the tasks named, what to hit, and who each sequence is for."""
    x = torch.randn(len(tasks), LENGTH, IN)
    targets = torch.stack(
        [
            rows @ (weight if task < 0 else weight + change[task]).t()
            for rows, task in zip(x, tasks, strict=True)
        ]
    )
    return x, targets, AdapterRows.by_index(tasks, TASKS)  # made once, for all layers of a step


def by_sequence(x, targets, rows):
    """The loss of every sequence, in one call for all adapters."""
    y = multi_lora_linear(x, weight, As, Bs, SCALINGS, rows=rows)
    return (y - targets).square().mean((1, 2))


def alone(task, x, targets):
    """The gradient of one task's B, computed by itself."""
    own = Bs[task].detach().clone().requires_grad_()
    y = lora_linear(x, weight, As[task].detach(), own, SCALINGS[task])
    (y - targets).square().mean((1, 2)).sum().backward()
    return own.grad


tasks = [3, 0, -1, 5, 0, 7, 1]  # tasks 2, 4 and 6 are absent, one sequence is the base's
x, targets, rows = batch(tasks)
losses = by_sequence(x, targets, rows)
losses.sum().backward()
error = 0.0
for task in range(TASKS):
    mine = [place for place, other in enumerate(tasks) if other == task]
    expected = alone(task, x[mine], targets[mine]) if mine else torch.zeros_like(Bs[task])
    error = max(error, (Bs[task].grad - expected).abs().max().item())

held_out = batch(list(range(TASKS)))
start = by_sequence(*held_out).tolist()
optimizer = torch.optim.AdamW([*As, *Bs], lr=1e-2, weight_decay=0.0)
for _ in range(100):
    optimizer.zero_grad()
    by_sequence(*batch(torch.randint(0, TASKS, (12,)).tolist())).sum().backward()
    optimizer.step()
end = by_sequence(*held_out).tolist()
for task in range(TASKS):
    print(f"task {task}, rank {RANKS[task]}: {start[task]:.4f} -> {end[task]:.4f}")
print(f"largest difference of a gradient from training alone: {error:.1e}")
assert error < 1e-6 and all(b < a for a, b in zip(start, end, strict=True))
