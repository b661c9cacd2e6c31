"""What stands where in the flat buffers that are exchanged, averaged and stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from rolora.adapter.model import adapted_layers
from rolora_kernels.exchange import pack, unpack

KINDS = ("A", "B", "span", "head")
TERM = "term"  # a frozen low-rank addition to the base; see `Layout.term_views`
_TRAVELLING = {"A": ("A", "head"), "B": ("B", "head"), "BOTH": ("A", "B", "head")}


@dataclass(frozen=True)
class Entry:
    """One tensor: module path (with the parameter's name for a head), kind, shape, offset in its
    kind's buffer.

    Of a stack of experts each expert's matrix is one, `path[0]`, `path[1]`, …, so that whatever is
    done to factors is done to those of one expert.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Layout:
    """The ordered entries behind the flat fp32 buffers "A", "B", with a trained head "head", and
    "span", which never travels in a round, where B is a matrix within it.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, model: nn.Module, heads: Sequence[str] = ()) -> Layout:
        """The layout of an attached model whose modules `heads` train and travel too."""
        named: dict[str, list[tuple[str, Tensor]]] = {kind: [] for kind in KINDS}
        for path, layer in adapted_layers(model):
            named["A"] += _matrices(path, layer.lora_A)
            named["B"] += _matrices(path, layer.lora_B)
            if layer.lora_span is not None:
                named["span"].append((path, layer.lora_span))
        for head in heads:
            named["head"] += [
                (f"{head}.{name}", p) for name, p in model.get_submodule(head).named_parameters()
            ]
        entries = []
        for kind in KINDS:
            offset = 0
            for path, parameter in named[kind]:
                entries.append(Entry(path, kind, tuple(parameter.shape), offset))
                offset += parameter.numel()
        return cls(tuple(entries))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Values in each kind's buffer; kinds without entries are absent."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            sizes[entry.kind] = sizes.get(entry.kind, 0) + torch.Size(entry.shape).numel()
        return sizes

    @cached_property
    def hash(self) -> str:
        """Identifies a compatible peer: 16 hex digits of SHA-256 over the entries."""
        text = json.dumps([[e.path, e.kind, list(e.shape), e.offset] for e in self.entries])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def travelling(self, phase: str) -> tuple[str, ...]:
        """The kinds that train and travel in a phase, in the order of a message."""
        return tuple(kind for kind in _TRAVELLING[phase] if kind in self.sizes)

    def travelling_size(self, phase: str) -> int:
        return sum(self.sizes[kind] for kind in self.travelling(phase))

    def parameters(self, model: nn.Module, kind: str) -> list[nn.Parameter]:
        """The model's parameters of one kind, in the layout's order; a stack is one of them."""
        paths = dict.fromkeys(_owner(e.path) for e in self.entries if e.kind == kind)
        if kind == "head":
            return [model.get_parameter(path) for path in paths]
        layers = dict(adapted_layers(model))
        return [getattr(layers[path], f"lora_{kind}") for path in paths]

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of all kinds."""
        return [p for kind in self.sizes for p in self.parameters(model, kind)]

    def gather(self, model: nn.Module, kinds: Sequence[str]) -> dict[str, Tensor]:
        """The model's values as flat fp32 buffers on the CPU; copies."""
        return {
            kind: pack(self.parameters(model, kind), torch.empty(self.sizes[kind]))
            for kind in kinds
        }

    def scatter(self, model: nn.Module, factors: dict[str, Tensor]) -> None:
        """Copies flat buffers into the model; a term is lent, not copied."""
        for kind, flat in factors.items():
            if kind == TERM:
                layers = dict(adapted_layers(model))
                for path, term in self._terms(flat).items():
                    layer = layers[path]
                    layer.set_call(replace(layer.call, term=term if flat.numel() else None))
            else:
                unpack(flat, self.parameters(model, kind))

    def adapters(self) -> dict[str, tuple[int, int, int]]:
        """path → (rank, in, out) of every adapter."""
        out: dict[str, int] = {}
        for kind in ("B", "span"):  # where there is a span, B is a matrix within it
            out |= {e.path: e.shape[0] for e in self.entries if e.kind == kind}
        return {
            e.path: (e.shape[0], e.shape[1], out[e.path]) for e in self.entries if e.kind == "A"
        }

    @cached_property
    def term_unit(self) -> int:
        """Values of a term of rank one: in + out numbers for every adapter."""
        return sum(K + N for _, K, N in self.adapters().values())

    def term_views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """path → (U `[out, R]`, V `[R, in]`), views of a term's buffer: R rows of `term_unit`
        numbers, so that a term grows by appending. U V is added to the adapter's base weight.
        """
        rows, views, offset = flat.view(-1, self.term_unit), {}, 0
        for path, (_, K, N) in self.adapters().items():
            views[path] = rows[:, offset : offset + N].t(), rows[:, offset + N : offset + N + K]
            offset += N + K
        return views

    def _terms(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`term_views` as layers take them: those of a stack's experts in one, `[E, …]`."""
        views = self.term_views(flat)
        stacks: dict[str, list[str]] = {}
        for path in views:
            stacks.setdefault(_owner(path), []).append(path)
        terms = {}
        for owner, paths in stacks.items():
            if paths == [owner]:
                terms[owner] = views[owner]
            else:
                U, V = (torch.stack([views[path][i] for path in paths]) for i in (0, 1))
                terms[owner] = U, V
        return terms

    def term(self, parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of `term_views`: the buffer of U `[out, R]`, V `[R, in]` of every adapter,
        fp32; R is the same for all.
        """
        rank = len(next(iter(parts.values()))[1])
        flat = torch.empty(rank * self.term_unit)
        for path, (U, V) in self.term_views(flat).items():
            U.copy_(parts[path][0]), V.copy_(parts[path][1])
        return flat

    def views(self, factors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """path → view of the flat buffer in the tensor's shape."""
        return {
            e.path: factors[kind][e.offset : e.offset + torch.Size(e.shape).numel()].view(e.shape)
            for e in self.entries
            if e.kind == kind
        }

    def split(self, tensors: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
        """The tensors of `parameters` of these kinds, one after another, matrix by matrix, as
        `views` has them; views.
        """
        entries = [e for kind in kinds for e in self.entries if e.kind == kind]
        found: list[Tensor] = []
        for tensor in tensors:
            shape = entries[len(found)].shape
            found += [tensor] if tensor.shape == shape else tensor.unbind(0)
        return found

    @cached_property
    def ranks(self) -> int:
        """The ranks of all adapters together."""
        return sum(rank for rank, _, _ in self.adapters().values())

    def budgets(self, own: int | None) -> list[int]:
        """How many ranks of each adapter a client of rank `own` may send, where it sends some only:
        half of them if it has no own.
        """
        return [min(own or -(-rank // 2), rank) for rank, _, _ in self.adapters().values()]

    def chosen(self, bits: Tensor, phase: str) -> Tensor:
        """Which values of a joined change belong to ranks that `bits` (bool `[ranks]`, adapter by
        adapter) choose: bool `[n]`. A head's always do.
        """
        ranks = dict(
            zip(
                self.adapters(),
                bits.split([rank for rank, _, _ in self.adapters().values()]),
                strict=True,
            )
        )
        parts = []
        for kind in self.travelling(phase):
            part = torch.ones(self.sizes[kind], dtype=torch.bool)
            for path, view in self.views({kind: part}, kind).items() if kind != "head" else ():
                view &= ranks[path][:, None] if kind == "A" else ranks[path]
            parts.append(part)
        return torch.cat(parts)

    def join(self, factors: dict[str, Tensor], phase: str) -> Tensor:
        """The travelling kinds as one flat tensor."""
        return torch.cat([factors[kind] for kind in self.travelling(phase)])

    def part(self, flat: Tensor, phase: str) -> dict[str, Tensor]:
        """The inverse of `join`; views."""
        kinds = self.travelling(phase)
        return dict(zip(kinds, flat.split([self.sizes[k] for k in kinds]), strict=True))


def _matrices(path: str, factor: Tensor) -> list[tuple[str, Tensor]]:
    """(path, matrix) of a factor: of a stack each expert's."""
    if factor.ndim == 2:
        return [(path, factor)]
    return [(f"{path}[{expert}]", matrix) for expert, matrix in enumerate(factor.detach())]


def _owner(path: str) -> str:
    """The adapted path that an entry's belongs to."""
    return path.partition("[")[0]


def rank_of(client_ranks: Sequence[int] | None, client: int) -> int | None:
    """The ranks that a client trains, of ranks given for clients 0, 1, … and repeated; None: all of
    the adapter's.
    """
    return None if client_ranks is None else client_ranks[client % len(client_ranks)]


def fingerprint(flat: Tensor) -> str:
    """16 hex digits of SHA-256 over a buffer's bytes: equal exactly when every bit is."""
    return hashlib.sha256(flat.contiguous().numpy().tobytes()).hexdigest()[:16]
