"""The error a user can cause, the hint that goes with a misspelt name, and the loss of another process."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the input: one line naming the field or file, the value found and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


class LostProcess(Exception):
    """Another of the run's processes has ended, and has said why if it could. Exit code 1."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; expected one of {', '.join(names)}"
