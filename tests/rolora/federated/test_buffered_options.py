"""What asynchronous rounds cannot be combined with, by name; and what they settle."""

import pytest

from rolora import config
from rolora.errors import BadInput
from rolora.federated import compatibility, methods


def settled(**options):
    values = {"buffer": 3, "clients_per_round": 5} | options
    return compatibility.settle(config.resolve(values))


def test_the_defaults_are_fedbuffs():
    own = settled().asynchrony
    assert (own.buffer, own.staleness_exponent, own.staleness_limit) == (3, 0.5, None)
    assert own.client_speeds == "equal"
    none = config.resolve({}).asynchrony
    assert (none.buffer, none.staleness_exponent, none.client_speeds) == (None, None, None)
    assert config.resolve({"client_speeds": "tail"}).asynchrony.buffer is None
    once = settled(staleness_exponent=0, staleness_limit=8, client_speeds="tail")
    assert once == compatibility.settle(config.check(once))
    assert once.asynchrony.staleness_exponent == 0.0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"aggregation": "median"}, "--aggregation median does not go with --buffer"),
        ({"sampling": "poisson"}, "--sampling poisson does not go with --buffer"),
        ({"deadline": 60}, "--deadline 60.0 does not go with --buffer"),
        ({"dp_clip": 1.0, "dp_noise": 1.0}, "--dp-clip does not go with --buffer"),
        ({"secure_aggregation": True}, "--secure-aggregation does not go with --buffer"),
        ({"quorum": 4}, "--quorum 4 does not go with --buffer: a round ends after 3 answers"),
        ({"balance": True}, "leave --balance out"),
        ({"equal_factors": True}, "leave --equal-factors out"),
        ({"method": "fedsvd"}, "factors turn between rounds"),
        ({"method": "flora"}, "it needs every client's own product"),
        ({"method": "fedrot"}, "it compares a change with what is published now"),
        ({"method": "fedsa"}, "clients are judged by factors that are still in training"),
        ({"buffer": None, "staleness_limit": 3}, "--staleness-limit 3 needs --buffer"),
        ({"buffer": None, "staleness_exponent": 0.5}, "--staleness-exponent 0.5 needs --buffer"),
        ({"buffer": 0}, "--buffer 0: expected at least 1"),
        ({"staleness_limit": -1}, "--staleness-limit -1: expected at least 0"),
        ({"staleness_exponent": float("nan")}, "--staleness-exponent nan: expected a finite"),
        ({"client_speeds": "slow"}, "--client-speeds 'slow' is not one of equal, uniform"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(options, said):
    with pytest.raises(BadInput) as error:
        settled(**options)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ranks, elsewhere", [(True, False), (False, True)])
def test_it_needs_all_clients_in_one_process(ranks, elsewhere):
    method = methods.load("rolora")
    with pytest.raises(BadInput, match=r"--buffer 3 does not go with .* its clock is simulated"):
        compatibility.require_processes(method, settled(), ranks, elsewhere)
    compatibility.require_processes(method, settled(), False, False)


def test_clients_elsewhere_have_clocks_of_their_own():
    """Ranks of one owner have none: a round's simulated time is the same on all of them."""
    method, clocked = methods.load("rolora"), config.resolve({"client_speeds": "tail"})
    with pytest.raises(BadInput, match="--client-speeds tail simulates a clock"):
        compatibility.require_processes(method, clocked, False, True)
    compatibility.require_processes(method, clocked, True, False)
