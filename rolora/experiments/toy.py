"""`python -m rolora.experiments.toy`: the paper's two-layer network on digits that are split by label, four methods.

    f(x) = ReLU(x A B) W_out,  A [d, r] and B [r, h] train, W_out [h, 10] is fixed and random           (section 5.1, Figure 2)

Clients see two labels each (5 clients) or one (10 clients). B starts at 1e-2 · Gaussian: at exactly 0 the derivative of ReLU(0) is 0 and
nothing would ever train. Gradients are clipped, because plain SGD diverges at the larger rates. Each method's rate is the best on a
held-out slice of the training data over seeds that the results do not use. The digits are UCI's (DIGITS.md); `--mnist DIR` takes MNIST's
four files instead.
"""

from __future__ import annotations

import gzip
import json
import statistics
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rolora import atomic, cli
from rolora.errors import BadInput

METHODS = ("rolora", "fedavg", "ffa", "flexlora")
SPLITS = {"10x1": (10, 1), "5x2": (5, 2)}
HELP = """Two-layer network on digits split by label: accuracy of RoLoRA, FedAvg, FFA and FlexLoRA against rounds and bytes."""
FLAGS = [
    cli.Flag(["--split"], metavar="|".join(SPLITS), default="10x1", help="clients x labels of each  [10x1]"),
    cli.Flag(["--methods"], default=",".join(METHODS), help=f"[{','.join(METHODS)}]"),
    cli.Flag(["--rounds"], type=int, default=100, help="[100]"),
    cli.Flag(["--seeds"], type=int, default=5, help="runs a method, beside two that choose its rate  [5]"),
    cli.Flag(["--rates"], default="0.05,0.1,0.2,0.5,1,2,4,8,16", help="learning rates to choose from  [0.05,0.1,0.2,0.5,1,2,4,8,16]"),
    cli.Flag(["--rank"], type=int, help="[8; 16 with --mnist]"),
    cli.Flag(["--mnist"], metavar="DIR", help="a folder with MNIST's four IDX files, gzipped or not"),
    cli.Flag(["--output-dir"], metavar="DIR", help="toy.json and toy.png go there; runs that are in toy.json are not repeated"),
]
_EPOCHS, _BATCH, _CLIP = 5, 64, 1.0
_TUNING_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Digits:
    """fp32 images in [0, 1] `[n, d]` and labels `[n]`: training, held-out slice, test."""

    train: tuple[np.ndarray, np.ndarray]
    held: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """What identifies a run."""

    method: str
    split: str
    rate: float
    seed: int
    rounds: int
    rank: int
    data: str


def load(mnist: str | None) -> Digits:
    """The shipped digits cut 64 : 16 : 20 in a fixed random order, or MNIST with a sixth of its training set held out."""
    rng = np.random.default_rng(0)
    if mnist is None:
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
            images, labels = stored["images"].astype(np.float32) / 16, stored["labels"].astype(np.int64)
        order = rng.permutation(len(images))
        cuts = [round(0.64 * len(order)), round(0.8 * len(order))]
        return Digits(*((images[part], labels[part]) for part in np.split(order, cuts)))
    train, test = ((_idx(mnist, f"{name}-images-idx3-ubyte") / np.float32(255), _idx(mnist, f"{name}-labels-idx1-ubyte")) for name in
                   ("train", "t10k"))
    order = rng.permutation(len(train[1]))
    cut = round(5 / 6 * len(order))
    parts = [(x.reshape(len(x), -1), y.astype(np.int64)) for x, y in (train, test)]
    return Digits(*((parts[0][0][rows], parts[0][1][rows]) for rows in (order[:cut], order[cut:])), parts[1])


def _idx(folder: str, name: str) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, its number of dimensions, their sizes (big-endian), the bytes."""
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]]) if len(data) > 4 and data[:3] == b"\0\0\x08" else ()
            if not shape or len(data) != 4 + 4 * len(shape) + int(np.prod(shape)):
                raise BadInput(f"{path} is not an IDX file of bytes")
            return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise BadInput(f"--mnist {folder} has no {name} (or {name}.gz)")


def clients_of(labels: np.ndarray, split: str) -> list[np.ndarray]:
    """Each client's rows: client c has labels c·k … c·k + k − 1."""
    count, own = SPLITS[split]
    return [np.flatnonzero((labels >= c * own) & (labels < (c + 1) * own)) for c in range(count)]


