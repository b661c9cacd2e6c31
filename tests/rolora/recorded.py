"""A CUDA graph without a GPU: the operations that some work dispatches, done again on the same
memory.

As in a capture, nothing of Python is run again: a value that the host made once stays as it was. As
in a capture, the work itself is not done while it is recorded: what it did to the memory that it
was given is taken back.
"""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host looks at a value while a step is captured")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in given:
            if memory(tensor) not in self.made and memory(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[memory(tensor)] = whole, whole.clone()
        result = function(*args, **kwargs)
        old = {memory(tensor) for tensor in given}
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.made |= {memory(tensor) for tensor in new} - old
        self.calls.append((function, args, kwargs, [t for t in new if memory(t) not in old], new))
        return result

    def take_back(self):
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def again(self):
        for function, args, kwargs, own, _ in self.calls:
            made = function(*args, **kwargs)
            new = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            old = {memory(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
            for into, value in zip(own, [t for t in new if memory(t) not in old], strict=True):
                into.copy_(value)


class Recorder:
    """`cuda_graphs.Capturer` by recordings."""

    def __init__(self):
        self.captures = 0

    def aside(self, work):
        return work()

    def capture(self, work):
        recording = Recording()
        try:
            with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True), recording:
                done = work()
        finally:
            with torch.no_grad():
                recording.take_back()
        self.captures += 1
        return recording.again, done
