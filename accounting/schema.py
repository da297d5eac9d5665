"""The tables of the ledger, as text.

Everything that grows is appended in the order of ``seq``, so a pass writes few pages; there is deliberately
no index by account. Times are in microseconds of Unix time, processor time in microseconds, all else in
bytes and packets.
"""

from __future__ import annotations

VERSION = 2
APPLICATION_ID = 0x50444C47  # "PDLG": tells our file from anybody else's database

AMOUNT_COLUMNS = ("bytes_in", "bytes_out", "packets_in", "packets_out", "quantity")
_AMOUNTS = ", ".join(f"{column} INTEGER NOT NULL" for column in AMOUNT_COLUMNS)

_FIRST = f"""
-- One row per pass. seq is the order in which passes happened and never goes back; at is the wall clock
-- then, which may. Thinning joins old passes: their samples move to the last of them, whose previous_at
-- becomes the first's.
CREATE TABLE pass (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, previous_at INTEGER) STRICT;
CREATE INDEX pass_at ON pass (at);

-- Who held a partition ('' for nobody), from the pass first_seq until before the pass until_seq (NULL:
-- holds it now).
CREATE TABLE owner (
    id INTEGER PRIMARY KEY, partition TEXT NOT NULL, guid TEXT NOT NULL,
    first_seq INTEGER NOT NULL, until_seq INTEGER, UNIQUE (partition, guid)
) STRICT;

-- How far each counter of the kernel had come, whoever is charged.
CREATE TABLE level (
    partition TEXT NOT NULL, name TEXT NOT NULL, address TEXT NOT NULL, family TEXT NOT NULL, scope TEXT NOT
    NULL, epoch TEXT NOT NULL, {_AMOUNTS}, PRIMARY KEY (partition, name, address, family, scope)
) STRICT, WITHOUT ROWID;

-- Likewise each living process.
CREATE TABLE process (
    pid INTEGER NOT NULL, started INTEGER NOT NULL, boot TEXT NOT NULL,
    partition TEXT NOT NULL, cpu INTEGER NOT NULL, PRIMARY KEY (pid, started, boot)
) STRICT, WITHOUT ROWID;

-- The total of one meter under one owner.
CREATE TABLE account (
    id INTEGER PRIMARY KEY, owner INTEGER NOT NULL REFERENCES owner, name TEXT NOT NULL,
    address TEXT NOT NULL, family TEXT NOT NULL, scope TEXT NOT NULL, {_AMOUNTS},
    UNIQUE (owner, name, address, family, scope)
) STRICT;

-- What a pass added to an account; nothing is written where that is nothing.
CREATE TABLE sample (
    seq INTEGER NOT NULL, account INTEGER NOT NULL, {_AMOUNTS}, PRIMARY KEY (seq, account)
) STRICT, WITHOUT ROWID;

-- The latest value under one owner, since the pass seq; and all its values, each from its pass on.
CREATE TABLE gauge (
    id INTEGER PRIMARY KEY, owner INTEGER NOT NULL REFERENCES owner, name TEXT NOT NULL,
    first_seq INTEGER NOT NULL, seq INTEGER NOT NULL, value INTEGER NOT NULL, UNIQUE (owner, name)
) STRICT;
CREATE TABLE gauge_sample (
    seq INTEGER NOT NULL, gauge INTEGER NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (seq, gauge)
) STRICT, WITHOUT ROWID;

-- When usage may be missing (partition NULL: anybody's), and what the next pass takes only the levels of.
CREATE TABLE gap (
    id INTEGER PRIMARY KEY, partition TEXT, start INTEGER, until INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE TABLE pending (what TEXT PRIMARY KEY, gap INTEGER NOT NULL) STRICT;

PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = 1;
"""

