import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # cores may be shared
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # workers share the cores, and so does what they start
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # kernels run on the CPU; set before anything imports Triton

import pytest
import torch

from tests import forked


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # ours, below, and not by the number of tests


def pytest_collection_modifyitems(items):
    """Files with slow tests first: begun last, one of them keeps one worker of two busy alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Starts programs of Python in which torch and transformers are loaded already."""
    with forked.serving(tmp_path_factory.mktemp("forked") / "socket") as started:
        yield started


@pytest.fixture(scope="session")
def users_python(tmp_path_factory):
    """The same without Triton's interpreter: as whoever reads a page has it."""
    place = tmp_path_factory.mktemp("forked") / "socket"
    with forked.serving(place, interpreted=False) as started:
        yield started


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every `torch.empty` and `new_empty` starts as NaN, so that an element nobody wrote cannot
    pass.
    """
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k))
    )
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda t, **k: poison(empty(t.shape, **{"dtype": t.dtype, "device": t.device, **k})),
    )
