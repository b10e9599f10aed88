"""Environment variables that gdro or its libraries read as numbers: a wrong one is reported before any work."""

import os
import re
import traceback
from math import isfinite

from gdro.common.errors import UserError

LARGEST = 2**31 - 1
NUMBERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "SOURCE_DATE_EPOCH")
BAR = ("MININTERVAL", "MAXINTERVAL", "MINITERS", "NCOLS", "NROWS", "POSITION", "DELAY", "SMOOTHING", "INITIAL", "TOTAL")
NAME = re.compile(r"\b[A-Z]+_[A-Z_]+\b")
READ = re.compile(r"""(?:environ(?:\.get)?|getenv)[\[(]\s*["']([A-Za-z0-9_]+)["']""")


def check() -> None:
    """Raise UserError for a variable that is not a number where one is read."""
    threads()
    for name in NUMBERS:
        whole(name, 0)
    for name in (f"TQDM_{setting}" for setting in BAR):
        try:
            fine = isfinite(float(os.environ.get(name, "0")))
        except ValueError:
            fine = False
        if not fine:
            raise _refused(name, "a number")
    processes = world_size()
    if processes > 1:
        launcher = "; torchrun or accelerate launch sets it"
        for name in ("RANK", "LOCAL_RANK"):
            whole(name, 0, processes - 1, required=launcher)
        whole("MASTER_PORT", 1, 65535, required=launcher)
        whole("LOCAL_WORLD_SIZE", 1, processes)
        if not os.environ.get("MASTER_ADDR"):
            raise _refused("MASTER_ADDR", f"an address{launcher}")


def world_size() -> int:
    """How many processes the launcher started; 1 without one."""
    return whole("WORLD_SIZE", 1) or 1 if os.environ.get("WORLD_SIZE") else 1


def is_first() -> bool:
    """Whether this is the first or only process, as far as the launcher's variables can be read."""
    rank, size = (_number(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE"))
    return not (rank and size and rank < size)


def threads() -> int | None:
    """OMP_NUM_THREADS, or the first entry if it is a list (for nested regions). None if it is empty or not set."""
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    numbers = [_number(part.strip()) for part in value.split(",")]
    if value and not all(numbers):
        raise _refused("OMP_NUM_THREADS", "a number from 1")
    return numbers[0]


def whole(name: str, least: int, most: int = LARGEST, *, required: str | None = None) -> int | None:
    """The variable's number; None if not set, which raises UserError with the text of `required` if given."""
    value = os.environ.get(name)
    if value is None and required is None:
        return None
    number = _number(value or "")
    if number is None or not least <= number <= most:
        bounds = f"from {least}" if most == LARGEST else f"from {least} to {most}"
        raise _refused(name, f"a whole number {bounds}{required or ', or no such variable'}")
    return number


def blamed(error: BaseException) -> str | None:
    """The variable that is set and that a library was reading when it raised `error`, or that a ValueError mentions."""
    lines = [frame.line or "" for frame in reversed(traceback.extract_tb(error.__traceback__))]
    names = [name for line in lines for name in READ.findall(line)]
    if isinstance(error, ValueError):
        names += NAME.findall(str(error))
    return next((name for name in names if name in os.environ), None)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,10}", text) else None


def _refused(name: str, expected: str) -> UserError:
    found = f'"{os.environ[name]:.100}"' if name in os.environ else "not set"
    return UserError(f"{name} is {found}; expected {expected}")
