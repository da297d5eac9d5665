"""What stunnel's log tells of sessions, as plain frozen data: those that live, ended, failed, or were refused.

All of it was written by a process of the tenant and is informative: never billed, and no ground to let
anybody in. ``remote`` is who connected to the tunnel (for a client's tunnel a program of the node itself).
``subject`` is that of the other side's certificate as stunnel logs it, as strangers chose it: escape it
(``syntax.plain``) wherever it goes out. Times are naive, in the local time of the log.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from .model import Endpoint

RefusedReason = Literal[
    "not_allowed", "no_certificate", "expired", "protocol", "no_tls", "timeout", "too_many", "other"
]
"""Why the other side was refused: its certificate is not pinned, or it lacks the key (``not_allowed``); it
showed none; outside of the certificate's dates (``expired``, those to come too); TLS 1.2 or older; no TLS at
all; it did not finish its handshake in time; stunnel has as many clients as it can (``too_many``); ``other``:
it hung up, or spoke nonsense.
"""
FailedReason = Literal["backend", "unreachable", "refused"]
"""Why nothing came of a session: the service behind a server's tunnel cannot be reached (``backend``); the other
end of a client's cannot, or hangs up, or talks nonsense; the other side does not take our certificate.
"""


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A session that has begun and not ended.

    ``established``: the handshake is over. Before that, ``subject`` proves nothing: stunnel logs a
    certificate as accepted before the other side has shown that it has the key (5.68, measured).
    """

    service: str
    remote: Endpoint
    subject: str | None
    began: datetime
    thread: int
    established: bool


@dataclass(frozen=True, slots=True)
class EndedSession:
    """A session that was. The bytes are None where its process ended first; ``clean``: it ended without a
    reset.
    """

    service: str
    remote: Endpoint
    subject: str | None
    began: datetime
    seconds: int
    bytes_to_tls: int | None
    bytes_to_socket: int | None
    clean: bool


@dataclass(frozen=True, slots=True)
class FailedSession:
    """A session that came to nothing though nobody was refused by us."""

    service: str
    remote: Endpoint
    subject: str | None
    at: datetime
    reason: FailedReason


@dataclass(frozen=True, slots=True)
class RefusedPeer:
    """Who was not let in. With ``too_many`` the log names neither service ("") nor remote (None)."""

    service: str
    remote: Endpoint | None
    subject: str | None
    at: datetime
    reason: RefusedReason


Record = EndedSession | FailedSession | RefusedPeer
