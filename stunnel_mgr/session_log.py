"""Sessions read from stunnel's log, as it is written at ``debug = notice`` for each service (5.68, measured).

What is read here was written by a process of the tenant: every line may be forged, of any length, in any
order, and subjects are chosen by strangers. So nothing raises, the memory is bounded, and what a line says
holds for the tunnels of that partition alone. stunnel itself keeps a subject from ending its line: it turns
control characters into dots, and cuts what it says after 1024 bytes (``safestring`` and ``s_vlog``, log.c).

A session has its number in brackets (``LOG5[17]``), unique within one process of stunnel; ``[ui]`` is the main
thread, which says when another process begins. A server's session tells in turn: accepted connection from,
Certificate accepted, connected remote server, Connection closed; a client's: accepted, connected,
Certificate accepted, closed. Between them errors of known wording. A handshake that ran into TIMEOUTbusy says
nothing at this level but "Connection reset" (measured), which nothing else does.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address
from typing import Self, cast, get_args

from .model import Endpoint
from .session_records import (
    EndedSession,
    FailedSession,
    LiveSession,
    Record,
    RefusedPeer,
    RefusedReason,
)

MAX_LIVE = 20_000
"""Most sessions that are remembered; the limit of clients of one stunnel is 9 765 with 20 000 descriptors."""
MAX_LINE = 4096
"""Longest line that is looked at, in bytes; stunnel's own have at most some 1100."""

_ACCEPTED = "Certificate accepted at depth=0: "
_REJECTED = "Rejected by CERT at depth=0: "
_MAX_SUBJECT = 1024 - len(_ACCEPTED)
_REMEMBERED = 160  # bytes

_LINE = re.compile(rb"(\d{4}\.\d\d\.\d\d \d\d:\d\d:\d\d) LOG([0-7])\[(ui|\d{1,20})\]: (.*)")
_OPENED = re.compile(r"Service \[([A-Za-z0-9][A-Za-z0-9_.-]{0,62})\] accepted connection from (\S{3,80})")
_CONNECTED = re.compile(r"Service \[[^\]]*\] connected remote server from \S+")
_CLOSED = re.compile(
    r"Connection (closed|reset|reset/closed|closed/reset): (\d{1,20}) byte\(s\) sent to TLS,"
    r" (\d{1,20}) byte\(s\) sent to socket",
    re.ASCII,
)
_PROCESS = re.compile(r"stunnel \S+ on \S+ platform|Terminated")
_TOO_MANY = "Connection rejected: too many clients"
_PRE_VERIFICATION = "CERT: Pre-verification error: "
_OUTSIDE_OF_DATES = ("certificate has expired", "certificate is not yet valid")
_ERROR_LEVEL = 3
_HANDSHAKE = ("SSL_accept: ", "SSL_connect: ", "error queue: ")
# OpenSSL's reasons, as 3.0 words them
_HANDSHAKE_REASONS: tuple[tuple[str, RefusedReason], ...] = (
    ("peer did not return a certificate", "no_certificate"),
    ("bad signature", "not_allowed"),  # a certificate that is pinned, shown without its key
    ("unsupported protocol", "protocol"),
    ("unknown protocol", "protocol"),  # a greeting of SSL 2
    ("http request", "no_tls"),
    ("https proxy request", "no_tls"),
    ("wrong version number", "no_tls"),
)
_NOT_TAKEN = re.compile(r"alert (?:unknown ca|access denied|(?:bad|unsupported) certificate|certificate \w+)")


@dataclass(slots=True)
class _Session:
    """What the log has told of one session so far."""

    service: str
    remote: Endpoint
    began: datetime
    subject: str | None = None
    connected: bool = False
    reason: RefusedReason | None = None  # why its handshake failed
    not_taken: bool = False  # the other side refuses our certificate
    error: bool = False  # of any other kind

    @property
    def established(self) -> bool:
        """A server connects onward once the handshake is over; a client has connected before. Of a server
        without the key to its certificate the log says no more, but a client gives it no byte.
        """
        return self.connected and self.subject is not None and self.reason is None


