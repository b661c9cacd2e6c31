"""A server of the digits experiment, and the updates that it accepts."""

from rolora.experiments import digits, two_layers
from rolora.run.federation import build_server
from tests.rolora.federated import toy


def weighted(values):
    return sum(w * v for w, v in zip(toy.WEIGHTS, values, strict=True)) / sum(toy.WEIGHTS)


def digits_server(method, rounds=3, rank=8, **values):
    rows = []
    job = two_layers.prepare(
        two_layers.Setting(method, "10x1", 0.5, 0, rounds, rank, "digits"),
        digits.load(None),
        "test",
    )
    job.config = job.config.with_values(**values)
    server = build_server(job, on_round=rows.append)
    server.norms.multiple = 0.0
    return server, rows


def seen_updates(server):
    """Every accepted update, with its change as the guard gives it."""
    caught, judge = [], server._judge

    def watched(arrival, expected, tally):
        update, change, norm = judge(arrival, expected, tally)
        caught.append((update, change, dict(expected.state.published)))
        return update, change, norm

    server._judge = watched
    return caught
