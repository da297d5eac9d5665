"""The calls of SLAP that a node makes, as methods that take and return typed values.

Protocol facts: SLAP classic as the node commands of slapos.core 1.26 speak it, with slapproxy and the
production master on the other side; what the two answer differently is evened out here. Reports are made
with the computer's certificate, also those about a partition.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from slap_client import documents, failures
from slap_client.checks import PARTITION_ID
from slap_client.documents import CertificatePair, ComputerDocument
from slap_client.errors import SlapError
from slap_client.marshal import MAX_BYTES, Value, loads
from slap_client.master_url import parse_master_url
from slap_client.transport import Transport

# The production master shows 80 characters of a log, from its end; more than this is of no use to anybody.
LOG_TAIL = 4096

_COMPUTER_ID = re.compile(
    r"[!-+\--~]{1,255}"
)  # printable ASCII without space, and without the header's comma
_Document = TypeVar("_Document")


class SlapClient:
    """A node's view of its master.

    ``master_url`` may have a path, and a bare IPv6 host. ``cert_file`` and ``key_file`` are the computer's
    X509 pair (both or none), ``ca_file`` the authorities to trust in place of the system's; the master's
    certificate is always verified, with ``fingerprint`` by that alone. ``timeout`` (seconds) bounds each wait for
    bytes, ``time_limit`` (seconds, twice the timeout if not given) the answer as a whole, ``max_body`` (bytes)
    its size.

    Every method raises SlapError with the codes of :mod:`slap_client.errors`; there are no retries. Nothing
    is sent before the first call. Threads may share a client, and so its connection. Close it after use, at any time; it is
    a context manager.
    """

    def __init__(
        self,
        master_url: str,
        computer_id: str,
        *,
        cert_file: str | None = None,
        key_file: str | None = None,
        ca_file: str | None = None,
        fingerprint: str = "",
        timeout: float = 60.0,
        time_limit: float | None = None,
        max_body: int = MAX_BYTES,
    ) -> None:
        if not _COMPUTER_ID.fullmatch(computer_id):
            raise _unusable("a computer's id has only printable ASCII characters, no space and no comma")
        if bool(cert_file) != bool(key_file):
            raise _unusable("cert_file and key_file are needed both, or none")
        self.computer_id = computer_id
        self._url = parse_master_url(master_url)
        self._transport = Transport(
            self._url,
            cert=(cert_file, key_file) if cert_file and key_file else None,
            ca_file=ca_file or None,
            pin=fingerprint,
            timeout=timeout,
            time_limit=2 * timeout if time_limit is None else time_limit,
            max_body=max_body,
        )
        self._last: tuple[str, ComputerDocument] | None = None

    @property
    def posted(self) -> int:
        """How often the master was told something: what it said before may have changed by that."""
        return self._transport.posted

    @property
    def master_url(self) -> str:
        """The master's address as it may be shown: slash-terminated, without credentials."""
        return self._url.base

    def close(self) -> None:
        """Close the connections to the master."""
        self._transport.close()

    def __enter__(self) -> "SlapClient":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # --- the computer

    def computer(self) -> ComputerDocument:
        """Return all that is wanted of this node (getFullComputerInformation).

        A master whose cache is cold answers 503: ``slap.unavailable``. An answer about another computer is
        ``slap.garbage``. While the master says by an ETag that nothing changed, the document is the same object as before.
        """
        endpoint = "getFullComputerInformation"
        last = self._last
        fields = {"computer_id": self.computer_id}
        answer = self._transport.get(endpoint, fields, last[0] if last else "")
        if answer.unchanged and last is not None:
            return last[1]
        document = self._parse(endpoint, answer.body, documents.parse_computer)
        if document.computer_id != self.computer_id:
            raise SlapError(
                "slap.garbage",
                "the answer is about another computer",
                resource=self._url.endpoint(endpoint),
                hint="check for a cache between the master and this node; nothing was changed here",
            )
        self._last = (answer.etag, document) if answer.etag else None
        return document

    def post_capacity(self, document: str) -> None:
        """Tell the master what this node has to offer (loadComputerConfigurationFromXML).

        ``document`` is that of :func:`slap_client.capacity.capacity_document`. Partitions that it
        does not list are dropped by the master. ``slap.not_found`` means that the master does not know this
        computer.
        """
        self._transport.post("loadComputerConfigurationFromXML", {"xml": document})

    def use_computer(self, tioxml: str) -> None:
        """Post a usage report, a TioXML document as text (useComputer); ``slap.refused`` if it is not valid.

        Success only says that the document arrived: production judges its content later, slapproxy never.
        """
        fields = {"computer_id": self.computer_id, "use_string": tioxml}
        self._transport.post("useComputer", fields)

    # --- software

    def software_building(self, url: str) -> None:
        """Report that a software release is being built (buildingSoftwareRelease)."""
        self._report_software("buildingSoftwareRelease", url)

    def software_available(self, url: str) -> None:
        """Report that a software release is ready (availableSoftwareRelease)."""
        self._report_software("availableSoftwareRelease", url)

    def software_destroyed(self, url: str) -> None:
        """Report that a software release was removed (destroyedSoftwareRelease).

        ``slap.not_found`` when the master did not ask for it, ``slap.destroy_refused`` when it objects.
        """
        endpoint = "destroyedSoftwareRelease"
        self._check_destroyed(endpoint, self._report_software(endpoint, url))

    def software_error(self, url: str, log: str) -> None:
        """Report a failed build with the end of its log, 4096 characters (softwareReleaseError)."""
        self._report_software("softwareReleaseError", url, error_log=log[-LOG_TAIL:])

    # --- instances

    def instance_started(self, partition_id: str) -> None:
        """Report that a partition's instance runs (startedComputerPartition)."""
        self._report_partition("startedComputerPartition", partition_id)

    def instance_stopped(self, partition_id: str) -> None:
        """Report that a partition's instance is stopped (stoppedComputerPartition)."""
        self._report_partition("stoppedComputerPartition", partition_id)

    def instance_destroyed(self, partition_id: str) -> None:
        """Report that a partition was emptied, which frees it (destroyedComputerPartition).

        Raises ``slap.destroy_refused`` (try later) when the master objects, for instance because the instance
        still has instances that it requested: slapproxy says so with status 200 and a sentence.
        """
        endpoint = "destroyedComputerPartition"
        self._check_destroyed(endpoint, self._report_partition(endpoint, partition_id))

    def instance_error(self, partition_id: str, log: str) -> None:
        """Report a failed instance with the end of its log, 4096 characters (softwareInstanceError)."""
        self._report_partition("softwareInstanceError", partition_id, error_log=log[-LOG_TAIL:])

    def bang(self, partition_id: str, message: str) -> None:
        """Ask the master to have the whole tree of an instance processed anew (softwareInstanceBang)."""
        self._report_partition("softwareInstanceBang", partition_id, message=message)

    def computer_bang(self, message: str) -> None:
        """Ask the master to have every instance of this node processed anew (computerBang), as after a reboot."""
        self._transport.post("computerBang", {"computer_id": self.computer_id, "message": message})

    def partition_certificate(self, partition_id: str) -> CertificatePair:
        """Return the X509 pair of the instance in a partition (getComputerPartitionCertificate).

        ``slap.not_found`` when the partition is free; both texts are empty with slapproxy.
        """
        fields = self._partition_fields(partition_id)
        endpoint = "getComputerPartitionCertificate"
        answer = self._transport.get(endpoint, fields)
        return self._parse(endpoint, answer.body, documents.parse_certificate)

    # ---

    def _parse(self, endpoint: str, body: bytes, parse: Callable[[Value], _Document]) -> _Document:
        try:
            return parse(loads(body))
        except SlapError as error:
            # Reading knows nothing of URLs; the error that leaves here names the one it is about.
            raise SlapError(
                error.code,
                error.message,
                resource=self._url.endpoint(endpoint),
                hint=error.hint,
                retryable=error.retryable,
            ) from error

    def _report_software(self, endpoint: str, url: str, **more: str) -> bytes:
        fields = {"url": url, "computer_id": self.computer_id, **more}
        return self._transport.post(endpoint, fields)

    def _report_partition(self, endpoint: str, partition_id: str, **more: str) -> bytes:
        fields = {**self._partition_fields(partition_id), **more}
        # Production goes by the TLS certificate; slapproxy and the reference client know this header.
        authorization = (
            f"X-SlapPartition computer_id={self.computer_id}, computer_partition_id={partition_id}"
        )
        return self._transport.post(endpoint, fields, authorization)

    def _partition_fields(self, partition_id: str) -> dict[str, str]:
        if not PARTITION_ID.fullmatch(partition_id):
            raise _unusable("that can not be the name of a partition")
        return {"computer_id": self.computer_id, "computer_partition_id": partition_id}

    def _check_destroyed(self, endpoint: str, body: bytes) -> None:
        """``OK`` is slapproxy's success and nothing else is; production's is None, as text or marshalled."""
        if body in {b"OK", b"None"} or _marshalled_none(body):
            return
        raise SlapError(
            "slap.destroy_refused",
            failures.sentence(body) or "the master gave an empty answer in place of a confirmation",
            resource=self._url.endpoint(endpoint),
            hint="destroy what depends on it first; it is reported again later",
            retryable=True,
        )


def _marshalled_none(body: bytes) -> bool:
    try:
        value = loads(body)
    except SlapError:
        return False
    return value is None or value == "None"


def _unusable(message: str) -> SlapError:
    return SlapError("slap.value", message, hint="correct the [slapos] section of the configuration")
