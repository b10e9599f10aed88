"""Judges' replies, kept in a SQLite file by digest of the question, so nothing is asked twice."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdro.common.errors import UserError


class Replies:
    """An open file of replies. A reply is safe once `keep` returns, even if the process is killed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, key: str) -> str | None:
        """The reply kept under `key`; None without one."""
        row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def keep(self, key: str, reply: str) -> None:
        """Keep the reply under `key`, in place of any other."""
        self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))


@contextmanager
def open_replies(file: str | None) -> Iterator[Replies]:
    """The file, created if missing (None: gdro/judge.sqlite in the user's cache); several processes may use it.

    Raises UserError, also from within the block, if it is damaged or cannot be written.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = cache / "gdro" / "judge.sqlite" if file is None else Path(file).expanduser()
    except RuntimeError as error:  # no HOME
        raise UserError(f"judge cache: {file or 'the default'} has no place ({error}); expected a path") from None
    connection = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise sqlite3.OperationalError(error.strerror) from None
        # used by one thread at a time, not necessarily this one
        connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        _use_wal(connection)
        connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        yield Replies(connection)
    except sqlite3.Error as error:
        raise UserError(f"judge cache: {path} cannot be used ({error}); expected a writable SQLite file") from None
    finally:
        if connection is not None:
            connection.close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead log: commits need no fsync, and a killed process loses none. Needs a local disk."""
    until = time.monotonic() + 60
    while True:  # the busy timeout does not cover this switch, which two processes may make at once
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous = NORMAL")
