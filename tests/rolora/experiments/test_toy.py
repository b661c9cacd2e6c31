"""The two-layer network: data, splits, what each method moves, and the order that the paper's
figure shows.
"""

import gzip
import json
import struct
import sys

import numpy as np
import pytest
import torch

from rolora import cli
from rolora.experiments import digits as data
from rolora.experiments import toy, two_layers
from rolora.run.federation import build_server


def accuracy(method, rounds=40, rate=0.5, split="10x1"):
    setting = two_layers.Setting(method, split, rate, 0, rounds, 8, "digits")
    return two_layers.train(setting, data.load(None), "test")


def test_the_shipped_digits_are_uci_s():
    digits = data.load(None)
    sizes = [len(y) for _, y in (digits.train, digits.held, digits.test)]
    assert sum(sizes) == 1797 and sizes == [1150, 288, 359]
    counts = np.bincount(np.concatenate([y for _, y in (digits.train, digits.held, digits.test)]))
    assert counts.tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]  # as the repository states
    for x, _ in (digits.train, digits.test):
        assert (
            x.dtype == np.float32
            and x.shape[1] == 64
            and x.min() == 0.0
            and x.max() == 1.0
            and (x * 16 == np.rint(x * 16)).all()
        )


@pytest.mark.parametrize("split, labels", [("10x1", 1), ("5x2", 2)])
def test_every_row_has_one_client_and_every_client_its_labels(split, labels):
    y = data.load(None).train[1]
    rows = data.clients_of(y, split)
    assert sorted(np.concatenate(rows)) == list(range(len(y)))
    assert all(len(np.unique(y[own])) == labels for own in rows)


def test_rolora_is_far_ahead_at_a_moderate_rate():
    """One label a client, 40 rounds, rate 0.5: the order of the figure in the paper.

    Larger rates suit FedAvg better (README).
    """
    last = {method: accuracy(method)["accuracy"][-1] for method in ("rolora", "fedavg", "ffa")}
    assert last["rolora"] > last["ffa"] + 0.1 and last["rolora"] > last["fedavg"] + 0.2


def test_a_round_against_an_independent_statement(monkeypatch):
    """FedAvg of two clients, one full batch each, in NumPy with gradients written out."""
    monkeypatch.setattr(two_layers, "_EPOCHS", 1)
    monkeypatch.setitem(data.SPLITS, "2x5", (2, 5))
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 6)).astype(np.float32), np.arange(40) % 10
    digits = data.Digits((x, y), (x, y), (x, y))
    monkeypatch.setattr(two_layers, "_BATCH", 20)  # the whole of a client
    server = build_server(
        two_layers.prepare(
            two_layers.Setting("fedavg", "2x5", 0.3, 5, 1, 3, "digits"), digits, "test"
        ),
        on_round=lambda row: None,
    )
    server.run()
    draw = torch.Generator().manual_seed(5)
    A = (torch.randn(6, 3, generator=draw) / 6**0.5).double().numpy()
    B = (1e-2 * torch.randn(3, 6, generator=draw)).double().numpy()
    W = (torch.randn(6, 10, generator=draw) / 6**0.5).double().numpy()
    means = [np.zeros_like(A), np.zeros_like(B)]
    for own in (y < 5, y >= 5):
        inputs, hidden = x[own].astype(float), x[own] @ A @ B
        logits = np.maximum(hidden, 0) @ W
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(p)), y[own]] -= 1
        back = (p / len(p)) @ W.T * (hidden > 0)
        gradients = [inputs.T @ back @ B.T, (inputs @ A).T @ back]
        scale = min(1.0, 1.0 / (np.sqrt(sum((g**2).sum() for g in gradients)) + 1e-6))
        for mean, start, gradient in zip(means, (A, B), gradients, strict=True):
            mean += 0.5 * (start - 0.3 * scale * gradient)
    for kind, mean in zip("AB", means, strict=True):  # the paper writes the factors transposed
        np.testing.assert_allclose(
            server.layout.views(server.state.published, kind)["hidden"].numpy(), mean.T, atol=1e-6
        )


def test_the_orthonormal_start():
    job = two_layers.prepare(
        two_layers.Setting("rolora+init=orthogonal", "10x1", 0.5, 0, 1, 8, "digits"),
        data.load(None),
        "test",
    )
    A = job.model.hidden.lora_A
    torch.testing.assert_close(A @ A.t(), torch.eye(8), rtol=0, atol=1e-5)
    assert job.model.hidden.lora_B.std() > 5e-3


def mnist_files(folder):
    rng = np.random.default_rng(0)
    for name, count, pack in (("train", 120, gzip.compress), ("t10k", 40, bytes)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            (np.arange(count) % 10).astype(np.uint8),
        )
        suffix = ".gz" if pack is gzip.compress else ""
        (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(
            pack(b"\0\0\x08\x03" + struct.pack(">3I", count, 28, 28) + images.tobytes())
        )
        (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(
            pack(b"\0\0\x08\x01" + struct.pack(">I", count) + labels.tobytes())
        )


def call(capsys, *args):
    sys.argv = ["toy", *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.run(toy.command)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_command_on_digits_and_on_mnists_files(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    common = ("--rounds", 2, "--seeds", 2, "--rates", "0.1,0.5", "--output-dir", tmp_path / "out")
    code, out, _ = call(capsys, *common, "--methods", "rolora,flexlora")
    assert (
        code == 0
        and out.count("rate 0.") == 2
        and (tmp_path / "out" / "toy-digits-10x1-r8.png").stat().st_size > 1000
    )
    runs = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert len(runs) == 2 * (2 * 2 + 2)
    monkeypatch.setattr(toy, "train", None)  # what is stored is not run again
    assert call(capsys, *common, "--methods", "rolora,flexlora")[1] == out
    monkeypatch.undo()
    mnist_files(tmp_path)
    code, out, _ = call(
        capsys,
        "--mnist",
        tmp_path,
        "--split",
        "5x2",
        "--methods",
        "ffa",
        "--rounds",
        1,
        "--seeds",
        1,
        "--rates",
        "0.1",
    )
    assert code == 0 and out.startswith("mnist, 5x2, rank 16")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--split", "3x3"), "--split '3x3' is not one of 10x1, 5x2"),
        (("--methods", "fedprox"), "--method 'fedprox' is not one of"),
        (("--methods", "rolora+balanse"), "unknown option 'balanse'; did you mean balance?"),
        (("--methods", "ffa+balance"), "--balance does not go with --method ffa"),
        (("--methods", "ffa,ffa"), "ffa is given twice"),
        (("--methods", "rolora+lr-b=fast"), "lr-b 'fast': expected a number"),
        (("--rates", "fast"), "expected positive numbers"),
        (("--rounds", 0), "--rounds 0: expected at least 1"),
        (("--mnist", "nowhere"), "--mnist nowhere has no train-images-idx3-ubyte"),
    ],
)
def test_bad_input(args, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    code, _, err = call(capsys, *args)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_method_names_its_own_rank_and_alpha():
    setting = two_layers.Setting("rolora+rank=4+alpha=2", "5x2", 0.1, 0, 2, 8, "digits")
    scaled = two_layers.prepare(setting, data.load(None), "test").model.hidden
    assert (scaled.lora_A.shape[0], scaled.scaling) == (4, 0.5)
