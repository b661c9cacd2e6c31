"""A federated method in one file: only the signs of what clients send are counted.

    python -m rolora.train --method examples/own_method.py --rounds 4

Prints what every run prints; the plan says `rounds: 4 of examples/own_method.py`.
"""


def phase(round, schedule):
    """ "A", "B" or "BOTH": what trains and travels in a round."""
    return schedule[(round - 1) % len(schedule)]


def transform(context, client, change):
    """A client's change, fp32 [n], as it is to be counted."""
    return 1e-3 * change.sign()
