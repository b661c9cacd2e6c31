"""What alternation promises: one frozen factor everywhere, exact means, stale clients that end
exact, order that is no matter.
"""

import itertools

import numpy as np
import pytest
import torch

from rolora import config
from rolora.federated import aggregate, methods, sampling, wire
from rolora.federated.guard import Bounds
from rolora.federated.methods.flexlora import truncate
from rolora.federated.state import GlobalState
from rolora.transport.local import LocalTransport
from rolora_kernels.codecs import CODECS, Rounded
from tests.rolora.federated import toy


@pytest.mark.parametrize("per_round", [None, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_every_client_holds_the_same_bits_in_every_round(per_round, dtype):
    published = {}
    server = toy.server(
        rounds=9,
        per_round=per_round,
        dtype=dtype,
        on_checkpoint=lambda s: published.update({s.state.round + 1: dict(s.state.published)}),
    )
    server.run()
    assert len(server.trainer.saw) == 9 * (per_round or 6)
    for number, _, held in server.trainer.saw:
        for kind in ("A", "B", "head"):
            assert torch.equal(held[kind], published[number][kind])


def test_a_frozen_factor_does_not_move_and_the_trained_one_does():
    states = []
    server = toy.server(rounds=4, on_checkpoint=lambda s: states.append(s.state))
    server.run()
    for before, after in itertools.pairwise(states):
        trained, frozen = ("B", "A") if after.round % 2 == 1 else ("A", "B")
        assert torch.equal(before.published[frozen], after.published[frozen])
        assert torch.equal(before.master[frozen], after.master[frozen])
        assert not torch.equal(before.published[trained], after.published[trained])
        assert not torch.equal(before.published["head"], after.published["head"])


def test_a_client_that_missed_rounds_is_brought_up_to_date_and_ends_exact():
    """With 2 of 6 clients a round everybody misses rounds; who is one publication behind is sent
    the change, the others all.
    """
    modes = []

    class Watched(LocalTransport):
        def run_round(self, tasks, deadline=None):
            asked = list(tasks)
            for _, message in asked:
                task = wire.decode_task(message, 1 << 30)
                modes.extend(("full", kind) for kind in task.full)
                modes.extend(("delta", kind) for kind in task.delta)
            return super().run_round(asked, deadline)

    server = toy.server(rounds=12, per_round=2, transport=Watched)
    server.run()
    assert {mode for mode, _ in modes} == {"full", "delta"}
    for peer in server.transport.peers.values():
        if peer.versions == server.state.versions:
            assert all(
                torch.equal(peer.published[k], server.state.published[k]) for k in peer.published
            )


@pytest.mark.parametrize("per_round", [None, 2])
def test_peers_of_one_process_hold_one_copy_of_the_same_bits(per_round):
    server = toy.server(rounds=7, per_round=per_round)
    server.run()
    for kind in ("A", "B", "head"):
        peers = server.transport.peers.values()
        held = [peer.published[kind] for peer in peers if kind in peer.published]
        buffers = {flat.data_ptr() for flat in held}
        contents = {flat.numpy().tobytes() for flat in held}
        assert len(buffers) == len(contents) < len(held)


def test_the_master_keeps_what_the_wire_could_not_say():
    """Published follows the master within one rounding of the last change, however many rounds
    there were.
    """
    for dtype, step in (("bf16", 2**-8), ("int8", 1 / 127)):
        server = toy.server(rounds=40, dtype=dtype)
        server.run()
        for kind in ("A", "B", "head"):
            rest = (server.state.master[kind] - server.state.published[kind]).abs().max()
            last = CODECS[dtype].decode(server.state.broadcast[kind].wire).abs().max()
            assert 0 < rest <= last * step, "errors must not accumulate"


class Shuffled(LocalTransport):
    def run_round(self, tasks, deadline=None):
        arrivals = list(super().run_round(tasks, deadline))
        return iter(
            [arrivals[i] for i in np.random.default_rng(len(arrivals)).permutation(len(arrivals))]
        )


@pytest.mark.parametrize(
    "method", sorted({*methods.NAMES} - {"lora-a2"})
)  # whose clients choose ranks: test_methods.py
def test_the_order_of_arrival_does_not_matter(method):
    servers = [toy.server(method, transport=transport) for transport in (LocalTransport, Shuffled)]
    for server in servers:
        server.run()
    assert all(
        torch.equal(servers[0].state.master[k], servers[1].state.master[k])
        for k in ("A", "B", "head")
    )


def random_factors(layout, rng):
    return {
        kind: torch.from_numpy(rng.normal(size=size).astype(np.float32))
        for kind, size in layout.sizes.items()
    }


def collected(method, phase, seed=0):
    """(layout, state, the clients' local factors, new master) of one aggregation."""
    _, layout = toy.model()
    rng = np.random.default_rng(seed)
    state = GlobalState.initial(random_factors(layout, rng), methods.load(method).changes_base)
    kinds = layout.travelling(phase)
    locals_ = [
        {
            **state.published,
            **{k: state.published[k] + 0.3 * random_factors(layout, rng)[k] for k in kinds},
        }
        for _ in toy.WEIGHTS
    ]
    mean = aggregate.collector(
        "mean", 0.0, layout, phase, Bounds(64.0, max(toy.WEIGHTS), len(toy.WEIGHTS))
    )
    context = methods.Context(state, layout, phase, 7, lambda client: None)
    collector = methods.load(method).collect(context, mean)
    for client, local in enumerate(locals_):
        collector.add(
            client,
            layout.join({k: local[k] - state.published[k] for k in kinds}, phase),
            toy.WEIGHTS[client],
        )
    return layout, locals_, state.apply(collector.finish())


def products(layout, factors):
    A, B = layout.views(factors, "A"), layout.views(factors, "B")
    return {path: B[path].double().numpy() @ A[path].double().numpy() for path in A}


@pytest.mark.parametrize(
    "method, phase, exact",
    [("rolora", "A", True), ("rolora", "B", True), ("ffa", "B", True), ("fedavg", "BOTH", False)],
)
def test_the_mean_of_products_is_the_product_of_means_with_one_factor_only(method, phase, exact):
    layout, locals_, state = collected(method, phase)
    mine = products(layout, state.master)
    for path, product in mine.items():
        wanted = sum(
            w * products(layout, local)[path] for w, local in zip(toy.WEIGHTS, locals_, strict=True)
        ) / sum(toy.WEIGHTS)
        error = np.linalg.norm(product - wanted) / np.linalg.norm(wanted)
        assert error < 1e-6 if exact else error > 1e-2


def test_flexlora_is_the_truncated_svd_of_the_mean_product():
    layout, locals_, state = collected("flexlora", "BOTH")
    mine = products(layout, state.master)
    for path, product in mine.items():
        mean = sum(
            w * products(layout, local)[path] for w, local in zip(toy.WEIGHTS, locals_, strict=True)
        ) / sum(toy.WEIGHTS)
        U, S, Vt = np.linalg.svd(mean)
        wanted = (U[:, :3] * S[:3]) @ Vt[:3]
        assert np.linalg.norm(product - wanted) < 1e-5 * np.linalg.norm(wanted)
    heads = sum(
        w * local["head"].double() for w, local in zip(toy.WEIGHTS, locals_, strict=True)
    ) / sum(toy.WEIGHTS)
    torch.testing.assert_close(state.master["head"].double(), heads, rtol=0, atol=1e-6)


def test_truncation_of_a_product_of_low_rank_gives_it_back():
    left, right = torch.randn(9, 2, dtype=torch.double), torch.randn(2, 7, dtype=torch.double)
    B, A = truncate(torch.cat([left, left], 1), torch.cat([right, right]), rank=2)
    torch.testing.assert_close(B @ A, 2 * left @ right)
    torch.testing.assert_close(B.t() @ B, A @ A.t())


def test_phases():
    def phases(name, schedule="BA"):
        return "".join(methods.load(name, schedule).phase(n) + " " for n in range(1, 7)).split()

    assert phases("rolora") == ["B", "A"] * 3 and phases("rolora", "BBA") == ["B", "B", "A"] * 2
    assert phases("ffa") == ["B"] * 6 and phases("fedavg") == phases("flexlora") == ["BOTH"] * 6


def test_bytes_up_halve_and_the_first_round_sends_everything():
    rows = {}
    for method in ("rolora", "fedavg"):
        rows[method] = []
        toy.server(method, rounds=6, dtype="fp32", on_round=rows[method].append).run()
    _, layout = toy.model()
    payload = {m: [r["bytes_up"] for r in rows[m][1:]] for m in rows}
    header = payload["fedavg"][0] - 6 * 4 * layout.travelling_size("BOTH")
    assert 0 < header < 6 * 700
    for number, sent in enumerate(payload["rolora"], 1):
        size = layout.travelling_size("B" if number % 2 else "A")
        assert abs(sent - 6 * 4 * size - header) < 6 * 64
    down = [row["bytes_down"] for row in rows["rolora"]]
    assert down[1] > 6 * 4 * sum(layout.sizes.values()), (
        "new peers are sent A, B and the head in fp32"
    )
    assert abs(down[1] - down[2] - 6 * 4 * layout.sizes["A"]) < 6 * 64, (
        "then the factor that was trained, and the head"
    )


def test_an_interrupted_run_saves_the_last_whole_round():
    saved = []
    server = toy.server(rounds=5, on_checkpoint=lambda s: saved.append(s.state.round))
    server.config = type(server.config)(**{**vars(server.config), "checkpoint_every": 100})
    train = server.trainer.train

    def interrupted(task, published, client_state):
        if task.round == 4 and task.client == 3:
            raise KeyboardInterrupt
        return train(task, published, client_state)

    server.trainer.train = interrupted
    with pytest.raises(KeyboardInterrupt):
        server.run()
    assert saved == [0, 3]


def test_sampling_is_keyed_and_uniform():
    assert sampling.cohort(0, 5, 10, 10) == list(range(10))
    draws = [sampling.cohort(3, n, 10, 3) for n in range(2000)]
    assert (
        draws
        == [sampling.cohort(3, n, 10, 3) for n in range(2000)]
        != [sampling.cohort(4, n, 10, 3) for n in range(2000)]
    )
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert (
        all(len(set(d)) == 3 for d in draws)
        and np.abs(counts - 600).max() < 5 * (2000 * 0.3 * 0.7) ** 0.5
    )
    plan = sampling.batches(0, 1, 2, examples=10, batch_size=4, steps=5)
    assert [len(b) for b in plan] == [4] * 5
    assert sorted(np.concatenate(plan)[:10]) == sorted(np.concatenate(plan)[10:]) == list(range(10))


def test_the_option_s_dtypes_are_the_codecs():
    assert config.WIRES == tuple(CODECS)
    assert all(CODECS[name].name == name for name in CODECS)


def test_a_wire_dtype_of_one_s_own_is_a_line_in_codecs(monkeypatch):
    """Registered, it goes both ways: tasks, updates, guard, and peers that hold the same bits."""
    fp8 = Rounded("fp8", torch.float8_e5m2)
    monkeypatch.setitem(CODECS, "fp8", fp8)
    server = toy.server(rounds=4, dtype="fp8")
    server.run()
    assert server.state.broadcast["A"].wire.dtype == torch.float8_e5m2
    for kind in ("A", "B", "head"):
        rest = (server.state.master[kind] - server.state.published[kind]).abs().max()
        last = fp8.decode(server.state.broadcast[kind].wire).abs().max()
        assert 0 < rest <= last / 4
    held = [peer.versions for peer in server.transport.peers.values()]
    assert held and all(versions == held[0] for versions in held)


@pytest.mark.parametrize("dtype, error", [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11)])
def test_codec_rounds_to_nearest(dtype, error):
    x, codec = torch.randn(1000), CODECS[dtype]
    assert ((codec.decode(codec.encode(x)) - x).abs() <= error * x.abs()).all()
