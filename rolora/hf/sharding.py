"""A frozen base that lies in parts on several processes, for one that is larger than a device.

FSDP2 (`torch.distributed.fsdp.fully_shard`): each block of a model is a unit, whose weights every
rank holds an n-th part of; they are gathered before the unit computes, and dropped after it, in
forward and in backward. Factors and heads are whole on every rank. All ranks train the same clients
on the same examples, so that what they compute is the same bits as unsharded and nothing but frozen
weights is ever sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rolora.errors import BadInput


def count() -> int:
    """Processes that torchrun started. Raises BadInput where it did not start this one."""
    if "WORLD_SIZE" not in os.environ:
        raise BadInput(
            "--base-sharding: a base lies in parts on several processes, and this is one: start it "
            "with torchrun --nproc-per-node N -m rolora.train"
        )
    return int(os.environ["WORLD_SIZE"])


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model: members of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from units(child)


def shard(model: nn.Module, device: torch.device, whole: Iterable[nn.Parameter]) -> None:
    """Leaves this rank its part of every parameter of `model` but of `whole`, which stay as they
    are. The process group has begun. The model may lie on the CPU; what this rank keeps is on
    `device` afterwards.
    """
    mesh, kept = init_device_mesh(device.type, (dist.get_world_size(),)), set(whole)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for unit in units(model):
        if any(parameter not in kept for parameter in unit.parameters()):
            fully_shard(unit, mesh=mesh, ignored_params=kept)
    # Without that what lies outside of blocks would stay whole after an evaluation.
    fully_shard(model, mesh=mesh, ignored_params=kept, reshard_after_forward=True)


def bytes_a_rank(model: nn.Module, ranks: int) -> tuple[int, int]:
    """(what each rank holds of the frozen weights, the most that it gathers at a time beside that).

    What lies outside of blocks, as embeddings do, is gathered while a forward or a backward runs;
    of blocks there are two at most, one that computes and the next.
    """
    blocks = [_bytes(unit.parameters()) for unit in units(model)]
    total = _bytes(model.parameters())
    return -(-total // ranks), total - sum(blocks) + 2 * max(blocks, default=0)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in set(parameters) if not p.requires_grad)
