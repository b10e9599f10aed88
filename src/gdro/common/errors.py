"""The error a user can cause, the hint that goes with a misspelled name, and the loss of another process."""

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 2000  # characters of the names in a message; a server may have thousands
NAME = 200  # characters of one
COMPARED = 5000  # names that a wrong one is compared with, which takes a while


class UserError(Exception):
    """A mistake in the input: one line naming the field or file, the value found and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


class LostProcess(Exception):
    """Another of the run's processes has ended, and has said why if it could. Exit code 1."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest valid name, else the list of valid names, of which a long one is cut."""
    names = sorted(valid)
    close = get_close_matches(name, names[:COMPARED], n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]:.{NAME}}"?'
    listed: list[str] = []
    for one in names:
        if sum(map(len, listed)) > LISTED:
            return f"; expected one of {', '.join(listed)} and {len(names) - len(listed)} more"
        listed.append(one[:NAME])
    return f"; expected one of {', '.join(listed)}"
