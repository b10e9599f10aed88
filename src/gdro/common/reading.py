"""Reading users' files: anything wrong with one becomes a single line naming the file and the place in it.

Text, JSON and lines are parsed here, YAML in `gdro.common.yaml`; a library that opens a file itself is called within
`reading`. Exceptions are caught broadly, because parsers raise far more than they document; the line keeps the cause.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError

DEPTH = 100  # of nested lists and objects; code that writes, shows or compares values fails at about 1,000
DIGITS = 300  # of an integer; a float holds no more


def check_regular(path: Path, expected: str, name: str | None = None) -> None:
    """Raise UserError unless `path` is a regular file that can be opened; opening a FIFO would wait forever.

    `name` is what the message calls it; default: the path.
    """
    name = name or str(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} not found; expected {expected}") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise UserError(f"{name} cannot be read: {cause(error)}; expected {expected}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; expected {expected}")


@contextmanager
def reading(path: Path, expected: str, name: str | None = None) -> Iterator[None]:
    """Wrap a library's reading of `path`: exceptions inside become a UserError."""
    check_regular(path, expected, name)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name or path} is damaged or truncated ({cause(error)}); expected {expected}") from error


def read_bytes(path: Path, expected: str, name: str | None = None) -> bytes:
    """The bytes of a regular file; UserError if it cannot be read."""
    check_regular(path, expected, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name or path} cannot be read: {cause(error)}; expected {expected}") from None


def read_text(path: Path, expected: str, name: str | None = None) -> str:
    """The file as UTF-8, with or without a byte order mark, line ends unchanged."""
    try:
        return read_bytes(path, expected, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(f"{name or path} is {what}; expected {expected}") from None


def read_lines(path: Path, expected: str, name: str | None = None) -> list[tuple[int, str]]:
    """(line number, line) of every line that is not blank."""
    lines = read_text(path, expected, name).split("\n")  # not splitlines: U+2028 may stand in JSON
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_json(text: str | bytes, where: str, expected: str = "JSON") -> Any:
    """The value, with at most DEPTH levels, integers of at most DIGITS digits, and text that UTF-8 can encode."""
    try:
        value = json.loads(text, parse_int=_integer)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        problem = "half of a surrogate pair in a string, such as \\ud800"
    except Exception as error:
        problem = cause(error)
    raise UserError(f"{where} is not JSON ({problem}); expected {expected}")


def read_json(path: Path, expected: str, name: str | None = None) -> dict[str, Any]:
    """The JSON object in a file."""
    value = parse_json(read_text(path, expected, name), name or str(path), expected)
    if not isinstance(value, dict):
        raise UserError(f"{name or path} holds a {type(value).__name__}; expected {expected}")
    return value


def cause(error: BaseException) -> str:
    """An exception's message, as part of one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    line = next(iter(text.strip().splitlines()), "")
    if not line or isinstance(error, LookupError | TypeError | AttributeError):  # their messages say little
        line = f"{type(error).__name__} {line}".strip()
    return line if len(line) <= 200 else line[:197] + "..."


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; expected at most {DIGITS}")
    return int(digits)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        child
        for one in level
        if isinstance(one, list | dict)
        for child in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"lists and objects nested more than {DEPTH} deep")
