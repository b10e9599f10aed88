"""Errors a user can cause, hints for misspelled names, and the loss of another process."""

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 2000  # characters of names in a message; a server may have thousands of names
NAME = 200  # characters per name
COMPARED = 5000  # names compared with a wrong one, since comparing is slow


class UserError(Exception):
    """A mistake in the input: one line naming the field or file, the value found, and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


class LostProcess(Exception):
    """Another of the run's processes has ended and reported why if it could. Exit code 1."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest valid name, otherwise the list of valid names, cut if long."""
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
