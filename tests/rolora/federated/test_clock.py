"""The simulated clock: exact, keyed, never backwards; and what a checkpoint may say of it."""

import math

import numpy as np
import pytest
import torch

from rolora.federated.buffered.book import Book
from rolora.federated.buffered.clock import Clock, slowness, ticked
from tests.rolora.federated.test_buffered import made


def drawn(speeds, clients, seed=0):
    return [slowness(speeds, seed, client, clients) for client in range(clients)]


def test_the_speeds_are_those_that_their_names_say():
    assert drawn("equal", 5) == [1.0] * 5
    uniform = np.array(drawn("uniform", 2000))
    assert 0.5 <= uniform.min() < 0.51 and 1.49 < uniform.max() < 1.5
    assert abs(uniform.mean() - 1.0) < 0.02
    logs = np.log(drawn("lognormal", 2000))
    assert abs(logs.mean()) < 0.07 and abs(logs.std() - 1.0) < 0.05
    tail = np.array(drawn("tail", 1000)).reshape(100, 10)
    assert ((tail == 10.0).sum(1) == 1).all() and ((tail == 1.0).sum(1) == 9).all()
    assert len(set(tail.argmax(1))) == 10, "which of ten is by key"
    for count in (1, 4):
        assert sorted(drawn("tail", count)) == [1.0] * (count - 1) + [10.0]


@pytest.mark.parametrize("speeds", ["uniform", "lognormal", "tail"])
def test_a_client_is_as_slow_whoever_else_there_is(speeds):
    assert drawn(speeds, 40) == drawn(speeds, 400)[:40]
    assert drawn(speeds, 40) != drawn(speeds, 40, seed=1)


def test_times_add_up_exactly():
    """Ten thousand tasks of a tenth of a second, one after another, and at once."""
    clock = Clock(lambda client: 0.1)
    for _ in range(10_000):
        clock.advance(clock.due(0))
    assert clock.now == 10_000 * ticked(0.1) and abs(ticked(0.1) - 0.1) <= 2.0**-11
    assert ticked(0.0) == 2.0**-10, "nobody takes no time"


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e13])
def test_a_duration_that_no_task_can_have_is_said(seconds):
    server = made(2, lambda client: seconds)
    with pytest.raises(ValueError, match=r"client 0 is said to take .* simulated seconds"):
        server.run()


def test_a_clock_that_jumps_never_runs_backwards():
    """Answers that were due before now, or far ahead, come one after another all the same."""
    rows = []
    server = made(2, rounds=20, on_round=rows.append)
    own, clock = server._round, server.clock

    def jumping(number):
        if number == 5:
            clock.now += 1000.0  # everything in training is due in the past
        if number == 10:
            clock.now -= 500.0  # and now all of it is far ahead
        return own(number)

    server._round = jumping
    server.run()
    assert [row["round"] for row in rows] == list(range(21))
    assert all(row["clients"] == 2 and not row["rejected"] for row in rows[1:])
    times = [row["simulated_seconds"] for row in rows[1:]]
    assert times[:9] == sorted(times[:9]) and times[9:] == sorted(times[9:])
    clock.advance(-5.0)
    assert clock.now == times[-1]


@pytest.mark.parametrize("now", [math.nan, math.inf, -1.0, "1", None])
@pytest.mark.parametrize("where", ["now", "due"])
def test_a_checkpoint_whose_clock_shows_no_time_is_not_used(now, where):
    server = made(2, rounds=3)
    server.run()
    book = server.snapshot().book
    numbers, tensors = book.numbers(), book.tensors()
    assert Book.read(book.numbers(), tensors).numbers() == numbers
    (numbers if where == "now" else numbers["training"][0])[where] = now
    with pytest.raises(ValueError, match="simulated seconds"):
        Book.read(numbers, tensors)


def test_a_checkpoint_whose_answers_are_not_finite_is_not_used():
    books = []
    made(2, rounds=9, on_checkpoint=lambda s: books.append(s.book)).run()
    book = next(book for book in books if any(book.waiting.values()))
    name = next(name for name in book.tensors() if name.startswith("waiting/"))
    damaged = book.tensors() | {name: torch.full((3,), math.nan)}
    with pytest.raises(ValueError, match="not finite"):
        Book.read(book.numbers(), damaged)
