"""Flags of small comparisons, and their tables."""

import csv

from tests.rolora.commands import small


def flags(files, **extra):
    given = small(files, **{"rounds": 2} | extra)
    at = given.index("--lr")
    return given[:at] + given[at + 2 :]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
