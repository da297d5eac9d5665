"""Whose sessions are cut when certificates are no longer allowed: pure, from the log's word and the kernel's.

stunnel lets sessions go on when a certificate is taken from its pins, in every variant (5.68, measured). The
kernel says which connections are alive, the log of stunnel whose each is. The log is the tenant's, so what is
doubtful is cut: a session that loses its connection by mistake makes a new one, a revoked peer cannot.
Sessions of services from which no certificate was taken are never touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .model import Endpoint
from .session_records import LiveSession
from .syntax import shown

Allowed = Mapping[str, Mapping[str, str]]
"""By service, the subject of each allowed certificate, as stunnel logs it (``subjects``), by fingerprint."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A connection to end: who is connected to the tunnel ``service``, and why, for people.

    ``doubtful``: a little later the log may say that it can stay; its lines come through supervisord, and a
    handshake takes up to TIMEOUTbusy.
    """

    service: str
    remote: Endpoint
    reason: str
    doubtful: bool = False


def sessions_to_cut(
    *,
    allowed_before: Allowed,
    allowed_now: Allowed,
    sessions: Mapping[tuple[str, Endpoint], LiveSession],
    alive: Iterable[tuple[str, Endpoint]],
) -> tuple[Cut, ...]:
    """Choose which of the ``alive`` connections end, in their order.

    ``allowed_before`` has all that was ever allowed since the last change that was carried out to its end; a
    service that is missing in ``allowed_now`` is gone. ``alive`` is taken *after* stunnel confirmed its
    reload, since a handshake that has begun goes on with the pins of before; ``sessions``
    (``SessionReader.by_remote()``) is of a log read after that.
    """
    judges = {
        service: _Judge(before, allowed_now.get(service))
        for service, before in allowed_before.items()
        if service not in allowed_now or before.keys() - allowed_now[service].keys()
    }
    return tuple(
        Cut(service, remote, *verdict)
        for service, remote in alive
        if service in judges and (verdict := judges[service].against(sessions.get((service, remote))))
    )


class _Judge:
    """Says for one service that is gone, or from which a certificate was taken, why a session has to end."""

    def __init__(self, before: Mapping[str, str], now: Mapping[str, str] | None) -> None:
        self._gone = now is None
        still = now or {}
        self._allowed = frozenset(still.values())
        self._revoked = frozenset(subject for name, subject in before.items() if name not in still)

    def against(self, session: LiveSession | None) -> tuple[str, bool] | None:
        """Give the reason and whether it is doubtful, or None if the session stays."""
        if self._gone:
            return "the tunnel is gone", False
        if session is None:
            return "a certificate was taken back, and the log does not say whose session this is", True
        if session.subject is None or not session.established:
            return "a certificate was taken back while its handshake was not over", True
        name = shown(session.subject)
        if session.subject not in self._revoked:
            return (
                None if session.subject in self._allowed else (f"no certificate of {name} is allowed", False)
            )
        if session.subject in self._allowed:
            return f"one of two certificates of {name} was taken back, and the log shows no difference", False
        return f"the certificate of {name} was taken back", False
