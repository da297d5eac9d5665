"""The master's wishes, asked for once for all lanes.

A pass over a node is one question: lanes that come to it together, or right after one another, share the answer. While the
master does not answer, it is one lane's question that fails each time, and not each lane's. What an operator asks for by hand
always asks the master.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitiond.polling import FIRST_PAUSE, LONGEST_PAUSE
from slap_client.backoff import Backoff
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slap_client.client import SlapClient
    from slap_client.documents import ComputerDocument

# An answer as old as this is nobody's any more.
SHARED_SECONDS = 10.0
_ABSENT = ("slap.unreachable", "slap.timeout")
_ABSENT_STATUS = (429, 502, 503, 504)


@dataclass(slots=True)
class _Answer:
    """What the master said, asked at ``at``; ``posted`` is how much it had been told before, ``takers`` who had it."""

    document: ComputerDocument
    client: SlapClient
    at: float
    posted: int
    takers: set[str]


@dataclass(slots=True)
class _Outage:
    """The master is not asked before ``until``; ``error`` is why."""

    error: SlapError
    at: float
    until: float


def is_absence(error: SlapError) -> bool:
    """Whether the master is away, or wants to be left alone; what else it says is about the matter."""
    return error.code in _ABSENT or error.status in _ABSENT_STATUS


def _nobody(_lane: str) -> None:
    """Wake nobody."""


@dataclass(slots=True)
class Wishes:
    """The last answer, or the last failure. Threads may share it.

    ``answered`` is called with the lane that asked, after each answer that the master gave to one, and with an empty name when
    it took anything else after it had been away, or is there again with an answer of no use: slapproxy has but an error for a
    computer of which it was not told yet.
    """

    answered: Callable[[str], None] = _nobody
    clock: Callable[[], float] = time.monotonic
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _answer: _Answer | None = None
    _outage: _Outage | None = None
    _backoff: Backoff | None = None
    _trouble: str = ""
    _client: SlapClient | None = None
    _lost: bool = False

    @property
    def trouble(self) -> str:
        """What an operator has to mend before the master can be of use; empty where waiting is all there is to do."""
        return self._trouble

    def ask(self, client: SlapClient, lane: str, first_pause: float) -> ComputerDocument:
        """The master's wishes; ``lane`` is empty for who asks by hand. Raises SlapError.

        ``first_pause`` is how long lanes leave the master alone after a first failure; longer and longer while it lasts.
        """
        if not lane:
            return self._ask(client, "", first_pause)
        away = False
        try:
            # whoever comes while it is being asked has that answer
            with self._turn:
                document = self._shared(client, lane)
                if document is not None:
                    return document
                self.spare(client, lane)
                away = self._away
                document = self._ask(client, lane, first_pause)
        except SlapError as error:
            if away and not is_absence(error):
                self.answered("")
            raise
        self.answered(lane)
        return document

    def spare(self, client: SlapClient, lane: str) -> None:
        """Raise what the master said last, with when to try again, where it is to be left alone; never to who asks by hand."""
        self._attend(client)
        outage = self._outage
        if not lane or outage is None or (left := outage.until - self.clock()) <= 0:
            return
        error = outage.error
        raise SlapError(
            error.code,
            f"{error.message} (asked {self.clock() - outage.at:.0f} s ago)",
            resource=error.resource,
            hint=error.hint,
            retryable=error.retryable,
            status=error.status,
            unsent=True,
            retry_after=left,
        ) from error

    @contextmanager
    def telling(self, client: SlapClient, lane: str, first_pause: float) -> Iterator[None]:
        """For a call that tells the master something: not made while it is away, and noted whether it is there.

        What it says of the matter is no sign of that; and one that has no answer of use may have to be told something first.
        Raises as :meth:`spare` does.
        """
        self._attend(client)
        if self._away:
            self.spare(client, lane)
        try:
            yield
        except SlapError as error:
            if is_absence(error):
                self._failed(client, error, first_pause)
            raise
        if self._good(client):
            self.answered("")

    def _ask(self, client: SlapClient, lane: str, first_pause: float) -> ComputerDocument:
        self._attend(client)
        at, posted = self.clock(), client.posted
        try:
            document = client.computer()
        except SlapError as error:
            self._failed(client, error, first_pause)
            raise
        if self._client is client:
            self._answer = _Answer(document, client, at, posted, {lane})
        if self._good(client) and not lane:
            self.answered("")
        return document

    @property
    def _away(self) -> bool:
        """Whether nobody answered when it was asked last."""
        return self._outage is not None and is_absence(self._outage.error)

    def _attend(self, client: SlapClient) -> None:
        """Forget what another master said, or failed to say: this one is asked now."""
        if self._client is not client:
            self._client = client
            self._answer = self._outage = self._backoff = None
            self._trouble = ""

    def _shared(self, client: SlapClient, lane: str) -> ComputerDocument | None:
        """The last answer, if this lane had it not yet and nothing was told to the master since it was asked."""
        answer = self._answer
        if answer is None or answer.client is not client or lane in answer.takers:
            return None
        if self.clock() - answer.at > SHARED_SECONDS or answer.posted != client.posted:
            return None
        answer.takers.add(lane)
        return answer.document

    def _good(self, client: SlapClient) -> bool:
        """Note that a master answers; whether somebody had been told that it does not."""
        if self._client is not client:
            return False
        lost, self._lost = self._lost, False
        self._outage = self._backoff = None
        self._trouble = ""
        return lost

    def _failed(self, client: SlapClient, error: SlapError, first_pause: float) -> None:
        if self._client is not client:
            return  # of a pass that began before a reload, and no word about the master of now
        self._answer = None
        self._lost = True
        backoff = self._backoff = self._backoff or Backoff(min(FIRST_PAUSE, first_pause), LONGEST_PAUSE)
        now, pause = self.clock(), backoff.next()
        # the lane that was told so comes back no sooner than the others
        error.retry_after = pause = max(pause, error.retry_after or 0.0)
        self._outage = _Outage(error, now, now + pause)
        self._trouble = "" if error.retryable else f"the master: {error.message}; {error.hint}"
