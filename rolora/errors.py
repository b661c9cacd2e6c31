"""The error that a user can mend."""


class BadInput(Exception):
    """One line: what was given, what was expected, how to mend it.

    Commands print it and exit with 2.
    """


class Diverged(BadInput):
    """A run whose clients all failed: its learning rate was too large."""
