"""Reports to the master that it does not take now: they wait on disk, in order, and are sent when it answers again.

A report is the latest news of one resource: an instance, a release, the node. News that come while older ones of the same
resource wait take their place, at the end: so there are never more than resources, and the master is told each thing's last
state, in the order in which these came about.

Promises: what was accepted here survives the daemon; while the master is away nothing overtakes what waits; a report that the
master refuses (it does not know the resource, or fails over it) holds up no other, and is kept and tried again, ever more
seldom, until there are newer news or the resource is no more: its caller believes that it is told. What the caller must know
the answer to (that something was destroyed) does not wait here, but goes only after what does.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from partitiond import files
from partitiond.errors import sentence
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

Kind = Literal[
    "software_building",
    "software_available",
    "software_error",
    "instance_started",
    "instance_stopped",
    "instance_error",
    "computer_bang",
]

DIRECTORY = "outbox"
_MOST = 5000  # more than a node has resources
_LONGEST = 1000  # of a log; the production master keeps its last 80 characters
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 86400.0  # of what is refused
_NAMED = 3
_OURS = frozenset((401, 403, 407, 429))
_FAILS = 500  # over this one, perhaps, where 502 to 504 say that it is away


@dataclass(frozen=True, slots=True)
class Message:
    """One report; ``number`` is its place in the order, ``about`` a partition, a URL, or empty for the node.

    ``refused``: how often, ``reason``: why the last time; then it is not sent before ``next_try`` (Unix seconds).
    """

    number: int
    kind: Kind
    about: str
    text: str = ""
    since: float = 0.0
    refused: int = 0
    next_try: float = 0.0
    reason: str = ""

    @property
    def resource(self) -> tuple[str, str]:
        """Whose news it is."""
        return resource_of(self.kind, self.about)

    def due(self, now: float) -> bool:
        """Whether it may be sent; a clock that was set back keeps nothing waiting."""
        return not now < self.next_try <= now + _LONGEST_PAUSE

    def after_refusal(self, reason: str, now: float) -> Message:
        """What is to be kept of it when the master has refused it."""
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self.refused, 20))
        return dataclasses.replace(
            self, refused=self.refused + 1, next_try=now + pause, reason=reason[:_LONGEST]
        )


def resource_of(kind: Kind, about: str) -> tuple[str, str]:
    """Whose news a report is."""
    return kind.partition("_")[0], about


class Outbox:
    """What waits, in memory and below ``state_dir``; from any thread."""

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._directory = state_dir / DIRECTORY
        self._turn = threading.RLock()
        self._sending = threading.Lock()
        self._waiting: dict[tuple[str, str], Message] | None = None
        self._last = 0
        self._names: frozenset[str] | None = None

    def put(self, kind: Kind, about: str, text: str = "") -> None:
        """Let a report wait. Raises OSError: then it does not."""
        with self._turn, self._beside_others():
            waiting = self._read()
            self._last += 1
            message = Message(self._last, kind, about, text[-_LONGEST:], self._clock())
            self._write(message)
            self._drop(message.resource)
            waiting[message.resource] = message
            while len(waiting) > _MOST:
                first = next(one for one in waiting.values() if one.kind != "computer_bang")
                logger.warning("%s: %s is not told any more: too much waits", first.about, first.kind)
                self._drop(first.resource)

    @contextmanager
    def _beside_others(self) -> Iterator[None]:
        """Know what other programs have put here, and let none of them put anything during the block. Raises OSError.

        Without a daemon each pass is a program, and on a node that owns nothing a build goes on beside passes over instances.
        """
        files.make_directory(self._directory, 0o700)
        with files.directory(self._directory) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # gone with the descriptor
            if self._names != frozenset(os.listdir(descriptor)):  # noqa: PTH208 - by descriptor
                self._waiting = None
            try:
                yield
            finally:
                self._names = frozenset(os.listdir(descriptor))  # noqa: PTH208 - by descriptor

    def waiting(self) -> list[Message]:
        """What waits, in its order."""
        with self._turn:
            return list(self._read().values())

    def forget(self, resource: tuple[str, str]) -> None:
        """Drop what waits of a resource that is no more, or of which the master has newer news."""
        with self._turn:
            if not self._read():
                return
            try:
                self._drop(resource)
            except OSError as error:
                logger.warning("%s: old news may be told to the master: %s", resource[1], error)

    def send(self, deliver: Callable[[Message], object]) -> bool:
        """Send what waits and is due; whether others may follow now: not while the master is away, nor while somebody else
        sends, who is not waited for. Never raises.
        """
        if not self.waiting():
            return True
        if not self._sending.acquire(blocking=False):
            return False
        try:
            return self._send(deliver)
        finally:
            self._sending.release()

    def _send(self, deliver: Callable[[Message], object]) -> bool:
        sent = tried = 0
        away = False
        # looked for anew each time: others go on reporting meanwhile
        while message := self._following(tried):
            tried = message.number
            following = None
            try:
                deliver(message)
            except SlapError as error:
                away = waits(error) and error.status != _FAILS
                if away:
                    logger.info("%d reports wait for the master: %s", len(self.waiting()), sentence(error))
                    break
                following = self._refused(message, error)
            else:
                sent += 1
            try:
                self._settle(message, following)
            except OSError as error:
                logger.warning("%s: may be told to the master twice: %s", message.about, error)
        if sent:
            logger.info("%d reports that waited are told to the master", sent)
        return not away

    def _following(self, number: int) -> Message | None:
        now = self._clock()
        return next((one for one in self.waiting() if one.number > number and one.due(now)), None)

    def _refused(self, message: Message, error: SlapError) -> Message:
        """The message with one refusal more; said when it is the first."""
        following = message.after_refusal(sentence(error), self._clock())
        level = logging.INFO if message.refused else logging.WARNING
        about = message.about or "the node"
        more = f"again in {following.next_try - self._clock():.0f} s at the earliest"
        logger.log(level, "%s: the master refuses %s: %s; %s", about, message.kind, sentence(error), more)
        return following

    def _settle(self, message: Message, following: Message | None) -> None:
        """Put another in the place of a message that was sent or refused, unless there are newer news by now."""
        with self._turn:
            waiting = self._read()
            if waiting.get(message.resource) != message:
                return
            if following is None:
                self._drop(message.resource)
            else:
                waiting[message.resource] = (
                    following  # also where it cannot be written: it is not sent each second
                )
                self._write(following)

    def _drop(self, resource: tuple[str, str]) -> None:
        message = self._read().pop(resource, None)
        if message is not None:
            files.remove_path(self._path(message))

    def _path(self, message: Message) -> Path:
        return self._directory / f"{message.number:012}.json"

    def _write(self, message: Message) -> None:
        content = json.dumps(dataclasses.asdict(message), sort_keys=True).encode()
        files.write_path(self._path(message), content, mode=0o600)

    def _read(self) -> dict[tuple[str, str], Message]:
        if self._waiting is None:
            self._waiting = {}
            for message in stored(self._directory):
                # of two of one resource the later: whoever put it there was killed before it took the other away
                self._drop(message.resource)
                self._waiting[message.resource] = message
                self._last = max(self._last, message.number)
        return self._waiting


def stored(directory: Path) -> list[Message]:
    """What waits on disk, in its order; what cannot be read is left where it is."""
    found = []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            found.append(_message(json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: a report to the master cannot be read and stays untold: %s", path, error)
    return found


def _message(value: Any) -> Message:
    message = Message(**value)
    if message.kind not in get_args(Kind) or not isinstance(message.number, int):
        raise ValueError(f"{message.kind!r} is no report")
    return message


def waits(error: SlapError) -> bool:
    """Whether a report that met this error is to be sent again as it is: the master is away, or does not let us in."""
    return error.retryable or error.code == "slap.tls" or error.status in _OURS


def open_cases(state_dir: Path) -> list[str]:
    """What ``partitiond status`` says of it."""
    found = stored(state_dir / DIRECTORY)
    refused = [one for one in found if one.refused]
    waiting = [one for one in found if not one.refused]
    cases = []
    if waiting:
        since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(min(one.since for one in waiting)))
        cases.append(
            f"{len(waiting)} reports wait for the master since {since} UTC; they are sent once it takes them"
        )
    if refused:
        named = ", ".join(f"{one.kind} {one.about}".rstrip() for one in refused[:_NAMED])
        more = f" and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        cases.append(
            f"the master refuses {len(refused)} reports ({named}{more}): {refused[0].reason}; they are sent again ever more"
            " seldom, up to once a day, until there are newer ones"
        )
    return cases
