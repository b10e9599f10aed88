"""The study's database, `arena.sqlite`: models, pairs, and one row per vote, readable by any SQLite client.

A vote is committed (and synced) before `record` returns, hence before anything else is shown. Every row has a digest of
its other columns, so what is read is what was written.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.validation import show
from gdro.tools.arena.pairs import Pair, Shown

FILE = "arena.sqlite"
QUESTIONS = {
    "text accuracy": "Which image writes the prompt’s text more accurately? A tie if the prompt asks for no text.",
    "alignment": "Which image better shows what the prompt describes?",
    "quality": "Which image has better visual quality?",
}
"""The paper's three questions; the keys name them in the database and the table."""
CHOICES = ("a", "tie", "b")

_RESTORE = "restore a copy of it, or begin another study in a new --out"

_FORMAT = 2
_SCHEMA = """
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE pairs (
    pair INTEGER PRIMARY KEY, group_id TEXT NOT NULL, prompt TEXT NOT NULL, image INTEGER NOT NULL,
    first TEXT NOT NULL, second TEXT NOT NULL, digest TEXT NOT NULL
);
CREATE TABLE votes (
    vote INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, pair INTEGER NOT NULL REFERENCES pairs,
    question TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL, choice TEXT NOT NULL CHECK (choice IN ('a', 'tie', 'b')),
    voted_at TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (rater, pair, question)
);
"""
_STUDY = "SELECT name, value, digest FROM study ORDER BY name"
_PAIRS = "SELECT pair, group_id, prompt, image, first, second, digest FROM pairs ORDER BY pair"
_VOTES = "SELECT rater, pair, question, a, b, choice, voted_at, digest FROM votes"


@dataclass(frozen=True)
class Study:
    """What was fixed when the study began: model names, pairs by number, and the seed and secret for dealing them."""

    models: list[str]
    pairs: dict[int, Pair]
    seed: int
    secret: bytes


@dataclass(frozen=True)
class Vote:
    """One answer of one rater: `a` and `b` are the models shown there, `choice` one of CHOICES."""

    rater: str
    pair: int
    question: str
    a: str
    b: str
    choice: str

    @property
    def winner(self) -> str | None:
        """The model preferred; None for a tie."""
        return {"a": self.a, "b": self.b}.get(self.choice)


class Votes:
    """Opens the database in `folder` (the study's folder), or creates it. Thread-safe.

    Raises UserError if there is none and `begin` is false, or if the file is not such a database.
    """

    def __init__(self, folder: Path, *, begin: bool = False) -> None:
        self.path = folder / FILE
        if not begin and not os.path.isfile(self.path):
            raise UserError(f"{folder} has no {FILE}; expected a study's folder (`gdro arena RUN --out {folder}`)")
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = DELETE")  # votes in a separate log could be lost with it
            self._db.execute("PRAGMA synchronous = FULL")  # a commit survives a power failure
            self._db.execute("PRAGMA foreign_keys = ON")
            with self._transaction() as db:
                found = db.execute("PRAGMA user_version").fetchone()[0]
                empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if found == 0 and empty:
                    for statement in _SCHEMA.split(";\n")[:-1]:
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {_FORMAT}")
                elif found != _FORMAT:
                    raise UserError(f"{self.path} has format {found}; expected {_FORMAT}, as `gdro arena` writes it")
                problem = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
                if problem != "ok":
                    raise UserError(f"{self.path} is damaged ({problem.splitlines()[-1]}); {_RESTORE}")
                for query in (_STUDY, _PAIRS, _VOTES):
                    self._rows(db, query)
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {error}; expected the SQLite database of a study; {_RESTORE}") from None

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def begin(self, models: Mapping[str, str], pairs: Sequence[Pair], seed: int) -> None:
        """Create the study, or resume the existing one; additional pairs are added to it.

        `models`: names and digests of their images. Raises UserError if images, models or seed differ from those the
        study was begun with, or if some of its pairs are missing.
        """
        with self._transaction() as db:
            begun = dict(self._rows(db, _STUDY))
            if not begun:
                begun = {"models": json.dumps(models), "seed": str(seed), "secret": secrets.token_hex(32)}
                db.executemany("INSERT INTO study VALUES (?, ?, ?)", [(*row, _digest(row)) for row in begun.items()])
            was = json.loads(begun["models"])
            if was.keys() != models.keys():
                raise UserError(f"{self.path} compares {', '.join(was)}, not {', '.join(models)}; expected those")
            for name, digest in models.items():
                if was[name] != digest:
                    raise UserError(
                        f"{self.path} was begun with other images of {name}; expected the same, or a new --out"
                    )
            if int(begun["seed"]) != seed:
                raise UserError(f"--seed is {seed}, {self.path} was begun with {begun['seed']}; expected that")
            had = db.execute("SELECT count(*) FROM pairs").fetchone()[0]
            if len(pairs) < had:
                raise UserError(f"--pairs is {len(pairs)}, {self.path} has {had}; expected at least as many")
            rows = [(n, p.group, p.prompt, p.index, p.first, p.second) for n, p in enumerate(pairs)]
            new = [(*row, _digest(row)) for row in rows[had:]]
            db.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?)", new)

    def study(self) -> Study | None:
        """The study begun here; None if there is none."""
        with self._lock:
            begun = dict(self._rows(self._db, _STUDY))
            pairs = {number: Pair(*rest) for number, *rest in self._rows(self._db, _PAIRS)}
        if not begun:
            return None
        return Study(list(json.loads(begun["models"])), pairs, int(begun["seed"]), bytes.fromhex(begun["secret"]))

    def record(self, rater: str, shown: Shown, question: str, choice: str) -> bool:
        """Commit a vote; repeating it changes nothing. False if another choice is recorded: undo that first."""
        with self._transaction() as db:
            row = (rater, shown.number, question, *shown.models, choice, datetime.now(UTC).isoformat())
            db.execute(
                "INSERT INTO votes (rater, pair, question, a, b, choice, voted_at, digest) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rater, pair, question) DO NOTHING",
                (*row, _digest(row)),
            )
            key = (rater, shown.number, question)
            stands = db.execute("SELECT choice FROM votes WHERE rater = ? AND pair = ? AND question = ?", key)
            return bool(stands.fetchone()[0] == choice)

    def undo(self, rater: str, pair: int, question: str) -> bool:
        """Remove the rater's last vote if it is this one; on a second call another one is the last."""
        with self._transaction() as db:
            key = (rater, rater, pair, question)
            return bool(
                db.execute(
                    "DELETE FROM votes WHERE vote = (SELECT max(vote) FROM votes WHERE rater = ?) "
                    "AND rater = ? AND pair = ? AND question = ?",
                    key,
                ).rowcount
            )

    def all(self, rater: str | None = None) -> list[Vote]:
        """All votes, or one rater's, in order."""
        where, values = ("", ()) if rater is None else (" WHERE rater = ?", (rater,))
        with self._lock:
            rows = self._rows(self._db, f"{_VOTES}{where} ORDER BY vote", values)
        return [Vote(*row[:-1]) for row in rows]

    def _rows(self, db: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows, without their digests, which are checked."""
        rows = db.execute(query, values).fetchall()
        for *row, digest in rows:
            if _digest(row) != digest:
                raise UserError(f"{self.path} is damaged: the row {show(row)} was altered; {_RESTORE}")
        return [row[:-1] for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _digest(row: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()[:16]