def train(setting: Setting, digits: Digits, on: str) -> dict:
    """One run: accuracy after every round on the held-out slice or the test set, and floats sent up by a client in each round."""
    import torch

    from rolora.federated.methods import load as load_method
    from rolora.federated.methods.flexlora import truncate

    x, y = (torch.from_numpy(a) for a in digits.train)
    judge_x, judge_y = (torch.from_numpy(a) for a in (digits.held if on == "held" else digits.test))
    rows = [torch.from_numpy(r) for r in clients_of(digits.train[1], setting.split)]
    draw = torch.Generator().manual_seed(setting.seed)
    d, r, h = x.shape[1], setting.rank, x.shape[1]
    A = torch.randn(d, r, generator=draw) / d**0.5
    B = 1e-2 * torch.randn(r, h, generator=draw)
    W_out = torch.randn(h, 10, generator=draw) / h**0.5
    phase_of = load_method(setting.method).phase
    accuracy, floats = [], []
    for number in range(1, setting.rounds + 1):
        phase, changed = phase_of(number), []
        for own in rows:
            a, b = A.clone(), B.clone()
            trained = [p.requires_grad_() for name, p in (("A", a), ("B", b)) if phase in (name, "BOTH")]
            for _ in range(_EPOCHS):
                for batch in own[torch.randperm(len(own), generator=draw)].split(_BATCH):
                    loss = torch.nn.functional.cross_entropy(torch.relu(x[batch] @ a @ b) @ W_out, y[batch])
                    gradients = torch.autograd.grad(loss, trained)
                    norm = torch.stack([g.norm() for g in gradients]).norm()
                    step = setting.rate * min(1.0, _CLIP / (norm.item() + 1e-6))
                    with torch.no_grad():
                        for parameter, gradient in zip(trained, gradients, strict=True):
                            parameter.sub_(gradient, alpha=step)
            changed.append((len(own), a.detach(), b.detach()))
        total = sum(n for n, _, _ in changed)
        if setting.method == "flexlora":  # the mean of the products, truncated; PEFT's B A is this file's (A B)ᵀ
            left = torch.cat([b.t().double() * (n / total) for n, _, b in changed], 1)
            right = torch.cat([a.t().double() for _, a, _ in changed])
            new_B, new_A = truncate(left, right, r)
            A, B = new_A.t().float().contiguous(), new_B.t().float().contiguous()
        else:
            A, B = (sum(n / total * parts[i] for n, *parts in changed) for i in (0, 1))
        floats.append(sum(p.numel() for p in trained))
        accuracy.append(round((torch.relu(judge_x @ A @ B) @ W_out).argmax(1).eq(judge_y).float().mean().item(), 4))
    return asdict(setting) | {"on": on, "accuracy": accuracy, "floats_up": floats}


def toy(split: str, methods: str, rounds: int, seeds: int, rates: str, rank: int | None, mnist: str | None, output_dir: str | None) -> int:
    if split not in SPLITS:
        raise BadInput(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    chosen = [name.strip() for name in methods.split(",")]
    for name in chosen:
        if name not in METHODS:
            raise BadInput(f"--methods: {name!r} is not one of {', '.join(METHODS)}")
    try:
        grid = [float(rate) for rate in rates.split(",")]
    except ValueError:
        grid = []
    if not grid or min(grid) <= 0:
        raise BadInput(f"--rates {rates!r}: expected positive numbers, such as 0.1,0.5")
    for flag, value in (("--rounds", rounds), ("--seeds", seeds), ("--rank", rank if rank is not None else 1)):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected at least 1")
    digits, data = load(mnist), "mnist" if mnist else "digits"
    rank = rank or (16 if mnist else 8)
    path = None if output_dir is None else Path(output_dir) / "toy.json"
    stored = json.loads(path.read_text()) if path is not None and path.is_file() else []

    def done(method: str, rate: float, seed: int, on: str) -> dict:
        setting = Setting(method, split, rate, seed, rounds, rank, data)
        found = next((row for row in stored if row["on"] == on and all(row[k] == v for k, v in asdict(setting).items())), None)
        if found is None:
            found = train(setting, digits, on)
            stored.append(found)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_text(path, json.dumps(stored) + "\n")
        return found

    print(f"{data}, {split}, rank {rank}, {rounds} rounds; accuracy on the test set, mean ± std over {seeds} seeds")
    results = {}
    for method in chosen:
        held = {rate: statistics.mean(done(method, rate, seed, "held")["accuracy"][-1] for seed in _TUNING_SEEDS) for rate in grid}
        rate = max(held, key=held.get)
        results[method] = runs = [done(method, rate, seed, "test") for seed in range(seeds)]
        last, early = ([run["accuracy"][at] for run in runs] for at in (rounds - 1, min(29, rounds - 1)))
        edge = " (the edge of the grid)" if rate in (grid[0], grid[-1]) and len(grid) > 1 else ""
        print(f"{method:<9} rate {rate:g}{edge}: {statistics.mean(last):.3f} ± {_std(last):.3f}; at round {min(30, rounds)} "
              f"{statistics.mean(early):.3f}; {4 * sum(runs[0]['floats_up']) / 1e3:,.0f} kB up a client", flush=True)
    if path is not None:
        _draw(results, path.parent / f"toy-{data}-{split}.png")
    return 0


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _draw(results: dict[str, list[dict]], path: Path) -> None:
    """Accuracy, mean and spread, against rounds and against the bytes that a client sends."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install 'rolora[report]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for method, runs in results.items():
        curves = np.array([run["accuracy"] for run in runs])
        across = np.arange(1, curves.shape[1] + 1), 4 * np.cumsum(runs[0]["floats_up"]) / 1e3
        for place, x in zip(axes, across, strict=True):
            place.plot(x, curves.mean(0), label=method)
            place.fill_between(x, curves.mean(0) - curves.std(0), curves.mean(0) + curves.std(0), alpha=0.2)
    axes[0].set(xlabel="round", ylabel="test accuracy")
    axes[1].set(xlabel="kB sent by a client (fp32)")
    axes[0].legend()
    for place in axes:
        place.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(**given: Any) -> int:
    return toy(**given)


command = cli.command("experiments.toy", HELP, FLAGS, run)

if __name__ == "__main__":
    cli.run(command)
