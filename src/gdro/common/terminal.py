"""What gdro prints goes through here: no text from outside (a reply, a file, a name) can steer the terminal."""

import re
import sys
from typing import TextIO

# Control characters but for tabs and line ends, the other ends of lines, marks that turn the direction of writing, and
# halves of surrogate pairs, which no stream takes.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with `\x1b` and the like where a terminal would obey it or not show it."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def put(text: str, file: TextIO | None = None) -> None:
    """Print on stdout (or `file`) at once; what the stream's encoding lacks stands as an escape."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def tell(text: str) -> None:
    """Print on stderr."""
    put(text, sys.stderr)