def logged_subject(text: bytes) -> str:
    """Give a subject as it stands in the log, of what OpenSSL prints: cut, without control characters.

    Of a long one the beginning and a digest: as many as there are sessions are remembered, and a tenant may forge them.
    """
    safe = text[:_MAX_SUBJECT].translate(_SAFE)
    if len(safe) > _REMEMBERED:
        return (
            f"{safe[:_REMEMBERED].decode('utf-8', 'replace')}... #{blake2b(safe, digest_size=16).hexdigest()}"
        )
    return safe.decode("utf-8", "replace")


_SAFE = bytes(byte if byte >= 0x20 and byte != 0x7F else ord(".") for byte in range(256))


class SessionReader:
    """Keeps the table of live sessions of one stunnel; feed it its log from the first line on.

    Where a part of the log was lost, call :meth:`forget`: what the table says may not hold any more.
    ``forgotten`` counts the sessions that there was no room for.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False  # the line that has begun is too long
        self._sessions: dict[int, _Session] = {}
        self._stamp: tuple[bytes, datetime] | None = None
        self.forgotten = 0

    def feed(self, data: bytes) -> list[Record]:
        """Take bytes of the log, cut anywhere; gives what ended, failed or was refused, in the log's order."""
        *lines, rest = (self._rest + data).split(b"\n")
        if self._skipping:
            if not lines:
                return []
            del lines[0]
        self._skipping = len(rest) > MAX_LINE
        self._rest = b"" if self._skipping else rest
        records: list[Record] = []
        for line in lines:
            if len(line) <= MAX_LINE and (found := _LINE.fullmatch(line)):
                stamp, level, thread, text = found.groups()
                with suppress(ValueError):  # a date, an address or a port that is none
                    self._line(stamp, int(level), thread, text, records)
        return records

    def live(self) -> Iterator[LiveSession]:
        """Give the live sessions, the oldest first."""
        for thread, one in self._sessions.items():
            yield LiveSession(one.service, one.remote, one.subject, one.began, thread, one.established)

    def by_remote(self) -> Mapping[tuple[str, Endpoint], LiveSession]:
        """Give the live sessions by service and remote, as the kernel knows them; of two the later one."""
        return {(session.service, session.remote): session for session in self.live()}

    def forget(self) -> None:
        """Empty the table: after a gap in the log nobody knows whose session is whose."""
        self._sessions.clear()
        self._rest, self._skipping = b"", True  # what comes next may be the rest of a line

    def _line(self, stamp: bytes, level: int, thread: bytes, text: bytes, records: list[Record]) -> None:
        at = self._time(stamp)
        message = text.decode("utf-8", "replace")
        if thread == b"ui":
            if _PROCESS.fullmatch(message):
                records += [_cut_off(session, at) for session in self._sessions.values()]
                self._sessions.clear()
            elif message.startswith(_TOO_MANY):
                records.append(RefusedPeer("", None, None, at, "too_many"))
        elif opened := _OPENED.fullmatch(message):
            self._open(int(thread), _Session(opened[1], _endpoint(opened[2]), at), records)
        elif session := self._sessions.get(int(thread)):
            if closed := _CLOSED.fullmatch(message):
                del self._sessions[int(thread)]
                records.append(_closed(session, closed[1], int(closed[2]), int(closed[3]), at))
            else:
                _tell(session, message, text, error=level <= _ERROR_LEVEL)

    def _open(self, thread: int, session: _Session, records: list[Record]) -> None:
        if before := self._sessions.pop(thread, None):
            records.append(_cut_off(before, session.began))
        elif len(self._sessions) >= MAX_LIVE:
            del self._sessions[next(iter(self._sessions))]
            self.forgotten += 1
        self._sessions[thread] = session

    def _time(self, stamp: bytes) -> datetime:
        if self._stamp is None or stamp != self._stamp[0]:
            self._stamp = stamp, datetime.strptime(stamp.decode(), "%Y.%m.%d %H:%M:%S")  # noqa: DTZ007 (local)
        return self._stamp[1]

    def to_json(self) -> dict[str, object]:
        """Give the state for :meth:`from_json`, of what JSON knows."""
        return {
            "rest": self._rest.decode("latin-1"),
            "skipping": self._skipping,
            "forgotten": self.forgotten,
            "sessions": [[thread, *_to_json(session)] for thread, session in self._sessions.items()],
        }

    @classmethod
    def from_json(cls, state: object) -> Self:
        """Make a reader as it was; of a state that is none, an empty one, which knows nobody's session."""
        reader = cls()
        match state:
            case {
                "rest": str(rest),
                "skipping": bool(skipping),
                "forgotten": int(forgotten),
                "sessions": [*rows],
            }:
                try:
                    sessions = dict(_from_json(row) for row in rows)
                    reader._rest = rest.encode("latin-1")
                except ValueError:  # UnicodeEncodeError among them
                    return cls()
                if len(rows) == len(sessions) <= MAX_LIVE and len(rest) <= MAX_LINE:
                    reader._sessions, reader._skipping, reader.forgotten = sessions, skipping, forgotten
                    return reader
        return cls()


