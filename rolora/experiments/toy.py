"""`python -m rolora.experiments.toy`: the paper's two-layer network on digits that are split by
label, any method.

    f(x) = ReLU(x A B) W_out,  A [d, r] and B [r, h] train, W_out [h, 10] is fixed and random
    (section 5.1, Figure 2)

Here A and B are the factors of an adapter on a linear layer of zeros, and the rounds are the
engine's own: what is compared is what a run of `rolora.train` does. Clients see two labels each (5
clients), one (10 clients), or all (10 clients, iid). B starts at 1e-2 · Gaussian: at exactly 0 the
derivative of ReLU(0) is 0 and nothing would ever train. Gradients are clipped, because plain SGD
diverges at the larger rates. Each method's rate is the best on a held-out slice of the training
data over seeds that the results do not use. The digits are UCI's (DIGITS.md); `--mnist DIR` takes
MNIST's four files instead.
"""

from __future__ import annotations

import gzip
import json
import statistics
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from rolora import atomic, cli, variants
from rolora.errors import BadInput

METHODS = "rolora,fedavg,ffa,flexlora"
SPLITS = {"10x1": (10, 1), "5x2": (5, 2), "iid": (10, 0)}
HELP = """Two-layer network on digits split by label: accuracy of any methods against rounds and
bytes."""
FLAGS = [
    cli.Flag(
        ["--split"],
        metavar="|".join(SPLITS),
        default="10x1",
        help="clients x labels of each  [10x1]",
    ),
    cli.Flag(
        ["--methods"],
        default=METHODS,
        help=f"names, with options after a plus: rolora+balance, rolora+schedule=BBA  [{METHODS}]",
    ),
    cli.Flag(["--rounds"], type=int, default=100, help="[100]"),
    cli.Flag(
        ["--seeds"], type=int, default=5, help="runs a method, beside two that choose its rate  [5]"
    ),
    cli.Flag(
        ["--rates"],
        default="0.05,0.1,0.2,0.5,1,2,4,8,16",
        help="learning rates to choose from  [0.05,0.1,0.2,0.5,1,2,4,8,16]",
    ),
    cli.Flag(["--rank"], type=int, help="[8; 16 with --mnist]"),
    cli.Flag(
        ["--mnist"], metavar="DIR", help="a folder with MNIST's four IDX files, gzipped or not"
    ),
    cli.Flag(
        ["--output-dir"],
        metavar="DIR",
        help="toy.json and a picture go there; runs that are in toy.json are not repeated",
    ),
]
_EPOCHS, _BATCH, _CLIP = 5, 64, 1.0
_TUNING_SEEDS, _LAST = (1000, 1001), 10


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
    """The shipped digits cut 64 : 16 : 20 in a fixed random order, or MNIST with a sixth of its
    training set held out.
    """
    rng = np.random.default_rng(0)
    if mnist is None:
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
            images, labels = (
                stored["images"].astype(np.float32) / 16,
                stored["labels"].astype(np.int64),
            )
        order = rng.permutation(len(images))
        cuts = [round(0.64 * len(order)), round(0.8 * len(order))]
        train_rows, held_rows, test_rows = np.split(order, cuts)
        return Digits(
            (images[train_rows], labels[train_rows]),
            (images[held_rows], labels[held_rows]),
            (images[test_rows], labels[test_rows]),
        )
    train, test = (
        (
            _idx(mnist, f"{name}-images-idx3-ubyte") / np.float32(255),
            _idx(mnist, f"{name}-labels-idx1-ubyte"),
        )
        for name in ("train", "t10k")
    )
    order = rng.permutation(len(train[1]))
    cut = round(5 / 6 * len(order))
    parts = [(x.reshape(len(x), -1), y.astype(np.int64)) for x, y in (train, test)]
    images, labels = parts[0]
    own, held = order[:cut], order[cut:]
    return Digits((images[own], labels[own]), (images[held], labels[held]), parts[1])


def _idx(folder: str, name: str) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, its number of dimensions, their sizes (big-endian), the
    bytes.
    """
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = (
                struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
                if len(data) > 4 and data[:3] == b"\0\0\x08"
                else ()
            )
            if not shape or len(data) != 4 + 4 * len(shape) + int(np.prod(shape)):
                raise BadInput(f"{path} is not an IDX file of bytes")
            return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise BadInput(f"--mnist {folder} has no {name} (or {name}.gz)")


def clients_of(labels: np.ndarray, split: str) -> list[np.ndarray]:
    """Each client's rows: client c has labels c·k … c·k + k − 1, or every tenth row."""
    count, own = SPLITS[split]
    if own == 0:
        return [np.arange(c, len(labels), count) for c in range(count)]
    return [np.flatnonzero((labels >= c * own) & (labels < (c + 1) * own)) for c in range(count)]


