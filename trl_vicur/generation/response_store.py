"""A file that stores each response as it arrives, so that a run can be killed at any moment and resumed."""

import errno
import json
import sqlite3
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .requests import ChatResponse


APPLICATION_ID = 0x56694352  # "ViCR": marks SQLite files of this module


class ResponseStore:
    """
    Responses by number in a SQLite file. When `add` returns, the response is on disk; a killed process loses none.
    Only one process can have a store open.

    Args:
        path (`str` or `Path`):
            The file; created if it does not exist.
        settings (`dict[str, Any]`):
            Everything that the responses depend on, JSON-serializable.

    Raises:
        `ValueError`: If the file contains responses for other settings (the error names them), or is not a response
            store.
        `BlockingIOError`: If another process has the file open.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        # One thread uses the store, but another one may close it
        self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            with self._explain_errors():
                self._open(settings)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        execute = self._connection.execute
        # With exclusive locking, a second process fails instead of repeating all work, and SQLite needs no shared
        # memory, which network file systems lack. With the write-ahead log, a commit is one write at the end of a file
        execute("PRAGMA locking_mode = EXCLUSIVE")
        (application_id,) = execute("PRAGMA application_id").fetchone()
        is_new = application_id == 0 and not execute("SELECT name FROM sqlite_master").fetchall()
        if not is_new and application_id != APPLICATION_ID:
            raise ValueError(f"{str(self.path)!r} is a SQLite file of another program. Choose another output.")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute("BEGIN EXCLUSIVE")
        if is_new:
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            execute("CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT)")
            execute("CREATE TABLE responses (number INTEGER PRIMARY KEY, text TEXT, error TEXT, seed INTEGER)")
            rows = [(name, json.dumps(value)) for name, value in settings.items()]
            self._connection.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        execute("COMMIT")
        # Round-trip through JSON, which turns tuples into lists, for example
        expected = json.loads(json.dumps(settings))
        found = {name: json.loads(value) for name, value in execute("SELECT name, value FROM settings")}
        if found != expected:
            differences = [
                f"{name} was {found.get(name)!r} and is {expected.get(name)!r}"
                for name in sorted(found.keys() | expected.keys())
                if found.get(name) != expected.get(name)
            ]
            raise ValueError(
                f"{str(self.path.parent)!r} was begun with other settings: {'; '.join(differences)}. Texts of both "
                "would be mixed. Use the same settings to resume, or choose another output."
            )

    def add(self, responses: list[ChatResponse], seed: int | None = None) -> None:
        """
        Write responses in one transaction; they replace earlier responses of the same numbers.

        Raises:
            `OSError`: If the disk is full. Responses that were written before are kept.
        """
        rows = [(*response, seed) for response in responses]
        with self._explain_errors():
            self._connection.execute("BEGIN")
            try:
                self._connection.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def pending(self, numbers: Sequence[int], retry_failed: bool = False) -> Sequence[int]:
        """The numbers without a response, in the given order. `retry_failed` includes those with an error."""
        # This needs one byte per number, and eight in the result; a set would need about sixty
        done = bytearray(max(numbers, default=-1) + 1)
        condition = "WHERE error IS NULL" if retry_failed else ""
        for (number,) in self._connection.execute(f"SELECT number FROM responses {condition}"):
            if number < len(done):
                done[number] = 1
        return array("q", (number for number in numbers if not done[number]))

    def count(self) -> tuple[int, int]:
        """Number of all responses, and of those with an error."""
        return self._connection.execute("SELECT count(*), count(error) FROM responses").fetchone()

    def __iter__(self) -> Iterator[tuple[int, str | None, str | None, int | None]]:
        """All responses as `(number, text, error, seed)`, sorted by number."""
        yield from self._connection.execute("SELECT number, text, error, seed FROM responses ORDER BY number")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "ResponseStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF  # SQLite's primary code, without the extended part
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise BlockingIOError(
                    errno.EAGAIN, "Another process is writing to the file. Wait for it, or stop it", str(self.path)
                ) from error
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise OSError(
                    errno.ENOSPC,
                    f"The disk is full or cannot be written to ({error}). All finished texts are kept; free some "
                    "space and run the same command again",
                    str(self.path),
                ) from error
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{str(self.path)!r} is not a trl-vicur response store, or is corrupt: {error}."
            ) from error


@contextmanager
def open_store(folder: str | Path | None, name: str, settings: dict[str, Any]) -> Iterator[ResponseStore]:
    """Open the store `name` in a folder, which is created if needed; without a folder, in a temporary one."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        with ResponseStore(Path(place) / name, settings) as store:
            yield store


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that the responses in a store were generated with."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM settings")}
    finally:
        connection.close()
