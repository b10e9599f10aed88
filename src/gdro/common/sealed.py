"""gdro's own files contain a digest of themselves, so what is read is what was written.

A *record* is a JSON object with its digest as the last field. A *sealed* parquet file has two digests in its footer: of
the footer itself, which every reader checks, and of the pages, which only `gdro verify` checks (pages also have
checksums of their own). All other files are listed, with their digests, in one of these.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.files import remake, write_bytes
from gdro.common.reading import check_regular, parse_json, read_bytes, reading

DIGEST = "digest"
AGAIN = {
    "evaluation.json": "run `gdro evaluate` again",
    "summary.json": "run `gdro report` again",
    "seconds.json": "run again: only the seconds so far are lost",
    "_sampling.json": "run `gdro sample` (or `evaluate`) again",
    "_importing.json": "run `gdro import` again",
    "standard.json": "run `gdro score` again",
    "best.json": "run `gdro train` again",
    "stopped.json": "run `gdro train` again",
    "made_with.json": "run `gdro compare` again",
    "failed.json": "run `gdro compare` again",
    "images.json": "run `gdro unigenbench` again",
}
"""How to recreate each record."""
_FOLDERS = ("_sampling.json", "_importing.json", "made_with.json")  # records about their whole folder

_PAGES, _FOOTER = b"gdro.pages", b"gdro.footer"
_LENGTH = 64
_found: dict[Path, tuple[Any, ...]] = {}  # known digests of files, with the stat fields that change when a file does


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and its digest, atomically."""
    plain = json.loads(json.dumps(value))  # keys as they will be read
    text = json.dumps({**plain, DIGEST: _of(plain)}, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote. UserError if the file is missing or altered."""
    again = remake(path.parent if path.name in _FOLDERS else path, AGAIN[path.name])
    data = read_bytes(path, "the file that gdro wrote")
    try:
        return parse_record(data)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); expected it as gdro wrote it{again}") from None


def find_record(path: Path) -> dict[str, Any] | None:
    """`read_record`, or None without the file."""
    return read_record(path) if path.exists() else None


def parse_record(data: bytes) -> dict[str, Any]:
    """The object of a record. Raises ValueError saying what is wrong."""
    try:
        value = parse_json(data, "it")
    except UserError as error:
        raise ValueError(str(error)) from None
    digest = value.pop(DIGEST, None) if isinstance(value, dict) else None
    if digest is None:
        raise ValueError(f'it has no "{DIGEST}", as files of this version of gdro do')
    if digest != _of(value):
        raise ValueError("its bytes were altered")
    return dict(value)


def row_digest(row: Mapping[str, Any]) -> str:
    """A short digest of a log's row."""
    return _of(json.loads(json.dumps(row)))[:16]


def check_bytes(path: Path, digest: str, what: str) -> None:
    """Raise UserError unless the file's sha256 is `digest`; hashed once per process, unless it changes."""
    check_regular(path, what)
    status = os.stat(path)
    known = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _found.get(path) != (*known, digest):
        with reading(path, what), open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise UserError(f"{path} is damaged: its bytes were altered; expected {what}")
        _found[path] = (*known, digest)


def forget() -> None:
    """Hash every file again from now on: one damaged in place may look unchanged."""
    _found.clear()


def unsealed() -> dict[str, str]:
    """The entries of a parquet file's metadata that `seal` fills in."""
    return {name.decode(): "0" * _LENGTH for name in (_PAGES, _FOOTER)}


def seal(path: Path) -> None:
    """Fill in the digests of a parquet file written with the metadata `unsealed()`."""
    with open(path, "rb+") as file:
        start, footer = _footer(path)
        footer = _with(footer, _PAGES, _of_pages(path, start))
        footer = _with(footer, _FOOTER, hashlib.sha256(footer).hexdigest())
        file.seek(start)
        file.write(footer)


def check_footer(path: Path) -> None:
    """Raise ValueError unless the parquet file's footer (schema, metadata, page locations) is as sealed."""
    _, footer = _footer(path)
    place = _place(footer, _FOOTER)
    blank = footer[:place] + b"0" * _LENGTH + footer[place + _LENGTH :]
    if hashlib.sha256(blank).hexdigest().encode() != footer[place : place + _LENGTH]:
        raise ValueError("its footer was altered")


def check_pages(path: Path) -> None:
    """Raise ValueError unless everything before the footer is as sealed."""
    start, footer = _footer(path)
    place = _place(footer, _PAGES)
    if _of_pages(path, start).encode() != footer[place : place + _LENGTH]:
        raise ValueError("its pages were altered")


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _footer(path: Path) -> tuple[int, bytes]:
    """(offset of a parquet file's footer, its bytes to the end)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        end = file.read()
        start = size - 8 - int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or start < 4:
            raise ValueError("it does not end as a parquet file does")
        file.seek(start)
        return start, file.read()


def _place(footer: bytes, name: bytes) -> int:
    """The offset of a metadata entry's value: Thrift writes the name, the value's type and length, then the value."""
    head = name + b"\x18" + bytes([_LENGTH])
    place = footer.rfind(head)
    if place < 0:
        raise ValueError("it has no digest; expected a file of this version of gdro")
    return place + len(head)


def _with(footer: bytes, name: bytes, digest: str) -> bytes:
    place = _place(footer, name)
    return footer[:place] + digest.encode() + footer[place + _LENGTH :]


def _of_pages(path: Path, length: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while length and (part := file.read(min(length, 1 << 20))):
            total.update(part)
            length -= len(part)
    return total.hexdigest()