def _endpoint(text: str) -> Endpoint:
    """Read ``10.0.0.1:5000`` or ``2001:db8::1:5000``. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 0xFFFF):
        raise ValueError(f"{port!a} is no port")
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        address = IPv6Address(int(address))  # the kernel's table of sockets names no interface
    return address, int(port)


def _tell(session: _Session, message: str, text: bytes, *, error: bool) -> None:
    """Take a line within a session."""
    if message.startswith(_ACCEPTED):
        session.subject = logged_subject(text[len(_ACCEPTED) :])
    elif message.startswith(_REJECTED):
        session.subject = logged_subject(text[len(_REJECTED) :])
        session.reason = session.reason or "not_allowed"
    elif message.startswith(_PRE_VERIFICATION):
        session.reason = "expired" if message.endswith(_OUTSIDE_OF_DATES) else "not_allowed"
    elif _CONNECTED.fullmatch(message):
        session.connected = True
    elif error:
        session.not_taken = session.not_taken or _NOT_TAKEN.search(message) is not None
        if message.startswith(_HANDSHAKE):
            known = next((reason for words, reason in _HANDSHAKE_REASONS if words in message), None)
            if session.reason in (None, "other"):
                session.reason = known or "other"
        else:
            session.error = True


def _closed(session: _Session, how: str, to_tls: int, to_socket: int, at: datetime) -> Record:
    """Tell what became of a session, at its last line."""
    who = session.service, session.remote, session.subject
    if session.not_taken and not to_socket:
        return FailedSession(*who, at, "refused")
    if session.reason == "other" and session.connected:  # a client: a server connects after its handshake
        return FailedSession(*who, at, "unreachable")
    if session.reason is not None:
        return RefusedPeer(*who, at, session.reason)
    if session.established or to_tls or to_socket:
        seconds = _seconds(session.began, at)
        return EndedSession(*who, session.began, seconds, to_tls, to_socket, clean=how == "closed")
    if session.error and not session.connected:
        return FailedSession(*who, at, "unreachable" if session.subject is None else "backend")
    # Without a word: the exceptions of stunnel that log nothing at this level are its timeouts.
    return RefusedPeer(*who, at, "timeout" if how == "reset" and not session.error else "other")


def _cut_off(session: _Session, at: datetime) -> EndedSession:
    seconds = _seconds(session.began, at)
    return EndedSession(
        session.service, session.remote, session.subject, session.began, seconds, None, None, clean=False
    )


def _seconds(began: datetime, ended: datetime) -> int:
    return max(0, int((ended - began).total_seconds()))  # clocks are set back, in autumn if not before


_Row = tuple[str, str, int, str, str | None, bool, str | None, bool, bool]


def _to_json(session: _Session) -> _Row:
    (host, port), began = session.remote, session.began.isoformat()
    state = session.connected, session.reason, session.not_taken, session.error
    return session.service, str(host), port, began, session.subject, *state


def _from_json(row: object) -> tuple[int, _Session]:
    """Read what ``_to_json`` gave, behind its number. Raises ValueError."""
    match row:
        case [
            int(thread), str(service), str(host), int(port), str(began), str() | None as subject,
            bool(connected), str() | None as reason, bool(not_taken), bool(error),
        ] if reason in (None, *get_args(RefusedReason)) and 0 <= port <= 0xFFFF:  # fmt: skip
            since = datetime.fromisoformat(began)
            if since.tzinfo is None and len(service) + len(subject or "") <= MAX_LINE:
                known = cast("RefusedReason | None", reason)
                remote = ip_address(host), port
                session = _Session(service, remote, since, subject, connected, known, not_taken, error)
                return thread, session
    raise ValueError("this is no session")
