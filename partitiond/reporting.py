"""The master as the lanes see it: a client whose reports wait in the outbox where the master does not take them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from partitiond.errors import sentence
from partitiond.messages import Message, resource_of, waits
from slap_client.client import SlapClient
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from partitiond.messages import Kind, Outbox
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)


class ReportingClient(SlapClient):
    """The master, with reports that wait where it does not take them: for callers they are told then.

    An answer to :meth:`computer` says that the master is there again: what waits is sent first of all.
    """

    def __init__(self, *arguments: Any, outbox: Outbox, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._outbox = outbox

    def computer(self) -> ComputerDocument:
        """As the client's; what waits is sent when there is an answer."""
        document = super().computer()
        self._outbox.send(self._deliver)
        return document

    def software_building(self, url: str) -> None:
        """As the client's, but waits."""
        self._tell("software_building", url)

    def software_available(self, url: str) -> None:
        """As the client's, but waits."""
        self._tell("software_available", url)

    def software_error(self, url: str, log: str) -> None:
        """As the client's, but waits."""
        self._tell("software_error", url, log)

    def software_destroyed(self, url: str) -> None:
        """As the client's, after what waits."""
        self._outbox.send(self._deliver)
        super().software_destroyed(url)
        self._outbox.forget(("software", url))

    def instance_started(self, partition_id: str) -> None:
        """As the client's, but waits."""
        self._tell("instance_started", partition_id)

    def instance_stopped(self, partition_id: str) -> None:
        """As the client's, but waits."""
        self._tell("instance_stopped", partition_id)

    def instance_error(self, partition_id: str, log: str) -> None:
        """As the client's, but waits."""
        self._tell("instance_error", partition_id, log)

    def instance_destroyed(self, partition_id: str) -> None:
        """As the client's, after what waits."""
        self._outbox.send(self._deliver)
        super().instance_destroyed(partition_id)
        self._outbox.forget(("instance", partition_id))

    def _tell(self, kind: Kind, about: str, text: str = "") -> None:
        if self._outbox.send(self._deliver):
            try:
                self._deliver(Message(0, kind, about, text))
            except SlapError as error:
                if not waits(error):
                    # older news are none any more, and that these were not taken the caller knows
                    self._outbox.forget(resource_of(kind, about))
                    raise
                logger.warning("%s: told to the master later: %s", about, sentence(error))
            else:
                self._outbox.forget(resource_of(kind, about))
                return
        try:
            self._outbox.put(kind, about, text)
        except OSError as error:
            # the caller remembers that it was not told
            message = f"neither told nor kept for later: {error.strerror}"
            raise SlapError("slap.unreachable", message, resource=about, retryable=True) from error

    def _deliver(self, message: Message) -> None:
        about, text = message.about, message.text
        if message.kind == "computer_bang":
            self.computer_bang(text)
        elif message.kind == "software_building":
            super().software_building(about)
        elif message.kind == "software_available":
            super().software_available(about)
        elif message.kind == "software_error":
            super().software_error(about, text)
        elif message.kind == "instance_started":
            super().instance_started(about)
        elif message.kind == "instance_stopped":
            super().instance_stopped(about)
        else:
            super().instance_error(about, text)
