"""The one error a user can cause, and the hint that goes with a misspelt name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the input: one line naming the field or file, the value found and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; expected one of {', '.join(names)}"
