"""Launches that do not ask Triton: the driver gets what it gets by Triton's own way, and whatever
Triton compiles anew for is asked for anew. Kernels are compiled for an H100; a stub is the driver.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, torch, triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks.launchers import Stub
from rolora_kernels import triton_ops
from rolora_kernels.triton_ops import again

stub, asked, run = Stub(), [], JITFunction.run
driver.set_active(stub)

def counted(self, *arguments, **options):
    asked.append(self.__name__)
    return run(self, *arguments, **options)

JITFunction.run = counted

def told(a):
    if isinstance(a, torch.Tensor):
        return str(a.data_ptr())
    plain = isinstance(a, (str, int, float, tuple)) or a is None
    return str(a) if plain else type(a).__name__  # what hooks are told is made anew

def shrink(x, A, S):
    asked.clear(), stub.launches.clear()
    triton_ops.shrink(x, A, out=S)
    (given,) = stub.launches
    if not triton.knobs.runtime.launch_enter_hook.calls:
        given = given[:6] + given[9:]  # what hooks are told, where none listens
    return len(asked), [told(a) for a in given]

store = torch.zeros(64 * 64 + 8, dtype=torch.bfloat16)
x, A = store[: 64 * 64].view(64, 64), torch.zeros(16, 64)
S = torch.zeros(64, 16, dtype=torch.bfloat16)
found = {"first": shrink(x, A, S), "again": shrink(x, A, S)}
again.forget()
found["by triton"] = shrink(x, A, S)
shorter = x[:40], A, S[:40]
found["shorter"] = shrink(*shorter)
again.forget()
found["shorter by triton"] = shrink(*shorter)
found["not aligned"] = shrink(store[1 : 64 * 64 + 1].view(64, 64), A, S)
found["strides"] = shrink(x[:, :48], A[:, :48], S)
found["dtype"] = shrink(x, A.bfloat16(), S)
found["rank"] = shrink(x, A[:15], S[:, :15])
found["last"] = shrink(x, A[:15], S[:, :15])
listening = lambda metadata: None
triton.knobs.runtime.launch_enter_hook.add(listening)
found["heard"] = shrink(x, A, S)
again.forget()
found["heard by triton"] = shrink(x, A, S)
print(json.dumps(found))
"""


def test_a_launch_again_gives_the_driver_what_triton_does():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    asked = {name: count for name, (count, _) in found.items()}
    assert asked == {
        "first": 1,
        "again": 0,
        "by triton": 1,
        "shorter": 0,  # a batch of another length is no other kernel
        "shorter by triton": 1,
        "not aligned": 1,
        "strides": 1,
        "dtype": 1,
        "rank": 1,
        "last": 0,
        "heard": 0,
        "heard by triton": 1,
    }
    given = {name: arguments for name, (_, arguments) in found.items()}
    assert given["again"] == given["by triton"] == given["first"]
    assert given["shorter"] == given["shorter by triton"] != given["first"]
    assert given["not aligned"] != given["first"]
    assert given["heard"] == given["heard by triton"] and "LazyDict" in given["heard"]
