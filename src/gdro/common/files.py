"""Atomic files: every file is written to a temporary path beside it, synced, then renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is synced and renamed to `path`, otherwise removed.

    Any failure leaves the old file unchanged. Raises UserError naming `path` if writing fails (full disk, no
    permission).
    """
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    if "\0" in str(path):
        raise UserError(f"{path} contains a NUL; expected a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}; nothing was changed") from error
    finally:
        with suppress(OSError):
            os.unlink(tmp)


def sync_folder(folder: Path) -> None:
    """Force the folder's entries to disk; not possible, and not needed, on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically; UserError if that fails."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically; UserError if that fails."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def discard(folder: Path) -> None:
    """Delete a folder if it exists; it is renamed first, so no partial folder is ever taken for a complete one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


# Files gdro leaves in its folders: the copy of a run's configuration, records of what a store was made from.
MARKS = (".config.yaml", "_sampling.json", "_importing.json")


def is_own(path: Path) -> bool:
    """Whether gdro made `path`: one of the folders around it has gdro's mark.

    Checked before advising anyone to delete it.
    """
    return any((folder / mark).is_file() for folder in list(path.absolute().parents)[:4] for mark in MARKS)


def remake(path: Path, how: str) -> str:
    """`: delete PATH and HOW` if gdro made it, otherwise nothing."""
    return f": delete {path} and {how}" if is_own(path) else ""


def sweep(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted in `folder`; no other may be using it."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.(tmp|tmp-\d+|deleted)", path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sweep_below(out: Path, folders: Iterable[str]) -> None:
    """`sweep` for `out`, which may also hold other files, and for all of its own `folders`."""
    for path in out.glob(".*"):
        if re.fullmatch(r"\..+\.tmp-\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)
    for name in folders:
        shutil.rmtree(out / f".{name}.deleted", ignore_errors=True)
        for folder, _, _ in os.walk(out / name):
            sweep(Path(folder))


def fingerprint(*parts: Any) -> str:
    """12 hex digits identifying JSON-able values, regardless of key order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
