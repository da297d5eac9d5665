"""What the ledger's tables say that each pass compares with, kept between passes by the one who writes them.

Reading 5000 levels and accounts anew takes longer than all the rest of a pass in which little happens. What is
kept is never the truth, only a copy of it: it is thrown away when a pass fails, and when another connection
wrote the file (``partitiond sync usage`` beside a daemon that is just starting) or recorded a pass. Only
``accounting.posting`` writes the tables level, process, account and gauge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accounting.settle import Books, Level, Meter, ProcessKey, ProcessLevel
from accounting.store import PROCESSES, READINGS

if TYPE_CHECKING:
    import sqlite3

    from accounting.settle import Settlement


@dataclass(slots=True)
class Memory:
    """The tables as of the pass ``seq``; ``accounts`` are those of ``owners`` (partition → owner).

    ``gauges`` has id and value by owner and name.
    """

    version: int
    seq: int
    levels: dict[Meter, Level]
    processes: dict[ProcessKey, ProcessLevel]
    gauges: dict[tuple[int, str], tuple[int, int]]
    accounts: dict[Meter, int] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    def holds(self, connection: sqlite3.Connection) -> bool:
        """Say whether that is still what the file says; to be asked inside the transaction of the pass."""
        return (self.version, self.seq) == (_version(connection), last_seq(connection))

    def books(self, connection: sqlite3.Connection) -> Books:
        """Give what a pass is settled against."""
        pending = {what for (what,) in connection.execute("SELECT what FROM pending")}
        return Books(self.levels, self.processes, READINGS in pending, PROCESSES in pending)

    def accounts_of(self, connection: sqlite3.Connection, owners: dict[str, int]) -> dict[Meter, int]:
        """Give the accounts of the present owners by meter; whoever opens one adds it."""
        if owners != self.owners:
            rows = connection.execute(
                "SELECT account.id, partition, name, address, family, scope FROM account"
                " JOIN owner ON owner.id = account.owner WHERE until_seq IS NULL"
            )
            self.accounts = {Meter(p, n, a, f, s): account for account, p, n, a, f, s in rows}
            self.owners = owners
        return self.accounts

    def posted(self, seq: int, settled: Settlement) -> None:
        """Take in what the pass ``seq`` has changed; call it once that is committed."""
        self.seq = seq
        self.levels.update(settled.levels)
        for key in settled.ended:
            del self.processes[key]
        self.processes.update(settled.processes)


def read(connection: sqlite3.Connection) -> Memory:
    """Read the tables, inside the transaction of a pass."""
    return Memory(
        _version(connection),
        last_seq(connection),
        {
            Meter(p, n, a, f, s): Level(epoch, (v, w, x, y, z))
            for p, n, a, f, s, epoch, v, w, x, y, z in connection.execute("SELECT * FROM level")
        },
        {
            ProcessKey(pid, started, boot): ProcessLevel(*level)
            for pid, started, boot, *level in connection.execute(
                "SELECT pid, started, boot, partition, cpu, io_read, io_written, parent FROM process"
            )
        },
        {
            (owner, name): (gauge, value)
            for gauge, owner, name, value in connection.execute("SELECT id, owner, name, value FROM gauge")
        },
    )


def last_seq(connection: sqlite3.Connection) -> int:
    """Give the number of the last pass, 0 where there is none."""
    row = connection.execute("SELECT max(seq) FROM pass").fetchone()
    return int(row[0] or 0)


def _version(connection: sqlite3.Connection) -> int:
    """Give what changes whenever another connection commits, and never by our own commits (PRAGMA data_version)."""
    return int(connection.execute("PRAGMA data_version").fetchone()[0])