def train(setting: Setting, digits: Digits, on: str) -> dict:
    """One run: accuracy after every round on the test set, and bytes of messages up and down a
    client; or its score on the held-out slice.
    """
    from rolora.federated.server import QuorumMissed
    from rolora.run.federation import build_server

    rows: list[dict] = []
    server = build_server(prepare(setting, digits, on), on_round=rows.append)
    server.norms.multiple = (
        0.0  # at these rates honest changes differ by more than a bound would bear
    )
    try:
        server.run()
    except QuorumMissed:
        rows += [rows[-1]] * (
            setting.rounds + 1 - len(rows)
        )  # every client diverged: it stays where it was
    accuracy = [round(row["eval"]["accuracy"], 4) for row in rows[1:]]
    if on == "held":  # judges a rate, by its last rounds: single ones jump at large rates
        return asdict(setting) | {"on": on, "score": round(statistics.mean(accuracy[-_LAST:]), 4)}
    return (
        asdict(setting)
        | {"on": on, "accuracy": accuracy}
        | {
            **{
                way: [row[way] // server.config.clients for row in rows[1:]]
                for way in ("bytes_up", "bytes_down")
            }
        }
    )


def prepare(setting: Setting, digits: Digits, on: str):
    """The `Job` of a run: what `rolora.train` works with, for this network and these data."""
    import torch

    from rolora import config
    from rolora.adapter.attach import attach
    from rolora.adapter.configuration import LoRAConfig
    from rolora.federated import compatibility
    from rolora.federated.layout import Layout
    from rolora.run.job import Job

    options = dict(
        lr=setting.rate,
        rounds=setting.rounds,
        seed=setting.seed,
        rank=setting.rank,
        alpha=float(setting.rank),
        clients=SPLITS[setting.split][0],
        local_epochs=_EPOCHS,
        batch_size=_BATCH,
        optimizer="sgd",
        exchange_dtype="fp32",
        max_grad_norm=_CLIP,
        device="cpu",
        engine="batched",
        init="gaussian",
    )
    named = config.Config().with_values(**(options | variants.parse(setting.method)))
    resolved = compatibility.settle(config.check(named))
    if resolved.federation.method == "fedsa" or resolved.federation.client_ranks:
        resolved = resolved.with_values(engine="sequential")  # their clients are not alike
    clients = clients_of(digits.train[1], setting.split)
    resolved = resolved.with_values(clients_per_round=len(clients))
    model = network(
        digits.train[0].shape[1],
        setting,
        resolved.adapter.init,
        torch.Generator().manual_seed(setting.seed),
    )
    report = attach(
        model, LoRAConfig(rank=setting.rank, alpha=setting.rank, target_modules=["hidden"])
    )
    model.draw(resolved.adapter.init)
    train, judged = (
        list(zip(*map(torch.from_numpy, part), strict=True))
        for part in (digits.train, digits.held if on == "held" else digits.test)
    )
    return Job(
        resolved,
        model,
        None,
        cast(Any, DigitsRecipe()),  # what a run uses of one: no rows are read here
        Layout.of(model),
        report,
        [],
        train,
        judged,
        None,
        clients,
        torch.device("cpu"),
    )


def network(width: int, setting: Setting, init: str, draw):
    """ReLU(x A B) W_out as a module: a linear of zeros, whose adapter holds A and B, and a fixed
    random one.
    """
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = (
                nn.Linear(width, width, bias=False),
                nn.Linear(width, 10, bias=False),
            )
            self.first = (
                torch.randn(width, setting.rank, generator=draw) / width**0.5,
                1e-2 * torch.randn(setting.rank, width, generator=draw),
            )
            with torch.no_grad():
                self.hidden.weight.zero_()
                self.out.weight.copy_((torch.randn(width, 10, generator=draw) / width**0.5).t())

        @torch.no_grad()
        def draw(self, init: str) -> None:
            """The initial factors, once they are attached."""
            A, B = self.first
            factors = dict(self.hidden.named_parameters())
            factors["lora_A"].copy_(torch.linalg.qr(A).Q.t() if init == "orthogonal" else A.t())
            factors["lora_B"].copy_(B.t())

        def forward(self, images):
            return self.out(torch.relu(self.hidden(images)))

    return Network()


class DigitsRecipe:
    """Images and labels for the engine; see `rolora.recipes.Recipe`."""

    headline = "accuracy"

    def collate(self, examples: Sequence):
        import torch

        from rolora.recipes import Batch

        images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
        return Batch({"images": images}, labels, len(labels), len(labels), len(labels))

    def loss(self, model, batch):
        return self.losses(model, batch).sum()

    def losses(self, model, batch):
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(**batch.inputs), batch.labels, reduction="none")

    def evaluate(self, model, examples: Sequence, batch_size: int) -> dict[str, float]:
        import torch

        batch = self.collate(examples)
        with torch.no_grad():
            hits = model(**batch.inputs).argmax(1).eq(batch.labels)
            return {
                "accuracy": hits.float().mean().item(),
                "loss": self.loss(model, batch).item() / len(hits),
            }


