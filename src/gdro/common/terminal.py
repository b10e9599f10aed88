"""All of gdro's output goes through here, so no outside text (a reply, a file, a name) can control the terminal."""

import re
import sys
from typing import TextIO

# Control characters except tabs and line ends, other line separators, marks that change the writing direction, and
# halves of surrogate pairs, which no stream accepts.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with escapes such as `\x1b` for characters that a terminal would obey or not show."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def put(text: str, file: TextIO | None = None) -> None:
    """Print to stdout (or `file`) and flush; characters that the stream cannot encode become escapes."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def tell(text: str) -> None:
    """Print to stderr."""
    put(text, sys.stderr)
