"""The file of the ledger: how it is opened, written in transactions, and set aside when damaged."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from accounting.errors import AccountingError
from accounting.schema import APPLICATION_ID, VERSION, statements

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUSY_SECONDS = 5.0
_SIDE_FILES = ("", "-wal", "-shm")

READINGS = "readings"  # rows of table pending
PROCESSES = "processes"

# Primary result codes, https://sqlite.org/rescode.html
_CODES = {
    sqlite3.SQLITE_CORRUPT: "accounting.ledger_damaged",
    sqlite3.SQLITE_NOTADB: "accounting.ledger_damaged",
    sqlite3.SQLITE_FULL: "accounting.ledger_full",
    sqlite3.SQLITE_BUSY: "accounting.ledger_busy",
    sqlite3.SQLITE_LOCKED: "accounting.ledger_busy",
}
_HINTS = {
    "accounting.ledger_damaged": "the next pass, or a restart of partitiond, sets the file aside and begins a new one",
    "accounting.ledger_full": "make space on its file system; the next pass makes up for it",
    "accounting.ledger_busy": "look for another partitiond that writes it; the next pass makes up for it",
    "accounting.ledger_unavailable": "check directory, rights and file system; the next pass makes up for it",
}


def microseconds(at: float) -> int:
    """Give Unix time as the ledger keeps it: whole, so that a report's text leads to the same moment."""
    return round(at * 1_000_000)


def was_begun(path: Path) -> bool:
    """Whether there was a ledger at ``path`` ever: where there is none now, it was moved away. Raises AccountingError."""
    with ledger_errors(path):
        return _mark(path).exists()