_SECOND = f"""
-- What each process had read from disks and written to them when it was last seen, and the pid of its parent.
ALTER TABLE process ADD COLUMN io_read INTEGER NOT NULL DEFAULT 0;
ALTER TABLE process ADD COLUMN io_written INTEGER NOT NULL DEFAULT 0;
ALTER TABLE process ADD COLUMN parent INTEGER NOT NULL DEFAULT 0;

-- Up to which pass an owner's samples are in documents: each is in one, whatever the clock does.
ALTER TABLE owner ADD COLUMN reported_seq INTEGER NOT NULL DEFAULT 0;
-- Its last documents are made: the master is about to let go of it, and would reject what names it later.
ALTER TABLE owner ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;

-- The passes of each day (UTC, 2026-11-22), first_seq to until_seq (NULL: under way). Closed by the first pass of another day,
-- and not opened again: a clock that goes back far makes another period of the same day. documented: its documents are made.
CREATE TABLE period (
    id INTEGER PRIMARY KEY, day TEXT NOT NULL, began INTEGER NOT NULL, first_seq INTEGER NOT NULL,
    until_seq INTEGER, documented INTEGER NOT NULL DEFAULT 0
) STRICT;

-- How far old passes are joined into buckets of so many seconds.
CREATE TABLE thinned (seconds INTEGER PRIMARY KEY, until_seq INTEGER NOT NULL) STRICT;

-- What the master is to be told, or was: id is the order in which it is sent. changed: since when it is in its state, and why.
CREATE TABLE document (
    id INTEGER PRIMARY KEY, reference TEXT NOT NULL UNIQUE, day TEXT NOT NULL, kind TEXT NOT NULL,
    partition TEXT NOT NULL, guid TEXT NOT NULL, content TEXT NOT NULL, state TEXT NOT NULL,
    made INTEGER NOT NULL, changed INTEGER NOT NULL, tries INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX document_state ON document (state);

-- What a partition's own usage files said (movements: JSON, each [resource, title, quantity]). source tells the file from every
-- other; it may still be there until removed is 1. document: in which the movements are.
CREATE TABLE intake (
    id INTEGER PRIMARY KEY, partition TEXT NOT NULL, guid TEXT NOT NULL, source TEXT NOT NULL, at INTEGER NOT NULL,
    movements TEXT NOT NULL, removed INTEGER NOT NULL DEFAULT 0, document INTEGER REFERENCES document
) STRICT;
CREATE INDEX intake_left ON intake (source) WHERE removed = 0;
CREATE INDEX intake_waiting ON intake (partition, guid) WHERE document IS NULL;

-- What was wrong with an instance, from begun to ended (NULL: still is); seen: when it was last found so. reported: the
-- microseconds of it that are in documents.
CREATE TABLE incident (
    id INTEGER PRIMARY KEY, partition TEXT NOT NULL, guid TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    begun INTEGER NOT NULL, seen INTEGER NOT NULL, ended INTEGER, reported INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX incident_open ON incident (partition, kind, name) WHERE ended IS NULL;
CREATE INDEX incident_ended ON incident (ended);

-- What every account had after some passes (nothing: it had nothing), so that usage of a long interval is a difference and few
-- samples. ends: the seconds of the longest stretch of the clock that ended with the pass: 10 minutes, an hour, a day, a week.
CREATE TABLE balanced (seq INTEGER PRIMARY KEY, ends INTEGER NOT NULL) STRICT;
CREATE TABLE balance (
    seq INTEGER NOT NULL, account INTEGER NOT NULL, {_AMOUNTS}, PRIMARY KEY (seq, account)
) STRICT, WITHOUT ROWID;

-- One row: how long the kernel boot had been up at a pass (microseconds), which no clock that is set changes, and what the
-- clock said then; jumped: the pass at which it was last found to have been set, by the clock (NULL: never).
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1), boot TEXT NOT NULL, uptime INTEGER NOT NULL, at INTEGER NOT NULL, jumped INTEGER
) STRICT;

-- One row: what tells this ledger from every other, also from the one that took its place after damage.
CREATE TABLE identity (id TEXT NOT NULL) STRICT;
INSERT INTO identity VALUES (lower(hex(randomblob(16))));

PRAGMA user_version = 2;
"""  # noqa: S608 - names of our own

_STEPS = (_FIRST, _SECOND)


def statements(version: int) -> list[str]:
    """Give what makes a ledger of ``version`` (0: an empty file) one of ``VERSION``, one statement each (``executescript``
    would commit first).
    """
    lines = "\n".join(_STEPS[version:]).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("--"))
    return [statement for statement in text.split(";") if statement.strip()]