def toy(
    split: str,
    methods: str,
    rounds: int,
    seeds: int,
    rates: str,
    rank: int | None,
    mnist: str | None,
    output_dir: str | None,
) -> int:
    if split not in SPLITS:
        raise BadInput(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    chosen, grid = variants.parse_all(methods), variants.rates(rates)
    for flag, value in (
        ("--rounds", rounds),
        ("--seeds", seeds),
        ("--rank", rank if rank is not None else 1),
    ):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected at least 1")
    digits, data = load(mnist), "mnist" if mnist else "digits"
    rank = rank or (16 if mnist else 8)
    path = None if output_dir is None else Path(output_dir) / "toy.json"
    stored = (
        json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else []
    )

    def done(method: str, rate: float, seed: int, on: str) -> dict:
        setting = Setting(method, split, rate, seed, rounds, rank, data)
        found = next(
            (
                row
                for row in stored
                if row["on"] == on and all(row[k] == v for k, v in asdict(setting).items())
            ),
            None,
        )
        if found is None:
            found = train(setting, digits, on)
            stored.append(found)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_text(path, json.dumps(stored) + "\n")
        return found

    print(
        f"{data}, {split}, rank {rank}, {rounds} rounds; accuracy on the test set, mean ± std over "
        f"{seeds} seeds"
    )
    results = {}
    for method in chosen:
        held = {
            rate: statistics.mean(
                done(method, rate, seed, "held")["score"] for seed in _TUNING_SEEDS
            )
            for rate in grid
        }
        rate = max(held, key=lambda rate: held[rate])
        results[method] = runs = [done(method, rate, seed, "test") for seed in range(seeds)]
        last, early = (
            [run["accuracy"][at] for run in runs] for at in (rounds - 1, min(29, rounds - 1))
        )
        edge = " (the edge of the grid)" if rate in (grid[0], grid[-1]) and len(grid) > 1 else ""
        up, down = (sum(runs[0][way]) / 1e3 for way in ("bytes_up", "bytes_down"))
        print(
            f"{method:<{max(map(len, chosen))}} rate {rate:g}{edge}: {statistics.mean(last):.3f} ± "
            f"{_std(last):.3f}; "
            f"at round {min(30, rounds)} {statistics.mean(early):.3f}; {up:,.0f} kB up, "
            f"{down:,.0f} kB down a client",
            flush=True,
        )
    if path is not None:
        _draw(results, path.parent / f"toy-{data}-{split}-r{rank}.png")
    return 0


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _draw(results: dict[str, list[dict]], path: Path) -> None:
    """Accuracy, mean and spread, against rounds and against the bytes that a client sends."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install '.[report]' in your clone")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
    for method, runs in results.items():
        curves = np.array([run["accuracy"] for run in runs])
        across = np.arange(1, curves.shape[1] + 1), np.cumsum(runs[0]["bytes_up"]) / 1e3
        for place, x in zip(axes, across, strict=True):
            place.plot(x, curves.mean(0), label=method)
            place.fill_between(
                x, curves.mean(0) - curves.std(0), curves.mean(0) + curves.std(0), alpha=0.2
            )
    axes[0].set(xlabel="round", ylabel="test accuracy")
    axes[1].set(xlabel="kB sent up by a client (fp32)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    for place in axes:
        place.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(**given: Any) -> int:
    return toy(**given)


command = cli.command("experiments.toy", HELP, FLAGS, run)

if __name__ == "__main__":
    cli.run(command)