def note_begun(path: Path) -> None:
    """Remember that there is a ledger, before anything is counted in it. Raises AccountingError."""
    with ledger_errors(path), suppress(FileExistsError):
        os.close(os.open(_mark(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _sync_directory(path)


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.stem}.begun")


def open_writer(path: Path, *, empty: bool = True) -> sqlite3.Connection:
    """Open the ledger for writing, make it where there is none.

    Raises AccountingError: ``accounting.ledger_damaged`` after a check of the whole file (some six
    seconds per gigabyte), and where there is nothing in it unless it may be ``empty``;
    ``accounting.ledger_version``, ``accounting.ledger_busy``, ``accounting.ledger_full``,
    ``accounting.ledger_unavailable``.
    """
    with ledger_errors(path):
        _private_file(path)
        connection = _connect(path.absolute().as_uri() + "?mode=rw")
        try:
            if not empty and _version(connection, path) == 0:
                raise _damaged(path, "there is nothing in it")
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """Open the ledger for reading only, also while a daemon writes; an empty one where there is none.

    Raises AccountingError ``accounting.ledger_damaged``, ``…_version``, ``…_busy``, ``…_unavailable``.
    """
    with ledger_errors(path):
        if not path.exists():
            connection = _connect(":memory:")
            _upgrade(connection, 0)
            return connection
        uri = path.absolute().as_uri() + "?mode=ro"
        try:
            return _open_to_read(uri, path)
        except sqlite3.OperationalError:
            # A reader of a WAL database makes the -shm file, which a read-only file system refuses. There
            # nobody writes either, so the file may be taken as immutable, provided nothing is left in the
            # WAL.
            log = path.with_name(path.name + "-wal")
            if os.access(path.parent, os.W_OK) or (log.exists() and log.stat().st_size > 0):
                raise
            return _open_to_read(uri + "&immutable=1", path)


def name_aside(path: Path, at: float) -> Path:
    """Give a name that is not taken, for a ledger found damaged at ``at``."""
    stem = f"{path.name}.damaged-{datetime.fromtimestamp(at, UTC):%Y%m%dT%H%M%SZ}"
    target, number = path.with_name(stem), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{stem}-{number}")
    return target


def last_written(path: Path) -> float | None:
    """Give the Unix time at which a ledger was last written, as far as its file system knows."""
    times = []
    for suffix in ("", "-wal"):
        with suppress(OSError):
            times.append(path.with_name(path.name + suffix).stat().st_mtime)
    return max(times, default=None)


def open_fresh(path: Path) -> sqlite3.Connection:
    """Begin a ledger beside that of ``path``; close it before ``exchange``. Raises like ``open_writer``."""
    with ledger_errors(path):
        for suffix in _SIDE_FILES:
            _fresh(path, suffix).unlink(missing_ok=True)
    return open_writer(_fresh(path))


def exchange(path: Path, aside: Path) -> None:
    """Keep the ledger ``path`` as ``aside`` and put the one of ``open_fresh`` in its place, in one step.

    Raises AccountingError ``accounting.ledger_unavailable``. No connection to either may be open in this
    process.
    """
    with ledger_errors(path):
        log = path.with_name(path.name + "-wal")
        nothing_logged = not log.exists() or log.stat().st_size == 0
        # Its WAL goes first: left beside another database it would be taken for that one's. Without it, the
        # old file is as it was some passes ago, which is consistent too.
        for suffix in _SIDE_FILES[1:]:
            side = path.with_name(path.name + suffix)
            with suppress(FileNotFoundError):
                if nothing_logged:
                    side.unlink()
                else:
                    side.rename(aside.with_name(aside.name + suffix))
        _take_place(path, aside)


def place(path: Path) -> tuple[int, int] | None:
    """Tell the file at ``path`` from every other; ``None`` where there is none. Raises AccountingError."""
    with ledger_errors(path):
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def put_back(connection: sqlite3.Connection, path: Path, aside: Path) -> None:
    """Write the ledger of an open connection to ``path`` anew, where its file is not any more; keep what is there as ``aside``.

    Close the connection afterwards. Killed at any instruction, either what was there still is, or all of the ledger.
    Raises AccountingError ``accounting.ledger_…``; the connection can still be used then.
    """
    with ledger_errors(path):
        # Page for page: if a WAL of the old file is left beside the new one, it holds pages that are the same.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        for suffix in _SIDE_FILES:
            _fresh(path, suffix).unlink(missing_ok=True)
        _private_file(_fresh(path))
        target = _connect(_fresh(path).absolute().as_uri() + "?mode=rw")
        try:
            target.execute("PRAGMA synchronous = FULL")
            connection.backup(target)
        finally:
            target.close()
        _take_place(path, aside)


def _take_place(path: Path, aside: Path) -> None:
    # somebody may have removed it
    with suppress(FileNotFoundError):
        aside.hardlink_to(path)
    _fresh(path).replace(path)
    _sync_directory(path)


def _sync_directory(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _fresh(path: Path, suffix: str = "") -> Path:
    return path.with_name(f"{path.name}.new{suffix}")


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All or nothing; a commit that fails is rolled back too, so that the connection stays usable."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After some errors SQLite has rolled back by itself; and the first error is the one to tell.
        with suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into AccountingError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        primary = getattr(error, "sqlite_errorcode", -1) & 0xFF
        code = _CODES.get(primary, "accounting.ledger_unavailable")
        raise AccountingError(
            code,
            f"the usage ledger {path}: {error}",
            resource=str(path),
            hint=_HINTS[code],
            retryable=code != "accounting.ledger_damaged",
        ) from error


def _connect(uri: str) -> sqlite3.Connection:
    # Statements are begun and ended by hand (isolation_level). Which thread calls is the Ledger's business:
    # it locks.
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _private_file(path: Path) -> None:
    """Make the file with mode 0600 before SQLite does with another; -wal and -shm take their mode from it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        # By name: closing any descriptor of the file drops this process's POSIX locks on it, those of an open
        # connection included (https://sqlite.org/howtocorrupt.html, section 2.2).
        path.chmod(0o600)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if _version(connection, path) == 0:
        # Lets thinning give pages back later; it can only be set before the first table, and in no
        # transaction.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    # FULL: the WAL is synced at each commit. A power cut then loses what was counted since the last pass
    # and no more. With NORMAL it is synced at checkpoints only, so a power cut would lose minutes; and as
    # it also sets the kernel's counters back to zero, the next pass could not make up for that. One sync
    # per pass costs nothing. A killed daemon loses nothing either way.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_size_limit = 16777216")
    # A pass at 500 partitions writes some 250 pages, nearly the same each time: the fewer checkpoints, the less is written.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    with transaction(connection):
        # asked again: another process may have been first
        _upgrade(connection, _version(connection, path))
    _check(connection, path)


def check(path: Path) -> None:
    """Read a whole ledger, past what an open connection has of it in memory. Raises AccountingError ``accounting.ledger_…``."""
    with ledger_errors(path), closing(open_reader(path)) as connection:
        _check(connection, path)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    answer = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if answer != "ok":
        raise _damaged(path, answer.strip())


def _damaged(path: Path, what: str) -> AccountingError:
    code = "accounting.ledger_damaged"
    return AccountingError(code, f"the usage ledger {path}: {what}", resource=str(path), hint=_HINTS[code])


def _upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring tables of an older version to ours, those of version 0 from nothing."""
    for statement in statements(version):
        connection.execute(statement)


def _open_to_read(uri: str, path: Path) -> sqlite3.Connection:
    connection = _connect(uri)
    try:
        if _version(connection, path) == 0:  # the daemon is just making it
            connection.close()
            connection = _connect(":memory:")
            _upgrade(connection, 0)
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Give the schema's version, 0 if there is none; raises ``accounting.ledger_version`` if not ours or newer."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    objects = int(connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
    if (version, application, objects) == (0, 0, 0):
        return 0
    if application == APPLICATION_ID and 0 < version <= VERSION:
        return version
    what = "is of version" if application == APPLICATION_ID else "is another program's database, version"
    raise AccountingError(
        "accounting.ledger_version",
        f"the usage ledger {path} {what} {version}, this partitiond writes version {VERSION}",
        resource=str(path),
        hint="use the partitiond that wrote it, or move the file away: a new one is begun, which counts from then on; what the"
        " file has counted and not reported is in no report then",
    )
