"""What the tests of kernels judge by: a problem of any size, NumPy in float64, and what autograd keeps."""

import numpy as np
import torch

GATES = {
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (3e-3, 4e-3),
    torch.float16: (4e-4, 4e-4),
}  # y and dx, dA and dB


def rms(value, truth):
    truth = np.asarray(truth, dtype=np.float64)
    return np.sqrt(np.mean((value.detach().double().numpy() - truth) ** 2) / np.mean(truth**2))


def problem(M, K, N, r, dtype, bias=True):
    x = torch.randn(M, K).to(dtype)
    W, A, B = (
        torch.randn(N, K).to(dtype) / K**0.5,
        torch.randn(r, K) / K**0.5,
        torch.randn(N, r) / r**0.5,
    )
    return x, W, A, B, torch.randn(N).to(dtype) if bias else None, torch.randn(M, N).to(dtype)


def numpy_judge(x, W, A, B, s, bias, dy, mask=1.0):
    """Every result by its formula in NumPy float64, on the factors as rounded to x's dtype."""
    x, W, dy = (t.double().numpy() for t in (x, W, dy))
    dropped = x * mask
    S, T = dropped @ A.T, s * dy @ B
    y = x @ W.T + s * S @ B.T + (0 if bias is None else bias.double().numpy())
    return {"y": y, "dx": dy @ W + (T @ A) * mask, "dA": T.T @ dropped, "dB": s * dy.T @ S}


class Kept:
    """Unique storages saved for backward that are not parameters."""

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def _pack(self, t):
        self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    def bytes_beyond(self, *parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters if p is not None}
        return sum(n for pointer, n in self.storages.items() if pointer not in own)
